"""What each change busts: which keys, and when nothing but a sweep will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
from changes import (
    LEAF,
    ORDERS,
    OTHER,
    USERS,
    Stream,
    delete,
    insert,
    relation,
    row,
    rule_set,
    told,
    truncate,
    update,
    users,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from cdc_invalidator.postgres import pgoutput
from cdc_invalidator.postgres.pgoutput import Delete, Insert, Update
from cdc_invalidator.rules.load import parse_rules
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.values import UNCHANGED, Value

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


# ── The condition on each image of a row ──────────────────────────────────────────────────────────────────────────────

ADA = "where: \"row.name == 'Ada'\""


def test_only_the_images_that_satisfy_the_condition_bust() -> None:
    stream = users("team", fields=ADA, identity="f")
    ada, eva = row("42", "7", "Ada", None), row("42", "9", "Eva", None)

    assert stream.busts(insert("42", "7", "Ada", None), insert("42", "8", "Eva", None)) == {"team:7"}
    assert stream.busts(update(eva, old=ada)) == {"team:7"}
    assert stream.busts(update(ada, old=eva)) == {"team:7"}
    assert stream.busts(update(eva, old=eva)) == set()
    assert stream.busts(delete(old=ada), delete(old=eva)) == {"team:7"}
    assert stream.busts(delete(old=eva)) == set()


def test_a_truncate_is_not_asked() -> None:
    assert users("team", fields=ADA, identity="f").busts(truncate(USERS)) == {"sweep team"}


@pytest.mark.parametrize("name", ["Eva", None])
def test_a_row_that_leaves_the_condition_busts_its_key_though_its_old_row_is_not_sent(name: str | None) -> None:
    # Without an old tuple the key is as it was; whether the row counted then is not known.
    assert users("user", fields=ADA).busts(update(row("42", "7", name, None))) == {"user:42"}
    moved = update(row("43", "7", name, None), key=row("42", None, None, None))
    assert users("user", fields=ADA).busts(moved) == {"user:42"}


def test_a_condition_on_what_the_identity_carries_or_what_never_changes_is_decided_for_the_old_row() -> None:
    by_key = users("user", fields="where: \"row.id == '1'\"")
    assert by_key.busts(update(row("42", "7", "Ada", None))) == set()
    assert by_key.busts(update(row("42", "7", "Ada", None), key=row("1", None, None, None))) == {"user:1"}
    assert by_key.busts(delete(key=row("42", None, None, None))) == set()
    kept = users("user", fields=f"{ADA}, immutable: [name]")
    assert kept.busts(update(row("42", "7", "Eva", None))) == set()
    assert kept.busts(update(row("42", "7", "Ada", None))) == {"user:42"}
    assert kept.busts(delete(key=row("42", None, None, None))) == {"user:42"}


def test_where_the_old_key_is_not_known_an_image_that_does_not_count_sweeps_nothing() -> None:
    stream = users("team", fields="old_row: sweep, where: \"row.id == '1'\"")

    assert stream.busts(update(row("42", "7", "Ada", None)), delete(key=row("42", None, None, None))) == set()
    assert stream.busts(update(row("1", "7", "Ada", None))) == {"team:7", "sweep team"}
    assert stream.busts(delete(key=row("1", None, None, None))) == {"sweep team"}
    undecided = users("team", fields=f"old_row: sweep, {ADA}")
    assert undecided.busts(delete(key=row("1", None, None, None))) == {"sweep team"}


def test_a_row_that_leaves_the_condition_busts_the_key_that_it_has_where_the_old_one_is_ignored() -> None:
    stream = users("team", fields=f"old_row: ignore, {ADA}")

    assert stream.busts(update(row("42", "7", "Eva", None))) == {"team:7"}
    assert stream.busts(delete(key=row("42", None, None, None))) == set()


def test_an_immutable_column_of_the_key_is_taken_from_the_new_row_though_that_does_not_count() -> None:
    stream = users("team", fields=f"old_row: sweep, immutable: [team_id], {ADA}")

    assert stream.busts(update(row("42", "7", "Eva", None))) == {"team:7"}


def test_a_condition_that_reads_a_toast_value_which_is_not_sent_counts_as_true() -> None:
    stream = users("user", fields="where: \"row.bio == 'x'\"")

    assert stream.busts(update(row("42", "7", "Ada", UNCHANGED))) == {"user:42"}
    full = users("user", fields="where: \"row.bio == 'x'\"", identity="f")
    assert full.busts(update(row("42", "7", "Ada", UNCHANGED), old=row("42", "7", "Ada", "y"))) == set()


@pytest.mark.parametrize("where", ["row.name > 'A'", "row.team_id.size() > 3"])
def test_a_condition_that_fails_counts_as_true(where: str) -> None:
    assert users("user", fields=f'where: "{where}"', identity="f").busts(insert("42", None, None, None)) == {"user:42"}


def test_an_update_that_changes_a_column_of_the_condition_counts_though_no_one_watches_it() -> None:
    stream = users("team", fields=f"columns: [bio], {ADA}", identity="f")
    ada, eva = row("42", "7", "Ada", "x"), row("42", "7", "Eva", "x")

    assert stream.busts(update(eva, old=ada)) == {"team:7"}
    assert stream.busts(update(ada, old=eva)) == {"team:7"}
    assert stream.busts(update(ada, old=ada)) == set()


def test_a_column_of_the_condition_that_never_changes_does_not_make_every_update_count() -> None:
    stream = users("user", fields=f"columns: [id], immutable: [name], {ADA}")

    assert stream.busts(update(row("42", "7", "Ada", "x"))) == set()


def test_one_rule_may_bust_one_cache_or_the_other_by_the_same_column() -> None:
    """As Mastodon's emoji: those of this server by their code, those of others by code and domain."""
    stream = users('user: {where: "row.team_id == null"}', 'member: {where: "row.team_id != null"}', identity="f")
    here, there = row("42", None, "Ada", None), row("42", "7", "Ada", None)

    assert stream.busts(insert("42", None, "Ada", None)) == {"user:42"}
    assert stream.busts(insert("42", "7", "Ada", None)) == {"team:7:user:42"}
    assert stream.busts(update(there, old=here)) == {"user:42", "team:7:user:42"}
    assert stream.busts(delete(old=there)) == {"team:7:user:42"}


def test_the_conditions_of_a_rule_and_of_a_bust_must_both_hold() -> None:
    stream = users("user: {where: \"row.team_id == '7'\"}", "team", fields=ADA, identity="f")

    assert stream.busts(
        insert("1", "7", "Ada", None), insert("2", "8", "Ada", None), insert("3", "7", "Eva", None)
    ) == {*("user:1", "team:7", "team:8")}


def test_a_query_is_asked_only_for_the_images_that_count() -> None:
    text = f"table: public.users, {ADA}, bust: [team: {{via: 'SELECT t AS team_id FROM x WHERE u = {{id}}'}}]"
    stream = Stream(rule_set(text), relation(identity="f"))
    ada, eva = row("42", "7", "Ada", None), row("43", "7", "Eva", None)

    # Its old image is a question that expects an answer: of it, something may be cached.
    assert stream.busts(update(eva, old=ada)) == {"!+42"}
    assert stream.busts(update(ada, old=eva)) == {"+42"}
    assert stream.busts(update(eva, old=eva), delete(old=eva)) == set()


def test_a_condition_on_a_column_that_is_not_there_counts_as_true_and_is_told() -> None:
    stream = users("user", fields="columns: [id], where: \"row.nam == 'Ada'\"")

    assert stream.busts(update(row("42", "7", "Eva", None))) == {"user:42"}
    assert ["has no column nam" in complaint.sentence for complaint in stream.complaints] == [True]


def test_a_condition_that_can_t_be_compared_counts_as_true_and_is_told_once() -> None:
    stream = users("user", "team", fields="old_row: ignore, where: row.name == 5")

    assert stream.busts(insert("42", "7", "Ada", None)) == {"user:42", "team:7"}
    (complaint,) = stream.complaints
    assert "`where` uses column name" in complaint.sentence
    assert complaint.sentence.endswith("; until then every row counts.")


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
    assert "run `cdc-invalidator check`" in complaint.sentence

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
    # Columns of which an image must have the value "1".
    where: frozenset[str]
    bust_where: frozenset[str]

    def counts(self, image: dict[str, str | None]) -> bool:
        return all(image[column] == "1" for column in self.where | self.bust_where)


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
    where=st.frozensets(st.sampled_from(ANY_COLUMNS), max_size=1),
    bust_where=st.frozensets(st.sampled_from(ANY_COLUMNS), max_size=1),
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
    where, bust_where = (
        "".join(f"where: \"row.{column} == '1'\"" for column in columns) for columns in (rule.where, rule.bust_where)
    )
    text = f"""
version: 1
caches: {{c: {{key: "{key}"}}}}
rules:
  - {{name: r, table: public.users, old_row: {old_row}, {watching}immutable: [{", ".join(sorted(rule.immutable))}],
      {where + ", " if where else ""}bust: [c: {{{bust_where}}}]}}
"""
    stream = Stream(
        parse_rules([("rules.yaml", text)], {}),
        relation(identity=shape.identity, keys=shape.keys, columns=ANY_COLUMNS),
        chunk=2,
    )
    stale = {
        ":".join(["k", *(image[param] or "" for param in rule.params)])
        for change in happened
        if not rule.watched or change.differs(rule.watched | set(rule.params) | rule.where | rule.bust_where)
        for image in change.images()
        if rule.counts(image)
        if None not in [image[param] for param in rule.params]
    }
    busted = stream.busts(*(as_postgresql_sends_it(change, shape) for change in happened))

    if "sweep c" not in busted:
        assert stale <= busted
    if shape.identity == "f":
        assert busted == stale
