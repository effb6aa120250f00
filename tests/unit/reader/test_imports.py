"""Who only reads needs redis, orjson, pydantic and PyYAML, and nothing else that the daemon needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from paths import PACKAGE

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, when: "op != 'update' || new.name != old.name", bust: [user]}
"""
DAEMONS = (
    *(
        "aiohttp",
        "asyncpg",
        "cel",
        "click",
        "django",
        "fastapi",
        "flask",
        "h11",
        "prometheus_client",
        "psycopg",
        "pydantic_settings",
    ),
    *("rich", "sqlalchemy", "structlog", "uvloop", "watchfiles"),
)
PROGRAM = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError("not installed here: " + name)

sys.meta_path.insert(0, Refuse())
import redis, redis.asyncio
from cdc_invalidator.reader import AsyncCaches, Caches
from cdc_invalidator.reader.commit import acommit_lsn, commit_lsn

client = redis.Redis(port=1, retry=None, socket_timeout=1, socket_connect_timeout=1)
assert Caches.from_rules({rules!r}, client).user.get(id=1, load=lambda id: id + 1) == 2
AsyncCaches.from_rules({rules!r}, redis.asyncio.Redis())
ours = sorted(name for name in sys.modules if name.startswith("cdc_invalidator."))
print(*ours, sep="\\n")
"""
# The pure modules that the reader shares with the daemon.
SHARED = {
    *(
        "errors",
        "rules",
        "rules.agreement",
        "rules.comparison",
        "rules.condition",
        "rules.defaults",
        "rules.document",
        "rules.draft",
    ),
    *("rules.duration", "rules.expression", "rules.format"),
    *(
        "rules.load",
        "rules.model",
        "rules.packed",
        "rules.regex",
        "rules.sql",
        "rules.suffixes",
        "rules.table",
        "rules.template",
    ),
    *("rules.values", "rules.wording"),
}


def test_the_reader_imports_nothing_that_only_the_daemon_needs(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    program = PROGRAM.format(refused=set(DAEMONS), rules=str(rules))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    ours = {name.removeprefix("cdc_invalidator.") for name in done.stdout.split()}
    assert {name for name in ours if name.partition(".")[0] != "reader"} == SHARED


def test_the_pure_part_does_no_io() -> None:
    folder = PACKAGE / "reader"
    shells = {
        "aio.py",
        "aio_servers.py",
        "background.py",
        "clients.py",
        "commit.py",
        "connect.py",
        "fastapi.py",
        "leases.py",
        "sync.py",
        "sync_servers.py",
        "tracking.py",
        "__init__.py",
    }
    for file in folder.glob("*.py"):
        if file.name not in shells:
            text = file.read_text()
            assert "import redis" not in text, file
            assert "from redis" not in text, file
            assert "asyncio" not in text, file
            assert "time.sleep" not in text, file
