"""Reads through the caches of a rule file, so that nothing older than a bust can be stored. See README.md here.

::

    caches = Caches.from_rules("rules/", redis.Redis(socket_timeout=0.25, socket_connect_timeout=0.25))
    caches.user.get(id=42, load=load_user)

`Caches` waits, `AsyncCaches` awaits. Both drive `contract`, which makes all decisions and does no I/O. Needs redis,
orjson, pydantic and PyYAML (``pip install 'cdc-invalidator[reader]'``), and nothing that only the daemon needs.
"""

from cdc_invalidator.reader.aio import AsyncCache, AsyncCaches
from cdc_invalidator.reader.breaker import Breaker
from cdc_invalidator.reader.leftovers import Aged
from cdc_invalidator.reader.metrics import Metrics
from cdc_invalidator.reader.options import Options
from cdc_invalidator.reader.serializers import (
    BYTES,
    JSON,
    ROWS,
    TEXT,
    Serializer,
    Unstorable,
    serializer_of,
    unsafe_pickle,
)
from cdc_invalidator.reader.spelling import Parameter
from cdc_invalidator.reader.sync import Cache, Caches

__all__ = [
    "BYTES",
    "JSON",
    "ROWS",
    "TEXT",
    "Aged",
    "AsyncCache",
    "AsyncCaches",
    "Breaker",
    "Cache",
    "Caches",
    "Metrics",
    "Options",
    "Parameter",
    "Serializer",
    "Unstorable",
    "serializer_of",
    "unsafe_pickle",
]
