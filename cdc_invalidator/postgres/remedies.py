"""The SQL that we print for an administrator, one function for each kind. Pure.

The rule that holds here: nothing is printed that makes the application's UPDATE or DELETE fail, not even between two of
the statements. A test runs each of them, with writers going, on each version of PostgreSQL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cdc_invalidator.postgres.quoting import identifier, literal, qualified
from cdc_invalidator.postgres.survey import Leaf
from cdc_invalidator.rules.table import Table

_WHY_NOT_FULL = {
    "virtual": "it has a virtual generated column, which PostgreSQL does not publish",
    "listed": "a publication shows only some of its columns or rows",
    "unstored": "another publication does not carry its generated columns",
}

# An entry of a B-tree may have some 2,700 bytes; each column may need 8 more for its length and alignment.
_INDEX_BYTES = 2600


# ── Replica identities ───────────────────────────────────────────────────────────────────────────────────────────────


class Remedy(NamedTuple):
    """What an administrator is told to do.

    ``text``: as the end of a sentence; ``sql``: its statements, ``or_sql``: those of another way to the same end.
    """

    text: str
    sql: tuple[str, ...] = ()
    or_sql: tuple[str, ...] = ()


def run(*statements: str) -> Remedy:
    """Return the remedy that consists of these statements."""
    return Remedy(f"run {as_text(statements)}", statements)


def as_text(statements: Sequence[str]) -> str:
    """Return statements as a sentence has them."""
    return "; ".join(statement.removesuffix(";") for statement in statements)


def full_identity(leaf: Leaf, publication: str) -> tuple[str, ...]:
    """Return the SQL that makes old rows carry all columns; empty where that would make UPDATE and DELETE fail."""
    full = f"ALTER TABLE {qualified(leaf.table)} REPLICA IDENTITY FULL;"
    if leaf.full == "stored":
        return (stored_columns(publication), full)
    return (full,) if leaf.full == "ok" else ()


def index_identity(leaf: Leaf, columns: Iterable[str]) -> tuple[str, ...]:
    """Return the SQL that makes old rows carry these columns by a unique index; empty where there can be none.

    The index contains the identity as it is, so it is unique, and what others need of the identity stays. Its columns
    must be NOT NULL, and so short that no value can ever be too long for the index.
    """
    missing = sorted(set(columns) - leaf.carried)
    indexed = sorted(leaf.carried) + missing
    sizes = [leaf.indexable.get(column) for column in indexed]
    known = [size + 8 for size in sizes if size is not None]
    if not missing or not leaf.carried or leaf.full == "listed" or len(known) < len(sizes) or sum(known) > _INDEX_BYTES:
        return ()
    named = hashlib.sha256(repr((str(leaf.table), indexed)).encode()).hexdigest()[:6]
    index = identifier(f"{leaf.table.name[:40]}_{named}_identity" if leaf.table.name.isascii() else f"{named}_identity")
    table = qualified(leaf.table)
    return (
        f"CREATE UNIQUE INDEX CONCURRENTLY {index} ON {table} ({', '.join(map(identifier, indexed))});",
        f"ALTER TABLE {table} REPLICA IDENTITY USING INDEX {index};",
    )


def carrying(leaf: Leaf, publication: str, columns: Iterable[str], needed: Iterable[str]) -> Remedy:
    """Return how old rows can be made to carry these columns, or why they can't.

    Args:
        leaf: the table.
        publication: ours.
        columns: what all rules on the table read of old rows.
        needed: those of them without which keys are not known; the index has only these if it can't have all.
    """
    full, index = full_identity(leaf, publication), index_identity(leaf, columns) or index_identity(leaf, needed)
    if full and index:
        return Remedy(
            f"run {as_text(full)}, or, for an index more and hardly more WAL, run {as_text(index)}", full, index
        )
    if full or index:
        return run(*(full or index))
    return Remedy(
        f"REPLICA IDENTITY FULL is no remedy, since UPDATE and DELETE would fail as long as {_WHY_NOT_FULL[leaf.full]}"
    )


def usable_identity(leaf: Leaf, publication: str) -> Remedy:
    """Return what gives a table an identity with which it can be published."""
    if leaf.awaits_stored:
        return run(stored_columns(publication))
    if leaf.keyed and not leaf.filtered:
        return run(f"ALTER TABLE {qualified(leaf.table)} REPLICA IDENTITY DEFAULT;")
    full = full_identity(leaf, publication)
    if full:
        return Remedy(f"add a primary key, or run {as_text(full)}", full)
    return Remedy("add a primary key and set REPLICA IDENTITY DEFAULT")


def stored_columns(publication: str) -> str:
    """Return the SQL that makes a publication carry stored generated columns; from PostgreSQL 18 on."""
    return f"ALTER PUBLICATION {identifier(publication)} SET (publish_generated_columns = stored);"


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
    return f"ALTER ROLE {identifier(role)} REPLICATION;"


def bypass_policies(role: str) -> str:
    """Return the SQL that lets a role read rows that row-level security hides."""
    return f"ALTER ROLE {identifier(role)} BYPASSRLS;"


def bounded_wal() -> tuple[str, ...]:
    """Return the SQL that bounds the WAL that slots hold; for example."""
    return ("ALTER SYSTEM SET max_slot_wal_keep_size = '10GB';", "SELECT pg_reload_conf();")


def make_index(table: Table, columns: str) -> str:
    """Return the SQL that makes an index on these columns (as SQL writes them)."""
    return f"CREATE INDEX CONCURRENTLY ON {qualified(table)} ({columns});"
