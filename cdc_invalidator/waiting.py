"""To wait for an event, but not longer than so many seconds."""

from __future__ import annotations

import asyncio


async def within(seconds: float | None, event: asyncio.Event) -> bool:
    """Wait until the event is set, at most so many seconds (``None``: without a limit); return whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
