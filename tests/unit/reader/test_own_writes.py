"""What a visitor's cookie says, and what the reads of a request ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator.reader import own_writes
from cdc_invalidator.reader.own_writes import UNKNOWN, Visitors, only_read, required, wrote

LSNS = st.integers(0, UNKNOWN)


def cookie(visitors: Visitors, lsn: int) -> str:
    with visitors.request("POST", None) as request:
        request.wrote(lsn)
    return visitors.cookie(request)


@given(LSNS, st.text(max_size=20))
def test_a_cookie_gives_back_the_lsn_until_its_time_is_over(lsn: int, other: str) -> None:
    now = [1000.0]
    visitors = Visitors("secret", seconds=60, clock=lambda: now[0])
    text = cookie(visitors, lsn)
    assert visitors.lsn(text) == lsn
    assert visitors.lsn(other) == visitors.lsn(None) == 0
    now[0] += 59
    assert visitors.lsn(text) == lsn
    now[0] += 1
    assert visitors.lsn(text) == 0


@given(st.data())
def test_a_cookie_that_was_changed_or_signed_by_another_says_nothing(data: st.DataObject) -> None:
    visitors = Visitors("secret")
    text = cookie(visitors, 0x16B3748)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.characters().filter(lambda sign: sign != text[at])) + text[at + 1 :]
    assert visitors.lsn(changed) == 0
    assert Visitors("another").lsn(text) == 0


def test_reads_ask_for_what_the_cookie_says_and_for_what_the_request_has_written() -> None:
    visitors = Visitors(b"secret")
    wrote(5)  # outside of a request
    only_read()
    assert required() == 0
    with visitors.request("GET", cookie(visitors, 7)) as request:
        assert (required(), request.asks, request.changed) == (7, False, False)
        wrote(9)
        wrote(8)
        assert (required(), request.changed) == (9, True)
    assert required() == 0
    assert visitors.lsn(visitors.cookie(request)) == 9


@pytest.mark.parametrize(("method", "asks"), [("GET", False), ("HEAD", False), ("POST", True), ("PATCH", True)])
def test_after_a_method_that_may_write_the_lsn_is_asked_for(method: str, asks: bool) -> None:
    with Visitors("secret").request(method, None) as request:
        request.ask(lambda: 5)
    assert (request.lsn, request.changed) == ((5, True) if asks else (0, False))


def test_who_says_that_nothing_was_written_is_not_asked() -> None:
    with Visitors("secret").request("POST", None) as request:
        only_read()
        request.ask(lambda: 5)
    assert not request.changed


async def test_an_lsn_that_can_t_be_had_sends_its_visitor_to_the_database(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> int:
        raise OSError("no such host")

    async def afails() -> int:
        raise OSError("no such host")

    visitors = Visitors("secret")
    with visitors.request("POST", cookie(visitors, 5)) as request:
        request.ask(fails)
    with visitors.request("POST", None) as other:
        await other.aask(afails)
    assert visitors.lsn(visitors.cookie(request)) == visitors.lsn(visitors.cookie(other)) == UNKNOWN
    assert "OSError" in caplog.text
    with visitors.request("POST", visitors.cookie(request)) as later:
        later.ask(lambda: 6)
    assert later.lsn == 6, "that server's commits so far are all below"


def test_without_a_secret_there_are_no_cookies() -> None:
    with pytest.raises(ValueError, match="give a secret"):
        own_writes.Visitors("")
