"""What `explain` says of a change, and of each key, is what the running daemon does, for thousands of changes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import psycopg
from running import RunningDaemon, eventually, settled

from cdc_invalidator.commands import explain, simulate
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import value_text

if TYPE_CHECKING:
    from pathlib import Path

    import redis

CHANGES = 2_000
SEED = 5
SCHEMA = """
CREATE TABLE users (id int PRIMARY KEY, name text, plan text, team int, score float8, active bool);
ALTER TABLE users REPLICA IDENTITY FULL;
CREATE TABLE orders (id int PRIMARY KEY, user_id int NOT NULL, status text);
CREATE TABLE notes (id int PRIMARY KEY, user_id int, body text);
ALTER TABLE notes REPLICA IDENTITY FULL;
"""
TYPES = {"id": 23, "team": 23, "user_id": 23, "score": 701, "active": 16}
COLUMNS = {
    "users": ("id", "name", "plan", "team", "score", "active"),
    "orders": ("id", "user_id", "status"),
    "notes": ("id", "user_id", "body"),
}
RULES = """
version: 1
caches:
  user: {key: "t:user:{id}", ttl: 5m}
  named: {key: "t:name:{name|lower|urlencode}", ttl: 5m}
  team: {key: "t:team:{team}:{plan}", ttl: 5m}
  orders: {key: "t:user:{id}:orders:{version}", version: "t:user:{id}:orders-version", ttl: 5m}
  all: {key: "t:all", ttl: 5m}
  catalog: {key: "t:item:{id}:{version}", version: "t:items", bump_over: 100, ttl: 5m}
  notes: {key: "t:notes:{user_id}", ttl: 5m}
rules:
  - {name: user, table: public.users, columns: [name, plan], bust: [user, named]}
  - {name: teams, table: public.users, on: [insert, update], bust: [team]}
  - name: paying
    table: public.users
    when: "op == 'insert' ? new.plan == 'pro' : op == 'update' && (new.plan != old.plan || new.score > 5.0)"
    bust: [all]
  - {name: idle, table: public.users, when: "op != 'delete' && !new.active", bust: [notes: {user_id: id}]}
  - {name: orders, table: public.orders, immutable: [user_id], old_row: ignore, bust: [orders: {id: user_id}, catalog]}
  - {name: notes, table: public.notes, on: [insert, update, delete], bust: [notes]}
"""


class Dice(random.Random):
    def value(self, column: str) -> Any:
        if column in {"id", "user_id"}:
            return self.randrange(1, 40)
        if column == "team":
            return self.choice([None, 1, 2, 3])
        if column == "score":
            return self.choice([None, 1.5, 5.0, 7.25])
        if column == "active":
            return self.choice([True, False, None])
        return self.choice([None, "Ada", "gräce hopper", "pro", "free", "x:y"])


def random_change(dice: Dice, rows: dict[str, dict[int, dict[str, Any]]]) -> tuple[str, str, Any, Any]:
    """Choose a change that the tables allow, and take it over: table, operation, old and new row."""
    table = dice.choice(list(COLUMNS))
    there = rows[table]
    op = dice.choice(["insert", "update", "update", "update", "delete"]) if there else "insert"
    if op == "insert":
        new = {column: dice.value(column) for column in COLUMNS[table]}
        if table == "orders":
            new["user_id"] = dice.randrange(1, 40)
        if new["id"] not in there:
            there[new["id"]] = new
            return table, op, None, new
        op = "update"
        old = there[new["id"]]
    else:
        old = there[dice.choice(list(there))]
    if op == "delete":
        return table, op, there.pop(old["id"]), None
    changed = dice.sample([column for column in COLUMNS[table] if column != "user_id"], dice.randrange(1, 3))
    new = old | {column: dice.value(column) for column in changed}
    if new["id"] != old["id"] and new["id"] in there:
        new["id"] = old["id"]
    del there[old["id"]]
    there[new["id"]] = new
    return table, op, old, new


def commit(connection: psycopg.Connection[Any], table: str, op: str, old: Any, new: Any) -> int:
    """Make the change, and give its transaction's id."""
    columns = COLUMNS[table]
    if op == "insert":
        marks = ", ".join(["%s"] * len(columns))
        query, values = f"INSERT INTO {table} VALUES ({marks})", [new[column] for column in columns]
    elif op == "update":
        sets = ", ".join(f"{column} = %s" for column in columns)
        query, values = f"UPDATE {table} SET {sets} WHERE id = %s", [*(new[column] for column in columns), old["id"]]
    else:
        query, values = f"DELETE FROM {table} WHERE id = %s", [old["id"]]
    with connection.transaction():
        connection.execute(query.encode(), values)
        row = connection.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
    assert row is not None
    return int(row[0]) & 0xFFFFFFFF


def texts(row: Any) -> dict[str, str | None] | None:
    return None if row is None else {column: value_text(value) for column, value in row.items()}


def predicted(rule_set: RuleSet, table: str, op: str, old: Any, new: Any) -> Counter[str]:
    # orders keeps its default identity: only the key's column of an old row is known.
    known = {"id": old["id"]} if old is not None and table == "orders" else old
    change = simulate.Change(Table("public", table), op, texts(known), texts(new), TYPES)
    found: Counter[str] = Counter()
    for verdict in simulate.simulate(rule_set, change, {}):
        for bust in verdict.busts:
            found[f"{verdict.rule.name} {bust}"] += 1
            if bust.key and "{version}" not in bust.key:
                told = explain.explain_key(rule_set, bust.key)
                assert verdict.rule.name in str(told), (bust, told)
    return found


def test_explain_says_what_the_daemon_does_for_two_thousand_random_changes(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    rule_set = load_rules(path, {})
    expected: dict[int, Counter[str]] = {}
    told: dict[int, Any] = {}
    dice = Dice(SEED)
    state: dict[str, dict[int, dict[str, Any]]] = {table: {} for table in COLUMNS}
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SCHEMA)
        redis_client.set("t:items", 7)
        settings = {"log_keys": "raw"}
        with RunningDaemon(dsn=database, redis_url=redis_url, rules=path, slot=slot_name, **settings) as daemon:
            daemon.ready()
            settled(database, redis_client, slot_name)
            redis_client.set("t:items", 7)
            for _ in range(CHANGES):
                table, op, old, new = random_change(dice, state)
                xid = commit(connection, table, op, old, new)
                told[xid] = (table, op, old, new)
                expected[xid] = predicted(rule_set, table, op, old, new)
            settled(database, redis_client, slot_name)
            total = sum(sum(counter.values()) for counter in expected.values())
            eventually(lambda: _count(daemon) >= total, "all events are written")
            done: dict[int, Counter[str]] = defaultdict(Counter)
            for event in daemon.named("bust"):
                if event["rule"] is not None:
                    done[event["xid"]].update(_of(event))
    for xid, busts in expected.items():
        assert done[xid] == busts, told[xid]
    assert total > CHANGES


def _count(daemon: RunningDaemon) -> int:
    return sum(1 if event["action"] == "sweep" else event["keys"] for event in daemon.named("bust") if event["rule"])


def _of(event: dict[str, Any]) -> list[str]:
    if event["action"] == "sweep":
        return [f"{event['rule']} sweep {event['cache']}"]
    bump = "bump " if event["action"] == "bump" else ""
    # A key of the cache with `bump_over` lies under the version that was set.
    return [
        f"{event['rule']} {bump}{key[:-2] + ':{version}' if event['cache'] == 'catalog' and not bump else key}"
        for key in event["raw_keys"]
    ]
