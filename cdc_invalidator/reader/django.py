"""Django: `caches` by the setting ``CDC_INVALIDATOR``, a visitor's own writes, and checks. See FRAMEWORKS.md here.

As a part of ``INSTALLED_APPS`` it lets ``manage.py check`` find mistakes. `OwnWrites` is a middleware.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.functional import SimpleLazyObject

from cdc_invalidator import errors
from cdc_invalidator.reader import connect, handle
from cdc_invalidator.reader.commit import commit_lsn
from cdc_invalidator.reader.own_writes import COOKIE, SECONDS, Visitors
from cdc_invalidator.reader.sync import Caches
from cdc_invalidator.rules.model import Cache
from cdc_invalidator.rules.wording import nearest

SETTING: Final = "CDC_INVALIDATOR"
# Beside these, it has the arguments of `Caches.from_rules`.
_OURS: Final = {"RULES": "", "REDIS": "", "DATABASE": "default", "SECONDS": SECONDS}
_OTHERS: Final = tuple(name.upper() for name in list(inspect.signature(Caches.from_rules).parameters)[2:])


def _setting() -> dict[str, Any]:
    """Return the setting, with defaults.

    Raises:
        ImproperlyConfigured: it has a mistake; the message is a sentence.
    """
    given = getattr(settings, SETTING, None)
    if not isinstance(given, Mapping) or not given.get("RULES") or not given.get("REDIS"):
        raise ImproperlyConfigured(
            f'{SETTING} lacks RULES or REDIS; write {SETTING} = {{"RULES": BASE_DIR / "rules.yaml", "REDIS": '
            '"redis://cache:6379/0"}} into the settings, with the rule files and the Redis of the daemon'
        )
    for name in given:
        if name not in _OURS and name not in _OTHERS:
            raise ImproperlyConfigured(f"{SETTING} has no entry {name}; {nearest(name, (*_OURS, *_OTHERS))}")
    found = _OURS | dict(given)
    alias = found["DATABASE"]
    if alias not in connections.settings or connections[alias].vendor != "postgresql":
        raise ImproperlyConfigured(
            f"{SETTING} names the database {alias}, which is no PostgreSQL in DATABASES; name in DATABASE "
            "the one that the daemon reads"
        )
    return found


def _made() -> Caches:
    found = _setting()
    others = {name.lower(): found[name] for name in found if name not in _OURS}
    return Caches.from_rules(found["RULES"], connect.client(found["REDIS"]), **others)


# Made at the first use. Its reads ask all open connections of Django whether their transactions have written.
caches: Caches = cast("Caches", SimpleLazyObject(_made))


class OwnWrites:
    """A middleware: a visitor's reads show what the visitor has written, in later requests too.

    Its place among other middlewares does not matter, except that none outside of it may open a transaction.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        found = _setting()
        self._database = found["DATABASE"]
        self._visitors = Visitors(settings.SECRET_KEY, found["SECONDS"])
        self._get_response = get_response

    def __call__(self, request: Any) -> Any:
        """Answer a request; after a write, the answer sets the cookie."""
        with self._visitors.request(request.method, request.COOKIES.get(COOKIE)) as own:
            response = self._get_response(request)
            own.ask(lambda: commit_lsn(connections[self._database]))
            if own.changed:
                response.set_cookie(
                    COOKIE,
                    self._visitors.cookie(own),
                    max_age=self._visitors.seconds,
                    secure=request.is_secure(),
                    httponly=True,
                    samesite="Lax",
                )
            return response


def check(**_: Any) -> list[Any]:
    """Look for mistakes in the setting and in the rule files; no server is asked."""
    try:
        found = _setting()
        read = handle.read_caches(found["RULES"], found.get("ENV", os.environ))
    except ImproperlyConfigured as wrong:
        return [checks.Error(str(wrong), id="cdc_invalidator.E001")]
    except errors.WrongRules as wrong:
        return [checks.Error(str(problem), id="cdc_invalidator.E002") for problem in wrong.problems]
    return [checks.Warning(text, id="cdc_invalidator.W001") for cache in read.values() for text in _doubtful(cache)]


def _doubtful(cache: Cache) -> Iterator[str]:
    """Tell of keys that Django's cache framework writes, without the contract."""
    for alias, backend in settings.CACHES.items():
        prefix = f"{backend.get('KEY_PREFIX', '')}:{backend.get('VERSION', 1)}:".encode()
        first = cache.key.parts[0]
        ours = isinstance(first, bytes) and first.startswith(prefix)
        if ours and "redis" in backend["BACKEND"].lower() and not cache.again_after:
            yield (
                f"The keys of cache {cache.name} are those of CACHES[{alias!r}], which may store a row that is older "
                f"than its bust; read it by caches[{cache.name!r}] with keys of its own, or give it `again_after`."
            )


checks.register(check, checks.Tags.caches)
