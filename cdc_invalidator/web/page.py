"""The page at /: for a person with a browser, who wants to know what is wrong, since when, and what to do.

It is rendered here, whole, and works without JavaScript. The script on it only fetches some parts again every two
seconds. Keys are shown as CDC_LOG_KEYS allows.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import orjson

from cdc_invalidator import __version__, errors
from cdc_invalidator.log import Journal, KeyDisplay
from cdc_invalidator.metrics import Metrics
from cdc_invalidator.web.history import OTHERS, SAMPLE_SECONDS, SAMPLES, Counts, History
from cdc_invalidator.web.markup import Html, element, join, plot
from cdc_invalidator.web.pulse import Pulse
from cdc_invalidator.web.server import Page, Request
from cdc_invalidator.web.verdict import Verdict, judge, names, seconds, size

# What the server's own files and nobody else's script, style or frame may do.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_HTML = "text/html; charset=utf-8"
_FILES = {"/page.css": "text/css; charset=utf-8", "/page.js": "text/javascript; charset=utf-8"}
PATHS = frozenset({"/", "/live", *_FILES})

# Who looks again within this time is shown the same moment.
SHARED_SECONDS = 0.5
# Caches with a row of their own, and how much is shown of what happened.
ROWS = 50
BUSTS = 12
HAPPENED = 25
KEYS_A_BUST = 3
# A key that is to be explained: its length, and how much longer than it takes the next one waits.
KEY_LENGTH = 1000
EXPLAIN_PAUSE = 10.0

View = dict[str, Any]
Explain = Callable[[Any, str], dict[str, Any]]


class Moment:
    """All that is shown of one moment."""

    def __init__(
        self, verdict: Verdict, status: Mapping[str, Any], view: View, as_of: float | None, now: float
    ) -> None:
        self.verdict = verdict
        self.status = status
        self.view = view
        self.as_of = as_of
        self.now = now


class StatusPage:
    """Renders the page.

    Args:
        metrics: the daemon's; what is counted of each cache.
        journal: the last lines.
        display: how keys may be shown.
        explain: tells of which caches a key is, and what busts them.
    """

    def __init__(self, metrics: Metrics, journal: Journal, display: KeyDisplay, explain: Explain) -> None:
        self._metrics = metrics
        self._journal = journal
        self._display = display
        self._explain = explain
        self._history = History(self._read)
        self._files = {path: (resources.files(__package__) / path.strip("/")).read_bytes() for path in _FILES}
        self._view: View | None = None
        self._unpublished_since: dict[str, float] = {}
        self._moment: Moment | None = None
        self._explaining = asyncio.Lock()

    def _read(self) -> dict[str, Counts]:
        """Return what was counted by cache."""
        metrics = self._metrics
        found: dict[str, Counts] = defaultdict(Counts)
        for (_, cache, _), keys in metrics.keys.items():
            found[cache] += Counts(keys=keys)
        for (_, cache, _), existed in metrics.existed.items():
            found[cache] += Counts(existed=existed)
        for (cache, _), sweeps in metrics.sweeps.items():
            found[cache] += Counts(sweeps=sweeps)
        return found

    async def run(self, pulse: Pulse, look: Callable[[], View]) -> None:
        """Keep the history, and since when something is so, until cancelled."""
        while True:
            self._history.sample()
            await self._ask(pulse, look)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def get(self, request: Request, pulse: Pulse, look: Callable[[], View]) -> Page:
        """Answer a request for one of PATHS.

        Args:
            request: what is asked for.
            pulse: tells how the daemon is.
            look: makes the view, in the daemon's loop.
        """
        if request.path in _FILES:
            return Page(200, _FILES[request.path], self._files[request.path], _HEADERS)
        moment = await self._ask(pulse, look)
        if request.path == "/live":
            parts = self._parts(moment) if "all" in request.query else self._live(moment)
            return Page(200, "application/json", orjson.dumps(parts), _HEADERS)
        key = request.query.get("key")
        explained = await self._explained(moment.view["rules"], key) if key else None
        return Page(200, _HTML, self._document(moment, explained).encode(errors="replace"), _HEADERS)

    async def _ask(self, pulse: Pulse, look: Callable[[], View]) -> Moment:
        now = time.time()
        if self._moment is not None and now - self._moment.now < SHARED_SECONDS:
            return self._moment
        answer, old = await pulse.ask()
        view = await pulse.call(look) if not old else None
        if view is not None:
            self._view = view
        view = self._view or NOTHING
        tables = [table["table"] for table in view["unpublished"]]
        self._unpublished_since = {table: self._unpublished_since.get(table, now) for table in tables}
        since = _iso(min(self._unpublished_since.values())) if tables else None
        as_of = next((value for _, value in self._metrics.watermark_as_of.items()), None)
        if as_of is None and answer.status["watermark_age_s"] is not None:
            as_of = answer.at - answer.status["watermark_age_s"]
        verdict = judge(
            answer.status,
            view | {"unpublished_since": since},
            hangs=pulse.hangs(),
            old=old,
            as_of=as_of,
            now=now,
        )
        self._moment = Moment(verdict, answer.status, view, as_of, now)
        return self._moment

    # The parts.

    def _live(self, moment: Moment) -> dict[str, str]:
        """Return the parts that change all the time, by the ids of their elements."""
        return {
            "verdict": _verdict(moment),
            "sweeps": _sweeps(moment.view),
            "busts": self._busts(),
        }

    def _parts(self, moment: Moment) -> dict[str, str]:
        return self._live(moment) | {
            "facts": self._facts(moment),
            "unpublished": _unpublished(moment.view),
            "caches": self._caches(moment),
            "happened": self._happened(),
        }

    def _document(self, moment: Moment, explained: Html | None) -> str:
        parts = {name: element("section", part, id=name) for name, part in self._parts(moment).items()}
        slot = moment.status["slot"]
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content_="width=device-width, initial-scale=1"),
            element("title", f"{slot} - cdc-invalidator"),
            element("link", rel="stylesheet", href="page.css"),
            element("script", src="page.js", defer=True),
        )
        role = {"leader": "leads and busts", "standby": "stands by", "connecting": "connects"}[moment.status["role"]]
        body = element(
            "body",
            element("header", element("b", "cdc-invalidator"), f" {__version__} · slot {slot} · {role}"),
            element("p", "The daemon does not answer any more. What you see is from before.", id="gone", hidden=True),
            element(
                "main",
                parts["verdict"],
                parts["unpublished"],
                parts["sweeps"],
                parts["caches"],
                parts["facts"],
                element("section", self._form(explained), id="explain"),
                element("div", parts["happened"], parts["busts"], class_="two"),
            ),
            element(
                "footer",
                element("noscript", "Without JavaScript this page shows one moment; reload it. "),
                "More for programs: ",
                *(join(element("a", path, href=path), " ") for path in ("metrics", "status", "readyz", "livez")),
                f"· keys are shown as CDC_LOG_KEYS={self._display.form} allows · CDC_PAGE=false turns this page off",
            ),
        )
        return "<!doctype html>\n" + element("html", head, body, lang="en")

    def _caches(self, moment: Moment) -> Html:
        view, history = moment.view, {name: self._history.of(name) for name in self._history.caches}
        states: dict[str, tuple[str, str]] = {}
        for name, reason in view["swept"].items():
            states[name] = "swept", f"swept: {reason}"
        for table in view["unpublished"]:
            states |= dict.fromkeys(table["caches"], ("unseen", f"changes of {table['table']} are not seen"))
        states |= dict.fromkeys(view["denied"], ("denied", "Redis denies its busts"))
        busy = {name: sum(each.keys for each in counts) for name, counts in history.items()}
        ordered = sorted(view["caches"], key=lambda name: (name not in states, -busy.get(name, 0), name))
        leads = moment.status["role"] == "leader" and view["redis_up"]
        rows = [
            self._row(name, history.get(name, []), states.get(name), moment.now, leads=leads) for name in ordered[:ROWS]
        ]
        rest = ordered[ROWS:]
        head = element("tr", *(element("th", title, scope="col") for title in _COLUMNS))
        more: Html | None = None
        if rest:
            busts = sum(busy.get(name, 0) for name in [*rest, OTHERS])
            more = element(
                "p", f"{len(rest)} more caches, of which {busts:,.0f} keys were busted in this time: {names(rest)}."
            )
        table = element("table", element("thead", head), element("tbody", *rows), class_="caches")
        return join(
            element("h2", "Caches in the last 15 minutes"), table if rows else _none("No rule names a cache."), more
        )

    def _row(
        self, name: str, counts: Sequence[Counts], state: tuple[str, str] | None, now: float, *, leads: bool
    ) -> Html:
        last = self._metrics.lag.last.get(name)
        recent = counts[-int(60 / SAMPLE_SECONDS) :]
        spent = max(1, len(recent)) * SAMPLE_SECONDS
        keys, existed = sum(each.keys for each in counts), sum(each.existed for each in counts)
        rate = sum(each.keys for each in recent) / spent
        shares = [each.existed / each.keys if each.keys else None for each in counts]
        swept = sum(each.sweeps for each in counts)
        cells = (
            element("b", name),
            element("span", state[1], class_=f"state {state[0]}") if state else "up to date" if leads else "-",
            f"{seconds(now - last)} ago" if last else "none yet",
            join(
                element("span", f"{rate:.3g} keys/s", class_="figure"),
                plot([each.keys for each in counts], f"Busted keys of {name} over 15 minutes", width=SAMPLES),
            ),
            join(
                element("span", f"{existed / keys:.0%}" if keys else "-", class_="figure"),
                plot(shares, f"Share of the busted keys of {name} that were there", width=SAMPLES, most=1.0),
            ),
            f"{swept:,.0f}",
        )
        titled = zip(_COLUMNS, cells, strict=True)
        return element("tr", *(element("td", cell, data_title=title) for title, cell in titled))

    def _facts(self, moment: Moment) -> Html:
        status, view = moment.status, moment.view
        leads, rules = status["role"] == "leader", status["rules"]
        facts = [
            ("Role", f"{status['role']}, {'observes only' if status['mode'] == 'observe' else 'busts'}"),
            ("PostgreSQL", f"{view['postgres']}, {_up(view['postgres_up'])}"),
            ("Redis", f"{view['redis']}, {_up(view['redis_up']) if leads else 'used once this daemon leads'}"),
            ("Slot and publication", f"{status['slot']}, {status['publication']}"),
            ("Received up to", status["received_lsn"] or "-"),
            ("Busted up to", status["watermark_lsn"] or "-"),
            ("Behind by", f"{size(status['lag_bytes'] or 0)}, {status['backlog_keys']:,} keys" if leads else "-"),
            ("WAL that the slot holds", _of(view["retained"], view["retained_limit"])),
            (
                "Rules",
                f"{rules['rules']} rules, {rules['caches']} caches, digest {rules['digest'][:12]}",
            ),
            ("Standbys of readers", view["standbys"] or "none"),
        ]
        return join(element("h2", "This daemon"), _list(facts))

    def _busts(self) -> Html:
        rows = [self._bust(event) for event in self._journal.busts(BUSTS)]
        return join(
            element("h2", "Last busts"),
            element("ol", *rows, class_="log")
            if rows
            else _none("None since this daemon started, of those that CDC_LOG_BUSTS lets into the log."),
        )

    def _bust(self, event: Mapping[str, Any]) -> Html:
        shown = event.get("raw_keys") or event.get("key_hashes") or []
        named = " ".join(shown[:KEYS_A_BUST]) + (
            f" and {len(shown) - KEYS_A_BUST} more" if len(shown) > KEYS_A_BUST else ""
        )
        rule = f" by {event['rule']}" if event.get("rule") else ""
        change = f" ({event.get('op')} of {event['table']})" if event.get("table") else ""
        lag = f", {event['lag_ms']:.1f} ms after the commit" if "lag_ms" in event else ""
        reason = f", {event['reason']}" if event.get("reason", "change") != "change" else ""
        keys = f"{event.get('keys')} {'key' if event.get('keys') == 1 else 'keys'}, {event.get('existed')} there"
        text = f" {event.get('action')}{rule}{change}: {keys}{lag}{reason}"
        return element(
            "li",
            _time(event.get("ts")),
            " ",
            element("b", event.get("cache", "")),
            text,
            element("code", named) if named else None,
        )

    def _happened(self) -> Html:
        rows = [_event(event) for event in reversed(self._journal.events[-HAPPENED:])]
        return join(
            element("h2", "Gaps, reloads, leaders and errors"),
            element("ol", *rows, class_="log") if rows else _none("Nothing since this daemon started."),
        )

    # A key.

    def _form(self, explained: Html | None) -> Html:
        what = "Which rules bust a key? Paste one; the daemon does not keep it, but your browser's history may."
        return join(
            element("h2", "Explain a key"),
            element(
                "form",
                element("label", what, for_="key"),
                element("input", id="key", name="key", maxlength=str(KEY_LENGTH), required=True, autocomplete="off"),
                element("button", "Explain"),
                method="get",
                action="./#explain",
            ),
            explained,
        )

    async def _explained(self, rules: Any, key: str) -> Html:
        """Explain a key; one at a time, and with a pause, so that nobody makes work of it."""
        if len(key) > KEY_LENGTH:
            return element("p", f"No key has more than {KEY_LENGTH} characters here.", class_="answer")
        if rules is None:
            return element("p", "The daemon does not answer.", class_="answer")
        async with self._explaining:
            began = time.thread_time()
            try:
                told = self._explain(rules, key)
            except errors.InvalidatorError as error:
                # Its first words quote the key.
                _, _, nearest = str(error).rpartition("; ")
                return element("p", f"No cache has this key; {nearest}", class_="answer")
            finally:
                await asyncio.sleep(EXPLAIN_PAUSE * (time.thread_time() - began))
        hint: str | None = None
        raw = self._display.form == "raw"
        if self._display.form == "hash":
            hint = f"In the log its hash is {self._display.hash(key.encode('utf-8', 'surrogateescape'))}."
        return element(
            "div",
            *(_explained_cache(cache, raw=raw) for cache in told["caches"]),
            element("p", hint) if hint else None,
            class_="answer",
        )


_COLUMNS = ("Cache", "State", "Last bust", "Busted", "Were there", "Sweeps")
NOTHING: View = {
    "postgres": "",
    "postgres_up": False,
    "redis": "",
    "redis_up": False,
    "retained": None,
    "retained_limit": 0,
    "standbys": "",
    "caches": [],
    "rules": None,
    "swept": {},
    "denied": [],
    "unpublished": [],
    "remedies": [],
    "sweeps": [],
}


def _verdict(moment: Moment) -> Html:
    verdict = moment.verdict
    sign = {"ok": "OK", "busy": "Wait", "wrong": "Act"}[verdict.level]
    since: Html | None = None
    if verdict.since is not None:
        began = datetime.fromisoformat(verdict.since).astimezone(UTC)
        ago = seconds(max(0.0, moment.now - began.timestamp()))
        since = element("p", f"Since {began:%Y-%m-%d %H:%M:%S} UTC, {ago} ago.", class_="since")
    return element(
        "div",
        element("h1", element("span", sign, class_="sign"), " ", verdict.text),
        since,
        element("p", verdict.to_do) if verdict.to_do else None,
        element("p", f"As of {datetime.fromtimestamp(moment.now, UTC):%Y-%m-%d %H:%M:%S} UTC", class_="as-of"),
        class_=f"verdict {verdict.level}",
        role="status",
    )


def _unpublished(view: View) -> Html:
    if not view["unpublished"]:
        return join()
    tables = [
        element("li", element("b", table["table"]), f" {table['why']}; it is shown in {names(table['caches'])}")
        for table in view["unpublished"]
    ]
    remedies = [
        join(
            element("p", remedy["sentence"]),
            element("pre", "\n".join(remedy["sql"])) if remedy["sql"] else None,
            join(element("p", "or"), element("pre", "\n".join(remedy["or_sql"]))) if remedy["or_sql"] else None,
        )
        for remedy in view["remedies"]
    ]
    return join(element("h2", "Tables that are not published"), element("ul", *tables), *remedies)


def _sweeps(view: View) -> Html:
    if not view["sweeps"]:
        return join()
    rows = []
    for sweep in view["sweeps"]:
        whole = sweep["passes"] * (sweep["all_keys"] or 0)
        share = min(1.0, sweep["scanned"] / whole) if whole else None
        rows.append(
            element(
                "li",
                element("b", sweep["what"]),
                f" of {names(sweep['caches'])}: ",
                element("progress", value=f"{share:.3f}", max="1") if share is not None else "has begun, ",
                f" {sweep['scanned']:,} keys looked at, {sweep['busted']:,} busted",
                f", {share:.0%}" if share is not None else None,
            )
        )
    return join(element("h2", "Running sweeps and searches"), element("ul", *rows))


def _event(event: Mapping[str, Any]) -> Html:
    told = event.get("error")
    others = ", ".join(f"{name}={_short(value)}" for name, value in event.items() if name not in _SHOWN_APART)
    text = " ".join(filter(None, [others, str(told) if told else ""]))
    name = element("b", str(event["event"]), class_=str(event["level"]))
    again = f" {times} times since {event['since'][11:19]}" if (times := event.get("times")) else None
    return element("li", _time(event.get("ts")), " ", name, again, " ", text)


_SHOWN_APART = frozenset({"event", "level", "ts", "error", "times", "since"})


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _explained_cache(cache: Mapping[str, Any], *, raw: bool) -> Html:
    what = {"key": "a key", "lock": "the lock of a key", "old_value": "the old value of a key", "version": "a version"}
    params = [f"{name} = {value}" if raw else name for name, value in cache["params"].items()]
    causes = [
        element(
            "li",
            f"{cause['action']} by rule ",
            element("b", cause["rule"]),
            f" on {', '.join(cause['on'])} of {cause['table']}",
            f", if it changes {', '.join(cause['columns'])}" if cause["columns"] else None,
            f", when {cause['when']}" if cause["when"] else None,
            f", where {cause['where']}" if cause["where"] else None,
            "" if cause["certain"] else ", if its query gives this key",
            f" ({cause['defined_at']})",
        )
        for cause in cache["busted_by"]
    ]
    return join(
        element(
            "p",
            f"It is {what.get(cache['is'], 'an old version')} of cache ",
            element("b", cache["cache"]),
            f" ({cache['defined_at']}), with {', '.join(params) or 'no parameters'}.",
        ),
        element("ul", *causes)
        if causes
        else element("p", "No rule busts it." if not cache["ttl_only"] else "It is `ttl_only`: nothing busts it."),
    )


def _list(pairs: Sequence[tuple[str, str]]) -> Html:
    return element("dl", *(element("div", element("dt", name), element("dd", text)) for name, text in pairs))


def _none(text: str) -> Html:
    return element("p", text, class_="none")


def _up(up: bool) -> str:
    return "connected" if up else "not connected"


def _of(value: float | None, limit: float) -> str:
    return "-" if value is None else f"{size(value)} of at most {size(limit)}"


def _time(ts: str | None) -> Html:
    return element("time", (ts or "")[11:19], datetime=ts or "", title=ts or "")


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
