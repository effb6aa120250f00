"""The command line: reads settings, builds what a command needs, turns errors into exit codes.

Heavy modules are imported inside the commands, so that ``healthcheck`` and ``--help`` stay quick.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cdc_invalidator import __version__, errors, settings

if TYPE_CHECKING:
    from cdc_invalidator.commands.simulate import Change
    from cdc_invalidator.rules.model import RuleSet

# Objects that the collector lets pile up before it looks for cycles among them.
YOUNG_OBJECTS = 50_000

app = typer.Typer(
    name="cdc-invalidator",
    help="Busts exactly the Redis keys that each PostgreSQL commit made stale, by declarative rules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; the process ends with the exit codes of `errors`."""
    try:
        app()
    except errors.InvalidatorError as error:
        print(error, file=sys.stderr)  # noqa: T201  this is the program's voice
        sys.exit(error.exit_code)


def _takes(
    kind: type[settings.Database | settings.Rules | settings.Tail], offline: type[settings.CheckOffline] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each setting of that kind, and call it with the settings.

    With its flag ``--offline``, those are of the kind ``offline``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "given"]
        flags = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    str | None,
                    typer.Option(
                        f"--{name.replace('_', '-')}",
                        help=f"{field.description} [{settings.PREFIX}{name.upper()}]",
                        show_default=False,
                        hidden=name in settings.RENAMED,
                    ),
                ],
            )
            for name, field in kind.model_fields.items()
        ]

        def wrapped(**arguments: Any) -> None:
            from cdc_invalidator.postgres.connection import check_dsn

            flagged = {flag.name: arguments.pop(flag.name) for flag in flags}
            if offline is not None and arguments["offline"]:
                command(settings.load(offline, flagged), **arguments)
                return
            given = settings.load(kind, flagged)
            if isinstance(given, settings.Database):
                check_dsn(given.postgres_dsn.get_secret_value())
            command(given, **arguments)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + flags
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        return wrapped

    return decorate


def _rules(given: settings.Stream | settings.Rules) -> RuleSet:
    from cdc_invalidator.rules.load import load_rules

    return load_rules(given.rules, os.environ)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _load_structlog() -> None:
    """Load structlog without rich, which it takes where it is there, to draw tracebacks with: 4 MB less."""
    if "rich" not in sys.modules:
        # That is how an import is refused; conditions need it later.
        sys.modules["rich"] = None  # type: ignore[assignment]
        import structlog  # noqa: F401

        del sys.modules["rich"]


@app.command()
@_takes(settings.Settings)
def run(given: settings.Settings) -> None:
    """Run the daemon. SIGTERM: stop receiving, apply, confirm, exit 0; a second signal: exit now."""
    # Until the daemon handles it: nothing has begun that would have to be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # The rules are about to be read anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _load_structlog()
    import gc

    import structlog
    from prometheus_client import REGISTRY, disable_created_metrics

    from cdc_invalidator import log
    from cdc_invalidator.daemon import Daemon
    from cdc_invalidator.metrics import Metrics
    from cdc_invalidator.pipeline import eventstream
    from cdc_invalidator.pipeline.events import Events
    from cdc_invalidator.pipeline.eventstream import EventStream
    from cdc_invalidator.postgres.standbys import Standbys
    from cdc_invalidator.redis.endpoint import Endpoint
    from cdc_invalidator.redis.topology import cache_server
    from cdc_invalidator.session import SessionOptions

    output = log.configure(given.log_format, given.log_level)
    for sentence in settings.renamed(given):
        structlog.get_logger().warning("setting_renamed", error=sentence)
    # OpenMetrics would carry a _created series beside each counter: noise that doubles them.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    secret = given.log_hash_key
    # A URL that can't be used is told before PostgreSQL is touched.
    redis = Endpoint.parse(given.redis_url.get_secret_value())
    cache_server(redis, given.slot)
    eventstream.check_key(given.event_stream, given.slot)
    options = SessionOptions(
        postgres_dsn=given.postgres_dsn.get_secret_value(),
        redis=redis,
        event_stream=given.event_stream,
        slot=given.slot,
        publication=given.publication,
        sweep_gaps=given.on_gap == "sweep",
        sweep_rate=given.sweep_rate,
        max_retained_wal=given.max_retained_wal,
    )
    rules, metrics = _rules(given), Metrics(REGISTRY)
    eventstream.check_rules(given.event_stream, rules)
    stream = EventStream(given.event_stream, given.event_stream_length, metrics) if given.event_stream else None
    display = log.KeyDisplay(given.log_keys, secret.get_secret_value().encode() if secret else None)
    events = Events(metrics, display, log.EventLog(output, given.log_format, given.log_level), stream=stream)
    dsns = given.postgres_standbys.get_secret_value().split()
    standbys = Standbys(dsns, limit=given.standby_limit, metrics=metrics)
    daemon = Daemon(options, rules, metrics, events, standbys, given.rules)
    # What is loaded by now stays: the collector need not look at it again. What comes is keys, which are in no cycle.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
    try:
        asyncio.run(daemon.run(given.http_host, given.http_port))
    finally:
        output.close()


@app.command()
@_takes(settings.Stream)
def setup(
    given: settings.Stream,
    show: Annotated[bool, typer.Option("--print", help="Print the SQL for an administrator; change nothing.")] = False,
) -> None:
    """Make the publication and the slot that the rules need, or bring them up to date."""
    rules = _rules(given)

    async def work() -> list[str]:
        from cdc_invalidator.postgres.connection import connect
        from cdc_invalidator.postgres.publication import Publication
        from cdc_invalidator.postgres.publication import run as run_statements
        from cdc_invalidator.postgres.slot import Slot

        connection = await connect(given.postgres_dsn.get_secret_value(), "cdc-invalidator setup")
        async with connection:
            slot, publication = Slot(connection, given.slot), Publication(connection, given.publication)
            server = await slot.server()
            survey = await publication.survey(rules)
            problems = survey.mistakes(rules)
            if problems:
                raise errors.WrongRules(problems)
            for table in survey.unknown:
                typer.echo(f"-- {table} does not exist yet; run setup again, or let the daemon add it once it does.")
            statements = publication.statements(survey)
            statements += slot.statements(await slot.state(), server, new_publication=not survey.exists)
            if not show:
                await run_statements(connection, statements)
            return statements

    statements = asyncio.run(work())
    typer.echo("\n".join(statements) if statements else "-- nothing is missing")


@app.command()
@_takes(settings.Settings, offline=settings.CheckOffline)
def check(
    given: settings.Settings | settings.CheckOffline,
    offline: Annotated[bool, typer.Option("--offline", help="Only the rule files; no server is touched.")] = False,
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="A table to read, or JSON for pipelines.")
    ] = "table",
) -> None:
    """Look for mistakes in the rule files, on the live database and on Redis; exit 1 where there are errors."""
    import orjson

    from cdc_invalidator.commands import check as checking
    from cdc_invalidator.commands import findings as findings_of
    from cdc_invalidator.pipeline import eventstream
    from cdc_invalidator.redis.endpoint import Endpoint
    from cdc_invalidator.redis.topology import cache_server

    redis = Endpoint.parse(given.redis_url.get_secret_value()) if given.redis_url is not None else None
    findings: list[findings_of.Finding] = []
    rules: RuleSet | None = None
    try:
        rules = _rules(given)
    except errors.WrongRules as wrong:
        findings += map(findings_of.Finding.of, wrong.problems)
    if rules is not None:
        findings += map(findings_of.Finding.of, eventstream.clashes(given.event_stream, rules))
    if offline:
        cluster = redis is not None and redis.kind == "cluster"
        findings += checking.offline(rules, checking.Columns(), cluster=cluster) if rules is not None else []
    else:
        from cdc_invalidator.commands import check_postgres as inspection

        assert isinstance(given, settings.Settings)
        assert redis is not None
        cache_server(redis, given.slot)
        eventstream.check_key(given.event_stream, given.slot)
        servers = inspection.ServerSettings(
            given.postgres_dsn.get_secret_value(), redis, given.event_stream, given.slot, given.publication
        )
        findings += asyncio.run(inspection.inspect(servers, rules))
    findings = findings_of.in_order(findings)
    if output == "json":
        typer.echo(orjson.dumps(findings_of.report(findings), option=orjson.OPT_INDENT_2))
    else:
        typer.echo(findings_of.table(findings))
    if findings_of.count(findings, findings_of.Severity.ERROR):
        raise typer.Exit(1)


@app.command()
@_takes(settings.Database)
def teardown(given: settings.Database) -> None:
    """Drop the slot and the publication that setup made; the WAL that the slot kept is released."""

    async def work() -> list[str]:
        from cdc_invalidator.postgres.connection import connect
        from cdc_invalidator.postgres.publication import Publication
        from cdc_invalidator.postgres.slot import Slot

        connection = await connect(given.postgres_dsn.get_secret_value(), "cdc-invalidator teardown")
        async with connection:
            try:
                dropped = await Slot(connection, given.slot).drop()
            except errors.SlotInUse as error:
                raise errors.ServerRefuses(
                    f"Slot {given.slot} is in use; stop the daemons that stream from it, then run teardown again."
                ) from error
            return dropped + await Publication(connection, given.publication).drop()

    statements = asyncio.run(work())
    typer.echo("\n".join(statements) if statements else "-- nothing to drop")


@app.command()
@_takes(settings.Stream)
def bust(
    given: settings.Stream,
    cache: Annotated[str, typer.Argument(help="Name of the cache, as in the rule files.")],
    parameter: Annotated[
        list[str] | None,
        typer.Argument(help="name=value, for each parameter of its key; without any, the whole cache."),
    ] = None,
) -> None:
    """Bust by hand, through PostgreSQL's WAL: in order with all writes, and recorded like them."""
    import orjson

    from cdc_invalidator.pipeline.manual import MESSAGE_PREFIX, ManualBusts
    from cdc_invalidator.postgres.connection import connect, translated

    order: dict[str, Any] = {"cache": cache}
    if parameter:
        if not all("=" in word for word in parameter):
            raise errors.WrongSettings("A parameter lacks its value; write name=value.")
        order["params"] = dict(word.split("=", 1) for word in parameter)
    content = orjson.dumps(order)
    try:
        ManualBusts(_rules(given)).read(content)
    except errors.WrongMessage as error:
        raise errors.WrongSettings(str(error)) from error

    async def work() -> str:
        connection = await connect(given.postgres_dsn.get_secret_value(), "cdc-invalidator bust")
        async with connection:
            with translated():
                cursor = await connection.execute(
                    "SELECT pg_logical_emit_message(true, %s, %s)::text AS lsn", [MESSAGE_PREFIX, content.decode()]
                )
                return str((await cursor.fetchall())[0].lsn)

    typer.echo(f"written at {asyncio.run(work())}; it is done once the watermark has passed that")


@app.command("test")
@_takes(settings.Rules)
def run_tests(
    given: settings.Rules,
    live: Annotated[
        Path | None,
        typer.Option(
            "--live",
            metavar="SCHEMA.sql",
            help="Through a real daemon, on an embedded PostgreSQL with this schema and an embedded Valkey.",
        ),
    ] = None,
) -> None:
    """Run the tests of the rule files: what they say a change busts, against what it busts. Needs no server."""
    from cdc_invalidator.commands import trial

    rules = _rules(given)
    outcomes = trial.run(rules)
    if live is not None:
        from cdc_invalidator.embedded import rehearsal

        outcomes = rehearsal.run(rules, given.rules, live)
    report = trial.Report()
    for line in report.lines(outcomes):
        typer.echo(line)
    if report.failed:
        raise typer.Exit(1)


@app.command()
@_takes(settings.Explain)
def explain(
    given: settings.Explain,
    key: Annotated[str | None, typer.Argument(help="A key: which cache it is of, and what busts it.")] = None,
    table: Annotated[str | None, typer.Option(help="Of a change: schema.table.")] = None,
    op: Annotated[str | None, typer.Option(help="Of a change: insert, update, delete or truncate.")] = None,
    old: Annotated[str | None, typer.Option(metavar="JSON", help="Of a change: the row before it.")] = None,
    new: Annotated[str | None, typer.Option(metavar="JSON", help="Of a change: the row after it.")] = None,
    output: Annotated[Literal["text", "json"], typer.Option("--format", help="How it is told.")] = "text",
) -> None:
    """Tell what busts a KEY, or what a change (--table, --op, --old, --new) busts and why no more."""
    import orjson

    from cdc_invalidator.commands import explain as explaining

    rules = _rules(given)
    if key is not None and table is None and op is None and old is None and new is None:
        told, lines = explaining.explain_key(rules, key), explaining.key_lines
        if given.event_stream and given.redis_url is not None:
            _tell_last_busts(given, rules, key, told)
    elif key is None and table is not None and op is not None:
        change = explaining.read_change(table, op, old, new)
        told, lines = _explain_change(given, rules, change), explaining.change_lines
    else:
        raise errors.WrongSettings("Give explain either a KEY, or a change with --table and --op.")
    typer.echo(orjson.dumps(told, option=orjson.OPT_INDENT_2) if output == "json" else "\n".join(lines(told)))


def _tell_last_busts(given: settings.Explain, rules: RuleSet, key: str, told: dict[str, Any]) -> None:
    """Add what the event stream says of a key to what is told of it."""
    from cdc_invalidator import log
    from cdc_invalidator.commands import explain as explaining
    from cdc_invalidator.commands.history import History
    from cdc_invalidator.redis.endpoint import Endpoint

    assert given.redis_url is not None
    redis = Endpoint.parse(given.redis_url.get_secret_value())
    secret = given.log_hash_key
    hashed = log.KeyDisplay("hash", secret.get_secret_value().encode()).hash if secret is not None else None
    last = explaining.LastBusts(rules, key, hashed)

    async def look() -> None:
        async with History.opened(redis, given.event_stream) as history, aclosing(history.backwards()) as entries:
            async for entry in entries:
                last.take(entry.event)
                if last.complete:
                    return

    try:
        asyncio.run(look())
    except errors.WrongSettings:
        raise
    except errors.InvalidatorError as error:
        # The rest of the answer stands.
        last.fail(str(error))
    last.tell(told)


def _explain_change(given: settings.Offline, rules: RuleSet, change: Change) -> dict[str, Any]:
    from cdc_invalidator.commands import explain as explaining
    from cdc_invalidator.commands import simulate

    dsn = given.postgres_dsn.get_secret_value() if given.postgres_dsn else None
    if dsn is None:
        verdicts = simulate.simulate(rules, change, {})
        if not verdicts:
            raise explaining.no_rule(rules, change.table)
        return explaining.explain_change(change, verdicts, live=False)
    import structlog

    from cdc_invalidator.commands import catalog
    from cdc_invalidator.postgres.connection import check_dsn

    check_dsn(dsn)
    # What queries have to complain of must not stand between the answer's lines.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    played = asyncio.run(catalog.ask(dsn, rules, change))
    if not played:
        raise explaining.no_rule(rules, change.table)
    return explaining.explain_change(change, [each.verdict() for each in played], live=True)


@app.command()
@_takes(settings.Tail)
def tail(
    given: settings.Tail,
    cache: Annotated[str | None, typer.Option(help="Only events of this cache.")] = None,
    rule: Annotated[str | None, typer.Option(help="Only busts of this rule.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DURATION", help="First those of the last while, such as 10m; or all.")
    ] = None,
    output: Annotated[
        Literal["console", "json"], typer.Option("--format", help="A line to read, or the log's JSON.")
    ] = "console",
) -> None:
    """Show live busts, out of the event stream that the daemon writes where CDC_EVENT_STREAM is set."""
    if not given.event_stream:
        raise errors.WrongSettings(
            "CDC_EVENT_STREAM is not set; set it for the daemon and here, for example to cdc:cdc_invalidator:events."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        from cdc_invalidator.commands import tail as tailing
        from cdc_invalidator.redis.endpoint import Endpoint

        redis = Endpoint.parse(given.redis_url.get_secret_value())
        wanted, milliseconds = tailing.Wanted(cache, rule), tailing.read_since(since)
        asyncio.run(tailing.run(redis, given.event_stream, wanted, milliseconds, output))
    except KeyboardInterrupt:
        return


@app.command()
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    import orjson

    from cdc_invalidator.rules.schema import schema as make_schema

    typer.echo(orjson.dumps(make_schema(), option=orjson.OPT_INDENT_2))


@app.command()
def healthcheck(
    http_port: Annotated[int, typer.Option(help="Port of the daemon's pages.", envvar="CDC_HTTP_PORT")] = 9479,
) -> None:
    """Exit 0 when the daemon on this machine is live, 1 otherwise."""
    import http.client

    connection = http.client.HTTPConnection("localhost", http_port, timeout=3)
    try:
        connection.request("GET", "/livez")
        status = connection.getresponse().status
    except OSError as error:
        raise errors.InvalidatorError(
            f"No daemon answers on port {http_port} ({error}); start it, or set CDC_HTTP_PORT."
        ) from error
    finally:
        connection.close()
    if status != 200:
        raise errors.InvalidatorError(f"/livez on port {http_port} answers {status}; look at the daemon's log.")


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=1, help="How long each half runs.")] = 5,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up in the end, to look around with psql.")] = False,
) -> None:
    """Show everything at once, on an embedded PostgreSQL and Valkey: stale entries without the daemon, none with it."""
    from cdc_invalidator.embedded.demo import run as run_demo

    raise typer.Exit(run_demo(seconds, keep=keep))
