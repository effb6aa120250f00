"""The pytest plugin, found by its entry point, in a project whose caches are made when it is imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

SHOP = """
import redis, redis.asyncio
from cdc_invalidator.reader import AsyncCaches, Caches

# Nobody is there.
caches = Caches.from_rules("rules.yaml", redis.Redis(port=1, retry=None, socket_timeout=1, socket_connect_timeout=1))
acaches = AsyncCaches.from_rules("rules.yaml", redis.asyncio.Redis(port=1))
users = {1: "Ada"}
loads = []

@caches.user.cached
def load_user(id):
    loads.append(id)
    return users.get(id)

@acaches.user.cached
async def aload_user(id):
    loads.append(id)
    return users.get(id)
"""
RULES = """
version: 1
caches:
  user: {key: "shop:user:{id}", ttl: 5m, max_keys_hint: 2}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
"""
SYNC = """
import pytest, shop
from cdc_invalidator.reader import testing

@pytest.fixture(autouse=True)
def no_loads():
    shop.loads.clear()

@pytest.mark.parametrize("turn", range(3))
def test_hits_and_a_bust(cdc_caches, turn):
    assert cdc_caches is shop.caches
    for _ in range(2):
        assert shop.load_user(1) == "Ada"
    testing.bust(cdc_caches.user, id=1)
    assert shop.load_user(1) == "Ada"
    assert shop.loads == [1, 1]
    assert testing.keys(cdc_caches) == [b"shop:user:1"]
    # So many that the hint of the next test would be used up, if it were remembered.
    for number in range(2, 20):
        shop.load_user(number)
    testing.clear(cdc_caches)
    assert testing.keys(cdc_caches) == []

def test_without_the_fixture_the_caches_are_as_they_were():
    with pytest.raises(TypeError, match="these caches are in Redis"):
        testing.clear(shop.caches)
    assert [shop.load_user(1), shop.load_user(1)] == ["Ada", "Ada"]
    assert shop.loads == [1, 1]
"""
ASYNC = """
import asyncio, pytest, shop
from cdc_invalidator.reader import testing

@pytest.fixture(autouse=True)
def in_memory():
    shop.loads.clear()
    with testing.in_memory(shop.acaches):
        yield

@pytest.mark.parametrize("turn", range(3))
async def test_each_test_has_its_own_loop(turn):
    assert await asyncio.gather(*(shop.aload_user(1) for _ in range(5))) == ["Ada"] * 5
    assert await shop.aload_user(1) == "Ada"
    assert shop.loads == [1]
    testing.bust(shop.acaches.user, id=1)
    assert await shop.aload_user(1) == "Ada"
    assert shop.loads == [1, 1]

@pytest.mark.anyio
async def test_so_it_is_with_anyio():
    assert [await shop.aload_user(1), await shop.aload_user(1)] == ["Ada"] * 2
    assert shop.loads == [1]
"""
BARE = """
import sys

def test_nothing_is_imported_where_it_is_not_used():
    assert "cdc_invalidator.pytest_plugin" in sys.modules
    assert [name for name in ("redis", "orjson", "yaml", "cdc_invalidator.reader") if name in sys.modules] == []
"""
UNSET = """
def test_where_the_caches_are_must_be_said(cdc_caches):
    pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project beside which the package is installed, as far as its entry points go."""
    folder = tmp_path_factory.mktemp("project")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    installed = folder / "site" / "cdc_invalidator_points-1.dist-info"
    installed.mkdir(parents=True)
    installed.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: cdc-invalidator-points\nVersion: 1\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    installed.joinpath("entry_points.txt").write_text(f"[pytest11]\n{lines}\n")
    for name, text in {"shop.py": SHOP, "rules.yaml": RULES, "test_sync.py": SYNC, "test_async.py": ASYNC}.items():
        folder.joinpath(name).write_text(text)
    folder.joinpath("test_bare.py").write_text(BARE)
    folder.joinpath("test_unset.py").write_text(UNSET)
    return folder


def _pytest(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path[:0] = [{str(project / 'site')!r}, {str(ROOT)!r}, '.']; import pytest; "
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "error", "-c", "none.ini", "--rootdir=."]
    project.joinpath("none.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return subprocess.run(
        [sys.executable, "-c", f"{program}sys.exit(pytest.main({[*options, *words]}))"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=project,
    )


def test_caches_of_the_project_are_in_memory_for_tests_that_ask_for_it(project: Path) -> None:
    settings = ["-o", "cdc_caches=shop:caches", "-o", "asyncio_mode=auto"]
    done = _pytest(project, *settings, "test_sync.py", "test_async.py")
    assert "8 passed" in done.stdout, done.stdout + done.stderr


def test_who_does_not_use_it_pays_nothing(project: Path) -> None:
    done = _pytest(project, "test_bare.py")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_who_uses_it_without_saying_where_the_caches_are_is_told(project: Path) -> None:
    done = _pytest(project, "test_unset.py")
    assert "write `cdc_caches = shop.cache:caches` into pytest's configuration" in done.stdout, done.stdout
