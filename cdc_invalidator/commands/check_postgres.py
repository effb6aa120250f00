"""Checks the rules against the live PostgreSQL; `check_redis` does the same for Redis.

The rule that holds here: nothing is changed. Catalogs are read and queries explained, on a connection that can't write.
A server that is away is a finding too.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from cdc_invalidator import errors
from cdc_invalidator.commands import check_redis
from cdc_invalidator.commands.check_joins import Reads, of_joins
from cdc_invalidator.commands.check_rules import never, offline, query_lacks
from cdc_invalidator.commands.column_texts import Columns, texts
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.pipeline.ask import objection, statement
from cdc_invalidator.postgres import remedies
from cdc_invalidator.postgres.connection import answered, connect, first_line, rows
from cdc_invalidator.postgres.dsn import DsnSource
from cdc_invalidator.postgres.mistakes import NAMED, mistakes, read_of_old, unknown_old
from cdc_invalidator.postgres.parameters import parameter_types
from cdc_invalidator.postgres.publication import Publication
from cdc_invalidator.postgres.queries import ColumnInfo, above, columns, given_tables, read_rights
from cdc_invalidator.postgres.replication import Replication
from cdc_invalidator.postgres.slot import READERS_UNKNOWN, ServerInfo, Slot
from cdc_invalidator.postgres.snapshot import Snapshots
from cdc_invalidator.postgres.spelling import Spelling
from cdc_invalidator.postgres.survey import Leaf, Survey
from cdc_invalidator.reader.keys import letters_folded
from cdc_invalidator.reader.spelling import has_text
from cdc_invalidator.redis.source import EndpointSource
from cdc_invalidator.rules.condition import asked_columns, condition_of
from cdc_invalidator.rules.model import Bust, Cache, Rule, RuleSet
from cdc_invalidator.rules.table import Table
from cdc_invalidator.rules.template import Param
from cdc_invalidator.rules.wording import Place, nearest

POSTGRES = "PostgreSQL"

# A smaller table is read in a millisecond or two, with or without an index.
LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The daemon's settings about its servers."""

    postgres_dsn: DsnSource
    postgres_readers: DsnSource | None
    redis: EndpointSource
    event_stream: str
    slot: str
    watermark: str
    publication: str
    raw_keys: bool
    sweep_rate: int
    fingerprints: bool
    observing: bool


async def inspect(servers: ServerSettings, rules: RuleSet | None) -> list[Finding]:
    """Check the servers and the rules.

    Args:
        servers: how to reach the servers.
        rules: the rule set; ``None`` if the files have mistakes, to check only the servers.
    """
    database = _Database(servers, rules)
    findings = await _or_finding(database.look, POSTGRES, "postgres_unavailable")
    if rules is not None:
        findings += offline(rules, database.columns, cluster=servers.redis.kind == "cluster")
    findings += await _or_finding(
        lambda: check_redis.look_at(
            servers.redis,
            servers.watermark,
            servers.event_stream,
            rules,
            system_id=database.system_id,
            columns=database.columns,
            raw_keys=servers.raw_keys,
            sweep_rate=servers.sweep_rate,
            fingerprints=servers.fingerprints,
            observing=servers.observing,
        ),
        check_redis.REDIS,
        "redis_unavailable",
    )
    return findings


async def _or_finding(look: Callable[[], Awaitable[list[Finding]]], place: str, code: str) -> list[Finding]:
    """Turn the error of a look that fails into a finding."""
    try:
        return await look()
    except errors.PoolerInBetween:
        # A wrong setting, behind which nothing else can be looked at.
        raise
    except errors.InvalidatorError as error:
        return [Finding(Severity.ERROR, code, place, str(error))]


# ── PostgreSQL ───────────────────────────────────────────────────────────────────────────────────────────────────────


_DOCUMENTS = frozenset({17, 114, 142, 3802})  # bytea, json, xml, jsonb
_NAME = 19


def _unbounded(column: ColumnInfo) -> bool:
    """Return whether a value of the column can be of any length."""
    if column.base_oid in _DOCUMENTS or column.base_category == "A":
        return True
    return column.base_category == "S" and column.base_modifier == -1 and column.base_oid != _NAME


class _Database:
    """One check of the database in the settings."""

    def __init__(self, servers: ServerSettings, rules: RuleSet | None) -> None:
        self._settings = servers
        self._rules = rules
        self._findings: list[Finding] = []
        self._columns: dict[Table, dict[str, ColumnInfo]] = {}
        self._reads: list[Reads] = []
        self.columns = Columns()
        # The settings that values are printed with, where they could be read.
        self._printed_with: Mapping[str, str] | None = None
        # Of the server, where it could be asked; nobody streams from the slot then.
        self.system_id: str | None = None

    async def look(self) -> list[Finding]:
        """Return the findings."""
        connection = await connect(
            self._settings.postgres_dsn,
            "cdc-invalidator check",
            {"default_transaction_read_only": "on", "row_security": "off"},
        )
        async with connection:
            slot = Slot(connection, self._settings.slot)
            server: ServerInfo | None = None
            try:
                server = await slot.server()
            except errors.ServerRefuses as error:
                self._add(Severity.ERROR, "no_logical_decoding", str(error))
            await self._look_at_spelling(connection)
            await self._look_at_slot(connection, slot, server)
            await self._look_at_readers(server)
            if self._rules is not None:
                publication = Publication(connection, self._settings.publication)
                survey = await publication.survey(self._rules)
                await self._look_at_publication(connection, publication, survey, self._rules)
                await self._look_at_tables(connection, survey, self._rules)
                await self._look_at_queries(connection, self._rules)
                await self._look_at_texts(connection, self._rules)
        return self._findings

    def _add(
        self,
        severity: Severity,
        code: str,
        sentence: str,
        place: Place | str = POSTGRES,
        sql: Sequence[str] = (),
        or_sql: Sequence[str] = (),
    ) -> None:
        self._findings.append(Finding(severity, code, place, sentence, tuple(sql), tuple(or_sql)))

    async def _look_at_readers(self, server: ServerInfo | None) -> None:
        readers = self._settings.postgres_readers
        if server is None:
            return
        if server.in_recovery and readers is None:
            self._add(Severity.ERROR, "readers_unknown", READERS_UNKNOWN)
        if readers is not None:
            try:
                (await Snapshots.open_readers(readers, self.system_id)).close()
            except errors.PoolerInBetween:
                raise
            except errors.InvalidatorError as error:
                self._add(Severity.ERROR, "readers_unavailable", str(error))

    async def _look_at_spelling(self, connection: psycopg.AsyncConnection[Any]) -> None:
        try:
            spelling = await Spelling.read(connection, self._settings.postgres_dsn)
        except errors.ServerRefuses as error:
            self._add(Severity.ERROR, "settings_hidden", str(error))
            return
        self._printed_with = spelling.values
        if not spelling.values["DateStyle"].startswith("ISO"):
            self._add(
                Severity.WARNING,
                "dates_not_iso",
                f"DateStyle of the database is {spelling.values['DateStyle']}, so that keys contain dates and times in "
                "that form; the reader library has keys for dates, and none for times, and `when` compares no times; "
                "keep times out of keys.",
            )
        if int(spelling.values["extra_float_digits"]) < 1:
            self._add(
                Severity.WARNING,
                "floats_rounded",
                "extra_float_digits of the database is below 1, so that floats which differ a little are printed and "
                "compared as equal; run ALTER DATABASE … SET extra_float_digits = 1, or keep floats out of keys, "
                "`columns` and `when`.",
            )

    async def _look_at_slot(
        self, connection: psycopg.AsyncConnection[Any], slot: Slot, server: ServerInfo | None
    ) -> None:
        name = self._settings.slot
        rights = await read_rights(connection)
        if not rights.replicates:
            remedy = remedies.run(remedies.replication_right(rights.role))
            self._add(
                Severity.ERROR,
                "no_replication_right",
                f"the role {rights.role} may not stream; {remedy.text}.",
                sql=remedy.sql,
            )
        if rights.keep_size == -1:
            self._add(
                Severity.NOTE,
                "wal_unbounded",
                "max_slot_wal_keep_size is not set, so while no daemon runs the slot holds WAL without a bound; set "
                f"it, for example {remedies.as_text(remedies.bounded_wal())}.",
                sql=remedies.bounded_wal(),
            )
        try:
            state = await slot.state()
        except errors.ServerRefuses as error:
            self._add(Severity.ERROR, "unusable_slot", str(error), sql=error.sql)
            return
        if state is None:
            self._add(
                Severity.NOTE,
                "no_slot",
                f"there is no slot {name} yet, so the caches are swept at the first start; the daemon makes it, or "
                "`cdc-invalidator setup`.",
            )
            if rights.free_slots <= 0:
                self._add(
                    Severity.ERROR,
                    "no_slot_free",
                    "all replication slots are taken; raise max_replication_slots, or drop a slot that nobody uses.",
                )
        elif state.lost:
            self._add(
                Severity.WARNING,
                "slot_lost",
                f"PostgreSQL has given up the slot {name}, and changes were missed; the daemon makes it anew and "
                "sweeps the caches: start it, and raise max_slot_wal_keep_size.",
            )
        elif not state.active:
            self._add(
                Severity.WARNING if state.wal_status != "reserved" else Severity.NOTE,
                "slot_idle",
                f"nobody streams from the slot {name}, which holds {state.retained >> 20} MiB of WAL; start the "
                "daemon, or drop the slot with `cdc-invalidator teardown`.",
            )
        elif state.wal_status != "reserved":
            self._add(
                Severity.WARNING,
                "slot_behind",
                f"the slot {name} holds {state.retained >> 20} MiB of WAL, more than max_wal_size; look at why the "
                "daemon does not keep up.",
            )
        if rights.replicates and (state is None or not state.active):
            try:
                self.system_id = (await Replication.try_out(self._settings.postgres_dsn)).system_id
            except errors.InvalidatorError as error:
                self._add(Severity.ERROR, "cannot_stream", str(error))
        if server is not None and server.in_recovery:
            self._add(
                Severity.NOTE,
                "on_a_standby",
                "this is a standby, where no publication can be made or altered; run what is missing on the primary.",
            )

    async def _look_at_publication(
        self, connection: psycopg.AsyncConnection[Any], publication: Publication, survey: Survey, rules: RuleSet
    ) -> None:
        name = self._settings.publication
        self._findings += map(Finding.of, mistakes(survey, rules))
        given = {"publication": name, **given_tables(rules.tables)}
        owned = {Table(row.schema, row.name) for row in await rows(connection, _OWNED, given)}
        missing = survey.unpublished
        if not survey.exists:
            (row,) = await rows(connection, _MAY_CREATE)
            self._not_set_up(
                POSTGRES,
                "no_publication",
                f"there is no publication {name}",
                publication.statements(survey),
                may=row.may and owned >= set(missing),
            )
            return
        (row,) = await rows(connection, _PUBLISHED, given)
        used = {op for rule in rules.rules for op in rule.on}
        lacking = sorted(used - set(row.ops))
        for leaf in await publication.bystanders() if {"update", "delete"} & set(row.ops) else ():
            if leaf.table not in survey.tables and leaf.table not in survey.without_identity:
                text, *sql = remedies.usable_identity(leaf, name)
                self._add(
                    Severity.ERROR,
                    "no_replica_identity",
                    f"the publication {name} is FOR ALL TABLES or a schema, and so carries {leaf.table}, which no rule "
                    "names and which has no usable replica identity, so that the application's UPDATE and DELETE fail; "
                    f"{text}.",
                    POSTGRES,
                    *sql,
                )
        fix = publication.options(survey)
        if survey.awaits_stored:
            self._not_set_up(
                POSTGRES,
                "generated_columns_not_published",
                f"the publication {name} does not carry stored generated columns, and a replica identity contains "
                "some, so that the application's UPDATE and DELETE would fail",
                fix,
                may=row.mine,
            )
        if lacking and not survey.bystanders:
            self._not_set_up(
                POSTGRES,
                "operation_not_published",
                f"the publication {name} does not publish {' and '.join(lacking)}, so that rules never see these",
                fix,
                may=row.mine,
            )
        if row.via_root:
            self._not_set_up(
                POSTGRES,
                "published_via_root",
                f"the publication {name} shows partitions under their root, which hides a TRUNCATE of one of them",
                fix,
                may=row.mine,
            )
        for table in missing:
            state = survey.tables[table]
            self._not_set_up(
                _rules_on(rules, table)[0].place,
                "table_not_published",
                f"the publication {name} lacks {table}, whose changes are not seen",
                [remedies.add_table(name, table, partitioned=state is not None and state.partitioned)],
                may=row.mine and table in owned,
            )
        for table in survey.without_identity:
            if table not in survey.tables:
                remedy = remedies.run(remedies.remove_table(name, table))
                self._add(
                    Severity.ERROR,
                    "no_replica_identity",
                    f"the publication {name} lists {table}, which no rule names and which has no replica identity, so "
                    f"that the application's UPDATE and DELETE fail; {remedy.text}.",
                    sql=remedy.sql,
                )

    def _not_set_up(self, place: Place | str, code: str, what: str, statements: list[str], *, may: bool) -> None:
        """Report what the daemon corrects when it starts, or an administrator must correct."""
        if may:
            severity = Severity.NOTE if code == "no_publication" else Severity.WARNING
            sentence = f"{what}; the daemon runs, when it starts: {' '.join(statements)}"
            self._add(severity, code, sentence, place, statements)
        else:
            sentence = f"{what}, and its role may not change that; have an administrator run {' '.join(statements)}"
            self._add(Severity.ERROR, code, sentence, place, statements)

    async def _look_at_tables(self, connection: psycopg.AsyncConnection[Any], survey: Survey, rules: RuleSet) -> None:
        if survey.unknown:
            names = [str(Table(row.schema, row.name)) for row in await rows(connection, _TABLES)]
            for table in survey.unknown:
                remedy = nearest(str(table), names, "create it, or correct the name")
                for rule in _rules_on(rules, table):
                    sentence = (
                        f"rule {rule.name} names the table {table}, which does not exist, so that the daemon would "
                        f"wait for it, and then publish it and sweep its caches; {remedy}"
                    )
                    self._add(Severity.ERROR, "unknown_table", sentence, rule.place)
        if survey.alike:
            names = [str(table) for table in survey.alike]
            listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            sentence = (
                f"{listed} {'is' if len(names) == 1 else 'are'} called like a table of rules, in another schema, and "
                "no rule names that; if caches show its rows, as with a schema for each tenant, write a rule for it."
            )
            self._add(Severity.NOTE, "tables_alike", sentence)
        found = await columns(connection, rules.tables)
        self._columns = {table: {column.name: column for column in of_table} for table, of_table in found.items()}
        for table, state in survey.tables.items():
            for leaf in state.leaves if state is not None else ():
                if leaf.usable:
                    for rule in _rules_on(rules, table):
                        own = unknown_old(rule, leaf)
                        wanted = [read.union(own) for read in read_of_old(_rules_on(rules, table), leaf)]
                        way = remedies.carrying(leaf, survey.publication, *wanted)
                        self._findings += _of_nulls(rule, leaf)
                        self._findings += _of_old_rows(rule, leaf, way)
        self._look_at_parameters(rules)

    def _look_at_parameters(self, rules: RuleSet) -> None:
        named: set[tuple[str, str]] = set()
        for rule in rules.rules:
            known = self._columns.get(rule.table, {})
            for bust in rule.busts:
                for parameter, name in bust.mapped.items():
                    column = known.get(name)
                    if column is None:
                        continue  # reported already
                    self.columns.learn(bust.cache, parameter, texts(column.base_oid, column.base_category))
                    long = _unbounded(column) and not column.unique and not _hashed(bust.cache, parameter)
                    long = long and not bust.cache.given
                    if long and (bust.cache.name, parameter) not in named:
                        named.add((bust.cache.name, parameter))
                        self._findings.append(_of_unbounded(bust.cache, parameter, rule.table, name, column))

    async def _look_at_texts(self, connection: psycopg.AsyncConnection[Any], rules: RuleSet) -> None:
        """Report the parameters for which the reader library has no key."""
        if self._printed_with is None:
            return  # reported already
        failing = {finding.place for finding in self._findings if finding.code == "query_fails"}
        reported = {
            bust.cache.name
            for rule in rules.rules
            for bust in rule.busts
            if rule.table not in self._columns or (bust.query and bust.query.place in failing)
        }
        for name, of_cache in (await parameter_types(connection, rules)).items():
            cache = rules.caches[name]
            folded = letters_folded(cache)
            for parameter, told in of_cache.items():
                if told is None and name in reported:
                    continue
                if not has_text(told, self._printed_with, folded=parameter in folded):
                    self._findings.append(_of_no_text(cache, parameter, told))

    async def _look_at_queries(self, connection: psycopg.AsyncConnection[Any], rules: RuleSet) -> None:
        for rule in rules.rules:
            known = self._columns.get(rule.table, {})
            for bust in rule.busts:
                if bust.query is None or not set(bust.columns.values()) <= known.keys():
                    continue  # an unknown table or column is reported already
                types = {name: column.type for name, column in known.items()}
                query = statement(bust.query, types)
                try:
                    await self._look_at_query(connection, rule, bust, query)
                except errors.PostgresUnavailable as error:
                    if connection.broken:
                        raise
                    self._query_fails(rule, bust, types, error)
                except (errors.ServerRefuses, errors.Locked) as error:
                    if "row-level security" in str(error):
                        await self._hides_rows(connection, rule, bust, query)
                    else:
                        self._query_fails(rule, bust, types, error)
        self._findings += of_joins(rules, self._reads)

    def _query_fails(self, rule: Rule, bust: Bust, types: Mapping[str, str], error: errors.InvalidatorError) -> None:
        assert bust.query is not None
        found = objection(bust.query, types, error, ahead=_NO_ROWS)
        if found is None:
            cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)
            found = f"{cause}; try it with psql as the role of CDC_POSTGRES_DSN"
        self._add(
            Severity.ERROR,
            "query_fails",
            f"the `via` query of rule {rule.name} for cache {bust.cache.name} fails, so that the cache would be swept "
            f"at each change: {found}.",
            bust.query.place,
        )

    async def _hides_rows(self, connection: psycopg.AsyncConnection[Any], rule: Rule, bust: Bust, query: str) -> None:
        """Report the tables of a query from which policies hide rows."""
        # Once planned, the query holds a lock on each of its tables, also on one that the plan leaves out.
        with answered(connection):
            async with connection.transaction():
                await connection.execute("SET LOCAL row_security = on")
                await connection.execute(f"EXPLAIN {query}".encode(), _nothing(bust))
                found = await (await connection.execute(_WITH_POLICIES)).fetchall()
        (row,) = await rows(connection, "SELECT current_user::text AS role")
        tables = " and ".join(str(Table(each.schema, each.name)) for each in found)
        remedy = remedies.run(remedies.bypass_policies(row.role))
        self._add(
            Severity.ERROR,
            "query_hides_rows",
            f"the `via` query of rule {rule.name} for cache {bust.cache.name} reads {tables}, where row-level security "
            f"hides rows from the role {row.role}, so that the cache would be swept at each change; "
            f"{remedy.text}, or read a view that the table's owner owns.",
            rule.place,
            remedy.sql,
        )

    async def _look_at_query(
        self, connection: psycopg.AsyncConnection[Any], rule: Rule, bust: Bust, query: str
    ) -> None:
        arguments = _nothing(bust)
        with answered(connection):
            nothing = f"{_NO_ROWS}{query}\n) AS found LIMIT 0"
            cursor = await connection.execute(nothing.encode(), arguments)
        given = {column.name: column.type_code for column in (cursor.description or [])[1:]}
        self._findings += query_lacks(rule, bust, given)
        for parameter, oid in given.items():
            self.columns.learn(bust.cache, parameter, texts(oid))
        with answered(connection):
            explained = await connection.execute(f"EXPLAIN (VERBOSE, FORMAT JSON) {query}".encode(), arguments)
            ((plans,),) = await explained.fetchall()
        nodes = list(_nodes(plans[0]["Plan"]))
        read = {Table(scan["Schema"], scan["Relation Name"]) for scan in nodes if "Relation Name" in scan}
        own = [table for table in sorted(read) if table.schema not in {"pg_catalog", "information_schema"}]
        self._reads.append(Reads(rule, bust, [[table, *await above(connection, table)] for table in own]))
        for scan in nodes:
            if scan["Node Type"] == "Seq Scan":
                await self._of_scan(connection, rule, bust, scan, nodes)

    async def _of_scan(
        self,
        connection: psycopg.AsyncConnection[Any],
        rule: Rule,
        bust: Bust,
        scan: Mapping[str, Any],
        nodes: Iterable[Mapping[str, Any]],
    ) -> None:
        table = Table(scan["Schema"], scan["Relation Name"])
        (row,) = await rows(connection, _SIZE, {"table": str(table)})
        if row.size is None or row.size < LARGE_BYTES:
            return
        columns = _compared(scan["Alias"], nodes)
        index = remedies.run(remedies.make_index(table, columns)) if columns else remedies.Remedy("add an index")
        self._add(
            Severity.WARNING,
            "query_scans_table",
            f"the `via` query of rule {rule.name} for cache {bust.cache.name} reads all of {table} "
            f"({row.size >> 20} MiB) for the changes of each flush, and busts wait for it; {index.text}.",
            rule.place,
            index.sql,
        )


def _rules_on(rules: RuleSet, table: Table) -> list[Rule]:
    return [rule for rule in rules.rules if rule.table == table]


def _of_old_rows(rule: Rule, leaf: Leaf, remedy: remedies.Remedy) -> Iterator[Finding]:
    """Yield findings on old rows that lack what a rule reads of them, as far as that is not refused."""
    advice, *sql = remedy
    ops = rule.on & {"update", "delete"}
    asked = asked_columns(rule) & leaf.columns - leaf.carried
    watched = {*rule.columns, *(asked - rule.immutable if rule.columns else ())} if "update" in ops else set()
    watched &= leaf.columns - leaf.carried
    compared: frozenset[str] = frozenset()
    if rule.when is not None and ops:
        reads = condition_of(rule.when).reads["old"]
        compared = ((leaf.columns if reads.whole else reads.columns) & leaf.columns) - leaf.carried
    fired = sorted((ops if compared else {"update"}) - never(rule))
    if (watched or compared) and fired:
        yield Finding(
            Severity.WARNING,
            "old_row_not_carried",
            rule.place,
            f"rule {rule.name} compares {', '.join(sorted(watched | compared))} of the old row, which the replica "
            f"identity of {leaf.table} does not carry, so that it fires on every {_and(fired)}; "
            f"{advice}.",
            *sql,
        )
    counted = {op: asked - rule.immutable if op == "update" else asked for op in ops}
    if any(counted.values()):
        yield Finding(
            Severity.NOTE,
            "old_row_not_asked",
            rule.place,
            f"rule {rule.name} asks its `where` for {', '.join(sorted(frozenset().union(*counted.values())))} of the "
            f"old row, which the replica identity of {leaf.table} does not carry, so that the old row counts at every "
            f"{_and(op for op, lacking in counted.items() if lacking)} and more is busted than need be; {advice}.",
            *sql,
        )
    unknown = unknown_old(rule, leaf)
    if unknown and rule.old_row == "sweep":
        swept = [op for op in ops if unknown_old(replace(rule, on=frozenset({op})), leaf)]
        yield Finding(
            Severity.NOTE,
            "old_row_sweeps",
            rule.place,
            f"rule {rule.name} needs {', '.join(unknown)} of the old row, which the replica identity of {leaf.table} "
            f"does not carry, so that its caches are swept at every {_and(swept)}; to bust single "
            f"keys, {advice}.",
            *sql,
        )
    if unknown and rule.old_row == "ignore" and rule.on == {"delete"}:
        yield Finding(
            Severity.WARNING,
            "never_fires",
            rule.place,
            f"rule {rule.name} can never fire: a DELETE of {leaf.table} does not tell {', '.join(unknown)}, and "
            f"`old_row: ignore` lets that pass; {advice}.",
            *sql,
        )


def _of_nulls(rule: Rule, leaf: Leaf) -> Iterator[Finding]:
    """Yield a note on columns whose NULL leaves a row without a key."""
    named: dict[str, list[str]] = {}
    for bust in rule.busts:
        mapped = bust.mapped
        for column in sorted(set(mapped.values()) & leaf.nullable):
            named.setdefault(column, []).append(bust.cache.name)
    if named:
        told = "; ".join(f"{column} (in keys of {', '.join(dict.fromkeys(of))})" for column, of in named.items())
        yield Finding(
            Severity.NOTE,
            "key_may_be_null",
            rule.place,
            f"rule {rule.name} makes keys of columns of {leaf.table} that may be NULL: {told}; a row with a NULL there "
            "has no such key, and busts none, so if the application caches something for such rows, write a rule for "
            "that key too.",
        )


def _and(ops: Iterable[str]) -> str:
    return " and ".join(op.upper() for op in sorted(ops))


def _hashed(cache: Cache, parameter: str) -> bool:
    return all(
        part.hashed
        for template in (cache.key, cache.version)
        for part in (template.parts if template is not None else ())
        if isinstance(part, Param) and parameter in part.names
    )


def _of_unbounded(cache: Cache, parameter: str, table: Table, name: str, column: ColumnInfo) -> Finding:
    return Finding(
        Severity.WARNING,
        "unbounded_key",
        cache.place,
        f"parameter {parameter} of cache {cache.name} is {table}.{name}, of type {column.type} and so of any length, "
        f"and keys of megabytes would go to Redis; hash it: `{{{parameter}|sha256}}`.",
    )


def _of_no_text(cache: Cache, parameter: str, told: str | None) -> Finding:
    why = f"is of type {told}, of which equal values may be printed differently"
    if told is None:
        why = "is taken from columns of several types"
    return Finding(
        Severity.NOTE,
        "no_certain_text",
        cache.place,
        f"parameter {parameter} of cache {cache.name} {why}, so that the reader library has no key for it and loads at "
        "each read; take it from columns of one type, such as bigint, uuid, text, or numeric with a scale.",
    )


def _nothing(bust: Bust) -> list[Any]:
    """Return arguments for a bust's query that ask for one change of which all columns are NULL."""
    assert bust.query is not None
    return [[None] for _ in bust.query.columns] or [1]


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


_NO_ROWS = "SELECT * FROM (\n"
_CONDITIONS = ("Filter", "Join Filter", "Hash Cond", "Merge Cond", "Recheck Cond")


def _compared(alias: str, nodes: Iterable[Mapping[str, Any]]) -> str:
    """Return the columns of a table that the plan compares by ``=``, as for an index; empty if there is an OR."""
    name = re.escape(alias)
    column = rf'\(*"?{name}"?\.("(?:[^"]|"")+"|\w+)\)?(?:::[\w ]+)?'
    conditions = [str(plan[kind]) for plan in nodes for kind in _CONDITIONS if kind in plan]
    if any(" OR " in condition for condition in conditions):
        return ""
    found = [
        match[1]
        for condition in conditions
        for pattern in (rf"{column} = ", rf" = {column}")
        for match in re.finditer(pattern, condition)
    ]
    return ", ".join(dict.fromkeys(found))


_MAY_CREATE = """
SELECT has_database_privilege(current_database(), 'CREATE') AND NOT pg_is_in_recovery() AS may
"""

_PUBLISHED = """
SELECT array_remove(ARRAY[CASE WHEN pubinsert THEN 'insert' END, CASE WHEN pubupdate THEN 'update' END,
    CASE WHEN pubdelete THEN 'delete' END, CASE WHEN pubtruncate THEN 'truncate' END], NULL) AS ops,
  pubviaroot AS via_root, pg_has_role(pubowner, 'USAGE') AND NOT pg_is_in_recovery() AS mine
FROM pg_publication WHERE pubname = %(publication)s
"""

_OWNED = """
SELECT n.nspname AS schema, c.relname AS name
FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
JOIN pg_namespace n ON n.nspname = wanted.schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
WHERE pg_has_role(c.relowner, 'USAGE')
"""

_TABLES = """
SELECT n.nspname AS schema, c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname <> 'information_schema'
  AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY 1, 2
"""

_WITH_POLICIES = """
SELECT DISTINCT n.nspname AS schema, c.relname AS name
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND row_security_active(c.oid)
ORDER BY 1, 2
"""

_SIZE = "SELECT pg_relation_size(to_regclass(%(table)s)) AS size"
