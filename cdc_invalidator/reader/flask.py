"""Flask: an extension with the caches of the application, and a visitor's own writes. See FRAMEWORKS.md here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, Request, current_app

from cdc_invalidator.reader import connect
from cdc_invalidator.reader.own_writes import COOKIE, SECONDS, Visitors
from cdc_invalidator.reader.sync import Cache, Caches

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_NAME = "cdc_invalidator"


class FlaskCaches:
    """The caches of whichever application answers: ``caches.user.get(…)`` in a view.

    The application's configuration has ``CDC_RULES``, a rule file or a directory of them, and ``CDC_REDIS``, a URL
    (``memory:`` in tests) or a client. ``CDC_OWN_WRITES_SECONDS`` says how long reads ask for a write.

    Args:
        app: the application, or `init_app` is called with it.
        lsn: returns the LSN of a commit: ``lambda: commit_lsn(engine)``. With it, a visitor's reads show what the
            visitor has written, in later requests too; what is committed before the answer begins.
        options: of `Caches.from_rules`.
    """

    def __init__(self, app: Flask | None = None, *, lsn: Callable[[], int] | None = None, **options: Any) -> None:
        self._lsn = lsn
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Make the caches of an application.

        Raises:
            KeyError: its configuration lacks something.
            errors.WrongRules: all mistakes of all rule files.
            ValueError: it has no secret key, with which cookies are signed.
        """
        client = connect.client(app.config["CDC_REDIS"])
        app.extensions[_NAME] = Caches.from_rules(app.config["CDC_RULES"], client, **self._options)
        if self._lsn is not None:
            visitors = Visitors(app.secret_key or "", app.config.get("CDC_OWN_WRITES_SECONDS", SECONDS))
            app.wsgi_app = OwnWrites(app.wsgi_app, visitors, self._lsn)  # type: ignore[method-assign]

    @property
    def of_app(self) -> Caches:
        """The caches of the present application."""
        caches: Caches = current_app.extensions[_NAME]
        return caches

    def __getitem__(self, name: str) -> Cache[Any]:
        return self.of_app[name]

    def __getattr__(self, name: str) -> Cache[Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        found: Cache[Any] = getattr(self.of_app, name)
        return found

    def at_least(self, lsn: int) -> Caches:
        """Return a view whose reads see all commits up to an LSN; see `Caches.at_least`."""
        return self.of_app.at_least(lsn)


class OwnWrites:
    """What is put around ``app.wsgi_app``, or around any WSGI application."""

    def __init__(self, app: WSGIApplication, visitors: Visitors, lsn: Callable[[], int]) -> None:
        self._app = app
        self._visitors = visitors
        self._lsn = lsn

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request; after a write, the answer sets the cookie."""

        def starting(status: str, headers: list[tuple[str, str]], *error: Any) -> Callable[[bytes], object]:
            own.ask(self._lsn)
            if own.changed:
                secure = environ["wsgi.url_scheme"] == "https"
                headers = [*headers, ("Set-Cookie", self._visitors.header(own, secure=secure))]
            return start_response(status, headers, *error)

        cookie = Request(environ).cookies.get(COOKIE)
        with self._visitors.request(environ["REQUEST_METHOD"], cookie) as own:
            return self._app(environ, starting)
