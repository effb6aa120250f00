"""`handles` on a real database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from running import command, execute

from cdc_invalidator.commands.handles import noted_types

if TYPE_CHECKING:
    from pathlib import Path

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
