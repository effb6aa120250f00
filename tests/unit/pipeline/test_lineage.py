"""Whether a stream is of the history that the watermark speaks of, by the last commit."""

from __future__ import annotations

import pytest

from cdc_invalidator.pipeline.batch import Batch, BustEvent, PlainBatch, Target
from cdc_invalidator.pipeline.lineage import Commit, Lineage
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.load import parse_rules

CACHE = parse_rules([("rules.yaml", 'version: 1\ncaches:\n  user: {key: "user:{id}", ttl_only: true}\n')], {}).caches[
    "user"
]
TARGET = Target("changed", CACHE, "public.users")


def single(lsn: int, at: int | None = 7) -> Batch:
    return Batch(lsn, at, 730)


def plain(*lsns: int, at: int = 7) -> PlainBatch:
    events = [BustEvent(TARGET, "delete", "insert", [b"user:1"], "change", lsn, at, lsn) for lsn in lsns]
    return PlainBatch(events, list(lsns), lsns[-1] + 5)


def expecting(last_commit: str, start: int = 100) -> Lineage:
    lineage = Lineage()
    lineage.expect([Watermark(500, 0, "7", 1, {}, last_commit=last_commit), None], start)
    return lineage


def test_a_commit_is_read_as_it_was_written() -> None:
    assert Commit.read(str(Commit(200, -7))) == (200, -7)
    assert [Commit.read(text) for text in ("", "200", "200:", "x:7")] == [None] * 4


@pytest.mark.parametrize("batch", [single(200), plain(100, 200), plain(200, 300)])
def test_a_stream_that_brings_the_commit_again_is_of_that_history(batch: Batch | PlainBatch) -> None:
    lineage = expecting("200:7")
    found = []
    for taken in ([], [single(150)], [batch]):
        differs = lineage.differs(taken, 0)
        found.append((lineage.proven, differs))
    assert found == [(False, False), (False, False), (True, False)]
    assert not lineage.differs([], 10_000)


@pytest.mark.parametrize("batch", [single(200, at=8), single(201), plain(100, 300), plain(200, at=8)])
def test_another_commit_in_its_place_is_of_another_history(batch: Batch | PlainBatch) -> None:
    lineage = expecting("200:7")
    assert lineage.differs([single(150), batch], 0)
    lineage.trust()
    assert lineage.proven
    assert not lineage.differs([single(300)], 0)


def test_a_commit_of_a_history_that_is_gone_is_forgotten() -> None:
    lineage = expecting("200:7")
    assert lineage.differs([], 300)
    lineage.trust()
    assert lineage.last is None


def test_no_commit_in_its_place_is_of_another_history() -> None:
    lineage = expecting("200:7")
    assert not lineage.differs([], 200)
    assert lineage.differs([], 201)


@pytest.mark.parametrize("last_commit", ["", "99:7", "nonsense"])
def test_what_need_not_come_again_is_not_awaited(last_commit: str) -> None:
    lineage = expecting(last_commit)
    assert lineage.proven
    assert not lineage.differs([single(300)], 400)


def test_it_knows_the_last_commit() -> None:
    lineage = expecting("99:7")
    assert lineage.last == (99, 7)
    lineage.differs([single(150), plain(160, 170), single(180, at=None)], 0)
    assert lineage.last == (170, 7)
    lineage.differs([], 0)
    assert lineage.last == (170, 7)
