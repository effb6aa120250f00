"""Which standbys the busts wait for: those that the watermark speaks for, as far as they are known to have come."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from cdc_invalidator import errors
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.postgres.standbys import Standbys

NAME = "db2:5432"


def standbys_of(*dsns: str) -> Standbys:
    text = " ".join(dsns) or "postgresql://reader:secret@db2/shop"
    return Standbys(lambda: text, limit=1, metrics=Metrics(CollectorRegistry()))


def test_one_whose_connection_is_lost_may_show_less_when_it_comes_back() -> None:
    known = standbys_of()
    known.recall({NAME: "1700000000.5"})
    known._replayed(known._standbys[0], 500, 0)
    assert known.replayed == 500

    known.close()

    assert (known.dropped, known.replayed) == ([], 0)


@pytest.mark.parametrize(
    ("standbys", "dropped"),
    [({NAME: "1700000000.5"}, []), ({NAME: None}, [NAME]), ({}, [NAME]), (None, [NAME])],
    ids=["with a start", "as dropped", "not at all", "without a watermark"],
)
def test_only_one_that_the_watermark_speaks_for_is_awaited(
    standbys: dict[str, str | None] | None, dropped: list[str]
) -> None:
    known = standbys_of()

    assert not known.recall(standbys)

    assert known.dropped == dropped
    assert known.known == {NAME: None if dropped else "1700000000.5"}
    assert known.awaited is not bool(dropped)


def test_one_that_was_dropped_and_is_not_named_any_more_is_told() -> None:
    assert standbys_of().recall({NAME: "1700000000.5", "db3:5432": None})


def test_one_that_was_awaited_and_is_not_named_any_more_is_no_harm() -> None:
    assert not standbys_of().recall({NAME: "1700000000.5", "db3:5432": "1700000000.5"})


@pytest.mark.parametrize(
    "dsns",
    [["host=db2"], ["postgresql://db2/a", "postgresql://db2:5432/b"]],
    ids=["words", "twice"],
)
def test_what_names_no_standby_or_one_twice_is_refused(dsns: list[str]) -> None:
    with pytest.raises(errors.WrongSettings, match=r"^CDC_POSTGRES_STANDBYS [^.]+\.$"):
        standbys_of(*dsns)
