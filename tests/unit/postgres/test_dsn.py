"""Connection strings that are another driver's or can be read in two ways: what is said, and that no value is."""

from __future__ import annotations

import traceback
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_invalidator import errors
from cdc_invalidator.postgres.dsn import check_dsn, place
from cdc_invalidator.postgres.standbys import name


def told(dsn: str) -> str:
    """Return all that a log may show of the refusal."""
    with pytest.raises(errors.WrongSettings) as caught:
        check_dsn(dsn)
    assert caught.value.exit_code == 2
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://h",
        "postgres://u:p@h:5432/db",
        "postgresql://u:p@a:1,b:2/db?target_session_attrs=read-write",
        "postgresql://u@[::1]:5432/db",
        "postgresql:///db?host=/run/postgresql&user=me%40srv",
        "postgresql://h/db?ssl=true",
        "postgresql://u:p@h/db?sslmode=verify-full&sslrootcert=/ca.pem&options=-c%20work_mem%3D1MB",
        "postgresql://u:12:34#56@h/db",
        "host=h port=5432 user=u password='a/b@c' dbname=db",
        r"host = h  password='a b\'c\\' user=u",
        "host=h password=a/b@c?d#e:f=g=&%h user='u'",
        r"password=a\ b host=/run/postgresql",
        "host=a,b port=1,2",
        "host=h user=u password='h:5432/?Action=connect&DBUser=u&X-Amz-Signature=ab%2Fcd@#' sslmode=verify-full",
    ],
)
def test_what_libpq_reads_as_it_is_meant_is_taken(dsn: str) -> None:
    check_dsn(dsn)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("schema=public", "the parameter schema, which other drivers know and PostgreSQL does not; leave it out (rule"),
        ("pgbouncer=true&connection_limit=1", "the parameters pgbouncer and connection_limit, which"),
        ("pgbouncer=true", "(the address must be PostgreSQL's own, not the pooler's)"),
        ("sslaccept=strict", "write sslmode=verify-full with sslrootcert, or sslmode=require"),
        ("sslmode=require&currentSchema=shop&prepareThreshold=0", "the parameters currentSchema and prepareThreshold"),
        ("unheard_of=1", "the parameter unheard_of,"),
        ("a=1&b=2&c=3", "the parameters a, b and c"),
        ("password=hunter2&schema=x", "the parameter schema,"),
        ("password=hun&ter2=x&schema=x", "parameters behind the ? that PostgreSQL does not know (schema among them)"),
        ("replication=database", "the parameter replication, which the daemon sets itself; leave it out"),
        ("sslmode=no-verify", "write one of disable, allow, prefer, require, verify-ca, verify-full"),
    ],
)
def test_a_parameter_of_somebody_else_is_named_and_the_password_not_blamed(query: str, words: str) -> None:
    said = told(f"postgresql://u:hunter2@h/db?{query}")

    assert words in said
    assert "hunter2" not in said
    assert "ter2" not in said
    assert ("percent-encode" in said) == ("ter2=" in query)


@pytest.mark.parametrize(
    ("dsn", "scheme"),
    [
        ("jdbc:postgresql://h/db?user=u", "jdbc:postgresql://"),
        ("postgresql+psycopg://u:hunter2@h/db", "postgresql+psycopg://"),
        ("postgresql+asyncpg://u:hunter2@h/db", "postgresql+asyncpg://"),
        ("postgres+asyncpg://u:hunter2@h/db", "postgres+asyncpg://"),
        ("PostgreSQL+psycopg2://u:hunter2@h/db", "PostgreSQL+psycopg2://"),
        ("postgis://u:hunter2@h/db", "postgis://"),
        ("mysql://u:hunter2@h/db", "mysql://"),
    ],
)
def test_the_scheme_of_another_driver_is_named_with_the_right_one(dsn: str, scheme: str) -> None:
    said = told(dsn)

    assert f"begins with {scheme}, which is another driver's; write postgresql://" in said
    assert "hunter2" not in said
    assert "percent" not in said


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:1234/hunter2@h:5432/db",
        "postgresql://u:hun@ter2@h/db",
        "postgresql://u:1234/56?hunter2@h/db",
        "postgresql://u:1234/hunter2@h/db?schema=public",
        "postgresql://u:hunter2/x@h",
        "postgresql://u:12?34hunter2@h/db",
        "postgresql://u:1234/db?user=hunter2@h/db",
        "postgresql://h?password=hunter2@x",
        "postgresql://h/db?user=hunter2@srv",
    ],
)
def test_a_password_that_can_be_read_as_something_else_is_told_without_a_part_of_it(dsn: str) -> None:
    said = told(dsn)

    assert "percent-encode these there (%40 %2F %3F)" in said or "a port that is no number" in said
    assert not any(part in said for part in ("hunter2", "ter2", "hun", "1234"))


@pytest.mark.parametrize(
    "dsn",
    [
        "host=db user=u password=a host=hunter2",
        "host=db user=u password='a'hunter2' dbname=x",
        "host=db user=u password='a host=hunter2",
        "host=db user=u password=a b hunter2",
        "password='a'host=hunter2",
        "host=db password=hunter2\\",
    ],
)
def test_pairs_that_can_be_read_in_another_way_are_told_without_a_part_of_the_password(dsn: str) -> None:
    said = told(dsn)

    assert "can't be read in one way only" in said
    assert not any(part in said for part in ("hunter2", "ter2", "hun"))


@pytest.mark.parametrize(
    ("dsn", "words"),
    [
        ("postgresql://u:p@h:0/db", "a port that is no number from 1 to 65535"),
        ("postgresql://u:p@h:65536/db", "a port that is no number from 1 to 65535"),
        ("host=h port=five", "a port that is no number from 1 to 65535"),
        ("postgresql://u:p@a,b,c/db?port=1,2", "another number of ports than of hosts"),
        ("host=h sslmode=on", "a value of sslmode that PostgreSQL does not know; write one of disable, allow,"),
        ("host=h target_session_attrs=master", "a value of target_session_attrs that"),
        ("host=h channel_binding=yes", "a value of channel_binding that"),
        ("host=h ssl_min_protocol_version=1.2", "write one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3."),
    ],
)
def test_a_value_that_libpq_would_refuse_at_each_connection_is_refused_at_once(dsn: str, words: str) -> None:
    assert words in told(dsn)


def test_a_line_break_is_told() -> None:
    assert "a line break" in told("postgresql://u:p@h/db\n")


def test_the_setting_of_a_standby_is_named() -> None:
    with pytest.raises(errors.WrongSettings, match="CDC_POSTGRES_STANDBYS has the parameter schema,"):
        name("postgresql://h/db?schema=public")


SECRET = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(SECRET, st.sampled_from(["", "?schema=public", "?sslmode=require", "?pgbouncer=true&x=1"]))
@example("1234/56secret", "?schema=public")
@example("a@b/c?d#e", "")
@example("%80", "")
def test_any_password_is_taken_encoded_and_never_shown_raw(password: str, query: str) -> None:
    marked = f"Zq{password}qZ"
    encoded = f"postgresql://u:{quote(marked, safe='')}@h:5432/db{query}"
    if query in {"", "?sslmode=require"}:
        check_dsn(encoded)
        assert psycopg.conninfo.conninfo_to_dict(encoded)["password"] == marked
    else:
        assert "Zq" not in told(encoded)
    said = ""
    try:
        check_dsn(f"postgresql://u:{marked}@h:5432/db{query}")
    except errors.WrongSettings as wrong:
        said = "".join(traceback.format_exception(wrong))
    assert "Zq" not in said
    assert "qZ" not in said


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://app:secret@db/shop", "db:5432, database shop"),
        ("postgresql://app:secret@a:1,b:2/shop", "a:1, b:2, database shop"),
        ("host=db user=app password=secret", "db:5432, database app"),
        ("postgresql:///shop", "localhost:5432, database shop"),
    ],
)
def test_a_place_is_where_it_leads_and_nothing_else(dsn: str, shown: str) -> None:
    assert place(dsn) == shown
