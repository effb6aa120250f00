"""Applications of Django, FastAPI and Flask as real servers: they read through the caches by the reader's adapters."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import httpx
import psycopg
import pytest
import redis
from running import RunningDaemon, eventually, execute, settled

from cdc_invalidator import reader
from cdc_invalidator.embedded.process import free_port
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader.own_writes import COOKIE

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(reader.__file__).with_name("FRAMEWORKS.md")
TESTS = Path(__file__).parents[1]
FOLDER = TESTS / "frameworks"
# The name by default; each test has a database of Redis of its own.
WATERMARK = "cdc_invalidator"
USERS = 5
COMMANDS = {
    "django": ["django", "runserver", "--noreload", "127.0.0.1:{port}"],
    "fastapi": ["uvicorn", "frameworks.fastapi_shop:app", "--port", "{port}", "--log-level", "warning"],
    "flask": ["flask", "--app", "frameworks.flask_shop", "run", "--port", "{port}", "--no-reload"],
}
UNDER_ASGI = {"django under ASGI": ["uvicorn", "--factory", "django.core.asgi:get_asgi_application"]}
UNDER_ASGI["django under ASGI"] += ["--port", "{port}", "--log-level", "warning", "--lifespan", "off"]
every_framework = pytest.mark.parametrize("framework", COMMANDS)


class Shop(NamedTuple):
    """A running application, with the daemon and the servers behind it."""

    url: str
    daemon: RunningDaemon
    database: str
    redis: redis.Redis

    @contextmanager
    def visitor(self) -> Iterator[Visitor]:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            yield Visitor(client)

    def settle(self) -> None:
        settled(self.database, self.redis, WATERMARK)


class Visitor:
    """A browser with cookies of its own."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def sees(self, number: int) -> Any:
        return self._name(self.client.get(f"/users/{number}"))

    def renames(self, number: int, name: str) -> Any:
        return self._name(self.client.post(f"/users/{number}", params={"name": name}))

    def touches(self, number: int) -> Any:
        return self._name(self.client.get(f"/users/{number}/touch"))

    def _name(self, answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found and found["name"]


@contextmanager
def served(framework: str, database: str, redis_url: str) -> Iterator[str]:
    """An application as a process, and its address."""
    port = free_port()
    given = {key: quote(str(value), safe="") for key, value in psycopg.conninfo.conninfo_to_dict(database).items()}
    login = f"{given['user']}:{given['password']}" if "password" in given else given["user"]
    env = os.environ | {
        "DSN": database,
        "DATABASE_URL": f"postgresql+psycopg://{login}@{given['host']}:{given['port']}/{given['dbname']}",
        "REDIS_URL": redis_url,
        "SECRET_KEY": "a secret of the tests",
        "DJANGO_SETTINGS_MODULE": "frameworks.django_shop.settings",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "APP_ENV": "prod",
    }
    words = [
        sys.executable,
        "-W",
        "error",
        "-m",
        *(word.format(port=port) for word in (COMMANDS | UNDER_ASGI)[framework]),
    ]
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        assert process.stderr is not None
        collecting = threading.Thread(target=lines.extend, args=[process.stderr])
        collecting.start()
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, "".join(lines)
            try:
                return httpx.get(url, timeout=5).status_code == 404
            except httpx.TransportError:
                return False

        try:
            eventually(answers, "the application answers")
            yield url
        finally:
            process.terminate()
            process.wait()
            collecting.join()
    assert not [line for line in lines if "Traceback" in line], "".join(lines)


@contextmanager
def shop(framework: str, database: str, redis_url: str, slot: str) -> Iterator[Shop]:
    execute(
        database,
        "CREATE TABLE users (id int PRIMARY KEY, name text)",
        f"INSERT INTO users SELECT n, 'Ada' FROM generate_series(1, {USERS}) n",
    )
    with (
        RunningDaemon(
            dsn=database, redis_url=redis_url, rules=FOLDER / "rules.yaml", slot=slot, watermark=WATERMARK
        ) as daemon,
        served(framework, database, redis_url) as url,
        redis.Redis.from_url(redis_url) as client,
    ):
        daemon.ready()
        settled(database, client, WATERMARK)
        yield Shop(url, daemon, database, client)


@pytest.mark.parametrize("framework", COMMANDS | UNDER_ASGI)
def test_who_has_written_sees_it_in_later_requests_while_the_daemon_stands_still(
    framework: str, database: str, redis_url: str, slot_name: str
) -> None:
    with (
        shop(framework, database, redis_url, slot_name) as here,
        here.visitor() as writer,
        here.visitor() as other,
        here.visitor() as toucher,
    ):
        for visitor in (writer, other):
            assert [visitor.sees(number) for number in (1, 2, 99)] == ["Ada", "Ada", None]
        assert here.redis.exists("shop:prod:user:1", "shop:prod:user:2", "shop:prod:user:99") == 3
        assert not writer.client.cookies, "who only reads is told nothing"
        here.daemon.send(signal.SIGSTOP)
        assert writer.renames(1, "Grace") == "Grace"
        assert toucher.touches(2) == "touched", "in the same request"
        assert [writer.sees(1), toucher.sees(2)] == ["Grace", "touched"]
        assert [other.sees(1), other.sees(2)] == ["Ada", "Ada"], "which shows that it is their cookies"
        here.daemon.send(signal.SIGCONT)
        here.settle()
        assert [other.sees(1), other.sees(2)] == ["Grace", "touched"]
        assert [writer.sees(1), toucher.sees(2)] == ["Grace", "touched"]


@every_framework
def test_writers_see_each_of_their_writes_though_the_daemon_is_late_and_the_rest_sees_the_last(
    framework: str, database: str, redis_url: str, slot_name: str
) -> None:
    wrong: list[Any] = []
    with shop(framework, database, redis_url, slot_name) as here:

        def write(number: int) -> None:
            with here.visitor() as visitor:
                for turn in range(25):
                    name = f"{number} in turn {turn}"
                    seen = visitor.renames(number, name), visitor.sees(number)
                    if seen != (name, name):
                        wrong.append((seen, name))

        def read() -> None:
            with here.visitor() as visitor:
                while not written.is_set():
                    for number in range(1, USERS + 1):
                        visitor.sees(number)

        written = threading.Event()
        writers = [threading.Thread(target=write, args=[number]) for number in range(1, USERS)]
        reading = threading.Thread(target=read)
        for thread in (*writers, reading):
            thread.start()
        while any(thread.is_alive() for thread in writers):
            for what in (signal.SIGSTOP, signal.SIGCONT):
                here.daemon.send(what)
                written.wait(0.1)
        written.set()
        reading.join()
        assert not wrong
        here.settle()
        with here.visitor() as visitor:
            last = [f"{number} in turn 24" for number in range(1, USERS)]
            for _ in range(2):
                assert [visitor.sees(number) for number in range(1, USERS)] == last


@every_framework
def test_a_redis_that_is_away_fails_no_request(framework: str, database: str, slot_name: str) -> None:
    with Valkey() as valkey, shop(framework, database, valkey.url, slot_name) as here, here.visitor() as visitor:
        assert visitor.sees(1) == "Ada"
        valkey.kill()
        assert visitor.sees(1) == "Ada"
        assert visitor.renames(1, "Grace") == "Grace"
        assert [visitor.sees(1) for _ in range(5)] == ["Grace"] * 5
        valkey.start()
        here.daemon.ready()
        here.settle()

        def cached() -> bool:
            with here.visitor() as other:
                assert other.sees(1) == "Grace"
            return bool(here.redis.exists("shop:prod:user:1"))

        eventually(cached, "the cache is used again")


@every_framework
def test_a_post_that_only_reads_leaves_its_visitor_to_the_cache(
    framework: str, database: str, redis_url: str, slot_name: str
) -> None:
    with shop(framework, database, redis_url, slot_name) as here, here.visitor() as visitor:
        assert visitor.client.post("/search").json() == {"id": 1, "name": "Ada"}
        assert not visitor.client.cookies
        visitor.renames(1, "Grace")
        (cookie,) = visitor.client.cookies.jar
        assert (cookie.name, cookie.path) == (COOKIE, "/")
        assert cookie.has_nonstandard_attr("HttpOnly")


def test_the_page_shows_what_the_applications_consist_of() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    written = {
        re.sub(r" *#.*", "", line).strip() for path in FOLDER.rglob("*.py") for line in path.read_text().splitlines()
    }
    for block in blocks:
        for line in block.splitlines():
            assert re.sub(r" *#.*", "", line).strip() in written, line


CHECK = """
import django
from django.conf import settings

settings.configure(
    DATABASES={
        "default": {"ENGINE": "django.db.backends.postgresql"},
        "other": {"ENGINE": "django.db.backends.sqlite3"},
    },
    CACHES={"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "KEY_PREFIX": "blog"}},
    INSTALLED_APPS=["cdc_invalidator.reader.django"],
    MIDDLEWARE=["cdc_invalidator.reader.django.OwnWrites"],
)
django.setup()
from django.core.checks import run_checks
from django.test import override_settings

for given in GIVEN:
    changes = {name: given.pop(name) for name in list(given or ()) if name == "MIDDLEWARE"}
    with override_settings(CDC_INVALIDATOR=given, **changes):
        print(*(f"{found.id.partition('.')[2]} {found.msg}" for found in run_checks(tags=["caches"])), sep="; ")
"""


def test_manage_py_check_finds_mistakes(tmp_path: Path) -> None:
    good, bad, same, again = (tmp_path / name for name in ("good.yaml", "bad.yaml", "same.yaml", "again.yaml"))
    rules = (FOLDER / "rules.yaml").read_text()
    good.write_text(rules)
    bad.write_text(rules.replace("bust: [user]", "bust: [usr]"))
    same.write_text(rules.replace("shop:prod:", "blog:1:"))
    again.write_text(rules.replace("shop:prod:", "blog:1:").replace("ttl: 5m,", "ttl: 5m, again_after: 1s,"))
    found = {"RULES": str(good), "REDIS": "redis://cache"}
    given: list[Any] = [
        found,
        found | {"SLOT": "shop", "DATABASE": "default"},
        found | {"RULES": str(again)},
        None,
        {"RULES": str(good)},
        found | {"SLOTS": "shop"},
        found | {"DATABASE": "other"},
        found | {"DATABASE": "none"},
        found | {"RULES": str(bad)},
        found | {"RULES": str(same)},
        found | {"RULES": str(tmp_path / "gone.yaml")},
        found | {"REDIS": "cache:6379"},
        found | {"REDIS": 6379},
        found | {"OPTIONS": {"fail_save": 600}},
        found | {"SECONDS": "x"},
        found | {"SECONDS": 0},
        found | {"MIDDLEWARE": []},
    ]
    program = CHECK.replace("GIVEN", repr(given))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *well, missing, half, unknown, sqlite, none, wrong, shared, gone, url, number, option, text, zero, without = (
        done.stdout.splitlines()
    )
    assert well == [""] * 3
    assert gone.startswith(f"E002 {tmp_path / 'gone.yaml'}")
    assert url.startswith("E001 CDC_INVALIDATOR can't be used: give the URL of one Redis server")
    assert number.startswith("E001 CDC_INVALIDATOR can't be used: ")
    assert option == "E001 CDC_INVALIDATOR can't be used: there is no option fail_save; did you mean `fail_safe`?"
    for line in (text, zero):
        assert line.startswith("E001 CDC_INVALIDATOR has SECONDS ")
    assert without.startswith("W002 MIDDLEWARE lacks cdc_invalidator.reader.django.OwnWrites")
    for line in (missing, half):
        assert line.startswith("E001 CDC_INVALIDATOR lacks RULES or REDIS; write CDC_INVALIDATOR = {")
    assert unknown == "E001 CDC_INVALIDATOR has no entry SLOTS; did you mean `SLOT`?"
    for line in (sqlite, none):
        assert "which is no PostgreSQL in DATABASES" in line
    assert wrong.startswith(f"E002 {bad}:")
    assert "usr" in wrong
    assert shared.startswith("W001 The keys of cache user are those of CACHES['default']")


PROJECT = """
SECRET_KEY = "a secret of the tests"
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql"}}
INSTALLED_APPS = ["cdc_invalidator.reader.django"]
MIDDLEWARE = ["cdc_invalidator.reader.django.OwnWrites"]
ROOT_URLCONF = "views"
"""
VIEWS = """
from cdc_invalidator.reader.django import caches

@caches.user.cached
def load_user(id):
    return id

urlpatterns = []
"""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RULE": "rules.yaml", "REDIS": "redis://cache"}, "has no entry RULE; did you mean `RULES`?"),
        ({"RULES": "rules.yaml"}, "CDC_INVALIDATOR lacks RULES or REDIS"),
        ({"RULES": "gone.yaml", "REDIS": "redis://cache"}, "gone.yaml"),
        ({"RULES": "rules.yaml", "REDIS": "cache:6379"}, "give the URL of one Redis server"),
    ],
)
def test_manage_py_check_is_no_traceback_where_a_view_is_decorated(
    given: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "rules.yaml").write_text((FOLDER / "rules.yaml").read_text())
    (tmp_path / "settings.py").write_text(f"{PROJECT}CDC_INVALIDATOR = {given!r}\n")
    (tmp_path / "views.py").write_text(VIEWS)
    done = subprocess.run(
        [sys.executable, "-m", "django", "check", "--settings=settings"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "APP_ENV": "prod"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
