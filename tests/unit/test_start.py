"""What commands import: a start costs mostly imports, and a probe starts in every Pod."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINT = (
    "import atexit, sys; atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr)); "
    "sys.argv = ['cdc-invalidator', *{words}]; from cdc_invalidator.__main__ import main; main()"
)
DRIVERS = {"hiredis", "psycopg", "redis"}
HEAVY = DRIVERS | {"asyncio", "h11", "prometheus_client", "pydantic", "pydantic_settings", "rich", "structlog", "yaml"}


def imported(*words: str, **settings: str) -> set[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")}
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(words=words)],
        env=env | {"PYTHONPATH": str(ROOT)} | {f"CDC_{name.upper()}": value for name, value in settings.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    return set(done.stderr.splitlines())


@pytest.mark.parametrize("words", [(), ("--http-port", "1"), ("--http-port=1",)])
def test_healthcheck_imports_neither_the_command_line_nor_an_http_client(words: tuple[str, ...]) -> None:
    modules = imported("healthcheck", *words, http_port="1")
    assert "cdc_invalidator.commands.healthcheck" in modules
    assert modules.isdisjoint(HEAVY | {"cdc_invalidator.cli", "cdc_invalidator.settings", "click", "http.client"})


def test_help_imports_the_command_line_and_nothing_that_a_command_needs() -> None:
    modules = imported("--help")
    assert "cdc_invalidator.cli" in modules
    assert modules.isdisjoint(HEAVY)


def test_the_files_alone_are_checked_without_the_driver_of_postgresql(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("version: 1\n")
    modules = imported("check", "--offline", rules=str(tmp_path))
    assert "cdc_invalidator.commands.check" in modules
    assert "psycopg" not in modules


def test_run_imports_nothing_of_other_commands_nor_what_no_rule_needs() -> None:
    # The URL is found wrong once all is imported.
    modules = imported("run", postgres_dsn="dbname=shop", redis_url="nonsense://", rules="rules")
    assert "cdc_invalidator.daemon" in modules
    others = {name for name in modules if name.startswith("cdc_invalidator.commands.")}
    assert others == {"cdc_invalidator.commands.healthcheck"}
    assert modules.isdisjoint({"cel", "multiprocessing.pool", "rich", "typer", "watchfiles"})
    assert not any(name.startswith(("cdc_invalidator.embedded", "cdc_invalidator.reader")) for name in modules)


RUN = """
import gc, sys
from cdc_invalidator import __main__, start

class Daemon:
    async def run(self, *_address):
        print(gc.isenabled(), gc.get_freeze_count() > 10_000)

    def status(self):
        return {}

start._daemon = lambda *_: Daemon()
sys.argv = ["cdc-invalidator", "run", "--postgres-dsn", "dbname=shop", "--redis-url", "redis://", "--rules", "rules"]
__main__.main()
"""


def test_the_collector_is_on_once_the_daemon_runs_and_leaves_alone_what_was_loaded() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
