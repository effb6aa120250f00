"""``cdc-invalidator demo``: a shop with a cache, first without busts, then with them; counts stale entries.

While nothing is busted, a daemon observes, and tells which rules would have helped. PostgreSQL and Valkey come from
wheels, and the daemon is a child process. The demo stops all that it starts, and
leaves no file behind.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from cdc_invalidator import errors
from cdc_invalidator.embedded import shop, shoppers
from cdc_invalidator.embedded.daemon import DaemonProcess
from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from rich.console import Console
    from rich.table import Table

ENVIRONMENT: Final = "demo"  # ${APP_ENV} of the keys
LIVE_SECONDS: Final = 0.25  # between two updates on a terminal
LINE_SECONDS: Final = 1.0  # between two lines elsewhere
GRACE_SECONDS: Final = 1.0  # after which the daemon that observes calls an entry stale
JUDGED_SECONDS: Final = 10.0  # for how long to wait for its last verdicts
OBSERVED_RULES: Final = 4  # that are shown, those that would have mended most


def run(seconds: float, keep: bool) -> int:
    """Run the demo.

    Args:
        seconds: How long the shop works in each of the two phases.
        keep: Keep servers and daemon running afterwards, until Ctrl-C.

    Returns:
        The exit code: 0 if no entry was stale with the daemon, 1 if some were, 128 + signal if a signal ended it early.

    Raises:
        errors.InvalidatorError: A wheel is missing, a server does not start, or the daemon fails.
    """
    console = _console()
    try:
        with _ended_by_signals(), contextlib.ExitStack() as stack:
            return _show(console, stack, seconds, keep)
    except SystemExit as ended:  # by _ended_by_signals; all is stopped by now
        console.print("Stopped.")
        return int(ended.code or 0)


def _show(console: Console, stack: contextlib.ExitStack, seconds: float, keep: bool) -> int:
    console.print("Starting a PostgreSQL and a Valkey (a Redis) for this demo …")
    postgres = stack.enter_context(Postgres())
    valkey = stack.enter_context(Valkey())
    dsn = postgres.create_database("shop")
    shop.create(dsn)
    phases = _PhaseRunner(console, dsn, valkey.url)

    with _DemoDaemon(dsn, valkey.url, CDC_MODE="observe", CDC_OBSERVE_GRACE=str(GRACE_SECONDS)) as observer:
        observer.wait_until_observing()
        console.print(f"\n[bold]A shop works for {seconds:g} s; the daemon deletes nothing, it only observes[/bold]")
        without = phases.run(seconds)
        for line in _observed(observer.judged()):
            console.print(line)

    console.print("\nNow the daemon busts. It missed the writes so far, so it empties the caches …")
    daemon = stack.enter_context(_DemoDaemon(dsn, valkey.url))
    daemon.wait_until_ready()
    console.print(f"\n[bold]The same shop works for {seconds:g} s; the daemon deletes what commits make stale[/bold]")
    console.print(f"Its page meanwhile: http://{HOST}:{daemon.port}/", soft_wrap=True)
    with_daemon = phases.run(seconds, daemon)

    console.print()
    console.print(_result_table(without, with_daemon))
    console.print(_verdict(without, with_daemon))
    if keep:
        _stay(console, daemon, postgres, dsn, valkey.url)
    else:
        console.print("[dim]To change rows yourself and see their busts: cdc-invalidator demo --keep[/dim]")
    return 0 if not with_daemon.audit.stale else 1


def _console() -> Console:
    try:
        from rich.console import Console  # noqa: PLC0415 - an optional dependency
    except ImportError:
        raise errors.InvalidatorError(
            "rich is not installed here; run: pip install 'cdc-invalidator[embedded]'",
        ) from None
    return Console(highlight=False)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into SystemExit(128 + its number), and ignore further ones."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def end(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The daemon


class SeenBust(NamedTuple):
    """The parts of a bust event that the demo shows.

    ``keys`` is a number; ``lag_ms`` is the time from commit to acknowledged bust.
    """

    rule: str | None
    cache: str
    action: str
    keys: int
    key_prefix: str
    lag_ms: float | None
    reason: str


class _DemoDaemon(DaemonProcess):
    """The daemon of the demo; collects its busts. ``settings`` are more of its ``CDC_…`` variables."""

    def __init__(self, dsn: str, url: str, **settings: str) -> None:
        super().__init__(dsn, url, shop.rules_file(), {"APP_ENV": ENVIRONMENT, **settings})
        self.busts: list[SeenBust] = []

    def check(self) -> None:
        """Append the busts that the daemon has logged since the last call to `busts`.

        Raises:
            errors.InvalidatorError: It has ended; the message ends with its log's tail.
        """
        super().check()
        self.busts += [_bust(event) for event in self.events if event.get("event") == "bust"]
        self.events.clear()

    def wait_until_observing(self) -> None:
        """Wait until the daemon, which has CDC_MODE=observe, can judge what changes.

        Raises:
            errors.InvalidatorError: It has ended, or does not get there in time.
        """
        self.wait_until_ready()
        self._wait_for_status(lambda found: found["observed_s"] is not None)

    def judged(self) -> dict[str, Any]:
        """Wait until it has judged all changes that it has seen; return what /status shows under ``observed``.

        Raises:
            errors.InvalidatorError: It has ended, or does not get there in time.
        """
        verdicts = ("mended", "stale", "too_large", "skipped")
        return self._wait_for_status(
            lambda found: all(
                each["there"] == sum(each.get(name, 0) for name in verdicts)
                for each in found["caches"]
                if "changes" in each
            )
        )

    def _wait_for_status(self, condition: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + JUDGED_SECONDS
        while True:
            self.check()
            observed = self.status().get("observed")
            if observed is not None and condition(observed):
                return dict(observed)
            if time.monotonic() > deadline:
                raise errors.InvalidatorError(f"The daemon has not judged all changes after {JUDGED_SECONDS:g} s.")
            time.sleep(0.05)


def _bust(event: Mapping[str, Any]) -> SeenBust:
    return SeenBust(
        event.get("rule"),
        event["cache"],
        event["action"],
        event["keys"],
        event["key_prefix"],
        event.get("lag_ms"),
        event["reason"],
    )


# A phase: half of the demo, without busts or with them


@dataclass(slots=True)
class Figures:
    """The figures of one phase.

    ``stale_now`` counts stale entries; with the daemon, only those that two audits in a row found, since a bust may be
    on its way. ``audit`` is the latest audit; the last one waits until all busts are done.
    """

    with_daemon: bool
    seconds: float = 0.0
    counts: shoppers.WorkCounts = field(default_factory=shoppers.WorkCounts)
    busts: list[SeenBust] = field(default_factory=list)
    stale_now: int = 0
    audit: shop.Audit = field(default_factory=lambda: shop.Audit(0, []))

    @property
    def hit_rate(self) -> float:
        """The share of reads that the cache answered, 0 to 1."""
        return self.counts.hits / self.counts.reads if self.counts.reads else 0.0

    def busted_keys(self) -> Counter[str]:
        """Count the keys deleted and versions bumped because of changed rows, by cache; sweeps don't count."""
        counts: Counter[str] = Counter()
        for bust in self.busts:
            if bust.reason == "change" and bust.action != "sweep":
                counts[bust.cache] += bust.keys
        return counts

    def lag_ms(self, share: float) -> float | None:
        """Return a percentile (share: 0 to 1) of the times from commit to bust; None if no row changed."""
        lags = sorted(bust.lag_ms for bust in self.busts if bust.reason == "change" and bust.lag_ms is not None)
        return lags[min(int(share * len(lags)), len(lags) - 1)] if lags else None


class _PhaseRunner:
    """Runs phases on one database and one Redis, and shows their figures."""

    def __init__(self, console: Console, dsn: str, url: str) -> None:
        self._console = console
        self._dsn = dsn
        self._url = url
        self._auditor = shop.Auditor(dsn, url, environment=ENVIRONMENT)
        self._phases = 0

    def run(self, seconds: float, daemon: _DemoDaemon | None = None) -> Figures:
        """Let the shop work for so many seconds, wait until all busts are done, and count the stale entries."""
        self._phases += 1
        figures = Figures(with_daemon=daemon is not None)
        first = len(daemon.busts) if daemon else 0
        work = shoppers.Workload(self._dsn, self._url, environment=ENVIRONMENT, seed=100 * self._phases)
        with _Screen(self._console) as screen:
            before: set[tuple[str, str]] = set()
            started = time.monotonic()
            with work:
                while (remaining := started + seconds - time.monotonic()) > 0:
                    time.sleep(min(remaining, screen.pause))
                    work.check()
                    before = self._update(figures, work, before, daemon, first)
                    figures.seconds = time.monotonic() - started
                    if figures.seconds < seconds:  # the last one is shown below
                        screen.show(figures)
            if daemon:
                daemon.settle()
            self._update(figures, work, before, daemon, first)
            figures.audit = self._audit()
            figures.stale_now = len(figures.audit.stale)
            screen.show(figures)
        return figures

    def _update(
        self,
        figures: Figures,
        work: shoppers.Workload,
        before: set[tuple[str, str]],
        daemon: _DemoDaemon | None,
        first: int,
    ) -> set[tuple[str, str]]:
        """Update the figures; return the entries that look stale now."""
        figures.counts = work.counts
        if daemon:
            daemon.check()
            figures.busts = daemon.busts[first:]
        audit = self._audit()
        now = {(entry.key, str(entry.cached)) for entry in audit.stale}
        figures.stale_now = len(now & before) if daemon else len(now)
        figures.audit = audit
        return now

    def _audit(self) -> shop.Audit:
        return self._auditor.audit()


# What the demo prints


class _Screen:
    """A table that is updated in place on a terminal; elsewhere, a line each second."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live  # noqa: PLC0415 - an optional dependency

        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.pause = LIVE_SECONDS if self._live else LINE_SECONDS

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, figures: Figures) -> None:
        """Show the figures as they are now."""
        if self._live:
            self._live.update(_live_table(figures), refresh=True)
        else:
            self._console.print(_progress_line(figures), soft_wrap=True)


def _progress_line(figures: Figures) -> str:
    counts = figures.counts
    parts = [
        f"{figures.seconds:5.1f} s",
        f"commits {counts.commits:5}",
        f"reads {counts.reads:5}",
        f"hit rate {figures.hit_rate:4.0%}",
    ]
    if figures.with_daemon:
        parts += [f"busts {figures.busted_keys().total():5}", f"commit to bust p50 {_ms(figures.lag_ms(0.5))}"]
    parts.append(f"stale {figures.stale_now} of {figures.audit.entries} entries")
    return "  ".join(parts)


def _live_table(figures: Figures) -> Table:
    from rich.table import Table  # noqa: PLC0415 - an optional dependency

    counts = figures.counts
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_column()
    left = [
        ("seconds", f"{figures.seconds:.1f}"),
        ("commits", f"{counts.commits}"),
        ("reads", f"{counts.reads}"),
        ("hit rate", f"{figures.hit_rate:.0%}"),
    ]
    right = [("", "")] * len(left)
    if figures.with_daemon:
        busted = figures.busted_keys()
        right = [
            ("busts", str(busted.total())),
            ("commit to bust, p50", _ms(figures.lag_ms(0.5))),
            ("commit to bust, p99", _ms(figures.lag_ms(0.99))),
            ("most busted cache", ", ".join(f"{cache} ({count})" for cache, count in busted.most_common(1))),
        ]
    for (name, value), (other, figure) in zip(left, right, strict=True):
        table.add_row(name, value, other, figure)
    table.add_row("stale entries", _stale(figures.stale_now, figures), "", "")
    return table


def _stale(count: int, figures: Figures) -> str:
    return f"[bold {'red' if count else 'green'}]{count}[/] of {figures.audit.entries}"


def _observed(found: Mapping[str, Any]) -> Iterator[str | Table]:
    """Yield what a daemon tells that has observed: which rules would have helped, and how often."""
    from rich.table import Table  # noqa: PLC0415 - an optional dependency

    stale = sorted((each for each in found["caches"] if each.get("stale")), key=lambda each: -each["stale"])
    table = Table(box=None, padding=(0, 2))
    for name, side in (("rule", "left"), ("cache", "left"), ("changes", "right"), ("met an entry", "right")):
        table.add_column(name, style="dim", header_style="dim", justify=side)  # type: ignore[arg-type]
    table.add_column("left it stale", justify="right", header_style="dim")
    for each in stale[:OBSERVED_RULES]:
        table.add_row(each["rule"], each["cache"], str(each["changes"]), str(each["there"]), f"{each['stale']}")
    yield "\nWhat it has observed, by the rule that would have helped:"
    yield table
    if more := stale[OBSERVED_RULES:]:
        yield f"  [dim]and {len(more)} more, with {sum(each['stale'] for each in more)}[/dim]"


def _result_table(without: Figures, with_daemon: Figures) -> Table:
    from rich.table import Table  # noqa: PLC0415 - an optional dependency

    table = Table()
    table.add_column("")
    table.add_column("only observed", justify="right")
    table.add_column("with busts", justify="right")
    both = (without, with_daemon)
    table.add_row("commits", *(str(each.counts.commits) for each in both))
    table.add_row("reads", *(str(each.counts.reads) for each in both))
    table.add_row("hit rate", *(f"{each.hit_rate:.0%}" for each in both))
    table.add_row("busts (keys deleted, versions bumped)", "", str(with_daemon.busted_keys().total()))
    table.add_row("loads not stored, a bust came first", *(str(each.counts.refused) for each in both))
    table.add_row("commit to bust, p50", "", _ms(with_daemon.lag_ms(0.5)))
    table.add_row("commit to bust, p99", "", _ms(with_daemon.lag_ms(0.99)))
    table.add_section()
    table.add_row("[bold]stale entries in the cache[/bold]", *(_stale(len(each.audit.stale), each) for each in both))
    return table


def _verdict(without: Figures, with_daemon: Figures) -> str:
    stale = with_daemon.audit.stale
    if stale:
        by_cache = ", ".join(f"{cache} {count}" for cache, count in Counter(each.cache for each in stale).items())
        return f"[bold red]{len(stale)} entries are stale with busts ({by_cache}): that is a bug.[/bold red]"
    share = len(without.audit.stale) / max(without.audit.entries, 1)
    return (
        f"Without busts, {share:.0%} of the cached entries differed from the database, and readers would have got them "
        "until their TTL. With busts, none did. The hit rate is lower, because what changed is loaded again."
    )


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"  # noqa: RUF001 - an empty cell


def _stay(console: Console, daemon: _DemoDaemon, postgres: Postgres, dsn: str, url: str) -> None:
    """Print each bust until a signal ends the demo."""
    psql = shutil.which("psql") or postgres.bin_dir / "psql"
    for line in (
        "\n[bold]All stays up until Ctrl-C. The shop is idle: change a row, and see its busts here.[/bold]",
        f"  {psql} '{dsn}'",
        f"  redis-cli -u {url}",
        f"  the daemon's page: http://{HOST}:{daemon.port}/",
        "  try: UPDATE users SET name = 'Grace' WHERE id = 42;\n",
    ):
        console.print(line, soft_wrap=True)
    with contextlib.suppress(SystemExit):  # Ctrl-C is the way to end it
        shown = len(daemon.busts)
        while True:
            daemon.check()
            for bust in daemon.busts[shown:]:
                where = f"{bust.keys} × {bust.key_prefix}…"  # noqa: RUF001
                console.print(f"{bust.action:6} {bust.cache:16} {where}  {_ms(bust.lag_ms)}", soft_wrap=True)
            shown = len(daemon.busts)
            time.sleep(0.1)
