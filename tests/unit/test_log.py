"""The output that nobody reads for a while: what is written, what is dropped, and what may be confirmed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from cdc_invalidator import errors, log

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = b"x" * 999 + b"\n"
# More than a pipe holds.
MANY = 200


class Pipe:
    """An output whose lines stand in a pipe until somebody reads them."""

    def __init__(self) -> None:
        self.end, start = os.pipe()
        self.output = log.Output(start)
        self.dropped: list[int] = []
        self.events = log.EventLog(self.output, "json", "info", dropped=self.dropped.append)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(self.end, count - len(data))
        return data


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setattr(log, "STUCK_SECONDS", 0.2)
    monkeypatch.setattr(log, "MOST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(log, "UNWRITTEN", 50 * len(LINE))
    pipe = Pipe()
    yield pipe
    os.close(pipe.end)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fill(pipe: Pipe) -> int:
    """Write more than fits; return the mark of it."""
    for _ in range(MANY):
        pipe.events.write_text(LINE)
    return pipe.events.mark


def test_lines_are_told_once_they_are_with_the_kernel(pipe: Pipe) -> None:
    pipe.events.write_text(LINE)
    first = pipe.events.mark
    until(lambda: pipe.events.told(first))
    mark = fill(pipe)

    assert not pipe.events.told(mark)
    assert pipe.read((1 + MANY) * len(LINE)) == (1 + MANY) * LINE
    until(lambda: pipe.events.told(mark))
    assert pipe.events.trouble is None


async def test_busts_wait_for_a_reader_who_dawdles(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST_WAIT_SECONDS", 20.0)
    mark = fill(pipe)
    waiting = asyncio.create_task(pipe.events.room())
    for _ in range(MANY - 60):
        await asyncio.sleep(0.005)
        assert pipe.output.dropped == 0
        os.read(pipe.end, len(LINE))
    await waiting

    assert len(await asyncio.to_thread(pipe.read, 60 * len(LINE))) == 60 * len(LINE)
    await asyncio.to_thread(until, lambda: pipe.events.told(mark))


async def test_for_a_reader_who_takes_nothing_they_wait_only_so_long_and_what_is_dropped_is_never_told(
    pipe: Pipe,
) -> None:
    fill(pipe)
    await pipe.events.room()
    pipe.events.write_text(LINE + LINE)
    mark = pipe.events.mark

    assert sum(pipe.dropped) == pipe.output.dropped == 2
    assert "standard output" in str(pipe.events.trouble).lower()
    assert len(await asyncio.to_thread(pipe.read, MANY * len(LINE))) == MANY * len(LINE)
    await asyncio.to_thread(until, lambda: not pipe.output.stuck)
    assert not pipe.events.told(mark)
    # Not even once more is written.
    pipe.output.write(LINE)
    assert await asyncio.to_thread(pipe.read, len(LINE)) == LINE
    assert not pipe.events.told(mark)
    with pytest.raises(errors.Untold):
        await pipe.events.room()
    # The next stream brings it again.
    pipe.events.begin_stream()
    await pipe.events.room()
    pipe.events.write_text(LINE)
    await asyncio.to_thread(until, lambda: pipe.events.told(pipe.events.mark))


async def test_for_a_reader_who_takes_too_little_they_wait_only_so_long_too(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "STUCK_SECONDS", 20.0)
    mark = fill(pipe)
    over = asyncio.Event()

    async def read_slowly() -> None:
        while not over.is_set():
            os.read(pipe.end, len(LINE))
            await asyncio.sleep(0.02)

    reading = asyncio.create_task(read_slowly())
    began = time.monotonic()
    await pipe.events.room()
    assert 0.3 <= time.monotonic() - began < 10
    assert not pipe.output.stuck
    pipe.events.write_text(LINE)
    began = time.monotonic()
    # From then on, they don't wait at all.
    await pipe.events.room()
    assert time.monotonic() - began < 0.1
    assert "standard output" in str(pipe.events.trouble).lower()
    assert not pipe.events.told(mark)
    over.set()
    await reading
    assert sum(pipe.dropped) == 1


async def test_lines_that_are_too_many_to_be_told_later_are_lost_and_hold_no_position(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MOST_UNTOLD", 3)
    fill(pipe)
    await pipe.events.room()
    for _ in range(4):
        pipe.events.write_text(LINE)
    mark = pipe.events.mark
    await pipe.events.room()
    assert not pipe.events.told(mark)
    await asyncio.to_thread(pipe.read, MANY * len(LINE))
    await asyncio.to_thread(until, lambda: pipe.events.told(mark))
    with structlog.testing.capture_logs() as said:
        await pipe.events.room()
    assert [(line["event"], line["lines"]) for line in said] == [("events_lost", 4)]
    assert pipe.events.trouble is None


async def test_with_too_much_wal_nothing_waits_and_what_was_lost_is_counted(pipe: Pipe) -> None:
    # More than the pipe and the output hold together.
    fill(pipe)
    pipe.events.hurry = True
    began = time.monotonic()
    await pipe.events.room()

    assert time.monotonic() - began < 0.1
    assert pipe.events.told(pipe.events.mark)
    taken = pipe.output.mark
    pipe.events.write_text(LINE + LINE)
    await pipe.events.room()
    assert pipe.events.told(pipe.events.mark)
    pipe.events.hurry = False
    await asyncio.to_thread(pipe.read, taken)
    await asyncio.to_thread(until, lambda: not pipe.output.full and not pipe.output.stuck)
    with structlog.testing.capture_logs() as said:
        await pipe.events.room()
    assert [(line["event"], line["lines"]) for line in said] == [("events_lost", MANY + 2 - taken // len(LINE))]


async def test_an_output_that_is_closed_ends_it(pipe: Pipe) -> None:
    end, start = os.pipe()
    os.close(end)
    output = log.Output(start)
    output.write(LINE)

    await asyncio.to_thread(until, lambda: output.failure)
    with pytest.raises(errors.OutputLost):
        await log.EventLog(output, "json", "info").room()
    assert not log.EventLog(output, "json", "info").told(output.mark)


def test_structlog_writes_there_too(pipe: Pipe) -> None:
    pipe.output.write(json.dumps({"event": "started"}).encode() + b"\n")

    assert b"started" in pipe.read(20)


def test_the_text_form_shows_control_signs_and_does_not_send_them() -> None:
    end, start = os.pipe()
    try:
        output = log.configure("console", "info", start)
        structlog.get_logger().info("seen", table="a\x1b[31mb", tables=["\x9b1m"], how={"\x07": "\u202e"})
        output.close()
        line = os.read(end, 4096).decode()
    finally:
        structlog.reset_defaults()
        os.close(end)
    plain = line.removesuffix("\n")
    assert plain.isprintable()
    assert all(escape in plain for escape in (r"a\x1b[31mb", r"\x9b1m", r"\x07", r"\u202e"))


def test_the_json_form_shows_control_signs_too_and_is_read_as_it_was() -> None:
    end, start = os.pipe()
    table = "Gr\u00f6\u00dfe\x1b\x9b1m\u202e"
    try:
        output = log.configure("json", "info", start)
        structlog.get_logger().info("seen", table=table)
        output.close()
        line = os.read(end, 4096).decode()
    finally:
        structlog.reset_defaults()
        os.close(end)
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line)["table"] == table


def test_the_journal_keeps_what_happened_whatever_the_level_and_tells_a_repetition_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    journal = log.Journal()
    end, start = os.pipe()
    output = log.configure("json", "error", start, journal)
    try:
        logger = structlog.get_logger()
        logger.info("role", role="leader")
        logger.info("sweep_progress", scanned=5)
        for attempt in range(3):
            logger.warning("redis_unavailable", error="It is away.", retry_in_s=attempt)
        logger.warning("redis_unavailable", error="It is full.")
        logger.error("reload_failed", error="A mistake.")
        output.close()
        assert [json.loads(line)["event"] for line in os.read(end, 65536).splitlines()] == ["reload_failed"]
    finally:
        structlog.reset_defaults()
        os.close(end)
    told = [(event["event"], event.get("error"), event.get("times")) for event in journal.events]
    assert told == [
        ("role", None, None),
        ("redis_unavailable", "It is away.", 3),
        ("redis_unavailable", "It is full.", None),
        ("reload_failed", "A mistake.", None),
    ]
    assert journal.events[1]["retry_in_s"] == 2
    assert journal.events[1]["since"] < journal.events[1]["ts"]


def test_the_journal_keeps_the_last_busts_in_bounded_memory() -> None:
    journal = log.Journal()
    end, start = os.pipe()
    output = log.Output(start)
    events = log.EventLog(output, "json", "warning", journal)
    for number in range(1000):
        events.write(
            [({"cache": "user"}, {"keys": number, "key_hashes": ["0123456789abcdef"] * (5 if number > 994 else 50)})]
            * 40
        )
    events.write([({"reason": "new_slot"}, {"swept": True})], "gap", "warning")
    output.close()
    os.close(end)
    assert [event["keys"] for event in journal.busts(50)] == [999] * 40 + [998] * 10
    assert [event["event"] for event in journal.events] == ["gap"]
    assert sum(map(len, journal._busts)) <= log.JOURNAL_FLUSHES * log.JOURNAL_BYTES
    # Every one is whole, however many were cut.
    assert all(event["cache"] == "user" for event in journal.busts(10_000))
