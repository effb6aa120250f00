"""From decoded messages to batches of keys: what each change busts, when, and when nothing but a sweep will do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from paths import PGOUTPUT_MESSAGES

from cdc_invalidator import errors
from cdc_invalidator.pipeline import assembly
from cdc_invalidator.pipeline.assembly import Assembly
from cdc_invalidator.pipeline.batch import Batch
from cdc_invalidator.pipeline.invalidation import Complaint, Invalidation
from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import Begin, Commit, Delete, Insert, Relation, Truncate, Update
from cdc_invalidator.rules.format import Table
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.values import UNCHANGED, Row, Value

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


# ── Images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_insert_busts_the_keys_of_its_row() -> None:
    stream = users("user", "member", fields="old_row: sweep")

    assert stream.busts(insert("42", "7", "Ada", None)) == {"user:42", "team:7:user:42"}


def test_a_row_that_moves_busts_both_its_teams() -> None:
    stream = users("team", identity="f")

    moved = update(row("42", "9", "Ada", None), old=row("42", "7", "Ada", None))

    assert stream.busts(moved) == {"team:7", "team:9"}


def test_a_changed_primary_key_busts_both_its_keys() -> None:
    stream = users("user")

    assert stream.busts(update(row("43", "7", "Ada", None), key=row("42", None, None, None))) == {"user:42", "user:43"}


def test_an_update_that_keeps_the_primary_key_busts_its_one_key() -> None:
    stream = users("user")

    assert stream.busts(update(row("42", "7", "Grace", None))) == {"user:42"}


def test_a_delete_busts_the_key_of_its_old_row() -> None:
    assert users("user").busts(delete(key=row("42", None, None, None))) == {"user:42"}
    assert users("team", identity="f").busts(delete(old=row("42", "7", "Ada", None))) == {"team:7"}


def test_an_identity_by_index_carries_its_columns_and_not_the_primary_key() -> None:
    stream = users("team", fields="old_row: sweep", identity="i", keys=("team_id",))

    assert stream.busts(delete(key=row(None, "7", None, None))) == {"team:7"}
    assert stream.busts(update(row("42", "9", "Ada", None), key=row(None, "7", None, None))) == {"team:7", "team:9"}
    assert stream.busts(update(row("43", "9", "Ada", None))) == {"team:9"}


def test_columns_map_to_parameters_of_other_names() -> None:
    stream = users("user: {id: team_id}", identity="f")

    assert stream.busts(insert("42", "7", "Ada", None)) == {"user:7"}


def test_one_cache_busted_from_two_columns_gets_both_keys() -> None:
    stream = users("user", "user: {id: team_id}", identity="f")

    assert stream.busts(insert("42", "7", "Ada", None)) == {"user:42", "user:7"}


def test_filters_apply_to_the_values() -> None:
    stream = users("bio", identity="f")

    assert stream.busts(insert("42", "7", "Ada", "abc")) == {
        "bio:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }


def test_only_the_changes_of_on_bust() -> None:
    stream = users("user", fields="on: [delete]")

    assert stream.busts(insert("1", "7", "Ada", None)) == set()
    assert stream.busts(update(row("1", "7", "Ada", None))) == set()
    assert stream.busts(truncate(USERS)) == set()
    assert stream.busts(delete(key=row("1", None, None, None))) == {"user:1"}


def test_a_batch_tells_rule_cache_table_and_kinds_of_change() -> None:
    stream = users("user", "dash")

    [batch] = stream.batches(insert("1", "7", "Ada", None), delete(key=row("2", None, None, None)))

    assert (batch.commit_lsn, batch.committed_at, batch.xid, batch.end_lsn) == (1000, 77, 730, 1048)
    assert [(t.rule, t.cache.name, t.table, t.action) for t in batch.busts] == [
        ("r0", "user", "public.users", "delete"),
        ("r0", "dash", "public.users", "bump"),
    ]
    assert [list(busts.ops) for busts in batch.busts.values()] == [["insert", "delete"]] * 2
    assert {busts.reason for busts in batch.busts.values()} == {"change"}
    assert batch.weight == 4


def test_a_key_that_many_rows_bust_stands_once_in_its_batch() -> None:
    stream = users("team", identity="f")

    [batch] = stream.batches(*(insert(str(number), "7", "Ada", None) for number in range(10)))

    assert [list(busts.keys) for busts in batch.busts.values()] == [[b"team:7"]]
    assert batch.weight == 1


def test_changes_are_counted_by_table_and_kind() -> None:
    stream = users("user", fields="on: [insert]")
    stream.busts(insert("1", "7", "Ada", None), insert("2", "7", "Ada", None), update(row("1", "8", "Ada", None)))
    stream.busts(delete(key=row("1", None, None, None)), truncate(USERS))

    assert stream.invalidation.counted() == {
        ("public.users", "insert"): 2,
        ("public.users", "update"): 1,
        ("public.users", "delete"): 1,
        ("public.users", "truncate"): 1,
    }
    assert stream.invalidation.counted() == {}


# ── NULL, and what is not NULL ───────────────────────────────────────────────────────────────────────────────────────


def test_a_null_parameter_gives_no_key() -> None:
    stream = users("team", "user", identity="f")

    assert stream.busts(insert("42", None, "Ada", None)) == {"user:42"}


def test_a_row_that_leaves_its_team_busts_the_team_it_was_in() -> None:
    stream = users("team", identity="f")

    assert stream.busts(update(row("42", None, "Ada", None), old=row("42", "7", "Ada", None))) == {"team:7"}
    assert stream.busts(update(row("42", "7", "Ada", None), old=row("42", None, "Ada", None))) == {"team:7"}


def test_an_empty_text_is_a_value() -> None:
    assert users("team", identity="f").busts(insert("42", "", "Ada", None)) == {"team:"}


def test_what_a_key_tuple_leaves_out_is_not_taken_for_null() -> None:
    stream = users("member", fields="old_row: sweep")

    assert "sweep member" in stream.busts(update(row("43", "7", "Ada", None), key=row("42", None, None, None)))
    assert stream.busts(delete(key=row("42", None, None, None))) == {"sweep member"}


def test_what_a_key_tuple_leaves_out_is_not_compared_as_null() -> None:
    stream = users("user", fields="columns: [name]")

    # The name was NULL before, for all that the key tuple says; it may have changed.
    assert stream.busts(update(row("43", "7", None, None), key=row("42", None, None, None))) == {"user:42", "user:43"}


# ── The columns filter ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_update_of_other_columns_busts_nothing() -> None:
    stream = users("user", fields="columns: [name]", identity="f")

    assert stream.busts(update(row("42", "9", "Ada", "new"), old=row("42", "7", "Ada", None))) == set()
    assert stream.busts(update(row("42", "7", "Grace", None), old=row("42", "7", "Ada", None))) == {"user:42"}


@pytest.mark.parametrize(("before", "after"), [(None, "Ada"), ("Ada", None), ("", None), (None, "")])
def test_null_and_values_are_told_apart_by_the_filter(before: str | None, after: str | None) -> None:
    stream = users("user", fields="columns: [name]", identity="f")

    assert stream.busts(update(row("42", "7", after, None), old=row("42", "7", before, None))) == {"user:42"}


def test_the_filter_is_for_updates_only() -> None:
    stream = users("user", fields="columns: [name]")

    assert stream.busts(insert("42", "7", None, None)) == {"user:42"}
    assert stream.busts(delete(key=row("42", None, None, None))) == {"user:42"}
    assert stream.busts(truncate(USERS)) == {"sweep user"}


def test_without_the_old_value_of_a_watched_column_every_update_busts() -> None:
    stream = users("user", fields="columns: [name]")

    assert stream.busts(update(row("42", "7", "Ada", None))) == {"user:42"}


def test_a_watched_column_that_the_identity_carries_is_known_to_be_unchanged() -> None:
    stream = users("user", fields="columns: [id]")

    assert stream.busts(update(row("42", "7", "Ada", None))) == set()
    assert stream.busts(update(row("43", "7", "Ada", None), key=row("42", None, None, None))) == {"user:42", "user:43"}


@pytest.mark.parametrize("identity", ["d", "f"])
def test_a_watched_toast_value_that_was_not_touched_did_not_change(identity: str) -> None:
    stream = users("user", fields="columns: [bio]", identity=identity)
    old = row("42", "7", "Ada", "long") if identity == "f" else None

    assert stream.busts(update(row("42", "9", "Ada", UNCHANGED), old=old)) == set()
    assert stream.busts(update(row("42", "9", "Ada", "longer"), old=old)) == {"user:42"}


def test_a_key_that_changed_busts_both_keys_though_nobody_watches_it() -> None:
    stream = users("team", fields="columns: [name]", identity="f")
    assert stream.busts(update(row("42", "9", "Ada", None), old=row("42", "7", "Ada", None))) == {"team:7", "team:9"}

    by_key = users("user", fields="columns: [bio]")
    moved = update(row("43", "7", "Ada", UNCHANGED), key=row("42", None, None, None))
    assert by_key.busts(moved) == {"user:42", "user:43"}


@pytest.mark.parametrize(("watched", "bio"), [("id", None), ("bio", UNCHANGED)])
def test_a_key_that_may_have_changed_unseen_is_swept_though_the_watched_columns_did_not(
    watched: str, bio: Value
) -> None:
    stream = users("team", fields=f"columns: [{watched}], old_row: sweep")

    assert "sweep team" in stream.busts(update(row("42", "9", "Ada", bio)))


def test_one_rule_with_a_filter_does_not_filter_for_another() -> None:
    stream = Stream(
        rule_set("table: public.users, columns: [name], bust: [user]", "table: public.users, bust: [team]"),
        relation(identity="f"),
    )

    assert stream.busts(update(row("42", "7", "Ada", "x"), old=row("42", "7", "Ada", "y"))) == {"team:7"}


# ── Old rows that the identity does not carry ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("old_row", ["require", "sweep"])
def test_without_the_old_row_the_cache_is_swept(old_row: str) -> None:
    stream = users("team", fields=f"old_row: {old_row}")

    assert stream.busts(insert("42", "7", "Ada", None)) == {"team:7"}
    assert "sweep team" in stream.busts(update(row("42", "9", "Ada", None)))
    assert stream.busts(delete(key=row("42", None, None, None))) == {"sweep team"}


def test_an_old_row_that_is_ignored_busts_what_is_known() -> None:
    stream = users("team", fields="old_row: ignore")

    assert stream.busts(update(row("42", "9", "Ada", None))) == {"team:9"}
    assert stream.busts(update(row("43", "9", "Ada", None), key=row("42", None, None, None))) == {"team:9"}
    assert stream.busts(delete(key=row("42", None, None, None))) == set()


def test_what_is_carried_is_busted_also_where_the_rest_is_ignored() -> None:
    stream = users("user", "team", fields="old_row: ignore")

    assert stream.busts(delete(key=row("42", None, None, None))) == {"user:42"}


def test_only_a_required_old_row_that_is_missing_is_complained_about() -> None:
    [complaint] = users("user", "team").complaints
    assert complaint.rule == "r0"
    assert "team_id" in complaint.sentence
    assert "REPLICA IDENTITY FULL" in complaint.sentence

    assert users("user", "team", identity="f").complaints == []
    assert users("team", fields="old_row: sweep").complaints == []
    assert users("team", fields="old_row: ignore").complaints == []
    assert users("team", fields="on: [insert, truncate]").complaints == []
    assert users("team", fields="on: [update], immutable: [team_id]").complaints == []
    assert len(users("team", fields="on: [delete], immutable: [team_id]").complaints) == 1


def test_an_immutable_column_needs_no_old_value() -> None:
    stream = users("member", fields="old_row: sweep, immutable: [team_id]")

    assert stream.busts(update(row("42", "7", "Grace", None))) == {"team:7:user:42"}
    # The primary key changed; the team did not.
    assert stream.busts(update(row("43", "7", "Ada", None), key=row("42", None, None, None))) == {
        "team:7:user:42",
        "team:7:user:43",
    }


def test_a_deleted_row_takes_its_immutable_columns_with_it() -> None:
    stream = users("member", fields="old_row: sweep, immutable: [team_id]")

    assert stream.busts(delete(key=row("42", None, None, None))) == {"sweep member"}


def test_a_changed_identity_counts_from_its_relation_on() -> None:
    stream = users("team")
    assert "sweep team" in stream.busts(update(row("42", "9", "Ada", None)))

    stream.tell(relation(identity="f"))

    assert stream.busts(update(row("42", "9", "Ada", None), old=row("42", "7", "Ada", None))) == {"team:7", "team:9"}


# ── Unchanged TOAST values ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_unchanged_toast_value_comes_from_the_old_row() -> None:
    stream = users("by-bio", identity="f")

    unchanged = update(row("42", "9", "Ada", UNCHANGED), old=row("42", "7", "Ada", "long"))

    assert stream.busts(unchanged) == {"by-bio:long"}


def test_an_unchanged_toast_value_comes_from_the_old_key() -> None:
    stream = users("by-bio", identity="i", keys=("id", "bio"))

    unchanged = update(row("43", "9", "Ada", UNCHANGED), key=row("42", None, None, "long"))

    assert stream.busts(unchanged) == {"by-bio:long"}


def test_an_unchanged_toast_value_that_nobody_carries_sweeps() -> None:
    ignoring = users("by-bio", fields="old_row: ignore")
    assert ignoring.busts(update(row("42", "9", "Ada", UNCHANGED))) == {"sweep by-bio"}

    immutable = users("by-bio", fields="old_row: sweep, immutable: [bio]")
    assert immutable.busts(update(row("42", "9", "Ada", UNCHANGED))) == {"sweep by-bio"}
    assert immutable.busts(update(row("43", "9", "Ada", UNCHANGED), key=row("42", None, None, None))) == {
        "sweep by-bio"
    }


def test_an_unchanged_toast_value_in_the_identity_that_is_not_sent_sweeps() -> None:
    stream = users("by-bio", identity="i", keys=("bio",))

    assert stream.busts(update(row("42", "9", "Ada", UNCHANGED))) == {"sweep by-bio"}


def test_an_unchanged_toast_value_that_no_key_needs_does_no_harm() -> None:
    assert users("user").busts(update(row("42", "9", "Ada", UNCHANGED))) == {"user:42"}


# ── TRUNCATE, caches without parameters, versions ────────────────────────────────────────────────────────────────────


def test_a_truncate_of_several_tables_sweeps_the_caches_of_all() -> None:
    stream = Stream(
        rule_set(
            "table: public.users, bust: [user, dash]",
            "table: public.orders, bust: [team: {team_id: id}]",
            "table: public.other, on: [insert], bust: [member: {team_id: id}]",
        ),
        relation(),
        relation(ORDERS, "orders"),
        relation(OTHER, "other"),
    )

    [batch] = stream.batches(truncate(USERS, ORDERS, OTHER))

    assert set(told(batch)) == {"sweep user", "sweep dash", "sweep team"}
    assert {busts.reason for busts in batch.busts.values()} == {"truncate"}
    assert {tuple(busts.ops) for busts in batch.busts.values()} == {("truncate",)}
    assert batch.weight == 3


def test_a_cache_without_parameters_has_one_key_and_is_never_searched_for() -> None:
    stream = users("counts", "all")

    for change in (
        insert("1", "7", "Ada", None),
        update(row("1", "7", "Ada", UNCHANGED)),
        delete(key=row("1", None, None, None)),
        truncate(USERS),
    ):
        assert stream.busts(change) == {"counts", "all:ver"}
    assert stream.complaints == []


def test_a_cache_with_a_version_is_busted_by_the_key_of_its_version() -> None:
    stream = users("dash")

    moved = update(row("43", "7", "Ada", None), key=row("42", None, None, None))

    assert stream.busts(moved) == {"dash:42:ver", "dash:43:ver"}
    [batch] = stream.batches(moved)
    [target] = batch.busts
    assert target.action == "bump"
    assert target.template.text == "dash:{id}:ver"


# ── Relations ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_partition_is_matched_by_the_rules_of_its_root_in_its_own_order_of_columns() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"))
    leaf = relation(LEAF, "users_2024", columns=("bio", "name", "id", "team_id"))
    stream.tell(leaf, Table("public", "users"))

    [batch] = stream.batches(insert(None, "Ada", "42", "7", oid=LEAF), truncate(LEAF))

    assert set(told(batch)) == {"user:42", "sweep user"}
    [target] = batch.busts
    assert target.table == "public.users"
    assert stream.invalidation.counted() == {("public.users", "insert"): 1, ("public.users", "truncate"): 1}


def test_two_partitions_of_one_table_bust_as_one() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation())
    stream.tell(relation(LEAF, "users_2024", columns=("bio", "id")), Table("public", "users"))

    [batch] = stream.batches(insert("1", "7", "Ada", None), insert(None, "2", oid=LEAF))

    [busts] = batch.busts.values()
    assert list(busts.keys) == [b"user:1", b"user:2"]


def test_a_partition_is_matched_by_its_own_rules_and_by_those_of_all_tables_above_it() -> None:
    stream = Stream(
        rule_set(
            "table: public.users, bust: [user]",
            "table: public.users_2024, bust: [member: {team_id: id}]",
            "table: public.other, bust: [counts]",
        )
    )
    stream.tell(relation(LEAF, "users_2024"), Table("public", "other"), Table("public", "users"))

    assert stream.busts(insert("1", "7", "Ada", None, oid=LEAF)) == {"user:1", "team:1:user:1", "counts"}
    assert stream.busts(truncate(LEAF)) == {"sweep user", "sweep member", "counts"}


def test_a_table_that_no_rule_names_busts_nothing() -> None:
    stream = users("user")
    stream.tell(relation(OTHER, "other"))

    assert (
        stream.busts(
            insert("1", "7", "Ada", None, oid=OTHER),
            update(row("1", "7", "Ada", None), oid=OTHER),
            delete(key=row("1", None, None, None), oid=OTHER),
            truncate(OTHER),
        )
        == set()
    )
    assert stream.invalidation.names(Table("public", "users"))
    assert not stream.invalidation.names(Table("public", "other"))
    assert stream.complaints == []


def test_an_unknown_table_that_may_be_a_renamed_one_sweeps_the_caches_of_all_its_rules_at_any_change() -> None:
    stream = Stream(
        rule_set(
            "table: public.users, on: [insert], columns: [name], bust: [user, counts]",
            "table: public.users, old_row: ignore, bust: [team]",
            "table: public.orders, bust: [member: {team_id: id}]",
        )
    )
    renamed = relation(LEAF, "users_old")
    stream.assembly.relation(renamed, stream.invalidation.compile_unknown(renamed, [Table("public", "users")]))

    for change in (
        insert("1", "7", "Ada", None, oid=LEAF),
        update(row("1", "7", "Ada", UNCHANGED), oid=LEAF),
        delete(key=row("1", None, None, None), oid=LEAF),
        truncate(LEAF),
    ):
        assert stream.busts(change) == {"sweep user", "counts", "sweep team"}


def test_a_truncate_of_known_and_unknown_tables_sweeps_the_known() -> None:
    stream = users("user")
    stream.tell(relation(OTHER, "other"))

    assert stream.busts(truncate(OTHER, USERS)) == {"sweep user"}


def test_the_shape_of_a_table_may_change_inside_a_transaction() -> None:
    stream = users("user", identity="f")

    reshaped = relation(identity="f", columns=("name", "id"))

    assert stream.busts(insert("1", "7", "Ada", None), reshaped, insert("Ada", "2")) == {"user:1", "user:2"}


def test_a_key_column_that_is_gone_breaks_the_rule_and_every_change_sweeps() -> None:
    stream = users("user", "team", identity="f", fields="columns: [name]")
    assert stream.complaints == []

    stream.tell(relation(identity="f", columns=("id", "name", "bio")))

    [complaint] = stream.complaints
    assert complaint.rule == "r0"
    assert "public.users has no column team_id" in complaint.sentence
    assert "sweep team" in stream.busts(insert("1", "Ada", None))
    assert "sweep team" in stream.busts(update(row("1", "Ada", None), old=row("1", "Ada", None)))
    assert "sweep team" in stream.busts(delete(old=row("1", "Ada", None)))
    assert "sweep team" in stream.busts(truncate(USERS))


def test_a_watched_column_that_is_gone_lets_every_update_bust() -> None:
    stream = users("user", identity="f", fields="columns: [name]")
    stream.tell(relation(identity="f", columns=("id", "team_id")))

    assert len(stream.complaints) == 1
    assert stream.busts(update(row("1", "7"), old=row("1", "7"))) == {"user:1"}


def test_a_column_that_is_back_mends_the_rule() -> None:
    stream = users("team", identity="f")
    stream.tell(relation(identity="f", columns=("id", "name", "bio")))
    stream.complaints.clear()

    stream.tell(relation(identity="f"))

    assert stream.complaints == []
    assert stream.busts(insert("1", "7", "Ada", None)) == {"team:7"}


def test_a_broken_rule_sweeps_at_a_delete_also_where_old_rows_are_ignored() -> None:
    stream = users("team", identity="f", fields="old_row: ignore")
    stream.tell(relation(identity="f", columns=("id", "name", "bio")))

    assert stream.busts(delete(old=row("1", "Ada", None))) == {"sweep team"}


# ── Transactions and batches ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_transaction_without_busts_is_a_batch_without_busts() -> None:
    stream = users("user")

    [batch] = stream.batches()

    assert batch.busts == {}
    assert batch.end_lsn == 1048


def test_a_large_transaction_leaves_in_batches_and_only_the_last_has_its_end() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=3)

    batches = stream.batches(*(insert(str(number), "7", "Ada", None) for number in range(8)))

    assert [list(told(batch)) for batch in batches] == [
        ["user:0", "user:1", "user:2"],
        ["user:3", "user:4", "user:5"],
        ["user:6", "user:7"],
    ]
    assert [batch.end_lsn for batch in batches] == [None, None, 1048]
    assert {(batch.commit_lsn, batch.committed_at, batch.xid) for batch in batches} == {(1000, 77, 730)}


def test_a_transaction_that_fills_its_last_batch_ends_with_an_empty_one() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=2)

    batches = stream.batches(insert("1", "7", "Ada", None), insert("2", "7", "Ada", None))

    assert [(len(batch.busts), batch.end_lsn) for batch in batches] == [(1, None), (0, 1048)]


def test_rows_that_bust_the_same_key_make_no_batch_of_their_own() -> None:
    stream = Stream(rule_set("table: public.users, bust: [counts]"), relation(), chunk=2)

    assert len(stream.batches(*(insert(str(number), "7", "Ada", None) for number in range(100)))) == 1


def test_a_batch_stays_within_its_chunk_and_one_row() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user, team, member]"), relation(identity="f"), chunk=10)

    batches = stream.batches(
        *(update(row(f"{n}", f"{n}", None, None), old=row(f"-{n}", f"-{n}", None, None)) for n in range(100))
    )

    assert len(all_told(batches)) == 600
    assert all(batch.weight < 10 + 6 for batch in batches)
    assert all(batch.weight == sum(len(busts.keys) for busts in batch.busts.values()) for batch in batches)


def states(stream: Stream, *messages: pgoutput.AnyMessage) -> list[bool]:
    """Whether it is in a transaction, at first and after each message."""
    found = [stream.assembly.in_transaction]
    for message in messages:
        stream.feed(message)
        found.append(stream.assembly.in_transaction)
    return found


def test_it_is_in_a_transaction_from_begin_to_commit_also_between_batches() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=1)

    assert states(stream, BEGIN, insert("1", "7", "Ada", None), insert("2", "7", "Ada", None), COMMIT) == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_transactions_do_not_mix() -> None:
    stream = users("user")

    assert stream.busts(insert("1", "7", "Ada", None)) == {"user:1"}
    assert stream.busts(insert("2", "7", "Ada", None)) == {"user:2"}


def test_messages_that_are_no_change_bust_nothing_in_and_between_transactions() -> None:
    stream = users("user")
    others: list[pgoutput.AnyMessage] = [
        pgoutput.Origin(1, "upstream"),
        pgoutput.Type(None, 16500, "public", "mood"),
        pgoutput.Message(None, transactional=True, lsn=1, prefix="app", content=b"x"),
    ]

    assert stream.feed(*others) == []
    assert stream.busts(*others) == set()


# ── Transactions that are streamed while they run ────────────────────────────────────────────────────────────────────

STOP = pgoutput.StreamStop()


def start(xid: int, *, first: bool = True) -> pgoutput.StreamStart:
    return pgoutput.StreamStart(xid, first)


def stream_commit(xid: int) -> pgoutput.StreamCommit:
    return pgoutput.StreamCommit(xid, lsn=2000, end_lsn=2048, committed_at=88)


def abort(xid: int, subxid: int | None = None) -> pgoutput.StreamAbort:
    return pgoutput.StreamAbort(xid, xid if subxid is None else subxid)


def added(xid: int, *ids: str) -> list[pgoutput.AnyMessage]:
    """Rows that a (sub)transaction inserts into public.users."""
    return [insert(each, "7", "Ada", None)._replace(xid=xid) for each in ids]


def test_what_is_streamed_is_busted_at_its_commit_and_not_before() -> None:
    stream = users("user", "dash")

    assert stream.feed(start(1), *added(1, "1"), STOP, start(1, first=False), *added(1, "2"), STOP) == []
    assert stream.assembly.held == 4
    [batch] = stream.feed(stream_commit(1))

    assert all_told([batch]) == {"user:1", "user:2", "dash:1:ver", "dash:2:ver"}
    assert (batch.commit_lsn, batch.end_lsn, batch.committed_at, batch.xid) == (2000, 2048, 88, 1)
    assert [list(busts.ops) for busts in batch.busts.values()] == [["insert"]] * 2
    assert stream.assembly.held == 0


def test_every_kind_of_change_is_streamed() -> None:
    stream = users("user", "team", identity="f")
    moved = update(row("1", "9", "Ada", None), old=row("1", "7", "Ada", None))._replace(xid=1)
    deleted = delete(old=row("2", "8", "Ada", None))._replace(xid=2)

    [batch] = stream.feed(start(1), moved, deleted, STOP, stream_commit(1))
    assert all_told([batch]) == {"user:1", "team:9", "team:7", "user:2", "team:8"}

    [batch] = stream.feed(start(3), truncate(USERS)._replace(xid=4), STOP, stream_commit(3))
    assert all_told([batch]) == {"sweep user", "sweep team"}
    assert {busts.reason for busts in batch.busts.values()} == {"truncate"}


def test_what_is_rolled_back_busts_nothing() -> None:
    stream = users("user")

    assert stream.feed(start(1), *added(1, "1"), *added(2, "2"), STOP, abort(1)) == []

    assert stream.assembly.held == 0
    assert stream.busts(*added_plainly("3")) == {"user:3"}


def added_plainly(*ids: str) -> list[Insert]:
    return [insert(each, "7", "Ada", None) for each in ids]


def test_what_a_savepoint_did_is_forgotten_when_it_is_rolled_back_and_only_that() -> None:
    stream = users("user")

    stream.feed(start(1), *added(1, "1"), *added(2, "2"), *added(3, "3"), STOP)
    stream.feed(abort(1, 2), start(1, first=False), *added(4, "4"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"user:1", "user:3", "user:4"}


def test_a_key_that_a_rolled_back_savepoint_shares_with_the_rest_is_busted() -> None:
    stream = users("user")

    stream.feed(start(1), *added(2, "1"), *added(1, "1"), STOP, abort(1, 2))

    assert all_told(stream.feed(stream_commit(1))) == {"user:1"}


def test_a_savepoint_that_busted_nothing_may_be_rolled_back() -> None:
    stream = users("user")

    assert stream.feed(start(1), STOP, abort(1, 5), stream_commit(1))[0].busts == {}


def test_transactions_stand_between_the_blocks_of_others() -> None:
    stream = users("user")

    stream.feed(start(1), *added(1, "1"), STOP)
    assert stream.busts(*added_plainly("2")) == {"user:2"}
    stream.feed(start(3), *added(3, "3"), STOP, start(1, first=False), *added(1, "4"), STOP)

    assert all_told(stream.feed(stream_commit(3))) == {"user:3"}
    assert all_told(stream.feed(stream_commit(1))) == {"user:1", "user:4"}


def test_a_large_streamed_transaction_leaves_in_batches_at_its_commit() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=3)
    ids = [str(number) for number in range(8)]
    stream.feed(start(1), *added(1, *ids[:5]), *added(2, *ids[5:]), STOP)

    batches = stream.feed(stream_commit(1))

    assert [len(list(told(batch))) for batch in batches] == [3, 3, 2]
    assert all_told(batches) == {f"user:{each}" for each in ids}
    assert [batch.end_lsn for batch in batches] == [None, None, 2048]
    assert {(batch.commit_lsn, batch.xid) for batch in batches} == {(2000, 1)}


def test_past_its_bound_the_target_with_most_keys_becomes_a_sweep() -> None:
    stream = Stream(rule_set("table: public.users, bust: [team, user]"), relation(identity="f"), held=10)
    ids = [str(number) for number in range(30)]

    stream.feed(start(1), *added(1, *ids), STOP)
    assert stream.assembly.held == 1
    assert stream.assembly.widened == 1
    stream.feed(start(1, first=False), *added(1, "77"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"sweep user", "team:7"}


def test_what_a_sweep_covers_is_rolled_back_with_its_savepoint() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=3)

    stream.feed(start(1), *added(1, "1"), *added(2, *"23456"), STOP, abort(1, 2))

    # The keys of both parts were traded for one sweep each.
    assert all_told(stream.feed(stream_commit(1))) == {"sweep user"}


@pytest.mark.timeout(10)
def test_widening_ends_also_with_more_savepoints_than_keys_may_be_held() -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=10)

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(30)), STOP)

    assert stream.assembly.held <= 10
    assert all_told(stream.feed(stream_commit(1))) == {"sweep user"}


@pytest.mark.timeout(10)
def test_widening_leaves_caches_of_a_single_key_alone() -> None:
    stream = Stream(rule_set("table: public.users, bust: [counts]"), relation(), held=0)

    stream.feed(start(1), *added(1, "1"), *added(2, "2"), STOP)

    assert all_told(stream.feed(stream_commit(1))) == {"counts"}


def test_the_bound_holds_inside_a_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "UNCHECKED", 5)
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), held=10)

    held = []
    for message in (start(1), *added(1, *(str(n) for n in range(40)))):
        stream.feed(message)
        held.append(stream.assembly.held)

    assert max(held) <= 10 + 5
    assert all_told(stream.feed(STOP, stream_commit(1))) == {"sweep user"}


def test_too_many_savepoints_become_one_part_that_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "PARTS", 3)
    stream = Stream(rule_set("table: public.users, bust: [user, counts]"), relation())

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(5)), STOP)
    assert stream.assembly.widened == 1
    # What they did cannot be told apart any more: rolled back or not, it is swept.
    stream.feed(*(abort(1, 2 + n) for n in range(5)), start(1, first=False), *added(9, "9"), STOP, abort(1, 9))

    assert all_told(stream.feed(stream_commit(1))) == {"sweep user", "counts"}


def test_a_transaction_of_too_many_savepoints_that_is_rolled_back_busts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "PARTS", 3)
    stream = users("user")

    stream.feed(start(1), *itertools.chain.from_iterable(added(2 + n, str(n)) for n in range(5)), STOP, abort(1))

    assert stream.assembly.held == 0
    assert stream.busts(*added_plainly("3")) == {"user:3"}


def test_a_block_and_no_more_is_a_transaction_to_wait_for() -> None:
    assert states(users("user"), start(1), *added(1, "1"), STOP, stream_commit(1)) == [False, True, True, False, False]


def test_the_shape_that_a_transaction_in_progress_gave_a_table_is_its_own_until_it_commits() -> None:
    stream = users("user")
    reshaped = relation(columns=("name", "id"))

    stream.feed(start(1), reshaped, insert("Ada", "1")._replace(xid=1), STOP)
    assert stream.busts(*added_plainly("2")) == {"user:2"}
    assert all_told(stream.feed(stream_commit(1))) == {"user:1"}

    assert stream.busts(insert("Ada", "3")) == {"user:3"}


def test_the_shape_that_a_rolled_back_transaction_gave_a_table_is_forgotten() -> None:
    stream = users("user")

    stream.feed(start(1), relation(columns=("name", "id")), insert("Ada", "1")._replace(xid=1), STOP, abort(1))

    assert stream.busts(*added_plainly("2")) == {"user:2"}


class Doing(NamedTuple):
    """One event in the life of one of several transactions in progress; 0 is a transaction's own part."""

    what: str
    xid: int
    part: int
    key: str


doings = st.builds(
    Doing,
    what=st.sampled_from(["rows", "rows", "rows", "plain", "savepoint rolled back", "commit", "rollback"]),
    xid=st.integers(1, 3),
    part=st.integers(0, 3),
    key=st.sampled_from("abcdef"),
)


@given(st.lists(doings, max_size=40), st.sampled_from([2, 1000]))
def test_whatever_the_course_of_transactions_each_commit_busts_what_it_kept(course: list[Doing], chunk: int) -> None:
    stream = Stream(rule_set("table: public.users, bust: [user]"), relation(), chunk=chunk)
    kept: dict[int, dict[int, set[str]]] = {}
    for what, xid, part, key in course:
        fed: list[Batch] = []
        expected: set[str] = set()
        if what == "plain":
            fed = stream.batches(*added_plainly(key))
            expected = {f"user:{key}"}
        elif what == "rows":
            first = xid not in kept
            kept.setdefault(xid, {}).setdefault(part, set()).add(f"user:{key}")
            fed = stream.feed(start(xid, first=first), *added(10 * part + xid, key), STOP)
        elif xid not in kept:
            continue
        elif what == "savepoint rolled back" and part:
            kept[xid].pop(part, None)
            fed = stream.feed(abort(xid, 10 * part + xid))
        elif what == "commit":
            expected = set().union(*kept.pop(xid).values())
            fed = stream.feed(stream_commit(xid))
        elif what == "rollback":
            del kept[xid]
            fed = stream.feed(abort(xid))
        assert all_told(fed) == expected
        assert [batch.end_lsn is None for batch in fed] == [True] * (len(fed) - 1) + [False] * bool(fed)
        assert stream.assembly.held == sum(len(keys) for parts in kept.values() for keys in parts.values())


# ── What real servers sent: see record_pgoutput.py ───────────────────────────────────────────────────────────────────

KEYS = {
    "by_key": "id",
    "by_index": "code",
    "whole": "id",
    "toasted": "id",
    "toasted_whole": "id",
    "measured_2023": "day",
    "measured_2024": "day",
    "alone": "id",
    "parent": "id",
    "child": "id",
    "replicated": "id",
    "words": "id",
}
BUSTS: dict[str, list[str]] = {
    "identities": ["by_key:1 by_key:2", "by_index:a by_index:b", "whole:7 whole:8"],
    "toast": ["toasted:1 toasted:2", "toasted_whole:1"],
    "truncate": ["sweep:alone", "sweep:parent sweep:alone sweep:child", "sweep:alone", "sweep:parent sweep:child"],
    "origin": ["replicated:1", "replicated:2"],
    "partitioned": ["measured_2023:2023-12-31 measured_2024:2024-01-01 sweep:measured_2023 sweep:measured_2024"],
    "streamed": ["sweep:by_key sweep:whole"],
    "interleaved": ["words:2", "words:1", "words:3"],
    "rolled_back": ["words:1 words:3", "words:5"],
    "reshaped_in_vain": ["words:1", "words:1", "words:3", "words:5", "words:6", "words:7"],
}


def recordings() -> Iterator[tuple[str, str, list[bytes]]]:
    lines = [json.loads(line) for line in PGOUTPUT_MESSAGES.read_text().splitlines()]
    for (server, protocol, scenario), of_one in itertools.groupby(lines, lambda line: [*line.values()][:3]):
        if scenario in BUSTS:
            yield f"{server}-v{protocol}", scenario, [bytes.fromhex(line["hex"]) for line in of_one]


@pytest.mark.parametrize(
    ("scenario", "payloads"),
    [pytest.param(scenario, payloads, id=f"{server}-{scenario}") for server, scenario, payloads in recordings()],
)
def test_a_recorded_scenario_busts_what_its_script_changed(scenario: str, payloads: list[bytes]) -> None:
    caches = "".join(f'  {table}: {{key: "{table}:{{{column}}}"}}\n' for table, column in KEYS.items())
    entries = "".join(f"  - {{name: {table}, table: public.{table}, bust: [{table}]}}\n" for table in KEYS)
    stream = Stream(parse_rules([("rules.yaml", f"version: 1\ncaches:\n{caches}rules:\n{entries}")], {}))
    decoder = pgoutput.Decoder()

    batches = [batch for payload in payloads for batch in stream.feed(decoder.decode(payload))]

    expected = [{part.replace("sweep:", "sweep ") for part in line.split()} for line in BUSTS[scenario]]
    assert [set(told(batch)) for batch in batches] == expected
    assert all(batch.end_lsn is not None for batch in batches)
    assert stream.assembly.held == 0
    assert stream.complaints == []


# ── Sequences that PostgreSQL does not send ──────────────────────────────────────────────────────────────────────────

INSERT = insert("1", "7", "Ada", None)
NARROW, WIDE = row("1", "7", "Ada"), row("1", "7", "Ada", None, None)
RIGHT = row("1", "7", "Ada", None)


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param([BEGIN, BEGIN], id="begin_in_begin"),
        pytest.param([COMMIT], id="commit_without_begin"),
        pytest.param([BEGIN, COMMIT, COMMIT], id="commit_after_commit"),
        pytest.param([INSERT], id="insert_without_begin"),
        pytest.param([update(RIGHT)], id="update_without_begin"),
        pytest.param([delete(old=RIGHT)], id="delete_without_begin"),
        pytest.param([truncate(USERS)], id="truncate_without_begin"),
        pytest.param([BEGIN, COMMIT, INSERT], id="insert_after_commit"),
        pytest.param([BEGIN, insert("1", oid=ORDERS)], id="insert_before_relation"),
        pytest.param([BEGIN, update(row("1"), oid=ORDERS)], id="update_before_relation"),
        pytest.param([BEGIN, delete(key=row("1"), oid=ORDERS)], id="delete_before_relation"),
        pytest.param([BEGIN, truncate(USERS, ORDERS)], id="truncate_before_relation"),
        pytest.param([BEGIN, insert(*NARROW)], id="narrow_insert"),
        pytest.param([BEGIN, insert(*WIDE)], id="wide_insert"),
        pytest.param([BEGIN, update(NARROW)], id="narrow_update"),
        pytest.param([BEGIN, update(WIDE, old=RIGHT)], id="wide_update"),
        pytest.param([BEGIN, update(RIGHT, old=NARROW)], id="narrow_old_row"),
        pytest.param([BEGIN, update(RIGHT, key=WIDE)], id="wide_old_key"),
        pytest.param([BEGIN, delete(key=NARROW)], id="narrow_delete"),
        pytest.param([BEGIN, delete(old=WIDE)], id="wide_delete"),
        pytest.param([BEGIN, start(1)], id="block_in_begin"),
        pytest.param([start(1), start(1)], id="block_in_block"),
        pytest.param([start(1), BEGIN], id="begin_in_block"),
        pytest.param([start(1), COMMIT], id="commit_in_block"),
        pytest.param([start(1), INSERT], id="row_in_block_of_no_transaction"),
        pytest.param([start(1), stream_commit(1)], id="stream_commit_in_block"),
        pytest.param([start(1), STOP, BEGIN, stream_commit(1)], id="stream_commit_in_begin"),
        pytest.param([start(1), STOP, stream_commit(1), stream_commit(1)], id="stream_commit_twice"),
        pytest.param([start(1), STOP, INSERT], id="insert_after_block"),
        pytest.param([stream_commit(1)], id="stream_commit_of_nothing"),
        pytest.param([BEGIN, abort(1)], id="stream_abort_of_nothing"),
        pytest.param([start(1), abort(1)], id="stream_abort_in_block"),
        pytest.param([start(1), insert("1", oid=ORDERS)._replace(xid=1)], id="streamed_insert_before_relation"),
        pytest.param([start(1), insert(*NARROW)._replace(xid=1)], id="narrow_streamed_insert"),
    ],
)
def test_a_sequence_that_cannot_be_is_malformed(sequence: list[pgoutput.AnyMessage]) -> None:
    stream = users("user")
    stream.feed(*sequence[:-1])

    with pytest.raises(errors.MalformedMessage):
        stream.feed(sequence[-1])


# ── Any rule, any table, any change: against what the rows really were ───────────────────────────────────────────────

ANY_COLUMNS = ("a", "b", "c", "d")


class Shape(NamedTuple):
    """A table's identity, and the columns whose values are stored out of line."""

    identity: str
    keys: tuple[str, ...]
    toasted: frozenset[str]


class AnyRule(NamedTuple):
    """One rule that busts one cache."""

    params: tuple[str, ...]
    watched: frozenset[str]
    immutable: frozenset[str]


@dataclass(frozen=True)
class Change:
    """What really happened to a row; None where there was or is no row."""

    before: dict[str, str | None] | None
    after: dict[str, str | None] | None

    def images(self) -> list[dict[str, str | None]]:
        return [image for image in (self.before, self.after) if image is not None]

    def differs(self, columns: frozenset[str]) -> bool:
        if self.before is None or self.after is None:
            return True
        return any(self.before[column] != self.after[column] for column in columns)


def as_postgresql_sends_it(change: Change, shape: Shape) -> pgoutput.Change:
    """The message: old tuples as the identity has it, and untouched TOAST values left out."""
    before, after = change.before, change.after
    old = None if before is None else row(*(before[column] for column in ANY_COLUMNS))
    if old is not None and shape.identity != "f":
        old = [value if column in shape.keys else None for column, value in zip(ANY_COLUMNS, old, strict=True)]
    kind = "O" if shape.identity == "f" else "K"
    if after is None:
        assert old is not None
        return Delete(None, USERS, kind, old)
    if before is None:
        return Insert(None, USERS, row(*(after[column] for column in ANY_COLUMNS)))
    untouched = {column for column in shape.toasted if before[column] is not None and before[column] == after[column]}
    new = row(*(UNCHANGED if column in untouched else after[column] for column in ANY_COLUMNS))
    # A key tuple is sent where the identity's columns changed, or where one of them is stored out of line.
    if shape.identity != "f" and not change.differs(frozenset(shape.keys)) and not untouched & set(shape.keys):
        return Update(None, USERS, "", None, new)
    return Update(None, USERS, kind, old, new)


shapes = st.builds(
    Shape,
    identity=st.sampled_from("df"),
    keys=st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "d")]),
    toasted=st.frozensets(st.sampled_from(ANY_COLUMNS)),
)
any_rules = st.builds(
    AnyRule,
    params=st.lists(st.sampled_from(ANY_COLUMNS), unique=True, max_size=3).map(tuple),
    watched=st.frozensets(st.sampled_from(ANY_COLUMNS), max_size=2),
    immutable=st.frozensets(st.sampled_from(ANY_COLUMNS), max_size=2),
)


@st.composite
def changes(draw: st.DrawFn, shape: Shape, immutable: frozenset[str]) -> Change:
    value = st.sampled_from(["1", "2", ""])
    rows = st.fixed_dictionaries(
        {column: value if column in shape.keys else value | st.none() for column in ANY_COLUMNS}
    )
    before, after = draw(st.none() | rows), draw(st.none() | rows)
    assume(before is not None or after is not None)
    if before is not None and after is not None:
        after |= {column: before[column] for column in immutable}
    return Change(before, after)


@given(shape=shapes, rule=any_rules, old_row=st.sampled_from(["require", "sweep"]), data=st.data())
def test_every_key_of_what_the_row_was_and_is_is_busted(
    shape: Shape, rule: AnyRule, old_row: str, data: st.DataObject
) -> None:
    """And with a full identity nothing else is."""
    happened = data.draw(st.lists(changes(shape, rule.immutable), min_size=1, max_size=4))
    key = "k" + "".join(f":{{{param}}}" for param in rule.params)
    watching = f"columns: [{', '.join(sorted(rule.watched))}], " if rule.watched else ""
    text = f"""
version: 1
caches: {{c: {{key: "{key}"}}}}
rules:
  - {{name: r, table: public.users, old_row: {old_row}, {watching}immutable: [{", ".join(sorted(rule.immutable))}],
      bust: [c]}}
"""
    stream = Stream(
        parse_rules([("rules.yaml", text)], {}),
        relation(identity=shape.identity, keys=shape.keys, columns=ANY_COLUMNS),
        chunk=2,
    )
    stale = {
        ":".join(["k", *(image[param] or "" for param in rule.params)])
        for change in happened
        if not rule.watched or change.differs(rule.watched | set(rule.params))
        for image in change.images()
        if None not in [image[param] for param in rule.params]
    }
    busted = stream.busts(*(as_postgresql_sends_it(change, shape) for change in happened))

    if "sweep c" not in busted:
        assert stale <= busted
    if shape.identity == "f":
        assert busted == stale
