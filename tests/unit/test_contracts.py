"""The import rule: the package keeps every contract in pyproject.toml, and each contract notices who breaks it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from typing import TYPE_CHECKING

from paths import PACKAGE, ROOT
from tools import tool

if TYPE_CHECKING:
    from pathlib import Path

# By contract: the module that breaks it, with which lines, and what is reported.
PLANTED = {
    "layers": ("postgres.slot", "from cdc_invalidator import reload", "postgres.slot -> cdc_invalidator.reload"),
    "circles": ("rules.template", "from cdc_invalidator.rules import load", "cdc_invalidator.rules"),
    "postgres": ("postgres.slot", "import redis", "postgres.slot -> redis"),
    "redis": ("redis.server", "import psycopg", "redis.server -> psycopg"),
    "rules": (
        "rules.model",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket",
        "rules.model -> socket",
    ),
    "pipeline": ("pipeline.apply", "def late():\n    import psycopg", "pipeline.apply -> psycopg"),
    "driver": ("session", "import redis", "session -> redis"),
    "reader": ("reader.aio", "import structlog", "reader.aio -> structlog"),
    "metrics": ("reload", "import prometheus_client", "reload -> prometheus_client"),
    "settings": ("daemon", "from cdc_invalidator import settings", "daemon -> cdc_invalidator.settings"),
    "compiled": (
        "pipeline.apply",
        "from cdc_invalidator.compiled import _scan",
        "pipeline.apply -> cdc_invalidator.compiled",
    ),
}


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the package in that folder against its pyproject.toml."""
    words = [tool("lint-imports"), "--no-cache", "--no-logo"]
    env = {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_package_keeps_every_contract() -> None:
    done = checked(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_contract_is_broken_by_an_import_against_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for module, lines, _ in PLANTED.values():
        with (tmp_path / PACKAGE.name / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\n{lines}\n")
    done = checked(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = {contract["id"]: contract["name"] for contract in contracts}
    assert names.keys() == PLANTED.keys()
    for contract, (_, _, reported) in PLANTED.items():
        name = names[contract]
        section = re.search(rf"^{re.escape(name)}\n-+\n(.*?)(?=^[^\n]+\n-+$|\Z)", done.stdout, re.MULTILINE | re.DOTALL)
        assert section is not None, f"{name}: not broken\n{done.stdout}"
        assert reported in section[1], f"{name}\n{section[1]}"
