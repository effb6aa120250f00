"""`handles` on a real database, and what type checkers find in an application with the module that it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from running import command, execute
from tools import find

from cdc_invalidator.commands.handles import module, noted_types
from cdc_invalidator.postgres.parameters import Types
from cdc_invalidator.rules.load import parse_rules

RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  day: {key: "t:day:{tenant}:{day}", ttl: 5m}
  known: {key: "t:known:{id}", ttl: 5m, ttl_only: true}
rules:
  - {name: user-changed, table: public.users, bust: [user]}
  - {name: visit-changed, table: public.visits, bust: [{day: {tenant: tenant_id}}]}
"""


APPLICATION = Path(__file__).parent / "typed" / "application.py"
OF_APPLICATION = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  session: {key: "t:session:{token}:{version}", version: "t:session:{day}:ver", ttl: 5m}
  team-members: {key: "t:team:{team}:{kind}", ttl: 5m}
  unknown: {key: "t:unknown:{thing}", ttl: 5m}
  odd: {key: "t:odd:{class}", ttl: 5m}
  all: {key: "t:all", ttl: 5m}
rules: []
"""
TYPES: Types = {
    "user": {"id": "bigint"},
    "session": {"token": "uuid", "day": "date"},
    "team-members": {"team": "integer", "kind": "character varying(20)"},
    "unknown": {"thing": None},
    "odd": {"class": "smallint"},
}
FILES = ("application.py", "shop_caches.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    caches = parse_rules([("rules.yaml", OF_APPLICATION)], {})
    (tmp_path / "shop_caches.py").write_text(module(caches, TYPES))
    shutil.copy(APPLICATION, tmp_path)
    return tmp_path


def wrong_lines() -> set[int]:
    lines = enumerate(APPLICATION.read_text().splitlines(), 1)
    return {number for number, line in lines if line.endswith("# wrong")}


def found(folder: Path, *words: str | Path) -> set[int]:
    """Run a type checker, and give the lines of the application that it complains of."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=250, check=False)
    errors = re.findall(r"(\w+\.py):(\d+):.*error: .*", done.stdout)
    assert errors, done.stdout + done.stderr
    assert {file for file, _ in errors} == {"application.py"}, done.stdout
    lines = {int(line) for _, line in errors}
    assert lines == wrong_lines(), done.stdout
    return lines


def test_mypy_finds_each_mistake_and_nothing_else(folder: Path) -> None:
    found(
        folder, sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "application.py", "shop_caches.py"
    )


def test_pyright_finds_each_mistake_and_nothing_else(folder: Path) -> None:
    pyright = find("basedpyright")
    if pyright is None:
        # It is large, so CI installs it for this test alone.
        pytest.skip("basedpyright is not installed here")
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}))
    found(folder, pyright, "--level", "error", "--pythonpath", sys.executable, *FILES)


def test_in_the_written_module_pyright_finds_nothing_at_all(folder: Path) -> None:
    pyright = find("basedpyright")
    if pyright is None:
        pytest.skip("basedpyright is not installed here")
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    words = (pyright, "--pythonpath", sys.executable, "shop_caches.py")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert (done.stdout.splitlines()[-1], done.returncode) == ("0 errors, 0 warnings, 0 notes", 0), done.stdout


def test_types_of_parameters_are_those_of_the_columns(database: str, rules: Path, tmp_path: Path) -> None:
    execute(
        database,
        "CREATE TABLE users (id bigint PRIMARY KEY)",
        "CREATE TABLE visits (tenant_id uuid, day date, PRIMARY KEY (tenant_id, day))",
    )
    file = tmp_path / "caches.py"
    words = ["handles", "--rules", str(rules), "-o", str(file)]
    asked = command(*words, "--postgres-dsn", database)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "", "")
    assert noted_types(file) == {"user": {"id": "bigint"}, "day": {"tenant": "uuid", "day": "date"}, "known": {}}
    text = file.read_text()
    assert 'DayParameters = TypedDict("DayParameters", {"tenant": uuid.UUID, "day": datetime.date})' in text
    assert 'KnownParameters = TypedDict("KnownParameters", {"id": Parameter})' in text
    assert command(*words, "--check").returncode == 0, "without a database, types stay as they are"
    execute(database, "ALTER TABLE users ALTER id TYPE text")
    changed = command(*words, "--check", "--postgres-dsn", database)
    assert changed.returncode == 1
    assert "caches.py is out of date; write it with `cdc-invalidator handles -o" in changed.stderr
