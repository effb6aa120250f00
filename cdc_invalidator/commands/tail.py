"""`tail`: the events of the event stream in the terminal, a line each, as the daemon's own log shows them."""

from __future__ import annotations

import os
import select
import sys
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cdc_invalidator import errors, log
from cdc_invalidator.commands.event_stream import EVER, StreamEntry, follow
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.duration import read_duration


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events are shown: those of a cache, of a rule; ``None`` for those of all."""

    cache: str | None = None
    rule: str | None = None

    def __contains__(self, event: dict[str, Any]) -> bool:
        # A gap names all its caches, and no rule.
        caches = event.get("caches") or [event.get("cache")]
        return self.cache in {None, *caches} and self.rule in {None, event.get("rule")}


def read_since(text: str | None) -> int:
    """Read ``--since``, in milliseconds.

    Raises:
        errors.WrongSettings: it is neither a duration nor ``all``.
    """
    if text is None:
        return 0
    if text == "all":
        return EVER
    try:
        return read_duration(text)
    except ValueError as error:
        raise errors.WrongSettings(f"--since: {error}, or all.") from None


async def run(source: EndpointSource, key: str, wanted: Wanted, since: int, form: log.Form) -> None:
    """Write events to standard output until nobody reads it.

    Args:
        source: the Redis that the daemon busts.
        key: its event stream.
        wanted: which events.
        since: see `event_stream.follow`.
        form: their JSON lines, or text.

    Raises:
        errors.InvalidatorError: the stream can't be read.
    """
    if sys.stdout is None:
        raise errors.WrongSettings("Standard output is closed; start tail with its output going somewhere.")
    render = log.console()

    def line(entry: StreamEntry) -> bytes:
        return entry.line if form == "json" else render(None, "", _printable(entry.event)).encode()

    reader = select.poll()
    # That it is gone is told without being asked for.
    reader.register(sys.stdout, 0)
    async with aclosing(follow(source, key, since=since, lost=_lost)) as batches:
        async for entries in batches:
            text = b"".join(line(entry) + b"\n" for entry in entries if entry.event in wanted)
            try:
                sys.stdout.buffer.write(text)
                sys.stdout.flush()
            except BrokenPipeError:
                # Or Python would try to flush once more when it ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return
            if reader.poll(0):
                return


def _lost(error: errors.RedisUnavailable) -> None:
    print(f"{error} Events go on once it is back.", file=sys.stderr)  # noqa: T201  not among the events


def _printable(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event whose texts can do nothing to a terminal."""
    return {
        repr(name)[1:-1]: repr(value) if isinstance(value, str) and not value.isprintable() else value
        for name, value in event.items()
    }
