"""Waiting for an event with a limit of time."""

from __future__ import annotations

import asyncio


async def within(seconds: float | None, event: asyncio.Event) -> bool:
    """Wait for the event, at most this many seconds (``None``: no limit); return whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
