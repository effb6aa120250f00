"""`when` compares what PostgreSQL compares, and fires where that is not known."""

from __future__ import annotations

import pytest

from cdc_invalidator.rules.comparison import ColumnType
from cdc_invalidator.rules.condition import Condition, ConditionError
from cdc_invalidator.rules.values import UNCHANGED

OIDS = {
    "bool": 16, "int8": 20, "int4": 23, "text": 25, "oid": 26, "float4": 700, "float8": 701, "money": 790,
    "int4[]": 1007, "char": 1042, "date": 1082, "timestamp": 1114, "timestamptz": 1184, "interval": 1186, "bit": 1560,
    "numeric": 1700, "uuid": 2950, "jsonb": 3802, "xid8": 5069, "mood": 16500, "citext": 16600,
}  # fmt: skip


def column(name: str, *, by_code_point: bool = False) -> ColumnType:
    return ColumnType(
        name, OIDS[name], OIDS[name], enum=name == "mood", array=name.endswith("[]"), by_code_point=by_code_point
    )


def fires(when: str, kind: str, old: str | None, new: str | None, *, by_code_point: bool = False) -> bool:
    condition = Condition(when)
    holds = condition.bind(["c"], [column(kind, by_code_point=by_code_point)])
    before, after = (None if value is None else value.encode() for value in (old, new))
    return holds("update", [before], [after])


@pytest.mark.parametrize(
    ("where", "kind", "value", "wanted"),
    [
        ("row.c == 'happy'", "mood", "happy", True),
        ("row.c == 'happy'", "mood", "sad", False),
        ("row.c == null", "text", None, True),
        ("row.c != null", "text", None, False),
        ("row.c > 5.5", "numeric", "5.51", True),
        ("row.c > 5.5", "numeric", "5.5", False),
        ("row.c > 5", "int4", None, True),  # that NULL is more than 5 is not known
        ("row['c'] in [1, 2]", "int4", "3", False),
        ("row == {'c': 3}", "int4", "3", True),
        ("row == {'c': 3}", "int4", "4", False),
    ],
)
def test_the_condition_on_an_image_compares_as_that_on_a_change_does(
    where: str, kind: str, value: str | None, wanted: bool
) -> None:
    holds = Condition(where, "where").bind_row(["c"], [column(kind)])
    assert holds([None if value is None else value.encode()]) is wanted


def test_the_condition_on_an_image_holds_where_a_value_is_not_known() -> None:
    assert Condition("row.c == 1", "where").bind_row(["c"], [column("int4")])([UNCHANGED])


def test_what_the_condition_on_an_image_can_t_compare_is_told_with_its_name() -> None:
    (misuse,) = Condition("row.c == 5", "where").misuses({"c": column("money")})
    assert misuse.startswith(
        "`where` uses column c, of type money, with `==`, but CEL can't compare it with a number; "
    )
    assert misuse.endswith("with a column of its type, or take it out of the condition")


def test_each_kind_of_condition_knows_its_own_variables() -> None:
    assert Condition("row.a == row.b", "where").columns == {"a", "b"}
    with pytest.raises(ConditionError, match=r"`when` knows `op`, `old` and `new`, and no `row`; write `old` or `new`"):
        Condition("row.a == 1")
    with pytest.raises(ConditionError, match=r"`where` knows `row`, and no `old`; it is asked for the old row and"):
        Condition("old.a == 1", "where")


EXACT = "12345678901234567890.1", "12345678901234567890.2"


@pytest.mark.parametrize(
    ("when", "kind", "old", "new", "wanted"),
    [
        # Decimals are exact: values, literals, and what is calculated.
        ("new.c != old.c", "numeric", *EXACT, True),
        ("new.c > old.c", "numeric", *EXACT, True),
        ("new.c <= old.c", "numeric", *EXACT, False),
        ("new.c == old.c", "numeric", *EXACT, False),
        ("new.c != old.c", "numeric", "1.0", "1.00", False),
        ("new.c != old.c", "numeric", "123456789012345678901234567890", "123456789012345678901234567891", True),
        ("new != old", "numeric", *EXACT, True),
        ("new != old", "numeric", "1.0", "1.00", False),
        ("[new.c] != [old.c]", "numeric", *EXACT, True),
        ("{'a': new.c} != {'a': old.c}", "numeric", *EXACT, True),
        ("new.c == 0.10000000000000000001", "numeric", "1", "0.10000000000000000001", True),
        ("new.c == 0.10000000000000000001", "numeric", "1", "0.1", False),
        ("new.c < 0.3000000000000000001", "numeric", "1", "0.3", True),
        ("new.c - old.c >= 0.1", "numeric", "0.2", "0.3", True),
        ("new.c - old.c > 0.1", "numeric", "0.2", "0.3", False),
        ("new.c / 2 > 2", "numeric", "1", "5", True),
        ("new.c % 2 == 1", "numeric", "1", "4", False),
        ("-new.c == -5.0", "numeric", "1", "5", True),
        ("new.c / 3 == 0.5", "numeric", "1", "1", True),  # a third is not exact, and so not known
        ("new.c in [4, 5.5]", "numeric", "1", "5.50", True),
        ("new.c in [4, 5.5]", "numeric", "1", "5.51", False),
        ("[4, 5].exists(x, x == new.c)", "numeric", "1", "5.0", True),
        ("[4, 5].exists(x, x == new.c)", "numeric", "1", "6.0", False),
        ("int(new.c) == 5 && double(new.c) > 5.6 && string(new.c) == '5.70'", "numeric", "1", "5.70", True),
        ("double(new.c) > 5.6", "numeric", "1", "5.5", False),
        ("(new.c > 1 ? new.c : 0.0) == 2.5", "numeric", "1", "2.50", True),
        # NaN equals NaN and is above all others.
        ("new.c > 100.0", "numeric", "1", "NaN", True),
        ("new.c < 100.0", "numeric", "1", "NaN", False),
        ("new.c != old.c", "numeric", "NaN", "NaN", False),
        ("new.c > 100", "numeric", "1", "Infinity", True),
        ("new.c > 100.0", "float8", "1", "NaN", True),
        ("new.c != old.c", "float8", "NaN", "NaN", False),
        ("new.c == 0.2", "float4", "0.1", "0.2", True),
        ("new.c > 1", "float8", "1", "1.5", True),
        # Integers.
        ("new.c == 9223372036854775807", "int8", "1", "9223372036854775807", True),
        ("new.c == 9223372036854775807", "int8", "1", "9223372036854775806", False),
        ("new.c != 9007199254740992.0", "int8", "1", "9007199254740993", True),
        ("new.c == 5", "xid8", "1", "5", True),
        ("new.c == 18446744073709551615u", "xid8", "1", "18446744073709551615", True),
        ("new.c == 4294967295", "oid", "1", "4294967295", True),
        ("new.c / 2 == -3 && new.c % 2 == -1 && new.c + 1 == -6 && new.c * 2 == -14", "int4", "1", "-7", True),
        ("new.c + 1 > 0", "int8", "1", "9223372036854775807", True),  # out of range: not known
        ("new.c / 0 == 1", "int4", "1", "1", True),
        # Texts.
        ("new.c == 'b'", "char", "a   ", "b   ", True),
        ("new.c == 'b'", "text", "a", "c", False),
        ("new.c == 'happy'", "mood", "sad", "happy", True),
        ("new.c == 'happy'", "mood", "sad", "sad", False),
        ("new.c + '!' == 'a!' && new.c.startsWith('a') && size(new.c) == 1", "text", "", "a", True),
        ("new.c in ['a', 'b'] || new.c == 'c'", "text", "", "d", False),
        # Times.
        ("new.c > timestamp('2025-01-01T00:00:00Z')", "timestamptz", "", "2030-01-01 00:00:00+00", True),
        ("new.c > timestamp('2025-01-01T00:00:00Z')", "timestamptz", "", "2025-01-01 01:00:00+02", False),
        ("new.c == timestamp('2025-01-01T00:00:00Z')", "timestamptz", "", "2025-01-01 05:30:00+05:30", True),
        # Of a test in a rule file, times are texts.
        ("new.c > timestamp('2025-01-01T00:00:00Z')", "text", "", "2025-01-01 00:00:00+00", False),
        ("new.c > timestamp('2025-01-01T00:00:00Z')", "text", "", "2025-01-01", True),
        ("new.c > '2025-01-01'", "timestamp", "", "2024-12-31 23:59:59.9", False),
        ("new.c < old.c", "timestamp", "infinity", "2024-12-31 23:59:59.9", True),
        ("new.c > old.c", "timestamp", "infinity", "2024-12-31 23:59:59.9", False),
        ("new.c >= '2024-02-29'", "date", "", "2024-02-29", True),
        ("new.c > '2024-02-29'", "date", "", "28.02.2024", True),  # not in ISO's style: not known
        ("new.c < '2024-02-29'", "date", "", "0044-03-15 BC", True),
        # What prints the same is equal. What prints otherwise may be.
        ("new.c != old.c", "interval", "1 day", "1 day", False),
        ("new.c == old.c", "interval", "1 day", "24:00:00", True),
        ("new.c != old.c", "jsonb", '{"a": 1}', '{"a": 1}', False),
        ("new.c == '$5.00'", "money", "$1.00", "$5.00", True),
        ("new.c != old.c", "citext", "a", "a", False),
        ("new.c == 'ADA'", "citext", "x", "ada", True),
        ("new.c == '1'", "bit", "1", "0", False),
        ("new.c == 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "uuid", "", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", True),
        ("new.c == 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "uuid", "", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", False),
        # Of another kind: not known, instead of never equal.
        ("new.c == 5", "money", "$1.00", "$5.00", True),
        ("new.c == 5", "text", "1", "1", True),
        ("size(new.c) == 2", "int4[]", "{1}", "{5,6}", True),
        ("5 in new.c", "int4[]", "{1}", "{5}", True),
        ("new.c == duration('48h')", "interval", "1 day", "2 days", True),
        ("new.c.a == 2", "jsonb", "", '{"a": 2}', True),
        # NULL: `==` and `!=` tell it from a value; an order does not know, whatever is done with the answer.
        ("new.c != old.c", "int4", None, "5", True),
        ("new.c != old.c", "int4", "5", None, True),
        ("new.c != old.c", "int4", None, None, False),
        ("new.c == 5", "int4", "5", None, False),
        ("new.c == null", "numeric", "5", None, True),
        ("new.c > 5", "numeric", "5", None, True),
        ("(new.c > 5) == true", "numeric", "5", None, True),
        ("!(new.c > 5)", "numeric", "5", None, True),
        ("old.c == 5 && new.c > 5", "numeric", "4", None, False),
        # Booleans.
        ("new.c", "bool", "f", "t", True),
        ("!new.c", "bool", "f", "t", False),
        ("new.c == true && new.c != old.c", "bool", "f", "t", True),
        # What is not asked of columns stays as it is.
        ("new['c'] == old[\"c\"] // none", "text", "a", "b", False),
        ("op == 'update' ? false : new.c == 'a'", "text", "a", "a", False),
        ("has(new.d) || (1 + 2 * 3 - -4 == 11 && 'a' in {'a': 1} && [1, 2][1] == 2)", "text", "", "", True),
    ],
)
def test_a_condition_compares_as_postgresql_does(
    when: str, kind: str, old: str | None, new: str | None, *, wanted: bool
) -> None:
    assert fires(when, kind, old, new) is wanted


def test_text_has_an_order_where_postgresql_has_the_same() -> None:
    assert fires("new.c > 'a'", "text", "", "A")
    assert not fires("new.c > 'a'", "text", "", "A", by_code_point=True)


@pytest.mark.parametrize(
    ("when", "kind", "part"),
    [
        ("new.c < 5", "money", "with `<`, but CEL does not know its order"),
        ("new.c == 5", "money", "can't compare it with a number"),
        ("5 != new.c", "text", "can't compare it with a number"),
        ("new.c == true", "int4", "can't compare it with a boolean"),
        ("new.c in ['a', 1]", "int4", "with `in`, but CEL can't compare it with text"),
        ("5 in new.c", "int4[]", "has no list of it"),
        ("size(new.c) == 2", "int4[]", "with `size`, but CEL has no list of it"),
        ("new.c.exists(x, x == 1) || new.c[0] == 1", "int4[]", "without parts"),
        ("new.c.a == 2", "jsonb", "without parts"),
        ("new.c + old.c == '1'", "interval", "can't calculate with it"),
        ("new.c > old.c", "interval", "does not know its order"),
        ("new.c == duration('48h')", "interval", "can't compare it with a value of another type"),
        ("new.c > 'happy'", "mood", "does not know its order"),
        ("new.c > 'a'", "text", "orders by code points, and PostgreSQL by a collation"),
    ],
)
def test_what_cel_can_t_do_is_said(when: str, kind: str, part: str) -> None:
    (misuse,) = Condition(when).misuses({"c": column(kind)})
    assert misuse.startswith(f"`when` uses column c, of type {kind}, with ")
    assert part in misuse


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        ("new.c != old.c || new.c == null || new.c == '$5.00'", "money"),
        ("new.c in ['sad', 'happy'] && new.c + '' != op", "mood"),
        ("new.c > 5 && new.c < 5.5 && new.c in [1, 2.5] && -new.c < new.c * 2", "numeric"),
        ("string(new.c) == '5' && int(new.c) == 5 && double(new.c) > 1.0 && bool(new.c)", "numeric"),
        ("new.c > '2025-01-01' && new.c > timestamp('2025-01-01T00:00:00Z')", "timestamptz"),
        ("new != old && new.d == 5", "jsonb"),
    ],
)
def test_what_cel_can_do_is_not_complained_about(when: str, kind: str) -> None:
    assert Condition(when).misuses({"c": column(kind)}) == []


def test_columns_of_different_types_are_compared_where_they_can_be() -> None:
    types = {
        "n": column("numeric"),
        "i": column("int8"),
        "t": column("text"),
        "m": column("money"),
        "u": column("uuid"),
    }
    assert Condition("new.n == new.i && new.t == new.u").misuses(types) == []
    assert len(Condition("new.n == new.t && new.m == new.u").misuses(types)) == 2


def test_a_condition_knows_which_columns_it_reads() -> None:
    condition = Condition("new.a == old['b c'] && \"new.x\" != 'old.y' && has(new.z) && size(new.q.w) > 0 // new.no")
    assert condition.reads["new"].columns == {"a", "z", "q"}
    assert condition.reads["old"].columns == {"b c"}
    assert not condition.reads["new"].whole
    assert Condition("new != old").reads["new"].whole
    assert Condition("[new].exists(row, row.a == 1)").reads["new"].whole
    assert Condition("old == null ? true : new[op] == 1").reads["new"].whole


def test_bytes_are_refused() -> None:
    with pytest.raises(ConditionError, match="no column as bytes") as refused:
        Condition("new.c == b'x'")
    assert refused.value.offset == 9
