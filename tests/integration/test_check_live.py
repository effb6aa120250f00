"""What `check` finds on a real PostgreSQL and Redis: mistakes that were put there, at their lines, and nothing else."""

from __future__ import annotations

import json
import re
import secrets
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from clusters import Cluster
from running import RunningDaemon, command, execute, settled
from sentinels import Sentinels

from cdc_invalidator.embedded.servers import Postgres, Valkey

README = Path(__file__).parents[2] / "deploy" / "README.md"

CACHES = """\
  thing: {key: "app:env:thing:{id}", ttl: 1m}
"""


class Checked:
    """The findings of one run."""

    def __init__(self, *words: str, **settings: Any) -> None:
        done = command("check", "--format", "json", *words, **settings)
        assert "Traceback" not in done.stderr
        assert done.returncode in {0, 1}, done.stderr
        self.text = done.stdout + done.stderr
        told = json.loads(done.stdout)
        self.findings: list[dict[str, Any]] = told["findings"]
        assert told["errors"] == len(self.of("error"))
        assert done.returncode == (1 if told["errors"] else 0)

    def of(self, *severities: str) -> list[str]:
        return [finding["code"] for finding in self.findings if finding["severity"] in severities]

    def only(self, code: str) -> dict[str, Any]:
        (finding,) = [finding for finding in self.findings if finding["code"] == code]
        return finding

    @property
    def grave(self) -> list[str]:
        """Codes of errors and warnings."""
        return self.of("error", "warning")


class Setting:
    """A database, a Redis, and a rule file to check against them."""

    def __init__(self, dsn: str, redis_url: str, slot: str, folder: Path) -> None:
        self.dsn = dsn
        self.given = {"postgres_dsn": dsn, "redis_url": redis_url, "slot": slot, "publication": slot}
        self.path = folder / "rules.yaml"

    def check(self, *rules: str, caches: str = CACHES, **settings: str) -> Checked:
        self.path.write_text(f"version: 1\ncaches:\n{caches}rules:\n" + "".join(f"  - {rule}\n" for rule in rules))
        return Checked(**self.given | {"rules": str(self.path)} | settings)


@pytest.fixture
def setting(database: str, redis_url: str, slot_name: str, tmp_path: Path) -> Setting:
    return Setting(database, redis_url, slot_name, tmp_path)


THINGS = "CREATE TABLE things (id int PRIMARY KEY, name text, n int)"
THING = "{name: thing-changed, table: public.things, bust: [thing]}"


def test_a_new_installation_has_notes_only_and_nothing_is_changed(setting: Setting, redis_client: redis.Redis) -> None:
    execute(setting.dsn, THINGS)
    checked = setting.check(THING)
    assert checked.grave == []
    assert set(checked.of("note")) == {"wal_unbounded", "no_slot", "no_publication", "redis_version", "watermark"}
    assert 'CREATE PUBLICATION "' in checked.only("no_publication")["sentence"]
    assert re.search(r"Valkey \d+\.\d+", checked.only("redis_version")["sentence"])
    assert redis_client.dbsize() == 0
    with psycopg.connect(setting.dsn) as connection:
        assert connection.execute("SELECT 1 FROM pg_publication").fetchall() == []


def test_beside_a_running_daemon_all_is_in_order_and_the_watermark_is_read(
    setting: Setting, redis_client: redis.Redis
) -> None:
    execute(setting.dsn, THINGS)
    setting.check(THING)
    given = setting.given
    with RunningDaemon(dsn=setting.dsn, redis_url=given["redis_url"], rules=setting.path, slot=given["slot"]) as daemon:
        daemon.ready()
        settled(setting.dsn, redis_client, daemon.slot)
        checked = setting.check(THING)
        assert checked.grave == []
        assert re.search(r"stands at [0-9A-F]+/[0-9A-F]+ and is \d+ s old", checked.only("watermark")["sentence"])
        assert daemon.terminate() == 0
    assert setting.check(THING).only("slot_idle")["severity"] == "note"


# Tables and columns

FOREIGN = (
    "CREATE EXTENSION postgres_fdw; CREATE SERVER s FOREIGN DATA WRAPPER postgres_fdw;"
    " CREATE FOREIGN TABLE things (id int) SERVER s"
)


@pytest.mark.parametrize(
    ("definition", "rule", "severity", "code", "sentence"),
    [
        (THINGS, THING.replace("things", "thingz"), "error", "unknown_table", "did you mean `public.things`?"),
        (
            THINGS,
            "{name: r, table: public.things, bust: [thing: {id: nam}]}",
            "error",
            "unknown_column",
            "did you mean name?",
        ),
        (
            THINGS,
            "{name: r, table: public.things, when: new.nam != 'x', bust: [thing]}",
            "error",
            "unknown_column",
            "did you mean name?",
        ),
        (
            THINGS,
            "{name: r, table: public.things, bust: [thing: {id: n}]}",
            "error",
            "old_row_unknown",
            'stay; run ALTER TABLE "public"."things" REPLICA IDENTITY FULL',
        ),
        (
            THINGS,
            "{name: r, table: public.things, old_row: sweep, bust: [thing: {id: n}]}",
            "note",
            "old_row_sweeps",
            "swept at every DELETE and UPDATE",
        ),
        (
            THINGS,
            "{name: r, table: public.things, on: [delete], old_row: ignore, bust: [thing: {id: n}]}",
            "warning",
            "never_fires",
            "a DELETE of public.things does not tell n",
        ),
        (
            THINGS,
            "{name: r, table: public.things, columns: [name], bust: [thing]}",
            "warning",
            "old_row_not_carried",
            'fires on every UPDATE; run ALTER TABLE "public"."things" REPLICA IDENTITY FULL.',
        ),
        (
            THINGS,
            "{name: r, table: public.things, when: old.name != 'x', bust: [thing]}",
            "warning",
            "old_row_not_carried",
            "fires on every DELETE and UPDATE",
        ),
        ("CREATE TABLE things (id int)", THING, "error", "no_replica_identity", "add a primary key"),
        ("CREATE UNLOGGED TABLE things (id int PRIMARY KEY)", THING, "error", "not_publishable", "an unlogged table"),
        (
            FOREIGN,
            THING,
            "error",
            "not_publishable",
            "a foreign table",
        ),
        ("CREATE TABLE things (id int) PARTITION BY LIST (id)", THING, "error", "not_publishable", "is partitioned"),
    ],
)
def test_a_mistake_about_a_table_is_told_at_its_line_with_the_remedy(
    setting: Setting, definition: str, rule: str, severity: str, code: str, sentence: str
) -> None:
    try:
        execute(setting.dsn, definition)
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this PostgreSQL comes without postgres_fdw")
    finding = setting.check(rule).only(code)
    assert finding["severity"] == severity
    assert (finding["file"], finding["line"]) == (str(setting.path), 5)
    assert sentence in finding["sentence"]


def test_tables_that_carry_what_the_rules_need_have_no_findings(setting: Setting) -> None:
    execute(
        setting.dsn,
        THINGS,
        "ALTER TABLE things REPLICA IDENTITY FULL",
        "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY LIST (id)",
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)",
    )
    checked = setting.check(
        "{name: a, table: public.things, columns: [name], when: old.n != new.n, bust: [thing: {id: n}]}",
        "{name: b, table: public.parts, bust: [thing]}",
    )
    assert checked.grave == []


def test_a_key_of_text_of_any_length_is_told_unless_it_is_hashed_or_unique(setting: Setting) -> None:
    execute(
        setting.dsn,
        "CREATE DOMAIN mail AS text",
        "CREATE TABLE texts (t text, v varchar, short varchar(20), u uuid, m mail, slug text UNIQUE, j jsonb,"
        " id int PRIMARY KEY)",
        "ALTER TABLE texts REPLICA IDENTITY FULL",
    )
    names = ("t", "v", "short", "u", "m", "slug", "j")
    caches = "".join(f"  of-{name}: {{key: 'app:env:of-{name}:{{{name}}}', ttl: 1m}}\n" for name in names)
    caches += "  hashed: {key: 'app:env:hashed:{t|sha256}', ttl: 1m}\n"
    busts = ", ".join([*(f"of-{name}" for name in names), "hashed"])
    checked = setting.check(f"{{name: r, table: public.texts, bust: [{busts}]}}", caches=caches)
    told = [finding for finding in checked.findings if finding["code"] == "unbounded_key"]
    assert checked.grave == ["unbounded_key"] * 4
    assert [finding["line"] for finding in told] == [3, 4, 7, 9]
    assert "hash it: `{t|sha256}`" in told[0]["sentence"]


def test_parameters_for_which_the_reader_has_no_key_are_told(setting: Setting) -> None:
    execute(setting.dsn, "CREATE TABLE odd (id numeric PRIMARY KEY, n int, code text, at timestamptz)")
    names = ("id", "n", "two", "none", "at")
    caches = "".join(f"  {name}: {{key: 'app:env:{name}:{{x}}', ttl: 1m}}\n" for name in names)
    busts = "{id: {x: id}}, {n: {x: n}}, {two: {x: n}}, {at: {x: at}}"
    rules = (
        f"{{name: a, table: public.odd, old_row: sweep, bust: [{busts}]}}",
        "{name: b, table: public.odd, old_row: sweep, bust: [{two: {x: code}}]}",
        "{name: c, table: public.odd, bust: [{none: {via: 'SELECT x FROM nowhere'}}]}",
    )

    def told() -> list[str]:
        checked = setting.check(*rules, caches=caches)
        return [each["sentence"].partition(", ")[0] for each in checked.findings if each["code"] == "no_certain_text"]

    name = setting.dsn.rpartition("/")[2]
    execute(setting.dsn, f"ALTER DATABASE {name} SET TimeZone = 'Asia/Tokyo'")
    everywhere = [
        "parameter x of cache id is of type numeric",
        "parameter x of cache two is taken from columns of several types",
    ]
    assert told() == [*everywhere, "parameter x of cache at is of type timestamp with time zone"]
    execute(setting.dsn, f"ALTER DATABASE {name} SET TimeZone = 'UTC'")
    assert told() == everywhere


def test_with_the_types_of_columns_clashes_of_keys_are_decided(setting: Setting) -> None:
    execute(setting.dsn, THINGS)
    caches = (
        "  thing: {key: 'app:env:thing:{id}', ttl: 1m}\n"
        "  all: {key: 'app:env:thing:all', ttl: 1m}\n"
        "  other: {key: 'app:env:thing:{n}', ttl: 1m}\n"
    )
    rule = "{name: r, table: public.things, old_row: sweep, bust: [thing, all, other]}"
    checked = setting.check(rule, caches=caches)
    assert checked.grave == ["same_keys"]
    assert checked.only("same_keys")["line"] == 5


def test_a_column_of_a_key_that_may_be_null_is_a_note(setting: Setting) -> None:
    execute(setting.dsn, THINGS, "ALTER TABLE things REPLICA IDENTITY FULL")
    caches = CACHES + "  by-name: {key: 'app:env:by-name:{name}:{id}', ttl: 1m}\n"
    checked = setting.check("{name: r, table: public.things, bust: [thing, by-name]}", caches=caches)
    sentence = checked.only("key_may_be_null")["sentence"]
    assert "name (in keys of by-name); a row with a NULL there has no such key" in sentence
    execute(setting.dsn, "ALTER TABLE things ALTER name SET NOT NULL")
    assert "key_may_be_null" not in setting.check(THING).of("note")


def test_a_table_of_another_schema_that_is_called_the_same_and_has_no_rule_is_a_note(setting: Setting) -> None:
    execute(setting.dsn, THINGS, "CREATE SCHEMA tenant_b", "CREATE TABLE tenant_b.things (id int PRIMARY KEY)")
    sentence = setting.check(THING).only("tables_alike")["sentence"]
    assert "tenant_b.things is called like a table of rules" in sentence
    both = (THING, "{name: b, table: tenant_b.things, bust: [thing]}")
    assert "tables_alike" not in setting.check(*both).of("note")


# Keys that are given

THINGSBOARD = Path(__file__).parents[2] / "rules" / "applications" / "thingsboard.yaml"


def test_for_the_keys_of_an_application_that_exists_nothing_is_advised_that_would_lose_a_bust(
    setting: Setting, redis_client: redis.Redis
) -> None:
    with psycopg.connect(setting.dsn, autocommit=True) as connection:
        connection.execute((Path(__file__).parent / "applications" / "thingsboard.sql").read_bytes())
    given = setting.given | {"rules": THINGSBOARD}
    before = Checked(**given)
    # What is left to do is in the database, and SQL does it.
    assert set(before.grave) == {"old_row_unknown", "old_row_not_carried"}
    assert all(finding["sql"] for finding in before.findings if finding["severity"] != "note")
    printed = command("setup", "--print", **{name: value for name, value in given.items() if name != "redis_url"})
    assert printed.returncode == 0, printed.stderr
    execute(setting.dsn, *(line for line in printed.stdout.splitlines() if not line.startswith("--")))
    checked = Checked(**given)
    assert checked.of("error") == []
    assert checked.grave == []
    for code in ("same_keys", "sweeps_others"):
        assert checked.only(code)["severity"] == "note"
    with RunningDaemon(
        dsn=setting.dsn, redis_url=setting.given["redis_url"], rules=THINGSBOARD, slot=setting.given["slot"]
    ) as daemon:
        daemon.ready()
        settled(setting.dsn, redis_client, daemon.slot)
        device, tenant = f"00000000-0000-0000-0000-{0xD1:012x}", f"00000000-0000-0000-0000-{1:012x}"
        for key in (f"devices{device}", f"devices{tenant}_n_one", f"devices{tenant}_n_four"):
            redis_client.set(key, "cached")
        execute(setting.dsn, "UPDATE device SET name = 'three' WHERE id = u('d1')")
        settled(setting.dsn, redis_client, daemon.slot)
        assert redis_client.keys("devices*") == [f"devices{tenant}_n_four".encode()]
        assert daemon.terminate() == 0


def test_what_redis_holds_under_the_pattern_of_a_sweep_is_told_and_shown_only_where_keys_may_be(
    setting: Setting, redis_client: redis.Redis
) -> None:
    execute(setting.dsn, THINGS)
    caches = "  thing: {key: 'things{id}', ttl: 1m, given: true}\n"
    redis_client.mset({f"things{number}": "x" for number in range(700)})
    assert setting.check(THING, caches=caches).grave == []
    redis_client.mset({f"things-of-ada:{number}": "x" for number in range(700)})
    before = redis_client.info("commandstats")
    told = setting.check(THING, caches=caches)
    assert told.grave == ["sweeps_others"]
    sentence = told.only("sweeps_others")["sentence"]
    assert "of all 1,400 keys there are 700 `things-<text>-<text>:<number>` of no cache under `things*`" in sentence
    assert "ada" not in told.text
    shown = setting.check(THING, caches=caches, log_keys="raw")
    assert "700 `things-of-ada:<number>` of no cache" in shown.only("sweeps_others")["sentence"]
    assert redis_client.dbsize() == 1400
    # In steps, so that nobody waits long for the answer to one of them.
    after = redis_client.info("commandstats")
    assert after["cmdstat_scan"]["calls"] - before.get("cmdstat_scan", {"calls": 0})["calls"] >= 2 * 3


# The publication and the slot


def test_what_the_publication_lacks_or_hides_is_told_with_the_sql(setting: Setting) -> None:
    name = setting.given["publication"]
    execute(setting.dsn, THINGS, "CREATE TABLE others (id int PRIMARY KEY)", "CREATE TABLE bare (id int)")
    execute(setting.dsn, f"CREATE PUBLICATION {name} FOR TABLE others, bare WITH (publish = 'insert, update')")
    other = "{name: other-changed, table: public.others, on: [insert], bust: [thing]}"
    checked = setting.check(other, THING)
    missing = checked.only("table_not_published")
    assert (missing["severity"], missing["line"]) == ("warning", 6)
    assert f'ALTER PUBLICATION "{name}" ADD TABLE ONLY "public"."things";' in missing["sentence"]
    assert "does not publish delete and truncate" in checked.only("operation_not_published")["sentence"]
    harmful = checked.only("no_replica_identity")
    assert harmful["severity"] == "error"
    assert f'ALTER PUBLICATION "{name}" DROP TABLE ONLY "public"."bare"' in harmful["sentence"]
    execute(setting.dsn, f"ALTER PUBLICATION {name} DROP TABLE bare")
    assert setting.check(other).grave == []
    execute(setting.dsn, f"ALTER PUBLICATION {name} SET TABLE others WHERE (id > 1)")
    limited = setting.check(other).only("limited_publication")
    assert (limited["severity"], limited["line"]) == ("error", 5)
    execute(setting.dsn, f"ALTER PUBLICATION {name} SET (publish_via_partition_root = true)")
    assert "published_via_root" in setting.check(other).of("warning")


@pytest.mark.parametrize("scope", ["FOR ALL TABLES", "FOR TABLES IN SCHEMA public"])
def test_tables_that_a_publication_for_all_makes_unwritable_are_named_with_the_remedy(
    setting: Setting, scope: str
) -> None:
    name = setting.given["publication"]
    execute(
        setting.dsn,
        THINGS,
        "CREATE TABLE bare (id int)",
        "CREATE TABLE nothing (id int PRIMARY KEY)",
        "ALTER TABLE nothing REPLICA IDENTITY NOTHING",
        "CREATE TABLE parts (id int) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (9)",
        "CREATE UNLOGGED TABLE unlogged (id int)",
        f"CREATE PUBLICATION {name} {scope}",
    )
    told = [each["sentence"] for each in setting.check(THING).findings if each["code"] == "no_replica_identity"]
    assert len(told) == 3
    for table, remedy in (
        ("bare", 'add a primary key, or run ALTER TABLE "public"."bare" REPLICA IDENTITY FULL'),
        ("nothing", 'run ALTER TABLE "public"."nothing" REPLICA IDENTITY DEFAULT'),
        ("part", 'add a primary key, or run ALTER TABLE "public"."part" REPLICA IDENTITY FULL'),
    ):
        assert any(f"carries public.{table}, which" in sentence and remedy in sentence for sentence in told)
    execute(setting.dsn, f"ALTER PUBLICATION {name} SET (publish = 'insert')")
    assert set(setting.check(THING).of("error")) == {"operation_not_published"}


def test_a_role_that_may_not_stream_or_set_up_is_an_error_with_what_an_administrator_runs(
    setting: Setting, postgres: Postgres
) -> None:
    role = setting.given["slot"]
    execute(setting.dsn, THINGS, f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        dsn = postgres.dsn_for(setting.dsn.rpartition("/")[2], user=role, password="pw")
        checked = setting.check(THING, postgres_dsn=dsn)
        assert sorted(checked.of("error")) == ["no_publication", "no_replication_right"]
        assert f'ALTER ROLE "{role}" REPLICATION' in checked.only("no_replication_right")["sentence"]
        assert "have an administrator run CREATE PUBLICATION" in checked.only("no_publication")["sentence"]
        assert "pw@" not in checked.text
        execute(setting.dsn, f"ALTER ROLE {role} REPLICATION")
        assert setting.check(THING, postgres_dsn=dsn).of("error") == ["no_publication"]
    finally:
        execute(setting.dsn, f"DROP ROLE {role}")


def test_a_slot_of_something_else_is_an_error(setting: Setting) -> None:
    execute(setting.dsn, THINGS, f"SELECT pg_create_physical_replication_slot('{setting.given['slot']}')")
    try:
        assert setting.check(THING).of("error") == ["unusable_slot"]
    finally:
        execute(setting.dsn, f"SELECT pg_drop_replication_slot('{setting.given['slot']}')")


def test_a_server_that_can_not_decode_is_an_error_beside_all_other_findings(redis_url: str, tmp_path: Path) -> None:
    with Postgres(settings={"wal_level": "replica", "max_slot_wal_keep_size": "1GB"}) as server:
        checked = Setting(server.dsn, redis_url, "s", tmp_path).check(THING)
    assert sorted(checked.of("error")) == ["no_logical_decoding", "unknown_table"]
    assert "set wal_level = logical" in checked.only("no_logical_decoding")["sentence"]
    assert "wal_unbounded" not in checked.of("note")


def test_servers_that_are_away_and_rules_that_are_wrong_are_told_in_one_table(tmp_path: Path) -> None:
    away = Setting("postgresql://u:topsecret@127.0.0.1:1/d", "redis://:topsecret@127.0.0.1:1", "s", tmp_path)
    checked = away.check("{name: r, table: things, bust: [thing]}")
    assert checked.of("error") == ["postgres_unavailable", "redis_unavailable", "wrong_rule_file"]
    assert "topsecret" not in checked.text


# Queries

TEAMS = """\
  team: {key: "app:env:team:{team_id}", ttl: 1m}
"""


def via(query: str) -> str:
    return f'{{name: user-changed, table: public.users, bust: [{{team: {{via: "{query}"}}}}]}}'


@pytest.mark.parametrize(
    ("query", "code", "sentence"),
    [
        ("SELECT team_id FROM public.members WHERE user_id = {id}", None, ""),
        ("SELECT team_id FROM public.memberz WHERE user_id = {id}", "query_fails", "memberz"),
        ("SELECT team_id FROM public.members WHERE user_id = {mail}", "query_fails", "operator does not exist"),
        ("SELECT team_id FROM public.members WHERE user_id = {idd}", "unknown_column", "did you mean id?"),
        ("SELECT team_id AS team FROM public.members WHERE user_id = {id}", "query_lacks_parameter", "`team`?"),
        (
            "SELECT team_id FROM public.members WHERE note = {mail}",
            "query_scans_table",
            'CREATE INDEX CONCURRENTLY ON "public"."members" (note)',
        ),
        (
            "SELECT team_id FROM public.members WHERE kind = {id} AND note = {mail}",
            "query_scans_table",
            '"public"."members" (kind, note)',
        ),
        ("SELECT team_id FROM public.small WHERE user_id = {id}", None, ""),
        ("SELECT 1 AS team_id", None, ""),
    ],
)
def test_a_query_that_fails_or_has_no_index_is_told(
    setting: Setting, query: str, code: str | None, sentence: str
) -> None:
    execute(
        setting.dsn,
        "CREATE TABLE users (id int PRIMARY KEY, mail text)",
        "ALTER TABLE users REPLICA IDENTITY FULL",
        "CREATE TABLE members (team_id int, user_id int, note text, kind int, PRIMARY KEY (user_id, team_id))",
        "INSERT INTO members SELECT n % 100, n, 'note ' || n, n FROM generate_series(1, 50000) n",
        "CREATE TABLE small (team_id int, user_id int, PRIMARY KEY (team_id, user_id))",
        "INSERT INTO small SELECT n, n FROM generate_series(1, 100) n",
        "ANALYZE",
    )
    watched = [
        "{name: members, table: public.members, bust: [team]}",
        "{name: small, table: public.small, bust: [team]}",
    ]
    checked = setting.check(via(query), *watched, caches=TEAMS)
    assert checked.grave == ([code] if code else [])
    if code is not None:
        finding = checked.only(code)
        assert finding["line"] == 5
        assert sentence in finding["sentence"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("SELECT t FROM public.membrs", 'relation "public.membrs" does not exist, at `public.membrs`; correct it.'),
        ("SELECT team_id FROM public.members WHERE user_id = {mail}", "{mail}"),
        (
            "SELECT nme AS team_id FROM public.members WHERE user_id = {id}",
            "at `nme AS team_id FROM public.members WHERE`",
        ),
        ("SELECT '%' || {mail} AS team_id, {id} AS n FROM public.members m WHERE m.usr = {id}", "at `m.usr = {id}`"),
        ("SELECT 1 / 0 AS team_id", "division by zero"),
    ],
)
def test_what_postgresql_objects_to_in_a_query_is_told_with_the_place(
    setting: Setting, query: str, sentence: str
) -> None:
    execute(
        setting.dsn,
        "CREATE TABLE users (id int PRIMARY KEY, mail text)",
        "ALTER TABLE users REPLICA IDENTITY FULL",
        "CREATE TABLE members (team_id int, user_id int, PRIMARY KEY (user_id, team_id))",
    )
    finding = setting.check(via(query), caches=TEAMS).only("query_fails")
    assert finding["line"] == 5
    assert finding["column"] > 60, "where the query stands"
    assert sentence in finding["sentence"]
    assert "CDC_POSTGRES_DSN" not in finding["sentence"]


JOINS = [
    "CREATE TABLE tags (id int PRIMARY KEY, slug text NOT NULL) PARTITION BY RANGE (id)",
    "CREATE TABLE tags_1 PARTITION OF tags FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE tags_2 PARTITION OF tags FOR VALUES FROM (10) TO (20)",
    "CREATE TABLE links (tag_id int, article_id int, PRIMARY KEY (tag_id, article_id))",
    "CREATE VIEW shown_tags AS SELECT id, slug FROM tags",
    "ALTER TABLE tags_1 REPLICA IDENTITY FULL",
    "ALTER TABLE tags_2 REPLICA IDENTITY FULL",
]
TAGGED = '  tagged: {key: "app:env:tag:{slug}", ttl: 1m}\n  both: {key: "app:env:both:{slug}:{article}", ttl: 1m}\n'
LINK = (
    "{{name: link, table: public.links, bust: [tagged: {{{}via: 'SELECT slug FROM public.{} WHERE id = {{tag_id}}'}}]}}"
)
LINKED = "{article: article_id, via: 'SELECT slug FROM public.tags WHERE id = {tag_id}'}"
NAMED = "{slug: slug, via: 'SELECT article_id AS article FROM public.links WHERE tag_id = {id}'}"
BOTH = [
    f"{{name: link, table: public.links, bust: [both: {LINKED}]}}",
    f"{{name: tag, table: public.tags, bust: [both: {NAMED}]}}",
]


@pytest.mark.parametrize("read", ["tags", "shown_tags"])
def test_a_query_that_reads_a_table_without_a_rule_for_the_cache_is_told(setting: Setting, read: str) -> None:
    execute(setting.dsn, *JOINS)
    other = "{name: other, table: public.tags, bust: [both: {article: id}]}"
    for rules in ([LINK.format("", read)], [LINK.format("on_empty: ignore, ", read), other]):
        checked = setting.check(*rules, caches=TAGGED)
        told = [finding for finding in checked.findings if finding["code"] == "query_reads_unwatched"]
        # A view is told by its table, and of a partitioned table, the whole.
        assert {finding["sentence"].partition(", and no rule")[0] for finding in told} == {
            "the `via` query of rule link reads public.tags"
        }
        assert ("nothing is busted" in told[0]["sentence"]) == (len(rules) == 2)
    watched = setting.check(LINK.format("", read), "{name: tag, table: public.tags, bust: [tagged]}", caches=TAGGED)
    assert "query_reads_unwatched" not in watched.grave
    late = "{name: tag, table: public.tags, on: [insert, update], bust: [tagged]}"
    assert "query_reads_unwatched" in setting.check(LINK.format("", read), late, caches=TAGGED).grave


def test_rules_that_find_keys_only_through_each_other_are_told(setting: Setting) -> None:
    execute(setting.dsn, *JOINS)
    checked = setting.check(*BOTH, caches=TAGGED)
    assert "queries_ask_each_other" in checked.grave
    assert "query_reads_unwatched" not in checked.grave
    sentence = checked.only("queries_ask_each_other")["sentence"]
    assert sentence.startswith(
        "link and tag find the keys of cache both only through rows of public.links and public.tags"
    )
    fixed = [
        BOTH[0].replace("bust:", "immutable: [tag_id, article_id], bust:"),
        BOTH[1].replace("bust:", "immutable: [id, slug], bust:"),
    ]
    assert "queries_ask_each_other" not in setting.check(*fixed, caches=TAGGED).grave
    # Where one of them never moves, the old row of the other finds it as it was, or finds nothing.
    link, tag = BOTH[0], BOTH[1].replace("bust:", "on: [delete, truncate], bust:")
    assert "queries_ask_each_other" not in setting.check(link, tag, caches=TAGGED).grave
    deaf = link.replace("via:", "on_empty: ignore, via:")
    assert "queries_ask_each_other" in setting.check(deaf, tag, caches=TAGGED).grave
    # Rows that never move are still deleted together.
    for kept in ("", "on_empty: ignore, "):
        both = [rule.replace("via:", f"{kept}via:") for rule in fixed]
        assert ("queries_ask_each_other" in setting.check(*both, caches=TAGGED).grave) == bool(kept)


# Redis


def test_a_right_that_redis_refuses_is_told_with_the_grant_and_those_of_the_readme_are_enough(
    setting: Setting, valkey: Valkey, redis_client: redis.Redis
) -> None:
    execute(setting.dsn, THINGS)
    name, url = f"check_{secrets.token_hex(3)}", setting.given["redis_url"]
    administrator: Any = redis_client
    granted = re.search(r"^ACL SETUSER cdc (.+)$", README.read_text(), re.MULTILINE)
    assert granted
    words = (
        granted[1].replace("cdc:cdc_invalidator:", f"cdc:{setting.given['slot']}:").replace("shop:*", "app:*").split()
    )
    given = {"redis_url": re.sub(r"//[^@]*@|//", f"//{name}:secret@", url, count=1)}
    try:
        administrator.execute_command("ACL", "SETUSER", name, *words)
        assert setting.check(THING, **given).grave == []
        old_values = CACHES.replace("ttl: 1m", "ttl: 1m, stale_for: 5s")
        checked = setting.check(THING, caches=old_values, **given)
        assert checked.grave == ["redis_rights"]
        assert "grant it +pexpire +rename." in checked.only("redis_rights")["sentence"]
        administrator.execute_command("ACL", "SETUSER", name, "+pexpire", "+rename")
        assert setting.check(THING, caches=old_values, **given).grave == []
        assert setting.check(THING, verify_sample="0.01", **given).grave == []
        administrator.execute_command("ACL", "SETUSER", name, "-type", "-memory|usage", "-smembers", "-dump")
        assert setting.check(THING, **given).grave == []
        checked = setting.check(THING, verify_sample="0.01", **given)
        assert checked.grave == ["verify_refused"]
        assert " +type +memory|usage +smembers +dump, or set" in checked.only("verify_refused")["sentence"]
        administrator.execute_command("ACL", "SETUSER", name, "+type", "+memory|usage", "+smembers", "+dump")
        administrator.execute_command("ACL", "SETUSER", name, "-unlink", "-hdel", "-multi", "-info")
        checked = setting.check(THING, **given)
        assert checked.of("error") == ["redis_rights"]
        assert f"~cdc:{setting.given['slot']}:* and +unlink +hdel +multi," in checked.only("redis_rights")["sentence"]
        administrator.execute_command("ACL", "SETUSER", name, "+multi", "-exec")
        checked = setting.check(THING, **given)
        assert checked.of("error") == ["redis_rights"]
        assert "+unlink +hdel +exec," in checked.only("redis_rights")["sentence"]
        administrator.execute_command(
            "ACL", "SETUSER", name, "+unlink", "+hdel", "+exec", "resetkeys", "~cdc:*", "~app:other:*"
        )
        checked = setting.check(THING, **given)
        assert checked.of("error") == ["redis_rights"]
        assert "grant it +evalsha +unlink and ~app:env:thing:*" in checked.only("redis_rights")["sentence"]
        assert checked.only("redis_rights")["line"] == 3
        # Who may ask what the ACL allows learns it of a key without parameters, and of a selector, too.
        administrator.execute_command(
            "ACL", "SETUSER", name, "-unlink", "(+unlink ~cdc:*)", "~app:env:*", "+acl|whoami"
        )
        one = "  thing: {key: 'app:env:thing', ttl: 1m}\n"
        assert setting.check(THING, caches=one, **given).of("error") == []
        administrator.execute_command("ACL", "SETUSER", name, "+acl|dryrun")
        checked = setting.check(THING, caches=one, **given)
        assert "grant it +unlink and ~app:env:thing*" in checked.only("redis_rights")["sentence"]
        assert "grant it +unlink and ~app:env:thing:*" in setting.check(THING, **given).only("redis_rights")["sentence"]
        assert setting.check(THING, redis_url=given["redis_url"].replace("secret", "other")).of("error") == [
            "redis_unavailable"
        ]
        assert redis_client.dbsize() == 0
    finally:
        administrator.execute_command("ACL", "DELUSER", name)


def test_who_only_observes_needs_no_right_to_bust(setting: Setting, valkey: Valkey, redis_client: redis.Redis) -> None:
    execute(setting.dsn, THINGS)
    name, url = f"check_{secrets.token_hex(3)}", setting.given["redis_url"]
    administrator: Any = redis_client
    granted = (README.parent / "observe.acl").read_text().replace("shop:", "app:").split()
    given = {"redis_url": re.sub(r"//[^@]*@|//", f"//{name}:secret@", url, count=1), "mode": "observe"}
    constant = CACHES + "  all: {key: 'app:env:all', ttl: 1m}\n"
    rule = "{name: thing-changed, table: public.things, bust: [thing, all]}"
    try:
        administrator.execute_command("ACL", "SETUSER", name, *granted[2:])
        redis_client.set("app:env:all", "content")
        checked = setting.check(rule, caches=constant, **given)
        assert checked.grave == []
        assert "observing" in checked.of("note")
        assert "watermark" not in checked.of("note")
        assert setting.check(rule, caches=constant, **given | {"mode": "bust"}).of("error") == ["redis_rights"]
        administrator.execute_command("ACL", "SETUSER", name, "-dump", "-type")
        checked = setting.check(rule, caches=constant, **given)
        assert checked.of("error") == ["redis_rights"] * 2
        assert {each["sentence"].partition("grant it ")[2] for each in checked.findings} >= {
            "+type +dump and %R~app:env:thing:*",
            "+type +memory|usage +get +hgetall +smembers +dump and %R~app:env:all",
        }
        administrator.execute_command("ACL", "SETUSER", name, "+dump", "+type", "resetkeys", "%R~app:other:*")
        assert "%R~app:env:thing:*" in setting.check(THING, **given).only("redis_rights")["sentence"]
        administrator.execute_command("ACL", "SETUSER", name, "-client|tracking")
        assert "grant it +client|tracking." in setting.check(THING, **given).only("redis_rights")["sentence"]
        assert redis_client.keys() == [b"app:env:all"]
    finally:
        administrator.execute_command("ACL", "DELUSER", name)


@pytest.mark.parametrize("command", ["HELLO", "CLIENT"])
def test_a_redis_that_does_not_tell_of_writes_can_not_be_observed(setting: Setting, command: str) -> None:
    execute(setting.dsn, THINGS)
    with Valkey(settings={"rename-command": f"{command} hidden"}) as limited:
        checked = setting.check(THING, redis_url=limited.url, mode="observe")
    (found,) = (each for each in checked.findings if each["severity"] == "error")
    assert found["code"] == "redis_lacks_commands"
    assert "CDC_MODE=observe needs CLIENT TRACKING and HELLO 3 of Redis 6.2 or later" in found["sentence"]
    assert found["sentence"].endswith("or use another Redis.")


def test_versions_on_a_redis_that_evicts_nothing_are_worth_a_note(setting: Setting) -> None:
    execute(setting.dsn, THINGS)
    versioned = "  thing: {key: 'app:env:thing:{id}:v{version}', version: 'app:env:thing:{id}:ver', ttl: 1m}\n"
    assert "noeviction" in setting.check(THING, caches=versioned).of("note")
    assert "noeviction" not in setting.check(THING).of("note")


def test_the_kind_of_redis_is_told_and_a_wrong_one_is_an_error(setting: Setting) -> None:
    execute(setting.dsn, THINGS)
    with Sentinels() as sentinels:
        checked = setting.check(THING, redis_url=sentinels.url)
        assert checked.grave == []
        assert "a master named by Sentinel" in checked.only("redis_version")["sentence"]
    with Cluster(replicas=False) as cluster, closing(cluster.client()):
        tagged = '  thing: {key: "app:env:{{{id}}}:thing", ttl: 1m}\n'
        checked = setting.check(THING, redis_url=cluster.url, caches=tagged)
        assert checked.grave == []
        assert "a cluster" in checked.only("redis_version")["sentence"]
        assert setting.check(THING, redis_url=cluster.url).grave == ["no_hash_tag"]
        single = cluster.url.replace("redis+cluster://", "redis://").split(",")[0]
        assert "other_kind_of_redis" in setting.check(THING, redis_url=single).of("error")


def test_what_a_search_costs_is_told_of_each_cache_that_is_searched_for(
    setting: Setting, redis_client: redis.Redis
) -> None:
    execute(setting.dsn, THINGS)
    redis_client.mset({f"stranger:{number}": 1 for number in range(5000)})
    caches = '  open: {key: "app:env:open:{id}:*", ttl: 1m}\n' + CACHES
    rule = "{name: thing-changed, table: public.things, bust: [thing, open]}"
    checked = setting.check(rule, caches=caches)
    assert checked.grave == []
    told = checked.only("search_cost")
    assert re.search(
        r"a bust of cache open is a search, which looks twice at all 5,000 keys of this Redis: about \S+ s(econd)? at "
        r"[0-9,]+ keys a second \(as measured\), so a key is gone, and the watermark goes on, at most about",
        told["sentence"],
    )
    slow = setting.check(rule, caches=caches, sweep_rate="100").only("search_cost")
    assert slow["severity"] == "warning"
    assert "about 100 s at 100 keys a second (as CDC_SWEEP_RATE allows)" in slow["sentence"]
    assert "at most about 200 s after the commit; to be faster" in slow["sentence"]
