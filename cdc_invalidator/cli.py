"""The command line: its commands, arguments and flags. It reads the settings; what a command does is in `commands`.

A command's modules are imported when it runs, so that ``--help`` imports none of them.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from cdc_invalidator import __version__, errors, settings
from cdc_invalidator.commands import healthcheck as probe

if TYPE_CHECKING:
    from cdc_invalidator.commands.simulate import Change
    from cdc_invalidator.rules.model import RuleSet

Result = TypeVar("Result")

app = typer.Typer(
    name="cdc-invalidator",
    help="Bust the Redis keys that each PostgreSQL commit made stale, by declarative rules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# How the help names types; values are validated when all settings are read.
_METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", settings.Size: "SIZE"}


def _takes(
    kind: type[settings.Database | settings.Rules | settings.Tail], offline: type[settings.CheckOffline] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each setting of that kind, and call it with the settings.

    With its flag ``--offline``, those are of the kind ``offline``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "given"]
        flags = [_flag(name, setting) for name, setting in settings.fields(kind).items()]

        def wrapped(**arguments: Any) -> None:
            flagged = {flag.name: arguments.pop(flag.name) for flag in flags}
            if offline is not None and arguments["offline"]:
                command(settings.load(offline, flagged), **arguments)
                return
            given = settings.load(kind, flagged)
            if isinstance(given, settings.Database):
                from cdc_invalidator.postgres.connection import check_dsn

                check_dsn(given.postgres_dsn)
            command(given, **arguments)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + flags
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        return wrapped

    return decorate


def _flag(name: str, setting: settings.Setting) -> inspect.Parameter:
    variants = setting.variants
    option = typer.Option(
        settings.flag(name),
        metavar=f"[{'|'.join(variants)}]" if variants else _METAVARS.get(setting.type, "TEXT"),
        help=_described(setting.help, name, "required" if setting.required else setting.shown_default),
        show_default=False,
        hidden=name in settings.RENAMED,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _described(text: str, name: str, default: str) -> str:
    """Return a flag's help, with its environment variable and its default."""
    default = f"default: {default}" if default not in {"", "required"} else default
    return f"{text}  [{'; '.join(filter(None, (f'env: {settings.variable(name)}', default)))}]"


def _rules(given: settings.Stream | settings.Rules) -> RuleSet:
    from cdc_invalidator.rules.load import load_rules

    return load_rules(given.rules, os.environ)


def _completed(work: Coroutine[Any, Any, Result]) -> Result:
    import asyncio

    return asyncio.run(work)


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
    from cdc_invalidator import start

    start.run(given)


@app.command()
@_takes(settings.Stream)
def setup(
    given: settings.Stream,
    show: Annotated[bool, typer.Option("--print", help="Print the SQL for an administrator; change nothing.")] = False,
) -> None:
    """Create or update the slot and the publication. They then match the rules."""
    from cdc_invalidator.commands.setup import set_up

    work = set_up(given.postgres_dsn, given.slot, given.publication, _rules(given), show=show, say=typer.echo)
    typer.echo("\n".join(_completed(work)) or "-- nothing is missing")


@app.command()
@_takes(settings.Settings, offline=settings.CheckOffline)
def check(
    given: settings.Settings | settings.CheckOffline,
    offline: Annotated[bool, typer.Option("--offline", help="Check the rule files only; contact no server.")] = False,  # noqa: ARG001  `_takes` heeds it
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="Output format: a table, or JSON for pipelines.")
    ] = "table",
) -> None:
    """Check the rule files, the database and Redis for mistakes. Exit 1 if there are errors."""
    import orjson

    from cdc_invalidator.commands import check, findings
    from cdc_invalidator.redis.endpoint import Endpoint

    redis = Endpoint.parse(given.redis_url) if given.redis_url is not None else None
    if isinstance(given, settings.CheckOffline):
        found = check.check_files(given.rules, os.environ, redis, given.event_stream)
    else:
        from cdc_invalidator.commands.check_postgres import ServerSettings

        assert redis is not None
        servers = ServerSettings(given.postgres_dsn, redis, given.event_stream, given.slot, given.publication)
        found = _completed(check.check_servers(given.rules, os.environ, servers))
    if output == "json":
        typer.echo(orjson.dumps(findings.report(found), option=orjson.OPT_INDENT_2))
    else:
        typer.echo(findings.table(found))
    if findings.count(found, findings.Severity.ERROR):
        raise typer.Exit(1)


@app.command()
@_takes(settings.Database)
def teardown(given: settings.Database) -> None:
    """Drop the slot and the publication. This releases the WAL that the slot retained."""
    from cdc_invalidator.commands.setup import tear_down

    statements = _completed(tear_down(given.postgres_dsn, given.slot, given.publication))
    typer.echo("\n".join(statements) or "-- nothing to drop")


@app.command()
@_takes(settings.Stream)
def bust(
    given: settings.Stream,
    cache: Annotated[str, typer.Argument(help="Name of the cache, as in the rule files.")],
    parameter: Annotated[
        list[str] | None,
        typer.Argument(help="name=value for each parameter of the cache's key; without any, the whole cache."),
    ] = None,
) -> None:
    """Bust a key or a whole cache manually. It goes through PostgreSQL's WAL, in order with all writes."""
    from cdc_invalidator.commands.bust import emit, message

    written_at = _completed(emit(given.postgres_dsn, message(_rules(given), cache, parameter or [])))
    typer.echo(f"written at {written_at}; it is done once the watermark has passed that")


@app.command("test")
@_takes(settings.Rules)
def run_tests(
    given: settings.Rules,
    live: Annotated[
        Path | None,
        typer.Option(
            "--live",
            metavar="SCHEMA.sql",
            help="Run them through a real daemon, on an embedded PostgreSQL with this schema and an embedded Valkey.",
        ),
    ] = None,
) -> None:
    """Run the tests of the rule files. Each compares what a change busts with what it should. Needs no server."""
    from cdc_invalidator.commands import trial

    rules = _rules(given)
    results = trial.run(rules)
    if live is not None:
        from cdc_invalidator.embedded import rehearsal

        results = rehearsal.run(rules, given.rules, live)
    report = trial.Report()
    for line in report.lines(results):
        typer.echo(line)
    if report.failed:
        raise typer.Exit(1)


@app.command()
@_takes(settings.Explain)
def explain(
    given: settings.Explain,
    key: Annotated[str | None, typer.Argument(help="A key: show its cache and what busts it.")] = None,
    table: Annotated[str | None, typer.Option(metavar="SCHEMA.TABLE", help="Table of the change.")] = None,
    op: Annotated[str | None, typer.Option(help="Kind of the change: insert, update, delete or truncate.")] = None,
    old: Annotated[str | None, typer.Option(metavar="JSON", help="The row before the change.")] = None,
    new: Annotated[str | None, typer.Option(metavar="JSON", help="The row after the change.")] = None,
    output: Annotated[Literal["text", "json"], typer.Option("--format", help="Output format.")] = "text",
) -> None:
    """Show what busts a KEY, or what a change busts and why nothing else. Give --table and --op for a change."""
    import orjson

    from cdc_invalidator.commands.explain import change_lines, explain_key, key_lines, read_change

    rules = _rules(given)
    if key is not None and table is None and op is None and old is None and new is None:
        answer, lines = explain_key(rules, key), key_lines
        if given.event_stream and given.redis_url is not None:
            from cdc_invalidator.commands.explain_live import last_busts
            from cdc_invalidator.redis.endpoint import Endpoint

            redis = Endpoint.parse(given.redis_url)
            last = _completed(last_busts(rules, key, redis, given.event_stream, given.log_hash_key))
            last.tell(answer)
    elif key is None and table is not None and op is not None:
        answer, lines = _explained(given.postgres_dsn, rules, read_change(table, op, old, new)), change_lines
    else:
        raise errors.WrongSettings("Give explain either a KEY, or a change with --table and --op.")
    typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2) if output == "json" else "\n".join(lines(answer)))


def _explained(dsn: str | None, rules: RuleSet, change: Change) -> dict[str, Any]:
    from cdc_invalidator.commands.explain import explain_change, no_rule

    if dsn is None:
        from cdc_invalidator.commands.simulate import simulate

        verdicts = simulate(rules, change, {})
    else:
        from cdc_invalidator.commands import explain_live

        verdicts = _completed(explain_live.verdicts(dsn, rules, change))
    if not verdicts:
        raise no_rule(rules, change.table)
    return explain_change(change, verdicts, live=dsn is not None)


@app.command()
@_takes(settings.Tail)
def tail(
    given: settings.Tail,
    cache: Annotated[str | None, typer.Option(help="Only events of this cache.")] = None,
    rule: Annotated[str | None, typer.Option(help="Only busts of this rule.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Begin with the events of the last DURATION, such as 10m, or with all."),
    ] = None,
    output: Annotated[
        Literal["console", "json"], typer.Option("--format", help="Output format: text, or the log's JSON.")
    ] = "console",
) -> None:
    """Show live busts from the event stream. The daemon writes it if CDC_EVENT_STREAM is set."""
    if not given.event_stream:
        raise errors.WrongSettings(
            "CDC_EVENT_STREAM is not set; set it for the daemon and here, for example to cdc:cdc_invalidator:events."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        from cdc_invalidator.commands.tail import Wanted, read_since, run
        from cdc_invalidator.redis.endpoint import Endpoint

        redis = Endpoint.parse(given.redis_url)
        _completed(run(redis, given.event_stream, Wanted(cache, rule), read_since(since), output))
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
    http_port: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            help=_described("Port of the daemon's pages.", "http_port", str(probe.DEFAULT_PORT)),
            envvar="CDC_HTTP_PORT",
            show_envvar=False,
            show_default=False,
        ),
    ] = probe.DEFAULT_PORT,
) -> None:
    """Exit 0 if the daemon on this machine is live, 1 if not."""
    probe.check(http_port)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=1, metavar="NUMBER", help="Seconds that each half runs.")] = 5,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the servers running afterwards, to try psql on.")] = False,
) -> None:
    """Demonstrate everything on embedded servers. Stale entries appear without the daemon, and none with it."""
    from cdc_invalidator.embedded.demo import run as run_demo

    raise typer.Exit(run_demo(seconds, keep=keep))
