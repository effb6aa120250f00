"""Whether the watermark of another deployment, which is alive, is in the place of ours.

Two deployments with one name for their watermark would each take the other's for a gap, and sweep for ever.

Mostly the other one has another PostgreSQL. It may also have a copy of ours, or another slot of ours, with the same
system identifier; then its watermark looks like ours, and only whoever holds the slot, or is about to make it, can tell
that somebody else writes.

The rule that holds here: no clocks are compared. Who is alive writes its watermark at least once a second, so it is
read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from cdc_invalidator import errors
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.redis.watermark import Watermark

# Within this time, a daemon that is alive has written its watermark again.
LIFE_SIGN_SECONDS = 2.5


async def refuse_occupied(
    server: CacheServer, found: Sequence[Watermark | None], system_id: str, *, suspicious: bool
) -> Sequence[Watermark | None]:
    """Return the watermarks of a Redis as they are now; refuse it while another deployment's daemon writes there.

    Args:
        server: holds them.
        found: what was just read of it.
        system_id: identifies our PostgreSQL.
        suspicious: somebody else may write a watermark with our system identifier.

    Raises:
        errors.WatermarkTaken: another daemon is alive.
        errors.RedisUnavailable: they can't be read again.
    """
    ours = None if suspicious else system_id
    before = _of_others(found, ours)
    if not before:
        return found
    await asyncio.sleep(LIFE_SIGN_SECONDS)
    found = await server.read_watermarks()
    moved = _of_others(found, ours) - before
    if moved:
        key, other = server.watermark_key.decode(), min(moved)[0]
        whose = "another slot or copy of this PostgreSQL" if other == system_id else "another PostgreSQL"
        raise errors.WatermarkTaken(
            f"A daemon of {whose} (system identifier {other}) is writing {key} in this Redis, and the two "
            "would sweep each other's caches for ever; stop the other one, or set CDC_WATERMARK to another name here, "
            "and give it to the readers."
        )
    return found


def _of_others(found: Iterable[Watermark | None], ours: str | None) -> set[tuple[str, int, int]]:
    """Return what tells the watermarks of other systems from those that they write next; without ``ours``, of all."""
    return {
        (watermark.system_id, watermark.at, watermark.lsn)
        for watermark in found
        if watermark is not None and watermark.system_id != ours
    }
