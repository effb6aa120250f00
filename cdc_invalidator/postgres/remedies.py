"""The SQL that we print for an administrator, one function for each kind. Pure.

The rule that holds here: nothing is printed that makes the application's UPDATE or DELETE fail, not even between two of
the statements. A test runs each of them, with writers going, on each version of PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdc_invalidator.postgres.quoting import identifier, literal, qualified
from cdc_invalidator.postgres.survey import Leaf
from cdc_invalidator.rules.table import Table

_WHY_NOT_FULL = {
    "virtual": "it has a virtual generated column, which PostgreSQL does not publish",
    "listed": "a publication shows only some of its columns or rows",
    "unstored": "another publication does not carry its generated columns",
}


# ── Replica identities ───────────────────────────────────────────────────────────────────────────────────────────────


def full_identity(leaf: Leaf, publication: str) -> str:
    """Return the SQL that makes old rows carry all columns; empty where that would make UPDATE and DELETE fail."""
    full = f"ALTER TABLE {qualified(leaf.table)} REPLICA IDENTITY FULL"
    if leaf.full == "stored":
        return f"{stored_columns(publication)}; {full}"
    return full if leaf.full == "ok" else ""


def with_full_identity(leaf: Leaf, publication: str) -> str:
    """Return the advice to make old rows carry all columns, or why that is none."""
    return (
        f"run {sql}"
        if (sql := full_identity(leaf, publication))
        else (
            "REPLICA IDENTITY FULL is no remedy, since UPDATE and DELETE would fail as long as "
            f"{_WHY_NOT_FULL[leaf.full]}"
        )
    )


def usable_identity(leaf: Leaf, publication: str) -> str:
    """Return the advice that gives a table an identity with which it can be published."""
    if leaf.awaits_stored:
        return f"run {stored_columns(publication)}"
    if leaf.keyed and not leaf.filtered:
        return f"run ALTER TABLE {qualified(leaf.table)} REPLICA IDENTITY DEFAULT"
    full = full_identity(leaf, publication)
    return f"add a primary key, or run {full}" if full else "add a primary key and set REPLICA IDENTITY DEFAULT"


def stored_columns(publication: str) -> str:
    """Return the SQL that makes a publication carry stored generated columns; from PostgreSQL 18 on."""
    return f"ALTER PUBLICATION {identifier(publication)} SET (publish_generated_columns = stored)"


# ── The publication ──────────────────────────────────────────────────────────────────────────────────────────────────


def make_publication(publication: str, tables: Sequence[str], *, stores: bool) -> str:
    """Return the SQL that makes a publication of these tables, as `published` writes them.

    With ``stores``, it carries stored generated columns, so that an identity may contain them; from PostgreSQL 18 on.
    """
    of_tables = f" FOR TABLE {', '.join(tables)}" if tables else ""
    options = " WITH (publish_generated_columns = stored)" if stores else ""
    return f"CREATE PUBLICATION {identifier(publication)}{of_tables}{options};"


def published(table: Table, *, partitioned: bool) -> str:
    """Return a table as a publication names it: without ONLY, tables that inherit from it would be published too."""
    return qualified(table) if partitioned else f"ONLY {qualified(table)}"


def add_table(publication: str, table: Table, *, partitioned: bool) -> str:
    """Return the SQL that publishes a table."""
    return f"ALTER PUBLICATION {identifier(publication)} ADD TABLE {published(table, partitioned=partitioned)};"


def remove_table(publication: str, table: Table) -> str:
    """Return the SQL that takes a table out; without ONLY, it would look for tables that inherit from it."""
    return f"ALTER PUBLICATION {identifier(publication)} DROP TABLE ONLY {qualified(table)};"


def set_options(publication: str, *, all_ops: bool, stored: bool) -> str:
    """Return the SQL that lets a publication hide nothing: all operations, leaves of partitioned tables.

    Args:
        publication: its name.
        all_ops: publish all operations.
        stored: carry stored generated columns.
    """
    options = ["publish = 'insert, update, delete, truncate'"] if all_ops else []
    options.append("publish_via_partition_root = false")
    options += ["publish_generated_columns = stored"] if stored else []
    return f"ALTER PUBLICATION {identifier(publication)} SET ({', '.join(options)});"


# ── The rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_slot(slot: str, *, failover: bool) -> str:
    """Return the SQL that makes the slot; with ``failover``, standbys copy it (from PostgreSQL 17 on)."""
    more = ", failover => true" if failover else ""
    return f"SELECT pg_create_logical_replication_slot({literal(slot)}, 'pgoutput'{more});"


def drop_slot(slot: str) -> str:
    """Return the SQL that drops the slot."""
    return f"SELECT pg_drop_replication_slot({literal(slot)});"


def replication_right(role: str) -> str:
    """Return the SQL that allows a role to stream."""
    return f"ALTER ROLE {identifier(role)} REPLICATION"


def bypass_policies(role: str) -> str:
    """Return the SQL that lets a role read rows that row-level security hides."""
    return f"ALTER ROLE {identifier(role)} BYPASSRLS"


def bounded_wal() -> str:
    """Return the SQL that bounds the WAL that slots hold; for example."""
    return "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT pg_reload_conf()"


def make_index(table: Table, columns: str) -> str:
    """Return the SQL that makes an index on these columns (as SQL writes them)."""
    return f"CREATE INDEX CONCURRENTLY ON {qualified(table)} ({columns})"
