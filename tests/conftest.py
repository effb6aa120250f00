"""Real servers for the tests: one PostgreSQL and one Valkey for each worker, a database of its own for each test.

A missing server skips the test on a developer's machine, and fails it where CI is set.
"""

from __future__ import annotations

import gc
import itertools
import os
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import redis
from hypothesis import settings

from cdc_invalidator import errors
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Server = TypeVar("Server", Postgres, Valkey)

_DATABASES = 63  # Valkey's databases 1 to 63 go round; 0 stays for tests that start a server of their own
_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 4 << 30  # the servers of a run take a tenth of that
_numbers = itertools.count()

# No test fails because the machine was slow; all else as hypothesis has it, which in CI is another profile.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


def _hold_data_in_memory() -> None:
    """Let the data of servers lie in memory if there is plenty, or elsewhere if TMPDIR says so.

    A database is hundreds of files; on a disk, making and removing them took a third of the suite's CPU.
    """
    if "TMPDIR" in os.environ or not _MEMORY.is_dir():
        return
    found = os.statvfs(_MEMORY)
    if found.f_bavail * found.f_frsize >= _MEMORY_BYTES and not found.f_flag & os.ST_NOEXEC:
        # Pytest keeps the folders of a few runs.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)


_hold_data_in_memory()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Choose how many workers run the tests: none for single files; else more than cores, since many tests wait."""
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    return len(os.sched_getaffinity(0)) * 3 // 2 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_finish() -> None:
    """Let the collector of garbage leave alone what thousands of collected tests consist of."""
    gc.collect()
    gc.freeze()


def _available(make: Callable[[], Server]) -> Server:
    """Make a server, or skip; in CI nothing is skipped."""
    try:
        return make()
    except errors.InvalidatorError as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL 18 with wal_level logical; shared, so leave its settings alone (start another one for that)."""
    with _available(Postgres) as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """Valkey 9 in memory; shared, so leave its settings alone (start another one for that)."""
    with _available(Valkey) as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The DSN of a fresh database; it goes away with its slots, whoever still uses them."""
    name = f"test_{next(_numbers)}_{secrets.token_hex(3)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """The URL of an empty numbered database on the shared Valkey."""
    url = valkey.url_for(1 + next(_numbers) % _DATABASES)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the same database as redis_url; replies are bytes."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def rules(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A rule file with the module's RULES."""
    path = tmp_path / "rules.yaml"
    path.write_text(request.module.RULES)
    return path


@pytest.fixture
def slot_name() -> str:
    """A name for a slot and its publication that no other test uses (slots are the whole server's)."""
    return f"cdc_test_{next(_numbers)}_{secrets.token_hex(3)}"
