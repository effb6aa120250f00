"""The views of the reader's README.md, each as an application of its own, on a real database with the daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row
from running import RunningDaemon, execute, settled

from cdc_invalidator import reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

README = Path(reader.__file__).with_name("README.md")
RULES = """
version: 1
caches:
  user: {key: "shop:prod:user:{id}", ttl: 5m, negative_ttl: 10s}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
# What surrounds a view: it answers each line of its standard input, an id, with what the page shows.
FASTAPI = """
import sys
from fastapi.testclient import TestClient
from view import app

with TestClient(app) as client:
    for line in sys.stdin:
        print(client.get(f"/users/{line.strip()}").text, flush=True)
"""
DJANGO = """
import os, sys
import psycopg
from django.conf import settings
from django.urls import path

given = psycopg.conninfo.conninfo_to_dict(os.environ["DSN"])
settings.configure(
    ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], INSTALLED_APPS=["shop"],
    DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "HOST": given["host"], "PORT": given["port"],
        "NAME": given["dbname"], "USER": given["user"], "PASSWORD": given.get("password"),
        "ATOMIC_REQUESTS": True,
    }},
)
import django
django.setup()
from django.db import connection, transaction
from django.http import HttpResponse, JsonResponse
from django.test import Client
import view
from cdc_invalidator.reader.commit import commit_lsn
from shop.models import User

def renamed(request, id):
    User.objects.filter(pk=id).update(name="rolled back")
    raise RuntimeError(view.user(request, id).content.decode())

def written(request, id):
    with view.caches.user.writing(id=id) as write:
        User.objects.filter(pk=id).update(name="rolled back")
        stored = write.set({"id": id, "name": "rolled back"})
    raise RuntimeError(str([stored, view.load_user.invalidate(id)]).lower())

def handler500(request):
    return HttpResponse('{"failed": %s}' % sys.exc_info()[1])

told = []

def committed(request, id):
    User.objects.filter(pk=id).update(name="Ada")
    transaction.on_commit(lambda: told.append(view.load_user.invalidate(id)))
    transaction.on_commit(lambda: told.append(commit_lsn(connection) > 0))
    return JsonResponse(told, safe=False)

urlpatterns = [path("users/<int:id>", view.user)]
urlpatterns += [path(f"users/{each.__name__}/<int:id>", each) for each in (renamed, written, committed)]
client = Client(raise_request_exception=False)
for line in sys.stdin:
    print(client.get(f"/users/{line.strip()}").content.decode(), flush=True)
"""
MODELS = """
from django.db import models

class User(models.Model):
    name = models.TextField()
    class Meta:
        app_label, db_table, managed = "shop", "users", False
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class View:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def shows(self, number: int | str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def application(folder: Path, program: str, dsn: str, redis_url: str) -> Iterator[View]:
    env = os.environ | {"DSN": dsn, "REDIS_URL": redis_url}
    (folder / "main.py").write_text(program)
    words = [sys.executable, "main.py"]
    with subprocess.Popen(
        words, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield View(process)
        finally:
            process.kill()


@pytest.mark.parametrize("framework", ["fastapi", "django"])
def test_a_view_of_the_readme_shows_what_is_written(
    framework: str, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(MODELS)
    with_fastapi, with_django, _ = blocks()
    (tmp_path / "view.py").write_text(with_fastapi if framework == "fastapi" else with_django)
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (42, 'Ada')")
    with (
        RunningDaemon(dsn=database, redis_url=redis_url, rules=tmp_path / "rules.yaml", slot=slot_name) as daemon,
        application(tmp_path, FASTAPI if framework == "fastapi" else DJANGO, database, redis_url) as view,
    ):
        daemon.ready()
        settled(database, redis_client, slot_name)
        for _ in range(2):
            assert view.shows(42) == {"id": 42, "name": "Ada"}
            assert view.shows(43) is None
        assert redis_client.exists("shop:prod:user:42", "shop:prod:user:43") == 2
        execute(database, "UPDATE users SET name = 'Grace' WHERE id = 42", "INSERT INTO users VALUES (43, 'Edsger')")
        settled(database, redis_client, slot_name)
        assert redis_client.exists("shop:prod:user:42", "shop:prod:user:43") == 0
        assert view.shows(42) == {"id": 42, "name": "Grace"}
        assert view.shows(43) == {"id": 43, "name": "Edsger"}


def test_a_django_request_that_fails_leaves_nothing_of_what_it_wrote(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(MODELS)
    (tmp_path / "view.py").write_text(blocks()[1])
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (42, 'Ada')")
    with application(tmp_path, DJANGO, database, redis_url) as view:
        assert view.shows("renamed/42") == {"failed": {"id": 42, "name": "rolled back"}}, "it reads its own write"
        assert not redis_client.keys("*")
        assert view.shows(42) == {"id": 42, "name": "Ada"}
        assert redis_client.exists("shop:prod:user:42")
        assert view.shows("renamed/42") == {"failed": {"id": 42, "name": "rolled back"}}, "whatever the cache has"
        assert view.shows("written/42") == {"failed": [False, False]}, "neither stored, nor invalidated for good"
        assert view.shows("committed/42") == []
        assert view.shows("committed/42") == [True, True], "by `on_commit`"
        assert view.shows(42) == {"id": 42, "name": "Ada"}


def test_a_writer_of_the_readme_reads_its_own_write(
    database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    import redis as driver

    from cdc_invalidator.reader import Caches

    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "INSERT INTO users VALUES (42, 'Ada')")
    block = blocks()[2]
    with (
        RunningDaemon(dsn=database, redis_url=redis_url, rules=rules, slot=slot_name) as daemon,
        driver.Redis.from_url(redis_url, socket_timeout=20) as client,
        psycopg.connect(database) as connection,
    ):
        daemon.ready()
        settled(database, redis_client, slot_name)
        caches = Caches.from_rules(rules, client, slot=slot_name)

        def load_user(id: int) -> Any:  # noqa: A002
            with psycopg.connect(database, row_factory=dict_row) as other:
                return other.execute("SELECT name FROM users WHERE id = %s", [id]).fetchone()

        assert caches.user.get(id=42, load=load_user) == {"name": "Ada"}
        connection.execute("UPDATE users SET name = 'Grace' WHERE id = 42")
        connection.commit()
        assert block.rstrip().splitlines()[-1] == "caches.at_least(lsn).user.get(id=42, load=load_user)"
        names = {"connection": connection, "caches": caches, "load_user": load_user}
        exec(block.replace("caches.at_least", "shown = caches.at_least"), names)
        assert names["shown"] == {"name": "Grace"}
