"""What the page knows of the last quarter of an hour, in memory that does not grow."""

from __future__ import annotations

from cdc_invalidator.web.history import MOST_CACHES, OTHERS, SAMPLES, Counts, History


def test_a_sample_has_what_was_counted_since_the_one_before() -> None:
    counted = {"user": Counts(5, 3, 1)}
    history = History(lambda: counted)
    history.sample()
    counted["user"] = Counts(15, 4, 1)
    counted["page"] = Counts(1, 0, 0)
    history.sample()
    history.sample()
    assert history.of("user") == [Counts(5, 3, 1), Counts(10, 1, 0), Counts()]
    assert history.of("page") == [Counts(), Counts(1, 0, 0), Counts()]
    assert history.of("nobody") == []


def test_the_oldest_sample_gives_way() -> None:
    total = 0

    def read() -> dict[str, Counts]:
        nonlocal total
        total += 1
        return {"user": Counts(total * (total + 1) / 2)}

    history = History(read)
    for _ in range(SAMPLES + 7):
        history.sample()
    assert [counts.keys for counts in history.of("user")] == list(range(8, SAMPLES + 8))


def test_a_cache_whose_counters_are_gone_has_nothing_more() -> None:
    counted = {"user": Counts(5)}
    history = History(lambda: counted)
    history.sample()
    counted.clear()
    history.sample()
    assert history.of("user") == [Counts(5), Counts()]


def test_caches_beyond_the_most_are_one() -> None:
    counted = {f"cache{number}": Counts(2) for number in range(MOST_CACHES + 100)}
    history = History(lambda: counted)
    history.sample()
    assert len(history.caches) == MOST_CACHES + 1
    assert history.of(OTHERS) == [Counts(200)]
    counted |= {f"more{number}": Counts(1) for number in range(1000)}
    history.sample()
    assert len(history.caches) == MOST_CACHES + 1
    assert history.of(OTHERS)[-1] == Counts(1000)
