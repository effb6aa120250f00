"""What is debounced: the first change at once, the last one always, and nothing held beyond what it needs."""

from __future__ import annotations

from cdc_invalidator.pipeline.batch import Batch, Target
from cdc_invalidator.pipeline.checkpoint import Checkpoint, Ticket
from cdc_invalidator.pipeline.debounce import MOST_XIDS, Debounce
from cdc_invalidator.rules.load import parse_rules

RULES = """
version: 1
caches: {user: {key: "user:{id}"}}
rules: [{name: r, table: public.users, debounce: 500ms, bust: [user]}]
"""
RULE = parse_rules([("rules.yaml", RULES)], {}).rules[0]
TARGET = Target(RULE.name, RULE.busts[0].cache, "public.users", RULE.busts[0], RULE.debounce or 0)


class DataPath:
    """A checkpoint and a debounce, fed with transactions."""

    def __init__(self, capacity: int = 100) -> None:
        self.checkpoint = Checkpoint(0)
        self.debounce = Debounce(self.checkpoint.resolve, capacity)
        self.lsn = 0

    def change(self, xid: int, now: float, *keys: str) -> tuple[Batch, Ticket]:
        batch = Batch(self.lsn + 5, 0, xid)
        for key in keys:
            batch.add(TARGET, ("update",), key.encode(), "change")
        ticket = self.checkpoint.track()
        self.lsn += 10
        self.checkpoint.received(self.lsn)
        self.debounce.hold([(batch, ticket)], now)
        self.checkpoint.resolve(ticket)
        return batch, ticket

    def due(self, now: float, *hidden: int) -> dict[int, set[bytes]]:
        found = self.debounce.due(now, hidden)
        for _, ticket in found:
            self.checkpoint.resolve(ticket)
        return {batch.xid: set(batch.busts[TARGET].keys) for batch, _ in found}


def test_the_first_change_goes_at_once_and_all_others_of_its_time_are_one() -> None:
    data_path = DataPath()
    batch, _ = data_path.change(1, 0.0, "a")
    assert set(batch.busts[TARGET].keys) == {b"a"}
    for xid in range(2, 6):
        batch, _ = data_path.change(xid, 0.1, "a", f"only {xid}")
        assert b"a" not in batch.busts[TARGET].keys
    assert data_path.checkpoint.position == 10, "what is held holds the position"
    assert data_path.due(0.4) == {}
    assert data_path.due(0.5) == {5: {b"a"}}
    assert data_path.checkpoint.position == data_path.lsn
    assert not data_path.debounce


def test_a_key_that_goes_on_changing_is_busted_once_in_each_time() -> None:
    data_path = DataPath()
    busts = 0
    for number in range(100):
        batch, _ = data_path.change(number + 1, number / 10, "a")
        busts += len(batch.busts[TARGET].keys) + len(data_path.due(number / 10))
    assert 19 <= busts <= 21


def test_a_transaction_that_readers_do_not_see_yet_is_waited_for_though_a_later_one_is_seen() -> None:
    data_path = DataPath()
    data_path.change(1, 0.0, "a")
    data_path.change(2, 0.1, "a")
    data_path.change(3, 0.2, "a")
    assert data_path.debounce.xids(0.6) == {2, 3}
    assert data_path.due(0.6, 2) == {2: {b"a"}, 3: {b"a"}}
    assert data_path.checkpoint.idle


def test_what_else_a_transaction_did_is_not_kept_with_its_held_key() -> None:
    data_path = DataPath()
    data_path.change(1, 0.0, "a")
    data_path.change(2, 0.1, "a", *map(str, range(1000)))
    assert data_path.debounce.next_due() == 0.5
    (held,) = data_path.debounce._held.values()
    assert held.last.busts == {}
    assert [batch.busts for batch in held.xids.values()] == [{}]


def test_a_key_that_too_many_transactions_change_is_busted_before_its_time() -> None:
    data_path = DataPath()
    data_path.change(1, 0.0, "a")
    for xid in range(2, MOST_XIDS + 10):
        data_path.change(xid, 0.1, "a")
    assert len(data_path.due(0.1)) == 1


def test_past_its_capacity_keys_are_busted_as_they_come() -> None:
    data_path = DataPath(capacity=10)
    for number in range(100):
        batch, _ = data_path.change(number + 1, 0.0, str(number))
        assert len(batch.busts[TARGET].keys) == 1
    batch, _ = data_path.change(1000, 0.1, "50")
    assert len(batch.busts[TARGET].keys) == 1
    batch, _ = data_path.change(1001, 0.6, "new")
    batch, _ = data_path.change(1002, 0.7, "new")
    assert len(batch.busts[TARGET].keys) == 0
