"""Which transactions a snapshot sees: ids in the 32 bits of the stream against the 64 bits of the snapshot."""

from __future__ import annotations

import pytest

from cdc_invalidator.postgres.snapshot import Horizon, hidden

EPOCH = 1 << 32


@pytest.mark.parametrize(
    ("snapshot", "xids", "unseen"),
    [
        ("100:100:", [99, 100, 101], {100, 101}),
        ("100:105:100,103", [99, 100, 101, 102, 103, 104, 105], {100, 103, 105}),
        ("100:100:", [], set()),
        # The ids have gone round: what is a little below 2³² was before what is a little above 3.
        (f"{EPOCH + 10}:{EPOCH + 12}:{EPOCH + 10}", [EPOCH - 5, 9, 10, 11, 12], {10, 12}),
        (f"{EPOCH - 2}:{EPOCH + 5}:{EPOCH - 2}", [EPOCH - 3, EPOCH - 2, 3, 4, 5], {EPOCH - 2, 5}),
        (f"{7 * EPOCH + 3}:{7 * EPOCH + 3}:", [EPOCH - 1, 3], {3}),
    ],
)
def test_a_transaction_is_hidden_while_it_runs_or_is_still_to_come(
    snapshot: str, xids: list[int], unseen: set[int]
) -> None:
    assert hidden(snapshot, xids) == unseen


def test_all_transactions_of_one_snapshot_are_over_once_the_oldest_of_another_came_after_them() -> None:
    assert Horizon(105, 110).covers(Horizon(100, 105))
    assert not Horizon(103, 110).covers(Horizon(100, 105))
    assert Horizon(100, 100).covers(Horizon(100, 100))
