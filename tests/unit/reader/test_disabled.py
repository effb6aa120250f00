"""Caches that are disabled: the same interface, and every read loads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from readers import Face, Loader, Reads, rules_file

from cdc_invalidator.reader import AsyncCaches, Caches


@pytest.fixture(params=["sync", "async"])
def disabled(request: pytest.FixtureRequest) -> Any:
    """Make disabled caches that wait."""
    with Reads(request.param) as reads:
        kind = Caches if request.param == "sync" else AsyncCaches
        yield lambda *args, **settings: Face(reads, kind.disabled(*args, **settings))


def _each_call(caches: Any, load: Loader) -> None:
    for _ in range(2):
        assert caches.user.get(id=1, load=load) == "Ada"
    assert caches.user.get_many([1, 2], load=load.many) == ["Ada", None]
    assert caches.at_least(7).user.get(id=1, load=load, max_staleness=5.0) == "Ada"
    assert caches.user.using(wait=0.5, early=1.0).get(id=1, load=load) == "Ada"
    assert load.asked == [1, 1, [1, 2], 1, 1]
    assert caches.user.warm([1], load=load) == 0
    assert caches.user.invalidate(id=1) is False
    with caches.user.writing(id=1) as write:
        assert write.set("Eve") is False
    with caches.local("user"):
        assert caches.user.get(id=1, load=load) == "Ada"
    assert len(load.asked) == 6


def test_every_read_loads(disabled: Callable[..., Any], tmp_path: Path) -> None:
    registry = CollectorRegistry()
    _each_call(disabled(rules_file(tmp_path), registry=registry), Loader({1: "Ada"}))
    labels = {"cache": "user", "reason": "disabled"}
    assert registry.get_sample_value("cdc_invalidator_reader_bypasses_total", labels) == 10


def test_no_rule_file_is_needed(disabled: Callable[..., Any]) -> None:
    _each_call(disabled(), Loader({1: "Ada"}))


def test_with_a_rule_file_names_and_parameters_are_checked(disabled: Callable[..., Any], tmp_path: Path) -> None:
    caches = disabled(rules_file(tmp_path))
    with pytest.raises(AttributeError, match=r"there is no cache usr; did you mean `user`[?]"):
        caches.usr  # noqa: B018  it is asked for
    with pytest.raises(TypeError, match="cache user has the parameters id, and was given uid"):
        caches.user.get(uid=1, load=Loader())
    with pytest.raises(TypeError, match="has no argument id"):
        caches.user.cached(lambda uid: uid)


def test_decorated_functions_load_with_and_without_a_rule_file(tmp_path: Path) -> None:
    for caches in (Caches.disabled(), Caches.disabled(rules_file(tmp_path))):

        @caches.user.cached(ignore=["session"])
        def load(session: str, id: int) -> str:  # noqa: A002  the parameter's name
            return f"{session} {id}"

        assert load("s", 1) == "s 1"
        assert load("t", id=1) == "t 1"


def test_one_object_serves_one_event_loop_after_the_other() -> None:
    caches = AsyncCaches.disabled()

    async def read() -> Any:
        return await asyncio.gather(*(caches.user.get(id=1, load=lambda **given: given["id"] + 1) for _ in range(3)))

    assert [asyncio.run(read()) for _ in range(2)] == [[2, 2, 2]] * 2
