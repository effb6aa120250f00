"""What `check` says of the keys that Redis holds, and what it never shows of them."""

from __future__ import annotations

import pytest

from cdc_invalidator.commands.check_keyspace import Sample, of_sweeps, shape
from cdc_invalidator.commands.column_texts import Columns
from cdc_invalidator.commands.findings import Finding, Severity
from cdc_invalidator.rules import overlap
from cdc_invalidator.rules.load import parse_rules

DEVICE = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
CACHES = (
    "  device: {key: 'devices{id}', ttl: 1d, given: true}\n"
    "  by-name: {key: 'devices{tenant}_n_{name}', ttl: 1d, given: true}\n"
    "  ours: {key: 'app:env:t:{id}:v{version}', version: 'app:env:t:{id}:ver', ttl: 1d}\n"
    "  counts: {key: 'counts:{id}', ttl: 1d, ttl_only: true}\n"
)
TYPES = Columns({"device": {"id": overlap.UUID}, "by-name": {"tenant": overlap.UUID, "name": overlap.TEXT}})


def found(*keys: str, columns: Columns = TYPES, complete: bool = True, raw: bool = False) -> list[Finding]:
    rules = parse_rules([("rules.yaml", f"version: 1\ncaches:\n{CACHES}")], {})
    return list(of_sweeps(rules, columns, Sample([key.encode() for key in keys], complete), raw=raw))


def test_keys_of_the_swept_cache_and_keys_that_no_sweep_finds_are_not_told() -> None:
    own = (f"devices{DEVICE}", f"devices{DEVICE}\0lock", "app:env:t:1:ver", "counts:whatever", "other:app")
    assert found(*own, "cdc:x:watermark") == []
    assert found() == []


def test_keys_of_other_caches_are_a_note_with_their_numbers() -> None:
    (finding,) = found(f"devices{DEVICE}", *(f"devices{DEVICE}_n_thing {number}" for number in range(12)))
    assert (finding.severity, finding.place) == (Severity.NOTE, "Redis")
    assert "of all 13 keys there are 12 of by-name under `devices*` (device)" in finding.sentence
    assert "nothing needs to be done" in finding.sentence


def test_keys_of_no_cache_are_a_warning_that_shows_their_shape_and_no_word_of_them() -> None:
    keys = ["devicesOnline:Ada", "devicesOnline:Bob", f"devices{DEVICE}/{DEVICE}", "devices42"]
    (finding,) = found(*keys, complete=False)
    assert finding.severity is Severity.WARNING
    assert "a sample of 4 keys" in finding.sentence
    assert "2 `devices<text>:<text>` of no cache" in finding.sentence
    assert "1 `devices<uuid>/<uuid>` of no cache" in finding.sentence
    assert "1 `devices<number>` of no cache" in finding.sentence
    assert not any(word in finding.sentence for word in ("Ada", "Bob", "Online", DEVICE))
    (finding,) = found(*keys, raw=True)
    assert "1 `devicesOnline:Ada` of no cache" in finding.sentence


def test_the_rest_of_a_key_may_be_anything() -> None:
    rules = parse_rules([("r.yaml", "version: 1\ncaches:\n  meta: {key: 'meta:{id}:*', ttl: 1d, given: true}\n")], {})
    columns = Columns({"meta": {"id": overlap.NUMBER}})
    own = Sample([b"meta:1:a:b", b"meta:2:"], complete=True)
    assert list(of_sweeps(rules, columns, own, raw=False)) == []
    (finding,) = of_sweeps(rules, columns, Sample([b"meta:x:a"], complete=True), raw=False)
    assert "`meta:<text>:<text>` of no cache" in finding.sentence


def test_many_kinds_of_keys_are_cut_short() -> None:
    kinds = [":".join(["devices", *("x" * number)]) for number in range(1, 9)]
    (finding,) = found(*kinds, columns=TYPES)
    assert finding.sentence.count("of no cache,") + finding.sentence.count("of no cache ") >= 5
    assert "3 others under" in finding.sentence


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("p:42", "`p:<number>`"),
        ("p:-42", "`p:-<number>`"),
        ("p:42x", "`p:<text>`"),
        ("p:d41d8cd98f00b204e9800998ecf8427e", "`p:<hash>`"),
        ("p:d41d8cd98f00b204e9800998ecf8427e0", "`p:<text>`"),
        ("p:{7}:a b", "`p:{<number>}:<text>`"),
        (f"p:{DEVICE}_x", "`p:<uuid>_<text>`"),
        ("p:", "`p:`"),
    ],
)
def test_a_key_is_shown_by_its_shape(key: str, shown: str) -> None:
    assert shape(key.encode(), b"p:", raw=False) == shown
