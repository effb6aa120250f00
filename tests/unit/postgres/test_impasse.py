"""When a stream that fails at one position is to skip it."""

from __future__ import annotations

from cdc_invalidator.postgres.impasse import ATTEMPTS, SECONDS, Impasse


def test_it_takes_some_attempts_and_some_time() -> None:
    impasse = Impasse()

    assert not any(impasse.failed(100, now / 100) for now in range(10 * ATTEMPTS))
    assert impasse.failed(100, SECONDS)


def test_long_attempts_are_some_all_the_same() -> None:
    impasse = Impasse()

    assert [impasse.failed(100, now * SECONDS) for now in range(ATTEMPTS)] == [False] * (ATTEMPTS - 1) + [True]


def test_a_stream_that_gets_further_is_in_none() -> None:
    impasse = Impasse()

    assert not any(impasse.failed(position, position * SECONDS) for position in range(100))


def test_a_position_before_the_one_that_failed_counts_as_the_same() -> None:
    impasse = Impasse()

    # How far a keepalive gets before the failure is chance.
    assert [impasse.failed(position, now * SECONDS) for now, position in enumerate([100, 90, 99])][-1]


def test_after_a_skip_the_count_starts_over() -> None:
    impasse = Impasse()
    for now in range(ATTEMPTS):
        impasse.failed(100, now * SECONDS)

    assert not impasse.failed(100, ATTEMPTS * SECONDS)
