"""What tests of applications are given: caches in memory, also of caches that are in memory already, and options."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from readers import USER_RULES, Rows, rules_file

from cdc_invalidator.reader import AsyncCaches, Caches, Options, connect, testing


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    return rules_file(tmp_path, USER_RULES)


@pytest.mark.parametrize("made", ["in memory", "of the URL"])
def test_caches_in_memory_may_be_in_memory_for_a_test(rules: Path, made: str) -> None:
    of_url = made == "of the URL"
    caches = Caches.from_rules(rules, connect.client(connect.MEMORY)) if of_url else Caches.in_memory(rules)
    rows = Rows()
    for step in (nullcontext(), testing.in_memory(caches), testing.in_memory(caches)):
        with step:
            testing.clear(caches)
            assert caches.user.get(id=1, load=rows) == caches.user.get(id=1, load=rows) == rows.loads
            assert testing.keys(caches) == [b"t:user:1"]
            testing.bust(caches.user, id=1)
            before = rows.loads
            assert testing.keys(caches) == []
            assert caches.user.get(id=1, load=rows) == before + 1
            testing.clear(caches)
            assert caches.user.get(id=1, load=rows) == before + 2
    assert testing.keys(caches) == [b"t:user:1"], "what was there before the first test"


async def test_so_may_those_that_are_awaited(rules: Path) -> None:
    caches, rows = AsyncCaches.in_memory(rules), Rows()
    with testing.in_memory(caches):
        assert await caches.user.get(id=1, load=rows) == await caches.user.get(id=1, load=rows) == 1
        assert testing.keys(caches) == [b"t:user:1"]
        testing.bust(caches.user, id=1)
        assert await caches.user.get(id=1, load=rows) == 2
    assert testing.keys(caches) == []


def test_the_clock_of_caches_in_memory_stays(rules: Path) -> None:
    now = 1e9
    caches, rows = Caches.in_memory(rules, clock=lambda: now), Rows()
    with testing.in_memory(caches):
        caches.user.get(id=1, load=rows)
        now += 1000
        assert testing.keys(caches) == []


@pytest.mark.parametrize("options", [{"fail_safe": 600}, Options[Any](fail_safe=600)])
def test_options_may_be_a_dictionary(rules: Path, options: Any) -> None:
    now = 1e9

    def gone(**_: int) -> int:
        raise OSError

    caches = Caches.in_memory(rules, clock=lambda: now, options=options)
    assert caches.user.get(id=1, load=Rows()) == 1
    now += 400
    assert caches.user.get(id=1, load=gone) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fail_save": 600}, r"there is no option fail_save; did you mean `fail_safe`\?"),
        ("fail_safe", r"options are given as Options\(…\) or as a dictionary of them, not as str"),
    ],
)
def test_wrong_options_are_told(rules: Path, options: Any, sentence: str) -> None:
    for kind in (Caches, AsyncCaches):
        with pytest.raises(TypeError, match=sentence):
            kind.in_memory(rules, options=options)
