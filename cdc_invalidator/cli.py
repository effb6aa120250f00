"""The command line: its commands, arguments and flags. It reads the settings; what a command does is in `commands`.

A command's modules are imported when it runs, so that ``--help`` imports none of them.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from cdc_invalidator import __version__, errors, settings
from cdc_invalidator.commands import healthcheck as probe

if TYPE_CHECKING:
    from cdc_invalidator.commands.simulate import Change
    from cdc_invalidator.postgres.dsn import DsnSource
    from cdc_invalidator.redis.source import EndpointSource
    from cdc_invalidator.rules.model import RuleSet

Result = TypeVar("Result")
Command = Callable[..., None]

# How the help names types; values are validated when all settings are read.
_METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", settings.Size: "SIZE"}


class _Commands(click.Group):
    """The commands, in the order in which they are defined below."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  the order of click's help
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except click.UsageError as error:
            # click repeats what it does not expect; it may be an address with its password.
            if "://" in error.message or "password=" in error.message:
                raise click.UsageError(
                    "An argument that looks like an address is not expected here; give an address with its flag, in a "
                    "variable, or in a file in CDC_SECRETS_DIR.",
                    error.ctx,
                ) from None
            raise
        except KeyboardInterrupt:
            sys.exit(130)


def _takes(
    kind: type[settings.Database | settings.Rules | settings.Tail | settings.Init],
    offline: type[settings.CheckOffline] | None = None,
) -> Callable[[Command], Command]:
    """Give a command a flag for each setting of that kind, and call it with the settings.

    With its flag ``--offline``, those are of the kind ``offline``.
    """

    def decorate(command: Command) -> Command:
        fields = settings.fields(kind)

        @wraps(command)
        def wrapped(**arguments: Any) -> None:
            flagged = {name: arguments.pop(name) for name in fields}
            if offline is not None and arguments["offline"]:
                command(settings.load(offline, flagged), **arguments)
                return
            given = settings.load(kind, flagged)
            if isinstance(given, settings.Database | settings.Init):
                from cdc_invalidator.postgres.dsn import check_dsn

                check_dsn(given.postgres_dsn())
                if isinstance(given, settings.Settings) and given.postgres_readers:
                    check_dsn(given.postgres_readers(), "CDC_POSTGRES_READERS")
            command(given, **arguments)

        for name, setting in reversed(list(fields.items())):  # as decorators are applied: the last one first
            _flag(name, setting)(wrapped)
        return wrapped

    return decorate


def _flag(name: str, setting: settings.Setting) -> Callable[[Command], Command]:
    variants = setting.variants
    return click.option(
        settings.flag(name),
        metavar=f"[{'|'.join(variants)}]" if variants else _METAVARS.get(setting.type, "TEXT"),
        help=_described(setting.help, name, "required" if setting.required else setting.shown_default),
        hidden=name in settings.RENAMED,
    )


def _format(*formats: str, help: str) -> Callable[[Command], Command]:  # noqa: A002  as click calls it
    """Give a command the flag ``--format``; its default is the first of these formats."""
    return click.option(
        "--format", "output", type=click.Choice(formats), default=formats[0], show_default=True, help=help
    )


def _described(text: str, name: str, default: str) -> str:
    """Return a flag's help, with its environment variable and its default."""
    default = f"default: {default}" if default not in {"", "required"} else default
    return f"{text}  [{'; '.join(filter(None, (f'env: {settings.variable(name)}', default)))}]"


def _rules(given: settings.Stream | settings.Rules) -> RuleSet:
    from cdc_invalidator.rules.load import load_rules

    return load_rules(given.rules, os.environ)


def _postgres(secret: settings.Secret) -> DsnSource:
    from cdc_invalidator.postgres.dsn import DsnSource

    return DsnSource(secret)


def _redis(secret: settings.Secret) -> EndpointSource:
    from cdc_invalidator.redis.source import EndpointSource

    return EndpointSource(secret)


def _say(text: str) -> None:
    """Print a text that a terminal shows as it is; SQL has no control signs, see `quoting`."""
    click.echo(errors.visible(text))


def _completed(work: Coroutine[Any, Any, Result]) -> Result:
    import asyncio

    return asyncio.run(work)


@click.group(cls=_Commands)
@click.version_option(__version__, message="%(version)s", help="Print the version and exit.")
def app() -> None:
    """Bust the Redis keys that each PostgreSQL commit made stale, by declarative rules."""


def _load_structlog() -> None:
    """Load structlog without rich, which it takes where it is there, to draw tracebacks with: 4 MB less."""
    if "rich" not in sys.modules:
        # That is how an import is refused; conditions need it later.
        sys.modules["rich"] = None  # type: ignore[assignment]
        import structlog  # noqa: F401

        del sys.modules["rich"]


@app.command()
@click.option("--observe", is_flag=True, help="Bust nothing; the same as --mode observe.")
@_takes(settings.Settings)
def run(given: settings.Settings, observe: bool) -> None:
    """Run the daemon. SIGTERM: stop receiving, apply, confirm, exit 0; a second signal: exit now."""
    _start(dataclasses.replace(given, mode="observe") if observe else given)


def _start(given: settings.Settings, **options: Any) -> dict[str, Any]:
    # Until the daemon handles it: nothing has begun that would have to be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # The rules are about to be read anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _load_structlog()
    from cdc_invalidator import start

    return start.run(given, **options)


@app.command()
@click.option("--for", "duration", metavar="DURATION", default="1h", show_default=True, help="How long, such as 30m.")
@_format("text", "json", help="Output format of the report.")
@_takes(settings.Settings)
def observe(given: settings.Settings, duration: str, output: str) -> None:
    """Run the daemon for a while without busting anything, and report what it would have mended.

    The log goes to standard error. SIGTERM and Ctrl+C end it earlier, with a report.
    """
    import orjson

    from cdc_invalidator.commands import observe as command
    from cdc_invalidator.rules.duration import read_duration

    try:
        seconds = read_duration(duration) / 1000
    except ValueError as error:
        raise errors.WrongSettings(f"--for is wrong: {error}.") from None
    status = _start(dataclasses.replace(given, mode="observe"), seconds=seconds, log_to=sys.stderr.fileno())
    found = command.report(status)
    if output == "json":
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        _say("\n".join(command.lines(found)))


@app.command()
@click.option("--print", "show", is_flag=True, help="Print the SQL for an administrator; change nothing.")
@_takes(settings.Stream)
def setup(given: settings.Stream, show: bool) -> None:
    """Create or update the slot and the publication. They then match the rules."""
    from cdc_invalidator.commands.setup import set_up

    dsn = _postgres(given.postgres_dsn)
    work = set_up(dsn, given.slot, given.publication, _rules(given), show=show, say=_say)
    _say("\n".join(_completed(work)) or "-- nothing is missing")


@app.command()
@click.option("--offline", is_flag=True, help="Check the rule files only; contact no server.")
@_format("table", "json", help="Output format: a table, or JSON for pipelines.")
@_takes(settings.Settings, offline=settings.CheckOffline)
def check(given: settings.Settings | settings.CheckOffline, offline: bool, output: str) -> None:  # noqa: ARG001  `_takes` heeds it
    """Check the rule files, the database and Redis for mistakes. Exit 1 if there are errors."""
    import orjson

    from cdc_invalidator.commands import check, findings
    from cdc_invalidator.redis.endpoint import Endpoint

    if isinstance(given, settings.CheckOffline):
        redis = Endpoint.parse(given.redis_url()) if given.redis_url is not None else None
        found = check.check_files(given.rules, os.environ, redis, given.event_stream)
    else:
        from cdc_invalidator.commands.check_postgres import ServerSettings
        from cdc_invalidator.postgres.dsn import DsnSource

        servers = ServerSettings(
            _postgres(given.postgres_dsn),
            DsnSource(given.postgres_readers, "CDC_POSTGRES_READERS") if given.postgres_readers else None,
            _redis(given.redis_url),
            given.event_stream,
            given.slot,
            given.watermark_name,
            given.publication,
            raw_keys=given.log_keys == "raw",
            sweep_rate=given.sweep_rate,
            fingerprints=given.verify_sample > 0,
            observing=given.mode == "observe",
        )
        found = _completed(check.check_servers(given.rules, os.environ, servers))
    if output == "json":
        click.echo(orjson.dumps(findings.report(found), option=orjson.OPT_INDENT_2))
    else:
        _say(findings.table(found))
    if findings.count(found, findings.Severity.ERROR):
        sys.exit(1)


@app.command()
@click.option(
    "--keys",
    metavar="FILE",
    help="Read the names of keys from FILE, one a line as `redis-cli --scan` prints them, instead of Redis; - for "
    "standard input. A line may go on with the type and the remaining seconds, after tabs.",
)
@click.option(
    "--from-redis-dump",
    "dump",
    metavar="FILE",
    help="Read the names of keys from FILE, which BGSAVE or `redis-cli --rdb` has written, instead of Redis. Values "
    "are skipped.",
)
@click.option(
    "--database",
    type=click.IntRange(min=0),
    default=0,
    metavar="INTEGER",
    show_default=True,
    help="The database of the dump whose keys count.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=100_000,
    metavar="INTEGER",
    show_default=True,
    help="Look at most at so many keys; 0 for all.",
)
@click.option(
    "--rate",
    type=click.IntRange(min=1),
    default=10_000,
    metavar="INTEGER",
    show_default=True,
    help="Look at most at so many keys a second.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the rule file to FILE instead of standard output.",
)
@click.option("--force", is_flag=True, help="Overwrite the FILE of --output.")
@_takes(settings.Init)
def init(
    given: settings.Init,
    keys: str | None,
    dump: str | None,
    database: int,
    sample: int,
    rate: int,
    output: Path | None,
    force: bool,
) -> None:
    """Write a rule file to begin with, from the tables of the database and the names of the keys in Redis."""
    from cdc_invalidator.commands import init as command

    if keys is not None and dump is not None:
        raise errors.WrongSettings("Give either --keys or --from-redis-dump, not both.")
    offline = keys is not None or dump is not None
    if not offline and given.redis_url is None:
        raise errors.WrongSettings(
            "CDC_REDIS_URL is not set; set it, or give --keys with a file of key names, or --from-redis-dump."
        )
    if output is not None and output.exists() and not force:
        raise errors.WrongSettings(f"{output} is there already; give another --output, or --force.")
    redis = _redis(given.redis_url) if not offline and given.redis_url is not None else None
    source = command.Source(redis, keys, dump, sample, rate, database, given.event_stream)
    text = _completed(command.draft(_postgres(given.postgres_dsn), given.publication, source))
    if output is None:
        click.echo(text, nl=False)
    else:
        command.save(text, output, force=force)


@app.command()
@_takes(settings.Database)
def teardown(given: settings.Database) -> None:
    """Drop the slot and the publication. This releases the WAL that the slot retained."""
    from cdc_invalidator.commands.setup import tear_down

    statements = _completed(tear_down(_postgres(given.postgres_dsn), given.slot, given.publication))
    _say("\n".join(statements) or "-- nothing to drop")


@app.command()
@click.argument("cache", help="Name of the cache, as in the rule files.  [required]")
@click.argument(
    "parameters",
    metavar="[PARAMETER]...",
    nargs=-1,
    help="name=value for each parameter of the cache's key; without any, the whole cache.",
)
@_takes(settings.Stream)
def bust(given: settings.Stream, cache: str, parameters: Sequence[str]) -> None:
    """Bust a key or a whole cache manually. It goes through PostgreSQL's WAL, in order with all writes."""
    from cdc_invalidator.commands.bust import emit, message

    written_at = _completed(emit(_postgres(given.postgres_dsn), message(_rules(given), cache, parameters)))
    click.echo(f"written at {written_at}; it is done once the watermark has passed that")


@app.command("test")
@click.option(
    "--live",
    type=click.Path(path_type=Path),
    metavar="SCHEMA.sql",
    help="Run them through a real daemon, on an embedded PostgreSQL with this schema and an embedded Valkey.",
)
@_takes(settings.Rules)
def run_tests(given: settings.Rules, live: Path | None) -> None:
    """Run the tests of the rule files. Each compares what a change busts with what it should. Needs no server."""
    from cdc_invalidator.commands import trial

    rules = _rules(given)
    results = trial.run(rules)
    if live is not None:
        from cdc_invalidator.embedded import rehearsal

        results = rehearsal.run(rules, given.rules, live)
    report = trial.Report()
    for line in report.lines(results):
        _say(line)
    if report.failed:
        sys.exit(1)


@app.command()
@click.argument("key", required=False, help="A key: show its cache and what busts it.")
@click.option("--table", metavar="SCHEMA.TABLE", help="Table of the change.")
@click.option("--op", metavar="KIND", help="Kind of the change: insert, update, delete or truncate.")
@click.option("--old", metavar="JSON", help="The row before the change.")
@click.option("--new", metavar="JSON", help="The row after the change.")
@_format("text", "json", help="Output format.")
@_takes(settings.Explain)
def explain(
    given: settings.Explain,
    key: str | None,
    table: str | None,
    op: str | None,
    old: str | None,
    new: str | None,
    output: str,
) -> None:
    """Show what busts a KEY, or what a change busts and why nothing else. Give --table and --op for a change."""
    import orjson

    from cdc_invalidator.commands.explain import change_lines, key_lines, read_change

    rules = _rules(given)
    if key is not None and table is None and op is None and old is None and new is None:
        answer, lines = _explained_key(given.postgres_dsn, rules, key, _hashed(given.log_hash_key)), key_lines
        if given.event_stream and given.redis_url is not None:
            from cdc_invalidator.commands.explain_live import last_busts

            last = _completed(
                last_busts(rules, key, _redis(given.redis_url), given.event_stream, _hashed(given.log_hash_key))
            )
            last.tell(answer)
    elif key is None and table is not None and op is not None:
        answer, lines = _explained(given.postgres_dsn, rules, read_change(table, op, old, new)), change_lines
    else:
        raise errors.WrongSettings("Give explain either a KEY, or a change with --table and --op.")
    if output == "json":
        click.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
    else:
        _say("\n".join(lines(answer)))


def _hashed(secret: settings.Secret | None) -> Callable[[bytes], str] | None:
    from cdc_invalidator.log import KeyDisplay

    return KeyDisplay("hash", secret().encode()).hash if secret is not None else None


def _explained_key(
    dsn: settings.Secret | None, rules: RuleSet, key: str, hashed: Callable[[bytes], str] | None
) -> dict[str, Any]:
    from cdc_invalidator.commands.explain import explain_key

    if dsn is None:
        return explain_key(rules, key, hashed)
    from cdc_invalidator.commands import explain_live

    try:
        known = _completed(explain_live.parameter_values(_postgres(dsn), rules))
    except errors.WrongSettings:
        raise
    except errors.InvalidatorError as error:
        # The rest of the answer stands.
        return {**explain_key(rules, key, hashed), "types_error": str(error)}
    return explain_key(rules, key, hashed, known)


def _explained(dsn: settings.Secret | None, rules: RuleSet, change: Change) -> dict[str, Any]:
    from cdc_invalidator.commands.explain import explain_change, no_rule

    if dsn is None:
        from cdc_invalidator.commands.simulate import simulate

        verdicts = simulate(rules, change, {})
    else:
        from cdc_invalidator.commands import explain_live

        verdicts = _completed(explain_live.verdicts(_postgres(dsn), rules, change))
    if not verdicts:
        raise no_rule(rules, change.table)
    return explain_change(change, verdicts, live=dsn is not None)


@app.command()
@click.option("--cache", help="Only events of this cache.")
@click.option("--rule", help="Only busts of this rule.")
@click.option(
    "--since",
    metavar="DURATION",
    help="Begin with the events of the last DURATION, such as 10m, or with all.",
)
@_format("console", "json", help="Output format: text, or the log's JSON.")
@_takes(settings.Tail)
def tail(
    given: settings.Tail, cache: str | None, rule: str | None, since: str | None, output: Literal["console", "json"]
) -> None:
    """Show live busts from the event stream. The daemon writes it if CDC_EVENT_STREAM is set."""
    if not given.event_stream:
        raise errors.WrongSettings(
            "CDC_EVENT_STREAM is not set; set it for the daemon and here, for example to cdc:cdc_invalidator:events."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        from cdc_invalidator.commands.tail import Wanted, read_since, run

        _completed(run(_redis(given.redis_url), given.event_stream, Wanted(cache, rule), read_since(since), output))
    except KeyboardInterrupt:
        return


@app.command()
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the module to FILE instead of standard output.",
)
@click.option("--check", "compare", is_flag=True, help="Write nothing; exit 1 if the FILE of --output is out of date.")
@_takes(settings.Handles)
def handles(given: settings.Handles, output: Path | None, compare: bool) -> None:
    """Write a Python module with which type checkers know each cache and its parameters.

    Types of parameters come from the database; without one, from the FILE of --output, if that is there.
    """
    from cdc_invalidator.commands import handles as command

    if compare and output is None:
        raise errors.WrongSettings("--check compares a file; give it with --output.")
    rules = _rules(given)
    if given.postgres_dsn is not None:
        types = _completed(command.types_of(_postgres(given.postgres_dsn), rules))
    else:
        types = command.noted_types(output)
    text = command.module(rules, types)
    if output is None:
        click.echo(text, nl=False)
    elif not compare:
        output.write_text(text)
    elif not output.exists() or output.read_text() != text:
        raise errors.InvalidatorError(f"{output} is out of date; write it with `cdc-invalidator handles -o {output}`.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    import orjson

    from cdc_invalidator.rules.schema import schema as make_schema

    click.echo(orjson.dumps(make_schema(), option=orjson.OPT_INDENT_2))


@app.command()
@click.option(
    "--http-port",
    type=int,
    default=probe.DEFAULT_PORT,
    envvar=settings.variable("http_port"),
    help=_described("Port of the daemon's pages.", "http_port", str(probe.DEFAULT_PORT)),
)
def healthcheck(http_port: int) -> None:
    """Exit 0 if the daemon on this machine is live, 1 if not."""
    probe.check(http_port)


@app.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=5,
    metavar="NUMBER",
    show_default=True,
    help="Seconds that each half runs.",
)
@click.option("--keep", is_flag=True, help="Keep the servers running afterwards, to try psql on.")
def demo(seconds: float, keep: bool) -> None:
    """Demonstrate everything on embedded servers. Stale entries appear without the daemon, and none with it."""
    from cdc_invalidator.embedded.demo import run as run_demo

    sys.exit(run_demo(seconds, keep=keep))
