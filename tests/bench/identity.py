"""What a replica identity costs: bytes of WAL for each UPDATE and DELETE, on an embedded PostgreSQL.

::

    PYTHONPATH=tests .venv/bin/python -m bench.identity

Under each identity, the same rows of a narrow and of a wide table are changed, one statement a change, after a
checkpoint and without full-page images, which would hide the difference. The wide row has a text of 8 kB, which
PostgreSQL stores apart (TOAST) and no update here changes.
"""

from __future__ import annotations

from typing import NamedTuple

import psycopg

from cdc_invalidator.embedded.servers import Postgres

ROWS = 1000
TABLES = {"narrow": "", "wide": "repeat(md5(random()::text), 256)"}
IDENTITIES = {
    "DEFAULT": "DEFAULT",
    "USING INDEX": "USING INDEX by_tenant",
    "FULL": "FULL",
}
CHANGES = {
    "UPDATE of another column": "UPDATE things SET n = n + 1 WHERE id = {}",
    "UPDATE of a key column": "UPDATE things SET tenant = tenant + 1 WHERE id = {}",
    "DELETE": "DELETE FROM things WHERE id = {}",
}


class Cost(NamedTuple):
    """Bytes of WAL that one change took, on the average."""

    table: str
    change: str
    identity: str
    size: float


def measure(server: Postgres, rows: int = ROWS) -> list[Cost]:
    """Return what each change costs under each identity; the first of each three is DEFAULT."""
    costs = []
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET full_page_writes = off")
        connection.execute("SELECT pg_reload_conf()")
        for table, text in TABLES.items():
            for change, statement in CHANGES.items():
                for identity, clause in IDENTITIES.items():
                    _make(connection, text, clause, rows)
                    before = _written(connection)
                    for number in range(rows):
                        connection.execute(statement.format(number).encode())
                    size = (_written(connection) - before) / rows
                    costs.append(Cost(table, change, identity, size))
    return costs


def _make(connection: psycopg.Connection, text: str, clause: str, rows: int) -> None:
    connection.execute("DROP TABLE IF EXISTS things")
    connection.execute(
        "CREATE TABLE things (id int PRIMARY KEY, tenant int NOT NULL, name varchar(100) NOT NULL, n int, body text)"
    )
    # Uncompressed, so that the size does not depend on the text.
    connection.execute("ALTER TABLE things ALTER body SET STORAGE EXTERNAL")
    connection.execute(
        f"INSERT INTO things SELECT n, n % 10, 'thing ' || n, 0, {text or 'NULL'} "
        f"FROM generate_series(0, {rows - 1}) n".encode()
    )
    if "INDEX" in clause:
        connection.execute("CREATE UNIQUE INDEX by_tenant ON things (id, tenant)")
    connection.execute(f"ALTER TABLE things REPLICA IDENTITY {clause}".encode())
    connection.execute("VACUUM ANALYZE things")
    connection.execute("CHECKPOINT")


def _written(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()
    assert row is not None
    return int(row[0])


def main() -> None:
    """Print the costs as a table in Markdown."""
    with Postgres() as server:
        costs = measure(server)
        print(f"PostgreSQL {server.version}; bytes of WAL a change, and times DEFAULT's")
    print()
    print("| row | change |", " | ".join(IDENTITIES), "|")
    print("| --- | --- |", " | ".join("--:" for _ in IDENTITIES), "|")
    for at in range(0, len(costs), len(IDENTITIES)):
        group = costs[at : at + len(IDENTITIES)]
        cells = [f"{cost.size:,.0f} ({cost.size / group[0].size:.2f})" for cost in group]
        print(f"| {group[0].table} | {group[0].change} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
