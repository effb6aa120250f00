"""The event stream: a Redis stream (CDC_EVENT_STREAM) that has the last events, each as the log's JSON line.

The rule that holds here: the stream is only a copy of the log. Events that Redis refuses are counted, reported once,
and lost to the stream; no bust and no watermark waits for them. After a lost connection, the events that were under way
are written again: an entry may stand there twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import structlog

from cdc_invalidator import errors
from cdc_invalidator.errors import Problem
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.redis import replies
from cdc_invalidator.redis.server import CacheServer
from cdc_invalidator.rules.model import RuleSet
from cdc_invalidator.rules.overlap import Language, common, whole
from cdc_invalidator.rules.suffixes import OLD_LOCK_SUFFIX
from cdc_invalidator.rules.template import Template
from cdc_invalidator.rules.wording import shown

_log = structlog.get_logger()

FIELD = "event"
# As many as of keys: no other client waits long, and the replies don't matter.
EVENTS_A_COMMAND = 1000

_REMEDIES = {
    "NOPERM": "grant the ACL user of CDC_REDIS_URL the key and what the README lists for the event stream",
    "WRONGTYPE": "the key holds something else; delete it, or name another one",
}


class EventStream:
    """What is still to be written to the event stream, in order.

    Args:
        key: the Redis stream.
        length: about how many events it keeps; no more of them wait here.
        metrics: what to count.
    """

    def __init__(self, key: str, length: int, metrics: Metrics) -> None:
        self._key = key.encode()
        self._length = length
        self._metrics = metrics
        self._events: deque[bytes] = deque(maxlen=length)
        self._refused = False

    def take(self, text: bytes) -> None:
        """Take events as the log has them: JSON lines."""
        self._events.extend(text.splitlines())

    async def write(self, server: CacheServer) -> None:
        """Write what was taken, in one round trip.

        Raises:
            errors.RedisUnavailable: the connection is lost; nothing was taken back.
        """
        if not self._events:
            return
        events, self._events = list(self._events), deque(maxlen=self._length)
        chunks = [events[start : start + EVENTS_A_COMMAND] for start in range(0, len(events), EVENTS_A_COMMAND)]
        append = ("EVALSHA", server.scripts.append, 1, self._key, self._length)
        try:
            answers = await server.ask_about(self._key, [(*append, *chunk) for chunk in chunks])
        except BaseException:
            # Before what was taken meanwhile.
            self._events = deque([*events, *self._events], maxlen=self._length)
            raise
        refused = False
        for chunk, answer in zip(chunks, answers, strict=True):
            if isinstance(answer, errors.RedisUnavailable):
                self._metrics.event_stream_refused.inc(len(chunk))
                if not self._refused and not refused:
                    _log.warning("event_stream_refused", code=answer.code, error=refusal(answer, "XADD"))
                refused = True
        self._refused = refused


def refusal(error: errors.RedisUnavailable, command: str) -> str:
    """Return the sentence that says why Redis refuses a command on the event stream."""
    remedy = _REMEDIES.get(error.code, replies.of(error.code).remedy)
    return f"Redis refuses {command} on CDC_EVENT_STREAM ({error.code}); {remedy}."


def check_key(key: str, watermark: str) -> None:
    """Make sure that the event stream is none of the keys that the daemon and `check` use.

    Args:
        key: the event stream.
        watermark: name of the watermark.

    Raises:
        errors.WrongSettings: it is.
    """
    for name in (f"cdc:{watermark}:watermark", f"cdc:{watermark}:check"):
        if key == name or key.startswith(f"{name}:"):
            raise errors.WrongSettings(
                f"CDC_EVENT_STREAM is {shown(key)}, and `{name}` is for something else; take cdc:{watermark}:events."
            )


def check_rules(key: str, rules: RuleSet) -> None:
    """Make sure that the event stream is of no cache.

    Raises:
        errors.WrongRules: it is: see `clashes`.
    """
    problems = list(clashes(key, rules))
    if problems:
        raise errors.WrongRules(problems)


def clashes(key: str, rules: RuleSet) -> Iterator[Problem]:
    """Yield the caches whose keys, keys beside them, or sweeps the event stream could be among.

    Args:
        key: the Redis stream; empty for none.
        rules: the rule set.
    """
    if not key:
        return
    stream = Language(Template.of([key.encode()]), {})
    for cache in rules.caches.values():
        templates = [template for template in (cache.key, cache.version) if template is not None]
        if any(
            common(stream, Language.of_sweep(Template.of([*whole(template).parts, suffix]))) is not None
            for template in templates
            for suffix in (b"", OLD_LOCK_SUFFIX)
        ):
            yield Problem(
                *cache.place,
                f"the event stream {shown(key)} is among the keys of cache {cache.name}, so that a sweep or a reader "
                "would overwrite it; name another one in CDC_EVENT_STREAM.",
                "event_stream_is_a_key",
            )
