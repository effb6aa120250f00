"""Families and tables: which table and columns a family comes from, how sure that is, and what is asked."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from cdc_invalidator.discovery.enumerations import fold
from cdc_invalidator.discovery.families import Family, Kind, Sample, group
from cdc_invalidator.discovery.matching import (
    COLUMNS_A_PARAMETER,
    QUESTIONS,
    Match,
    Sure,
    match,
    questions,
    usable_pairs,
    usable_values,
    versions,
)
from cdc_invalidator.discovery.schema import Category, Column, PairQuestion, Question, TableInfo
from cdc_invalidator.discovery.words import Vocabulary
from cdc_invalidator.rules.table import Table

NUMBER, UUID, TEXT = Category.NUMBER, Category.UUID, Category.TEXT
UUIDS = [str(uuid.UUID(int=number + (1 << 100), version=4)) for number in range(40)]
Answer = Callable[[Question], float | None]


def table(name: str, refers: dict[str, str] | None = None, /, **columns: Category) -> TableInfo:
    of_table = tuple(Column(column, category, askable=True) for column, category in columns.items())
    references = {column: Table("public", to) for column, to in (refers or {}).items()}
    return TableInfo(Table("public", name), of_table, ("id",) if "id" in columns else (), references)


USERS = table("users", id=NUMBER, email=TEXT)
ORDERS = table("orders", {"user_id": "users"}, id=NUMBER, user_id=NUMBER)
POSTS = table("blog_post", {"author_id": "users"}, id=NUMBER, author_id=NUMBER, slug=TEXT)
DEVICES = table("device", {"tenant_id": "tenant"}, id=UUID, tenant_id=UUID, name=TEXT)
TENANTS = table("tenant", id=UUID)
SCHEMA = [USERS, ORDERS, POSTS, DEVICES, TENANTS]


def matches(
    keys: list[str],
    schema: list[TableInfo] = SCHEMA,
    answer: Answer = lambda _: None,
    kind: str = "string",
    ttl: float | None = 60.0,
) -> list[Match]:
    names = [name for info in schema for name in (info.table.name, *(column.name for column in info.columns))]
    families = group([Sample(key.encode(), kind, ttl) for key in keys], Vocabulary(names)).families
    asked = questions(families, schema)
    shares: dict[Question | PairQuestion, float] = {
        question: share
        for question in asked
        if isinstance(question, Question) and (share := answer(question)) is not None
    }
    return match(families, schema, shares)


def only(
    keys: list[str], answer: Answer = lambda _: None, **more: str | float | None
) -> tuple[str, list[dict[int, str]], Sure]:
    (found,) = matches(keys, answer=answer, **more)  # type: ignore[arg-type]
    return found.table.name if found.table else "", [dict(each) for each in found.maps], found.sure


def holds(**columns: float) -> Answer:
    """Answer for columns, written `table__column`; all others hold nothing."""
    return lambda question: columns.get(f"{question.table.name}__{question.column}", 0.0)


NUMBERS = range(1, 41)


@pytest.mark.parametrize(
    ("keys", "table", "maps", "sure"),
    [
        ([f"app:user:{n}" for n in NUMBERS], "users", [{0: "id"}], Sure.CERTAIN),
        ([f"app:users/{n}" for n in NUMBERS], "users", [{0: "id"}], Sure.CERTAIN),
        ([f"app:user:{n}:orders" for n in NUMBERS], "orders", [{0: "user_id"}], Sure.CERTAIN),
        ([f"app:orders:user:{n}" for n in NUMBERS], "orders", [{0: "user_id"}], Sure.CERTAIN),
        ([f"app:user:{n}:badge" for n in NUMBERS], "users", [{0: "id"}], Sure.LIKELY),
        ([f":1:blog.post.{n}" for n in NUMBERS], "blog_post", [{0: "id"}], Sure.CERTAIN),
        ([f"app:userByEmail:a{n}b@mail.example" for n in NUMBERS], "users", [{0: "email"}], Sure.CERTAIN),
        # Of the orders of a user, or an order?
        ([f"app:orders:{n}" for n in NUMBERS], "orders", [{0: "id"}], Sure.GUESS),
        # What is shown of the user's group is not said.
        ([f"app:user:{n}:tenant" for n in NUMBERS], "users", [{0: "id"}], Sure.GUESS),
        ([f"app:lock:order:{n}" for n in NUMBERS], "orders", [{0: "id"}], Sure.GUESS),
        # Whose rows followers are, and what a feed shows, the key does not say.
        ([f"app:user:{n}:followers" for n in NUMBERS], "users", [{0: "id"}], Sure.GUESS),
        ([f"app:followers:user:{n}" for n in NUMBERS], "users", [{0: "id"}], Sure.GUESS),
        ([f"app:user:feed:{n}" for n in NUMBERS], "users", [{0: "id"}], Sure.GUESS),
        ([f"app:stats:{n}" for n in NUMBERS], "", [], Sure.NOT),
        (["app:users"], "users", [{}], Sure.LIKELY),
    ],
)
def test_names_alone_tell_a_table(keys: list[str], table: str, maps: list[dict[int, str]], sure: Sure) -> None:
    assert only(keys) == (table, maps, sure)


def test_values_say_which_column_it_is() -> None:
    keys = [f"devices{each}_n_Hall {n}" for n, each in enumerate(UUIDS)]
    first, second = holds(device__tenant_id=1.0, tenant__id=1.0), holds(device__name=0.9)
    assert only(keys, lambda question: (first, second)[question.parameter](question)) == (
        "device",
        [{0: "tenant_id", 1: "name"}],
        Sure.CERTAIN,
    )


def test_what_a_bust_can_not_name_at_the_end_of_a_key_is_searched_for() -> None:
    (found,) = matches(
        [f"devices{each}_n_Hall {n}" for n, each in enumerate(UUIDS)], answer=holds(device__tenant_id=1.0)
    )
    assert (found.rest, found.sure, [dict(each) for each in found.maps]) == (1, Sure.LIKELY, [{0: "tenant_id"}])


def test_values_of_several_columns_at_one_place_are_several_busts() -> None:
    keys = [f"devices{each}" for each in UUIDS]
    assert only(keys, holds(device__id=0.8, device__tenant_id=0.2)) == (
        "device",
        [{0: "id"}, {0: "tenant_id"}],
        Sure.CERTAIN,
    )


def test_values_that_the_table_does_not_have_make_no_rule() -> None:
    assert only([f"app:user:{n}" for n in NUMBERS], holds())[2] <= Sure.GUESS
    assert only([f"devices{each}" for each in UUIDS], holds(tenant__id=1.0))[2] <= Sure.GUESS


def test_values_without_a_name_are_a_guess() -> None:
    (found,) = matches([f"d:{each}" for each in UUIDS], answer=holds(device__id=1.0))
    assert (found.table, found.sure) == (DEVICES.table, Sure.GUESS)
    assert "nothing says which tables are shown" in found.reasons[0]


@pytest.mark.parametrize(
    ("kind", "ttl", "sure"), [("stream", 60.0, Sure.GUESS), ("zset", None, Sure.GUESS), ("zset", 60.0, Sure.CERTAIN)]
)
def test_what_may_be_no_copy_of_rows_is_a_guess(kind: str, ttl: float | None, sure: Sure) -> None:
    assert only([f"app:user:{n}" for n in NUMBERS], kind=kind, ttl=ttl)[2] == sure


def test_a_version_belongs_to_its_counter_and_needs_only_its_parameters() -> None:
    keys = [f"app:user:{n}:dash:{page}:v{1764000000 + n}" for n in NUMBERS for page in (1, 2)]
    keys += [f"app:page:{n}:v{1764000000 + n}" for n in NUMBERS] + ["app:pages:ver"]
    keys += [f"app:user:{n}:feed:v{1764000000 + n}" for n in NUMBERS] + [f"app:user:{n}:feed:ver" for n in NUMBERS]
    families = group([Sample(key.encode()) for key in keys], Vocabulary()).families
    shapes = {number: family.shape for number, family in enumerate(families)}
    assert {shapes[key]: shapes[counter] for key, counter in versions(families).items()} == {
        "app:user:\0:feed:v\0": "app:user:\0:feed:ver",
        "app:page:\0:v\0": "app:pages:ver",
    }
    found = {each.family.shape: each for each in matches(keys)}
    assert found["app:user:\0:feed:v\0"].table == USERS.table
    assert "app:pages:ver" not in found


def test_questions_are_bounded_and_the_likeliest_come_first() -> None:
    schema = [table(f"t{n}", id=NUMBER, other=NUMBER) for n in range(300)] + [USERS]
    keys = [f"kind{letter}:{other}:user:{n}" for letter in "abcdefghij" for other in "abcdefghij" for n in NUMBERS]
    families = group([Sample(key.encode()) for key in keys], Vocabulary()).families
    asked = questions(families, schema)
    assert len(asked) <= QUESTIONS
    of_parameter: dict[tuple[int, int], list[Question]] = {}
    for each in asked:
        assert isinstance(each, Question)
        of_parameter.setdefault((each.family, each.parameter), []).append(each)
    assert max(map(len, of_parameter.values())) == COLUMNS_A_PARAMETER
    for (family, parameter), some in of_parameter.items():
        if families[family].parameters[parameter].kind == Kind.NUMBER:
            assert (some[0].table, some[0].column) == (USERS.table, "id")


def test_values_that_a_column_can_not_hold_are_not_looked_up() -> None:
    assert usable_values(["", "a\0b", "x" * 600, "\udcff", "good"]) == ["good"]


# Values of columns that have few, and pairs of columns

STATES = ("open", "paid", "sent")
PARCELS = TableInfo(
    Table("public", "parcels"),
    (
        Column("id", NUMBER, askable=True),
        Column("tenant_id", NUMBER, askable=True),
        Column("weight", NUMBER, askable=False),
        Column("status", Category.OTHER, askable=False, values=frozenset({*STATES, "lost"})),
    ),
    ("id",),
    {},
    (("tenant_id", "status"),),
)


def folded(keys: list[str], schema: list[TableInfo]) -> tuple[Family, ...]:
    return fold(group([Sample(key.encode(), "string", 60.0) for key in keys], Vocabulary(["parcels"])).families, schema)


def test_words_that_are_values_of_one_column_are_one_parameter() -> None:
    keys = [f"parcels:{n}:{STATES[n % 3]}" for n in NUMBERS] + [f"parcels:{n}:notes" for n in NUMBERS]
    one, other = folded(keys, [PARCELS])
    assert {one.shape, other.shape} == {"parcels:\0:\0", "parcels:\0:notes"}
    whole = one if one.shape.count("\0") == 2 else other
    assert (whole.keys, whole.types, whole.endless) == (40, (("string", 40),), 0)
    assert set(whole.parameters[1].values) == set(STATES)
    assert {(number, state) for number, state in whole.rows} <= {(str(n), STATES[n % 3]) for n in NUMBERS}
    # Where no table is named, where there is one value only, or where it is a part of a word, it is a word.
    for others in (
        [f"boxes:{n}:{STATES[n % 3]}" for n in NUMBERS],
        [f"parcels:{n}:paid" for n in NUMBERS],
        [f"parcels:{n}:{STATES[n % 3]}ly" for n in NUMBERS],
    ):
        before = group([Sample(key.encode(), "string", 60.0) for key in others], Vocabulary(["parcels"])).families
        assert fold(before, [PARCELS]) == before


def matched_pair(share: float, rival: float) -> Match:
    families = folded([f"parcels:{n}:{STATES[n % 3]}" for n in NUMBERS], [PARCELS])
    asked = questions(families, [PARCELS])
    pairs = [question for question in asked if isinstance(question, PairQuestion)]
    assert [question.columns for question in pairs] == [("tenant_id", "status")]
    alone: dict[Question | PairQuestion, float] = {
        question: 1.0 for question in asked if isinstance(question, Question)
    }
    assert len(usable_pairs(families[0], pairs[0].parameters)) == 40
    (found,) = match(
        families, [PARCELS], alone | {pairs[0]: share, pairs[0]._replace(columns=("weight", "status")): rival}
    )
    return found


def test_the_columns_of_an_index_that_hold_the_pairs_are_those_of_the_key() -> None:
    sure = matched_pair(1.0, 0.2)
    assert (sure.table, sure.maps, sure.sure) == (PARCELS.table, ({0: "tenant_id", 1: "status"},), Sure.CERTAIN)
    # Without that, a small number is in every column.
    assert matched_pair(0.5, 0.2).sure == Sure.GUESS
    assert matched_pair(1.0, 0.9).sure == Sure.GUESS


def test_a_table_that_writes_two_words_as_one_or_has_a_prefix_is_named_by_both() -> None:
    people = table("zerver_userprofile", id=NUMBER, realm_id=NUMBER, api_key=TEXT)
    messages = table("zerver_message", id=NUMBER, content=TEXT)
    keys = [f"cache:user_profile_by_id:{n}" for n in NUMBERS] + [f"cache:message_dict:{n}" for n in NUMBERS]
    found = {each.family.shape: each for each in matches(keys, [people, messages])}
    profile, message = found["cache:user_profile_by_id:\0"], found["cache:message_dict:\0"]
    assert (profile.table, profile.maps, profile.sure >= Sure.LIKELY) == (people.table, ({0: "id"},), True)
    assert (message.table, message.maps, message.sure >= Sure.LIKELY) == (messages.table, ({0: "id"},), True)
    # Two of its words among others are no name: the users of a realm are not the realm.
    realms = table("zerver_realm", id=NUMBER, name=TEXT)
    (other,) = matches([f"cache:realm_user_dicts:{n}" for n in NUMBERS], [people, realms])
    assert other.sure < Sure.LIKELY
