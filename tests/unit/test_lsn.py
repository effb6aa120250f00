"""LSNs and PostgreSQL's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator import lsn


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("0/0", 0),
        ("0/1", 1),
        ("1/0", 1 << 32),
        ("16/B374D848", 0x16B374D848),
        ("0/FFFFFFFF", 0xFFFFFFFF),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
    ],
)
def test_an_lsn_is_read_and_printed_as_postgresql_does(text: str, position: int) -> None:
    assert lsn.parse(text) == position
    assert lsn.text(position) == text


@pytest.mark.parametrize("text", ["16/b374d848", "16/B374d848", "00000016/B374D848"])
def test_lower_case_and_leading_zeros_are_read_too(text: str) -> None:
    assert lsn.parse(text) == 0x16B374D848


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_every_position_survives_printing_and_reading(position: int) -> None:
    assert lsn.parse(lsn.text(position)) == position


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "0",
        "16B374D848",
        "/B374D848",
        "16/",
        "16/B374D848/0",
        "16//B374D848",
        "G/0",
        "0/G",
        "000000016/B374D848",
        "16/1B374D8480",
        "-1/0",
        "0/-1",
        "+1/0",
        "0x1/0",
        "1_0/0",
        "0/0x10",
        " 1/0",
        "1/0 ",
        "1/0\n",
        "1 /0",
        "１/0",  # noqa: RUF001 - a digit to Python's int, not to PostgreSQL
    ],
)
def test_other_text_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="is not an LSN; write it as in 16/B374D848"):
        lsn.parse(text)


@given(st.text(alphabet="0123456789abcdefABCDEFxX/_+- \n", max_size=20))
def test_what_is_read_is_within_64_bits(text: str) -> None:
    try:
        position = lsn.parse(text)
    except ValueError:
        return
    assert 0 <= position < 2**64


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime(2024, 2, 29, 12, 0, 0, 123_456, tzinfo=UTC),
    ],
)
def test_postgresqls_microseconds_become_unix_microseconds(moment: datetime) -> None:
    since_2000 = (moment - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    since_1970 = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

    assert lsn.unix_us(since_2000) == since_1970
