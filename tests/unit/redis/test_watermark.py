"""The watermark: what is written is read again, and every kind of lost continuity is a gap."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator.redis import watermark
from cdc_invalidator.redis.watermark import Position, Watermark

RULES = {"user": "d1", "dashboard": "d2"}
FOUND = Watermark(lsn=1000, at=1_700_000_000_000, system_id="7300000000000000001", timeline=1, rules=RULES)
POSITION = Position(system_id="7300000000000000001", timeline=1, start=1000, flushed=2000)


def as_redis_gives_it(fields: dict[str, str | int]) -> dict[bytes, bytes]:
    return {name.encode(): str(value).encode() for name, value in fields.items()}


def test_its_fields_are_those_of_the_design() -> None:
    assert FOUND.fields() == {
        "lsn": 1000,
        "at": 1_700_000_000_000,
        "system_id": "7300000000000000001",
        "timeline": 1,
        "rules": '{"dashboard":"d2","user":"d1"}',
    }
    standbys = {"b:2": None, "a:1": "123.5"}
    assert replace(FOUND, standbys=standbys).fields()["standbys"] == '{"a:1":"123.5","b:2":null}'
    assert replace(FOUND, as_of=1_700_000_000_000).fields()["as_of"] == 1_700_000_000_000
    assert replace(FOUND, crash_free_since="1.5").fields()["crash_free_since"] == "1.5"


@given(
    st.builds(
        Watermark,
        lsn=st.integers(0, 2**64 - 1),
        at=st.integers(0, 2**53),
        system_id=st.integers(0, 2**64 - 1).map(str),
        timeline=st.integers(1, 2**32 - 1),
        rules=st.dictionaries(st.text(), st.text()),
        standbys=st.dictionaries(st.text(), st.none() | st.text()),
        as_of=st.integers(0, 2**53),
        crash_free_since=st.text(),
        last_commit=st.text(),
    )
)
def test_what_is_written_is_read_again(written: Watermark) -> None:
    assert Watermark.read(as_redis_gives_it(written.fields())) == written


def test_fields_that_others_added_do_no_harm() -> None:
    assert Watermark.read(as_redis_gives_it(FOUND.fields()) | {b"note": b"mine"}) == FOUND


@pytest.mark.parametrize("name", FOUND.fields())
def test_a_missing_field_makes_it_no_watermark(name: str) -> None:
    fields = as_redis_gives_it(FOUND.fields())
    del fields[name.encode()]

    assert Watermark.read(fields) is None


def test_an_empty_hash_is_no_watermark() -> None:
    assert Watermark.read({}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"lsn", b""),
        (b"lsn", b"16/B374D848"),
        (b"lsn", b"1e3"),
        (b"lsn", b"9" * 5000),
        (b"at", b"yesterday"),
        (b"timeline", b"1.0"),
        (b"timeline", b"\xff"),
        (b"system_id", b"\xff\xfe"),
        (b"rules", b""),
        (b"rules", b"{"),
        (b"rules", b"[]"),
        (b"rules", b"null"),
        (b"rules", b'"user"'),
        (b"rules", b"\xff"),
        (b"rules", b"[" * 100_000),
    ],
)
def test_a_field_that_we_did_not_write_makes_it_no_watermark(name: bytes, value: bytes) -> None:
    assert Watermark.read(as_redis_gives_it(FOUND.fields()) | {name: value}) is None


@given(st.sampled_from(sorted(FOUND.fields())), st.binary(max_size=30) | st.text(max_size=30).map(str.encode))
def test_whatever_a_field_holds_reading_does_not_fail(name: str, value: bytes) -> None:
    read = Watermark.read(as_redis_gives_it(FOUND.fields()) | {name.encode(): value})

    assert read is None or isinstance(read, Watermark)


def test_digests_of_another_type_are_read_and_differ_from_ours() -> None:
    fields = as_redis_gives_it(FOUND.fields()) | {b"rules": json.dumps({"user": None, "dashboard": 2}).encode()}

    assert watermark.gaps(Watermark.read(fields), POSITION, RULES) == dict.fromkeys(RULES, "rules_changed")


@pytest.mark.parametrize(
    ("found", "position"),
    [
        pytest.param(FOUND, POSITION, id="it_stands_where_the_stream_starts"),
        pytest.param(replace(FOUND, lsn=1500), POSITION, id="it_is_ahead_so_some_is_replayed"),
        pytest.param(replace(FOUND, lsn=2000), POSITION, id="it_has_all_that_the_server_has"),
        pytest.param(replace(FOUND, at=0), POSITION, id="it_is_old_but_nothing_was_missed"),
        pytest.param(replace(FOUND, rules=RULES | {"gone": "d3"}), POSITION, id="a_cache_is_no_longer_in_the_rules"),
    ],
)
def test_continuity_that_is_proven_is_no_gap(found: Watermark, position: Position) -> None:
    assert watermark.gaps(found, position, RULES) == {}


@pytest.mark.parametrize(
    ("found", "position", "reason"),
    [
        pytest.param(None, POSITION, "no_watermark", id="an_emptied_or_another_redis"),
        pytest.param(FOUND, replace(POSITION, new_slot=True), "new_slot", id="a_slot_made_anew"),
        pytest.param(None, replace(POSITION, new_slot=True), "new_slot", id="a_first_start"),
        pytest.param(replace(FOUND, system_id="2"), POSITION, "other_system", id="another_database_server"),
        pytest.param(replace(FOUND, timeline=2), POSITION, "other_timeline", id="a_timeline_that_was_left"),
        pytest.param(FOUND, replace(POSITION, timeline=2), "other_timeline", id="a_promoted_standby"),
        pytest.param(
            replace(FOUND, crash_free_since="1.5"),
            replace(POSITION, crash_free_since="2.5"),
            "server_crashed",
            id="commits_may_have_been_taken_back",
        ),
        pytest.param(
            FOUND, replace(POSITION, crash_free_since="2.5"), "server_crashed", id="nobody_wrote_down_since_when"
        ),
        pytest.param(replace(FOUND, lsn=999), POSITION, "missed_changes", id="an_old_snapshot_or_a_slot_moved_on"),
        pytest.param(replace(FOUND, lsn=0), POSITION, "missed_changes", id="a_watermark_of_nothing"),
        pytest.param(replace(FOUND, lsn=-1), POSITION, "missed_changes", id="an_lsn_below_zero"),
        pytest.param(replace(FOUND, lsn=2001), POSITION, "database_went_back", id="a_restored_backup"),
        pytest.param(
            replace(FOUND, system_id="2", timeline=2, lsn=5000), POSITION, "other_system", id="nothing_is_as_it_was"
        ),
    ],
)
def test_lost_continuity_is_a_gap_of_every_cache(found: Watermark | None, position: Position, reason: str) -> None:
    assert watermark.gaps(found, position, RULES) == {"user": reason, "dashboard": reason}


def test_a_cache_whose_rules_changed_is_a_gap_alone() -> None:
    assert watermark.gaps(FOUND, POSITION, RULES | {"user": "d9"}) == {"user": "rules_changed"}


def test_a_new_cache_is_a_gap_alone() -> None:
    assert watermark.gaps(FOUND, POSITION, RULES | {"counts": "d3"}) == {"counts": "rules_changed"}


def test_without_caches_there_is_nothing_to_sweep() -> None:
    assert watermark.gaps(None, replace(POSITION, new_slot=True), {}) == {}
