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
from django.core.management.base import CommandError
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


class WrongSetting(ImproperlyConfigured, CommandError):  # type: ignore[misc]  # Django has no types
    """The setting has a mistake; the message is a sentence.

    It is an error of commands, too, so that ``manage.py check`` shows the sentence without a traceback where a module
    uses `caches` when it is imported.
    """


def _setting() -> dict[str, Any]:
    """Return the setting, with defaults.

    Raises:
        WrongSetting: it has a mistake.
    """
    given = getattr(settings, SETTING, None)
    for name in given if isinstance(given, Mapping) else ():
        if name not in _OURS and name not in _OTHERS:
            raise WrongSetting(f"{SETTING} has no entry {name}; {nearest(name, (*_OURS, *_OTHERS))}")
    if not isinstance(given, Mapping) or not given.get("RULES") or not given.get("REDIS"):
        raise WrongSetting(
            f'{SETTING} lacks RULES or REDIS; write {SETTING} = {{"RULES": BASE_DIR / "rules.yaml", "REDIS": '
            '"redis://cache:6379/0"}} into the settings, with the rule files and the Redis of the daemon'
        )
    found = _OURS | dict(given)
    seconds = found["SECONDS"]
    if not isinstance(seconds, int) or seconds < 1:
        raise WrongSetting(f"{SETTING} has SECONDS {seconds!r}; write a whole number of seconds, from 1 on")
    alias = found["DATABASE"]
    if alias not in connections.settings or connections[alias].vendor != "postgresql":
        raise WrongSetting(
            f"{SETTING} names the database {alias}, which is no PostgreSQL in DATABASES; name in DATABASE "
            "the one that the daemon reads"
        )
    return found


def _made_by(found: Mapping[str, Any]) -> Caches:
    """Make the caches of the setting.

    Raises:
        errors.WrongRules: all mistakes of all rule files.
        WrongSetting: it has another mistake.
    """
    others = {name.lower(): found[name] for name in found if name not in _OURS}
    try:
        return Caches.from_rules(found["RULES"], connect.client(found["REDIS"]), **others)
    except (TypeError, ValueError) as error:
        raise WrongSetting(f"{SETTING} can't be used: {error}") from error


def _made() -> Caches:
    try:
        return _made_by(_setting())
    except errors.WrongRules as wrong:
        raise WrongSetting(str(wrong)) from wrong


# Made at the first use. Its reads ask all open connections of Django whether their transactions have written.
caches: Caches = cast("Caches", SimpleLazyObject(_made))


class OwnWrites:
    """A middleware: a visitor's reads show what the visitor has written, in later requests too.

    It stands first, or at least outside of whatever opens a transaction or reads through the caches.
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
        # A registry takes each metric once.
        found = _setting() | {"REGISTRY": None}
        read = handle.read_caches(found["RULES"], found.get("ENV", os.environ))
        _made_by(found)
    except WrongSetting as wrong:
        return [checks.Error(str(wrong), id="cdc_invalidator.E001")]
    except errors.WrongRules as wrong:
        return [checks.Error(str(problem), id="cdc_invalidator.E002") for problem in wrong.problems]
    doubts = [checks.Warning(text, id="cdc_invalidator.W001") for cache in read.values() for text in _doubtful(cache)]
    if _MIDDLEWARE not in settings.MIDDLEWARE:
        doubts.append(checks.Warning(_WITHOUT, id="cdc_invalidator.W002"))
    return doubts


_MIDDLEWARE: Final = "cdc_invalidator.reader.django.OwnWrites"
_WITHOUT: Final = (
    f"MIDDLEWARE lacks {_MIDDLEWARE}, so visitors may not see what they have just written; add it in front, or silence "
    "this by SILENCED_SYSTEM_CHECKS."
)


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
