"""The common case of the data path in one pass, by the compiled part: from bytes of the stream to keys. Pure.

Most of a stream is small transactions on tables with plain rules: no condition, no query, no filter, nothing that is
held or done twice. `transactions` takes whole transactions, and `rows` the rows of large ones. Both stop at whatever is
not plain, and leave it to `pgoutput`, `assembly` and `plan`, which are the reference. Without the compiled part these
do everything, at some five times the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from cdc_invalidator.pipeline.batch import BustEvent, Target

try:
    from cdc_invalidator.compiled import _scan
except ImportError:
    # No wheel for this platform, and no C compiler when it was installed.
    COMPILED = False
else:
    COMPILED = True

# What the compiled part has room for: PostgreSQL's limit is 1,600.
_MOST_COLUMNS = 1664

Plans: TypeAlias = "Mapping[int, Planned | None]"
PlainFiring: TypeAlias = "tuple[Target, Sequence[bytes], Sequence[int], str]"
"""A target; the literals of its key, one more than its columns; the columns between them; what is known of the old row
(``given``, ``kept``, ``ignore``)."""
PlainRules: TypeAlias = "Sequence[tuple[Sequence[int], Sequence[PlainFiring]]] | None"
"""For each rule, the columns of which an UPDATE must change one, none for any, and what it busts; ``None`` where one of
them is not plain."""


class Planned(Protocol):
    """A `Plan`, as far as the pass reads it: what `compile_plain` gave for its relation."""

    table: _scan.Table | None


class Transactions(NamedTuple):
    """What `transactions` has taken: where it stopped, and how many were taken, with the end of the last one.

    ``events``: what they bust; ``xids``: those that bust anything.
    """

    pos: int
    taken: int
    end_lsn: int
    events: list[BustEvent]
    xids: list[int]


class Rows(NamedTuple):
    """What `rows` has taken: where it stopped, and how many were taken; ``xid`` as the stream gives it.

    ``found``: for each target, the kinds of change, and keys, which may repeat.
    """

    pos: int
    taken: int
    xid: int | None
    found: list[tuple[Target, str, list[bytes]]]


def compile_plain(
    name: str,
    identity: Sequence[bool],
    inserts: PlainRules,
    updates: PlainRules,
    deletes: PlainRules,
    counts: MutableMapping[tuple[str, str], int],
) -> _scan.Table | None:
    """Make the rules of a relation ready for the pass; ``None`` without the compiled part, and for too wide a relation.

    Args:
        name: what rules know it by.
        identity: for each column, whether an old key tuple carries it.
        inserts: the rules for an INSERT.
        updates: the rules for an UPDATE.
        deletes: the rules for a DELETE.
        counts: is counted up, by table and kind of change.
    """
    if not COMPILED or len(identity) > _MOST_COLUMNS:
        return None
    return _scan.Table(name, identity, inserts, updates, deletes, counts)


def transactions(data: bytes, pos: int, plans: Plans, event_type: type[BustEvent], *, limit: int) -> Transactions:
    """Take whole transactions, as long as they are small and plain.

    Args:
        data: whole CopyData messages.
        pos: where in them to begin: between two transactions.
        plans: by relation.
        event_type: `batch.BustEvent`.
        limit: how many keys to take.
    """
    return Transactions(*_scan.transactions(data, pos, plans, event_type, limit))


def rows(data: bytes, pos: int, plans: Plans, own_plans: Plans, *, in_stream: bool, limit: int) -> Rows:
    """Take rows of one transaction, or subtransaction, as long as they are plain.

    Args:
        data: whole CopyData messages.
        pos: where in them to begin: in a transaction.
        plans: by relation.
        own_plans: those that only this transaction sees, which come first.
        in_stream: whether rows carry the id of their subtransaction.
        limit: how many keys to take.
    """
    return Rows(*_scan.rows(data, pos, plans, own_plans, in_stream, limit))
