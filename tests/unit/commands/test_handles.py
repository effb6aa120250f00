"""The module that `handles` writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cdc_invalidator import cli
from cdc_invalidator.commands.handles import module, noted_types
from cdc_invalidator.postgres.parameters import Types
from cdc_invalidator.rules.load import load_rules

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  session: {key: "t:session:{token}:{version}", version: "t:session:{day}:ver", ttl: 5m}
  team-members: {key: "t:team:{team}:{kind}", ttl: 5m}
  unknown: {key: "t:unknown:{thing}", ttl: 5m}
  odd: {key: "t:odd:{class}", ttl: 5m}
  all: {key: "t:all", ttl: 5m}
  local: {key: "t:local:{load}", ttl: 5m}
  9-lives: {key: "t:lives:{id}", ttl: 5m}
  rest: {key: "t:rest:{id}:*"}
rules: []
"""
TYPES: Types = {
    "user": {"id": "bigint"},
    "session": {"token": "uuid", "day": "date"},
    "team-members": {"team": "integer", "kind": "character varying(20)"},
    "unknown": {"thing": None},
    "odd": {"class": "smallint"},
    "gone": {"id": "text"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    (folder / "rules.yaml").write_text(RULES)
    (folder / "shop_caches.py").write_text(module(load_rules(folder / "rules.yaml", {}), TYPES))
    return folder


def test_at_runtime_its_caches_are_those_of_the_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdc_invalidator import reader

    monkeypatch.syspath_prepend(str(folder))
    import shop_caches  # type: ignore[import-not-found]

    assert shop_caches.Caches is reader.Caches
    assert shop_caches.AsyncCaches is reader.AsyncCaches
    assert shop_caches.UserCache[int] == reader.Cache[int]
    assert all(hasattr(shop_caches, name) for name in shop_caches.__all__)


@pytest.mark.parametrize("cache", ["user: {key: 't:user:{id}'}", "day: {key: 't:day:{datetime}:{day}'}", None])
def test_it_imports_what_it_uses(folder: Path, tmp_path: Path, cache: str | None) -> None:
    file, rules = tmp_path / "caches.py", folder / "rules.yaml"
    if cache is not None:
        rules = tmp_path / "rules.yaml"
        rules.write_text(f"version: 1\ncaches:\n  {cache}\nrules: []\n")
    file.write_text(module(load_rules(rules, {}), {"day": {"datetime": "text", "day": "date"}}))
    words = (
        "check",
        "--isolated",
        "--ignore-noqa",
        "--select",
        "F401,F821",
        "--no-cache",
        "--output-format",
        "concise",
    )
    ruff = subprocess.run([sys.executable, "-m", "ruff", *words, file], capture_output=True, text=True, check=False)
    assert (ruff.stdout, ruff.returncode) == ("All checks passed!\n", 0)


def test_a_cache_that_the_reader_can_not_read_is_left_out(folder: Path) -> None:
    text = (folder / "shop_caches.py").read_text()
    assert "RestCache" not in text
    assert "Cache9LivesCache" in text
    assert "def local(self) ->" not in text, "it is the name of a method"


def test_without_a_database_types_are_kept_and_check_compares(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "caches.py"

    def run(*words: str) -> tuple[int, str]:
        given = ["handles", "--rules", str(folder / "rules.yaml"), *words]
        ended = CliRunner().invoke(cli.app, given)
        return ended.exit_code, str(ended.exception or ended.output)

    assert run("--check") == (1, "--check compares a file; give it with --output.")
    assert "is out of date; write it with `cdc-invalidator handles -o" in run("-o", str(file), "--check")[1]
    shutil.copy(folder / "shop_caches.py", file)
    assert run("-o", str(file), "--check") == (0, "")
    assert run("-o", str(file)) == (0, "")
    assert file.read_text() == (folder / "shop_caches.py").read_text()
    assert noted_types(file)["user"] == {"id": "bigint"}
    file.write_text(file.read_text().replace("# wrong", "").replace("UserCache", "UsrCache"))
    assert run("-o", str(file), "--check")[0] == 1
    assert "unknown" in run()[1]
