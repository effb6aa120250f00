"""Key names become families: what is a literal, what is a parameter, and that no data is ever taken for a literal."""

from __future__ import annotations

import random
import string
import uuid
from hashlib import md5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_invalidator.discovery.families import Family, Found, Sample, group
from cdc_invalidator.discovery.words import Vocabulary

RNG = random.Random(15)
SYLLABLES = [one + other for one in "bcdfgklmnprstvz" for other in "aeiou"]
PEOPLE = list(dict.fromkeys("".join(RNG.choices(SYLLABLES, k=RNG.randint(2, 4))) for _ in range(500)))[:400]
UUIDS = [str(uuid.UUID(int=RNG.getrandbits(128), version=4)) for _ in range(200)]
TOKENS = ["".join(RNG.choice(string.ascii_letters + string.digits) for _ in range(24)) for _ in range(200)]


def found(keys: list[str], *vocabulary: str) -> Found:
    return group([Sample(key.encode()) for key in keys], Vocabulary(vocabulary), lambda key: key.startswith(b"cdc:"))


def shown(family: Family) -> str:
    return "".join(part if isinstance(part, str) else f"<{part.kind}>" for part in family.parts)


def families(keys: list[str], *vocabulary: str) -> dict[str, int]:
    return {shown(family): family.keys for family in found(keys, *vocabulary).families}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([f"shop:prod:user:{n}:orders" for n in range(50)], "shop:prod:user:<number>:orders"),
        ([f"user:{name}:cart" for name in PEOPLE], "user:<text>:cart"),
        ([f"devices{each}" for each in UUIDS], "devices<UUID>"),
        ([f"tsLatest{{{each}}}temperature" for each in UUIDS], "tsLatest{<UUID>}temperature"),
        ([f"user:{{{n}}}:profile" for n in range(50)], "user:{<number>}:profile"),
        ([f":1:blog.post.{n}" for n in range(50)], ":1:blog.post.<number>"),
        ([f"otaPackages::{each}" for each in UUIDS], "otaPackages::<UUID>"),
        ([f"posts/{n}-2026{n:04}" for n in range(50)], "posts/<number>-<number>"),
        ([f"user:{n}:dash:v{1764000000000 + n}" for n in range(50)], "user:<number>:dash:v<version>"),
        ([f"filters:v3:{n}" for n in range(50)], "filters:v3:<number>"),
        ([f"token_{each}" for each in TOKENS], "token_<text>"),
        ([f"apiKeys{each}" for each in TOKENS], "apiKeys<random text>"),
        ([f"page:{one}-{other}-is-here" for one, other in zip(PEOPLE, reversed(PEOPLE), strict=True)], "page:<text>"),
        ([f"page:the-{one}-{other}" for one, other in zip(PEOPLE, reversed(PEOPLE), strict=True)], "page:the-<text>"),
        ([f"by-mail:{name}@mail.example" for name in PEOPLE], "by-mail:<address>"),
        ([f"unfurl:{n}:https://{name}.example/a:b" for n, name in enumerate(PEOPLE)], "unfurl:<number>:<URL>"),
        ([f"report:2026-{1 + n % 12:02}-{1 + n % 28:02}:{n}" for n in range(60)], "report:<date>:<number>"),
        ([f"devices{UUIDS[n % 3]}_n_Sensor {n} in {name}" for n, name in enumerate(PEOPLE)], "devices<UUID>_n_<text>"),
        ([f"cache/{md5(b'%d' % n).hexdigest()}" for n in range(50)], "cache/<hash>"),
    ],
)
def test_a_family_is_found(keys: list[str], expected: str) -> None:
    assert families(keys) == {expected: len(set(keys))}


def test_keys_of_several_kinds_of_value_are_families_of_their_own() -> None:
    keys = [f"devices{UUIDS[n % 3]}_n_{name}" for n, name in enumerate(PEOPLE)] + [f"devices{each}" for each in UUIDS]
    keys += [f"followers:{n}:local" for n in range(60)] + [
        f"followers:{n}:https://{PEOPLE[n]}.example/" for n in range(60)
    ]
    assert families(keys).keys() == {
        "devices<UUID>", "devices<UUID>_n_<text>", "followers:<number>:local", "followers:<number>:<URL>",
    }  # fmt: skip


def test_values_of_a_parameter_are_those_of_its_own_family() -> None:
    keys = [f"devices{each}" for each in UUIDS[:100]] + [
        f"devices{each}_{other}" for each, other in zip(UUIDS[100:], UUIDS, strict=False)
    ]
    by_shape = {shown(family): family for family in found(keys).families}
    assert set(by_shape["devices<UUID>"].parameters[0].values) == set(UUIDS[:100])
    assert set(by_shape["devices<UUID>_<UUID>"].parameters[0].values) == set(UUIDS[100:])


def test_keys_beside_keys_and_the_daemons_own_are_left_out() -> None:
    keys = [f"user:{n}" for n in range(50)]
    all_found = found([*keys, "user:1\0lock", "user:2\0stale", "cdc:app:watermark"])
    assert [shown(family) for family in all_found.families] == ["user:<number>"]
    assert (all_found.seen, all_found.beside, all_found.single) == (53, 3, 0)


def test_what_few_keys_have_is_shown_only_if_it_is_a_word_of_the_trade_or_of_the_schema() -> None:
    keys = [f"app:user:{n}" for n in range(200)]
    alone = ["app:settings", "app:exchange_rates", "app:bartholomew", "app:bartholomew-cubbins", "app:secret project"]
    all_found = found([*keys, *alone], "exchange_rates")
    assert {shown(family) for family in all_found.families} == {
        "app:user:<number>",
        "app:settings",
        "app:exchange_rates",
    }
    assert all_found.single == 3


def test_few_keys_make_a_family_where_as_many_ids_follow_an_unknown_word() -> None:
    keys = [f"app:user:{n}" for n in range(50)] + [f"app:whs:{each}" for each in UUIDS[:5]]
    keys += [f"app:bartholomew:{n % 2}:{each}" for n, each in enumerate(PEOPLE[:6])]
    all_found = found(keys)
    assert {shown(family) for family in all_found.families} == {"app:user:<number>", "app:whs:<UUID>"}
    assert all_found.single == 6


def test_of_types_and_times_the_extremes_are_kept() -> None:
    samples = [Sample(b"user:%d" % n, "hash" if n < 3 else "string", None if n < 5 else float(n)) for n in range(50)]
    samples.append(Sample(b"user:77"))  # gone before it was looked at
    (family,) = group(samples, Vocabulary()).families
    assert (family.types, family.ttls, family.endless) == ((("string", 47), ("hash", 3)), (5.0, 49.0), 5)


def test_names_that_are_not_utf_8_go_through() -> None:
    (family,) = group([Sample(b"user:\xff\xfe%d" % n) for n in range(400)], Vocabulary()).families
    assert shown(family) == "user:<text>"


@pytest.mark.parametrize("separator", [":", "_", "{"])
def test_names_of_many_parts_end_somewhere(separator: str) -> None:
    keys = [separator.join(str(RNG.randrange(9)) for _ in range(250)) for _ in range(300)]
    keys += [separator.join(RNG.choice("ab") for _ in range(250)) for _ in range(300)]
    all_found = found(keys)
    assert sum(family.keys for family in all_found.families) + all_found.single == 600
    assert all(len(family.parts) <= 81 for family in all_found.families)


# Families that hypothesis puts together, and keys that belong to none.

VALUES = {
    "number": lambda n: str(n + 1),
    "UUID": lambda n: UUIDS[n],
    "text": lambda n: PEOPLE[n],
    "address": lambda n: f"{PEOPLE[n]}{n}@{PEOPLE[n + 1]}.example",
}
NAMES = ["user", "product", "orderLines", "team_members", "invoice", "shipment", "reviewsByUser"]
ENDINGS = ["", "profile", "recent_activity", "permissions"]


@st.composite
def spaces(draw: st.DrawFn) -> tuple[dict[str, list[str]], list[str]]:
    """Families with their keys, and noise: at most one key in a hundred."""
    separator = draw(st.sampled_from([":", "/", "|", "::"]))
    prefix = draw(st.sampled_from(["", "app", "shop:prod"]))
    made: dict[str, list[str]] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=6, unique=True)):
        kind = draw(st.sampled_from(sorted(VALUES)))
        for ending in draw(st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=3, unique=True)):
            parts = [*([prefix] if prefix else []), name, "{}", *([ending] if ending else [])]
            template = separator.join(parts)
            keys = [template.format(VALUES[kind](n)) for n in range(draw(st.integers(100, 150)))]
            made[template.format(f"<{kind}>")] = keys
    every = sum(map(len, made.values()))
    noise = draw(
        st.lists(st.text(string.ascii_lowercase + ":-_ 0189é\n", min_size=6, max_size=30), max_size=every // 100)
    )
    return made, noise


@settings(max_examples=25)
@given(spaces())
def test_generated_families_are_found_again_whatever_else_is_there(
    space: tuple[dict[str, list[str]], list[str]],
) -> None:
    made, noise = space
    got = families([key for keys in made.values() for key in keys] + noise, *NAMES)
    for template, keys in made.items():
        assert len(keys) <= got.get(template, 0) <= len(keys) + len(noise)


@settings(max_examples=25)
@given(spaces())
def test_no_value_becomes_a_literal(space: tuple[dict[str, list[str]], list[str]]) -> None:
    made, noise = space
    all_found = found([key for keys in made.values() for key in keys] + noise, *NAMES)
    literals = [part for family in all_found.families for part in family.parts if isinstance(part, str)]
    for text in [*PEOPLE[:151], *UUIDS[:10]]:
        assert not any(text in part and text not in "".join([*NAMES, *ENDINGS, "shopprod"]) for part in literals), text
