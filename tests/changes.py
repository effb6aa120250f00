"""Changes of rows as PostgreSQL sends them, and the keys that they bust."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from cdc_invalidator.pipeline.assembly import Assembly
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.pipeline.invalidation import Invalidation
from cdc_invalidator.pipeline.plan import Complaint
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import Begin, Commit, Delete, Insert, Relation, Truncate, Update
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import Row, Value

USERS, ORDERS, OTHER, LEAF = 16385, 16390, 16400, 16410
COLUMNS = ("id", "team_id", "name", "bio")
BEGIN = Begin(lsn=1000, committed_at=77, xid=730)
COMMIT = Commit(lsn=1000, end_lsn=1048, committed_at=77)

CACHES = """
version: 1
caches:
  user: {key: "user:{id}"}
  team: {key: "team:{team_id}"}
  member: {key: "team:{team_id}:user:{id}"}
  bio: {key: "bio:{bio|sha256}"}
  by-bio: {key: "by-bio:{bio}"}
  dash: {key: "dash:{id}:v{version}", version: "dash:{id}:ver"}
  all: {key: "all:v{version}", version: "all:ver"}
  counts: {key: "counts"}
rules:
"""


def rule_set(*entries: str) -> RuleSet:
    """The caches above, and rules in YAML's flow form, without names: ``table: public.users, bust: [user]``."""
    lines = [f"  - {{name: r{number}, {entry}}}\n" for number, entry in enumerate(entries)]
    return parse_rules([("rules.yaml", CACHES + "".join(lines))], {})


def relation(
    oid: int = USERS,
    name: str = "users",
    *,
    identity: str = "d",
    keys: Sequence[str] = ("id",),
    columns: Sequence[str] = COLUMNS,
) -> Relation:
    """A table's shape as the server tells it: identity f carries all columns, n none, i and d those of ``keys``."""
    carried = {"f": columns, "n": ()}.get(identity, keys)
    shape = tuple(pgoutput.Column(column, column in carried, 25, -1) for column in columns)
    return Relation(None, oid, "public", name, identity, shape)


def row(*values: str | Value) -> Row:
    return [value.encode() if isinstance(value, str) else value for value in values]


def insert(*values: str | Value, oid: int = USERS) -> Insert:
    return Insert(None, oid, row(*values))


def update(new: Row, *, key: Row | None = None, old: Row | None = None, oid: int = USERS) -> Update:
    """An UPDATE without an old tuple, with one of the identity's columns (``key``), or with all (``old``)."""
    kind = "K" if key is not None else "O" if old is not None else ""
    return Update(None, oid, kind, old if key is None else key, new)


def delete(*, key: Row | None = None, old: Row | None = None, oid: int = USERS) -> Delete:
    given_row = old if key is None else key
    assert given_row is not None
    return Delete(None, oid, "O" if key is None else "K", given_row)


def truncate(*oids: int) -> Truncate:
    return Truncate(None, oids, cascade=False, restart_identity=False)


class Stream:
    """One Assembly with the relations that it has been told."""

    def __init__(self, rule_set: RuleSet, *relations: Relation, chunk: int = 1000, held: int = 1000) -> None:
        self.invalidation = Invalidation(rule_set)
        self.assembly = Assembly(chunk=chunk, held=held)
        self.complaints: list[Complaint] = []
        for each in relations:
            self.tell(each)

    def tell(self, message: Relation, *above: Table) -> None:
        tables = [table for table in (Table(message.schema, message.name), *above) if self.invalidation.names(table)]
        plan = None
        if tables:
            plan, complaints = self.invalidation.compile(message, tables)
            self.complaints += complaints
        self.assembly.relation(message, plan)

    def feed(self, *messages: pgoutput.AnyMessage) -> list[Batch]:
        """Feed messages, Relations among them."""
        batches: list[Batch] = []
        for message in messages:
            if isinstance(message, Relation):
                self.tell(message)
            else:
                batches += self.assembly.feed(message)
        return batches

    def batches(self, *changes: pgoutput.AnyMessage) -> list[Batch]:
        """One transaction, sent when it has committed."""
        return self.feed(BEGIN, *changes, COMMIT)

    def busts(self, *changes: pgoutput.AnyMessage) -> set[str]:
        """What one transaction busts, whatever the batches: keys, and ``sweep <cache>``."""
        return all_told(self.batches(*changes))


def all_told(batches: Iterable[Batch]) -> set[str]:
    return set(itertools.chain.from_iterable(map(told, batches)))


def told(batch: Batch) -> Iterator[str]:
    for target, busts in batch.busts.items():
        yield from (key.decode() for key in busts.keys)
        if busts.sweep:
            yield f"sweep {target.cache.name}"


def users(*busts: str, fields: str = "", identity: str = "d", keys: Sequence[str] = ("id",)) -> Stream:
    """A stream with one rule on public.users."""
    entry = f"table: public.users, {fields + ', ' if fields else ''}bust: [{', '.join(busts)}]"
    return Stream(rule_set(entry), relation(identity=identity, keys=keys))
