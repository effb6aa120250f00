"""What the daemon writes: JSON lines or text on standard output. Owns the shape of the bust events.

No raw key, row value, password or DSN secret is written unless `KeyDisplay` was told to show keys.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import sys
from collections.abc import Sequence
from typing import Any, Literal

import orjson
import structlog

# No bust goes unlogged, and no line grows without bound.
KEYS_A_LINE = 1000

KeyForm = Literal["prefix", "hash", "raw"]


def configure(form: Literal["json", "console"], level: str) -> None:
    """Set structlog up for the process: one line an event on standard output."""
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    wrapper = structlog.make_filtering_bound_logger(threshold)
    if form == "json":
        structlog.configure(
            processors=[*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_dumps)],
            wrapper_class=wrapper,
            logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer),
            cache_logger_on_first_use=True,
        )
    else:
        structlog.configure(
            processors=[*shared, structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), timestamp_key="ts")],
            wrapper_class=wrapper,
            logger_factory=structlog.PrintLoggerFactory(sys.stdout),
            cache_logger_on_first_use=True,
        )


def _dumps(value: Any, **_kwargs: Any) -> bytes:
    return orjson.dumps(value, default=str)


class KeyDisplay:
    """How bust events show keys: ``prefix`` alone, with a keyed ``hash`` of each key, or the keys ``raw``.

    Args:
        form: how much to show.
        secret: key of the hashes; without it each process has its own, and hashes compare within one run only.
    """

    def __init__(self, form: KeyForm, secret: bytes | None = None) -> None:
        self.form = form
        key = hashlib.sha256(secret).digest() if secret is not None else secrets.token_bytes(32)
        self._keyed = hashlib.blake2b(key=key, digest_size=8)

    def hash(self, key: bytes) -> str:
        """Give 16 hexadecimal digits that stand for the key."""
        keyed = self._keyed.copy()
        keyed.update(key)
        return keyed.hexdigest()

    def fields(self, keys: Sequence[bytes]) -> dict[str, Any]:
        """Give the fields of an event that show these keys."""
        if self.form == "prefix":
            return {}
        if self.form == "raw":
            return {"raw_keys": [key.decode(errors="backslashreplace") for key in keys]}
        return {"key_hashes": [self.hash(key) for key in keys]}
