"""Key templates: text to parts, rows to keys, keys back to parameters."""

from __future__ import annotations

import fnmatch
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from cdc_invalidator.rules.template import Param, Template, TemplateError

NOT_A_NAME = (
    "`{…}` does not hold a parameter's name; write `{name}` or `{name|filter}`, without blanks,"
    " or `{{` for the brace itself"
)


OUTSIDE = "a text is put together in `{{…}}` only for a hash, such as `|sha256`; write it outside: `{}`"


def template(text: str, **env: str) -> Template:
    return Template.parse(text, env)


def glob_finds(pattern: bytes, key: bytes) -> bool:
    """Redis' stringmatchlen for the patterns that we write: `*`, and a backslash before a literal."""
    translated, at = "", 0
    text = pattern.decode("latin-1")
    while at < len(text):
        if text[at] == "\\":
            at += 1
            translated += f"[{text[at]}]" if text[at] in "*?[" else text[at]
        else:
            assert text[at] not in "?[]^"
            translated += text[at]
        at += 1
    return fnmatch.fnmatchcase(key.decode("latin-1"), translated)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("counts", (b"counts",)),
        ("{id}", (Param("id"),)),
        ("user:{id}", (b"user:", Param("id"))),
        ("user:{id}:v{version}", (b"user:", Param("id"), b":v", Param("version"))),
        ("{a}{b}", (Param("a"), Param("b"))),
        ("user:{{{id}}}:profile", (b"user:{", Param("id"), b"}:profile")),
        ("{{id}}", (b"{id}",)),
        ("{{{{{id}", (b"{{", Param("id"))),
        ("{id}}}", (Param("id"), b"}")),
        ("{email|lower}", (Param("email", ("lower",)),)),
        ("q:{query|lower|sha256}", (b"q:", Param("query", ("lower", "sha256")))),
        ("größe:{größe}", ("größe:".encode(), Param("größe"))),
        ("100%:{id}", (b"100%:", Param("id"))),
        ("$:{id}$", (b"$:", Param("id"), b"$")),
        ("${{id}}", (b"${id}",)),
        ("${{{id}}}", (b"${", Param("id"), b"}")),
    ],
)
def test_a_text_becomes_literals_and_parameters(text: str, parts: tuple[bytes | Param, ...]) -> None:
    assert template(text).parts == parts
    assert template(text).text == text


@pytest.mark.parametrize(
    ("text", "env", "parts"),
    [
        ("shop:${APP_ENV}:{id}", {"APP_ENV": "prod"}, (b"shop:prod:", Param("id"))),
        ("shop:${APP_ENV:-dev}:{id}", {"APP_ENV": "prod"}, (b"shop:prod:", Param("id"))),
        ("shop:${APP_ENV:-dev}:{id}", {}, (b"shop:dev:", Param("id"))),
        ("shop:${APP_ENV:-dev}:{id}", {"APP_ENV": ""}, (b"shop:dev:", Param("id"))),
        ("${APP_ENV}{id}", {"APP_ENV": ""}, (Param("id"),)),
        ("a${A:-}b", {}, (b"ab",)),
        ("{x}${A:-}{y}", {}, (Param("x"), Param("y"))),
        ("${A:-b:-c}", {}, (b"b:-c",)),
        ("${A}${B}", {"A": "1", "B": "2"}, (b"12",)),
        ("${A}}}", {"A": "1"}, (b"1}",)),
    ],
)
def test_the_environment_is_expanded_at_load(text: str, env: dict[str, str], parts: tuple[bytes | Param, ...]) -> None:
    assert Template.parse(text, env).parts == parts


def test_what_the_environment_gives_is_never_parsed_again() -> None:
    assert template("a:${A}:{id}", A="{id}${B}}}").parts == (b"a:{id}${B}}}:", Param("id"))


@pytest.mark.parametrize(
    ("text", "offset", "sentence"),
    [
        ("", 0, "the template is empty; write a key, such as `shop:user:{id}`"),
        ("${EMPTY}", 0, "the template is empty; write a key, such as `shop:user:{id}`"),
        ("user:{id", 5, "`{` opens no parameter; write `{name}`, or `{{` for the brace itself"),
        ("user:id}", 7, "`}` closes no parameter; write `}}` for the brace itself"),
        ("{{id}", 4, "`}` closes no parameter; write `}}` for the brace itself"),
        (
            "a:{}",
            2,
            NOT_A_NAME,
        ),
        (
            "a:{ id }",
            2,
            NOT_A_NAME,
        ),
        ("a:{id name}", 2, OUTSIDE.format("{id}{name}")),
        ("a:{id ':' name|lower}", 2, OUTSIDE.format("{id|lower}:{name|lower}")),
        ("a:{':' name|urlencode|upper}", 2, OUTSIDE.format(":{name|urlencode|upper}")),
        ("a:{':'|md5}", 2, NOT_A_NAME),
        ("a:{id ':|md5}", 2, NOT_A_NAME),
        ("a:{id :|md5}", 2, NOT_A_NAME),
        ("a:{id ':' |md5}", 2, NOT_A_NAME),
        ("a:{ id|md5}", 2, NOT_A_NAME),
        ("a:{id ':' 2|md5}", 2, NOT_A_NAME),
        ("a:{id ':' name|md6}", 15, "there is no filter `md6`; did you mean `md5`?"),
        ("a:{id '\t' name|md5}", 7, "the template holds white space or a control character (U+0009); remove it"),
        ("a:{id|lover}", 6, "there is no filter `lover`; did you mean `lower`?"),
        ("a:{id|lower|zzz}", 12, "there is no filter `zzz`; there are lower, upper, urlencode, md5, sha1, sha256"),
        ("a:{id|}", 6, "there is no filter ``; there are lower, upper, urlencode, md5, sha1, sha256"),
        (
            "a:${APP_ENV}",
            2,
            "the environment variable `APP_ENV` is not set; set it, or give a default: `${APP_ENV:-default}`",
        ),
        (
            "a:${APP-ENV}",
            2,
            "`${…}` does not hold a name of an environment variable; write `${NAME}` or `${NAME:-default}`",
        ),
        (
            "a:${A:-{id}}",
            2,
            "`${` is not closed; write `${NAME}` or `${NAME:-default}`, with no brace in the default",
        ),
        ("a b", 1, "the template holds white space or a control character (U+0020); remove it"),
        ("ab\n", 2, "the template holds white space or a control character (U+000A); remove it"),
        ("ab\x00", 2, "the template holds white space or a control character (U+0000); remove it"),
        ("ab\ud800", 2, "the template holds white space or a control character (U+D800); remove it"),
        ("a:${SPACED}", 2, "the value of `${SPACED}` holds white space or a control character (U+0020); remove it"),
    ],
)
def test_a_mistake_is_told_with_its_offset_and_remedy(text: str, offset: int, sentence: str) -> None:
    with pytest.raises(TemplateError) as caught:
        template(text, EMPTY="", SPACED="a secret")
    assert (caught.value.offset, str(caught.value)) == (offset, sentence)


@given(st.text(alphabet="{}$|:-aA_ é\ud800", max_size=12))
def test_any_text_is_a_template_or_a_template_error(text: str) -> None:
    try:
        parsed = template(text, A="x")
    except TemplateError as error:
        offset = error.offset
    else:
        offset = 0
        assert parsed.render(dict.fromkeys(parsed.params, b"v")) is not None
    assert 0 <= offset <= len(text)


def test_parameters_are_listed_once_in_order_of_appearance() -> None:
    assert template("{b}:{a}:{b|lower}").params == ("b", "a")
    assert template("counts").params == ()


def test_the_prefix_is_the_literal_text_up_to_the_first_parameter() -> None:
    assert template("shop:user:{id}:x").prefix == b"shop:user:"
    assert template("{id}:x").prefix == b""
    assert template("counts").prefix == b"counts"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("counts", b"counts"),
        ("user:{id}:dash", b"user:*:dash"),
        ("{a}{b|lower}{c}", b"*"),
        ("a:{a}:{b}{c}", b"a:*:*"),
        ("a**b??c[[d]]e^f\\g:{id}", b"a\\*b\\?c\\[d\\]e\\^f\\\\g:*"),
        ("a**{id}", b"a\\**"),
        ("a:{id}:*", b"a:*:*"),
        ("a:{id}*", b"a:*"),
        ("a:***", b"a:\\**"),
        ("*", b"*"),
        ("user:{{{id}}}", b"user:{*}"),
    ],
)
def test_the_glob_has_a_star_for_each_parameter_and_escapes_the_rest(text: str, pattern: bytes) -> None:
    assert template(text).glob() == pattern


@pytest.mark.parametrize(
    ("text", "tagged"),
    [
        ("user:{{{id}}}", True),
        ("user:{{{id}}}:name", True),
        ("{{{id}}}", True),
        ("{{user:{id}}}:v{version}", True),
        ("{{shop}}:{id}", True),
        ("{id}:{{shop}}", True),
        ("{{{{shop}}", True),
        ("counts", False),
        ("user:{id}", False),
        ("user:{{{id}", False),
        ("user:{id}}}", False),
        ("}}{{{id}", False),
        ("{{}}user:{id}", False),
        ("{{}}user:{{{id}}}", False),
        ("}}{{{id}}}", True),
    ],
)
def test_a_key_is_tagged_by_what_stands_between_its_first_braces(text: str, tagged: bool) -> None:
    assert bool(template(text).hash_tag) is tagged


@given(
    st.lists(st.sampled_from(["{{", "}}", "{a}", "{b|upper}", "x", ":"]), min_size=1, max_size=8),
    st.text("abé:?*", min_size=1, max_size=3),
)
def test_a_tagged_key_is_in_the_slot_of_its_lock_and_another_one_is_not(pieces: list[str], value: str) -> None:
    parsed = template("".join(pieces))
    key = parsed.render({"a": value, "b": value})
    assert key is not None
    # By chance, one lock in 16,384 is in its key's slot, but not three.
    slots = {key_slot(key + suffix) for suffix in (b"", b"\0lock", b":lock2", b":lock3")}
    assert bool(parsed.hash_tag) is (len(slots) == 1)


# One row for all: index is by parameter, None is NULL.
INDEX = {"id": 0, "team": 1, "email": 2, "gone": 3, "path": 4}
ROW = (b"42", b"7", "Ada@Ä.example".encode(), None, b"a/b c")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("counts", b"counts"),
        ("100%", b"100%"),
        ("user:{id}", b"user:42"),
        ("{id}", b"42"),
        ("user:{id}:100%d", b"user:42:100%d"),
        ("{team}:{id}", b"7:42"),
        ("100%s:{team}:{id}", b"100%s:7:42"),
        ("{team}:{id}:{team}", b"7:42:7"),
        ("{id}:{id}", b"42:42"),
        ("{id}:{team}:{email}", "42:7:Ada@Ä.example".encode()),
        ("{email|lower}", "ada@ä.example".encode()),
        ("{email|upper}:%", "ADA@Ä.EXAMPLE:%".encode()),
        ("{path|urlencode}", b"a%2Fb%20c"),
        ("{id}:{path|sha256}", b"42:" + hashlib.sha256(b"a/b c").hexdigest().encode()),
        ("{email|lower|sha256}", hashlib.sha256("ada@ä.example".encode()).hexdigest().encode()),
        ("{path|sha1}:%", hashlib.sha1(b"a/b c").hexdigest().encode() + b":%"),
        ("{path|upper|md5|upper}", hashlib.md5(b"A/B C").hexdigest().upper().encode()),
        ("u:{id ':' email|sha256}", b"u:" + hashlib.sha256("42:Ada@Ä.example".encode()).hexdigest().encode()),
        ("{team}:{'%b  '  team  \"|'\" id|lower|sha1}", b"7:" + hashlib.sha1(b"%b  7|'42").hexdigest().encode()),
        ("{id team|md5}", hashlib.md5(b"427").hexdigest().encode()),
        ("{id ':' gone|md5}", None),
        ("{gone}", None),
        ("{id}:{gone}", None),
        ("{gone}:{id}", None),
        ("{id}:{team}:{gone}", None),
        ("{gone|lower}", None),
        ("{id|lower}:{gone}", None),
    ],
)
def test_a_row_gives_its_key_and_a_null_gives_none(text: str, key: bytes | None) -> None:
    parsed = template(text)
    assert parsed.compile(INDEX)(ROW) == key
    assert parsed.render({name: ROW[position] for name, position in INDEX.items()}) == key


def test_a_text_that_is_put_together_is_one_parameter_of_many_values() -> None:
    parsed = template("t:{team ':' id|sha1}:{team}")
    (_, hashed, _, _) = parsed.parts
    assert isinstance(hashed, Param)
    assert (hashed.name, hashed.names, hashed.hashed) == ('team ":" id', ("team", "id"), True)
    assert parsed.params == ("team", "id")
    assert parsed.glob() == b"t:*:*"
    assert parsed.plain({"team": 0, "id": 1}) is None
    assert template('t:{team  ":"  id|sha1}:{team}').parts == parsed.parts
    assert template("t:{team '\"' id|sha1}").parts != template('t:{team "\'" id|sha1}').parts


@pytest.mark.parametrize(("name", "digits"), [("md5", 32), ("sha1", 40), ("sha256", 64)])
def test_a_key_with_a_hash_is_known_by_its_digits(name: str, digits: int) -> None:
    parsed = template(f"t:{{team ':' id|{name}}}:{{team}}")
    key = parsed.render({"team": "a:b", "id": "7"})
    assert key is not None
    assert parsed.match(key) == {'team ":" id': key[2 : 2 + digits], "team": b"a:b"}
    assert parsed.match(key[:2] + key[3:]) is None
    assert parsed.match(key[:2] + b"g" + key[3:]) is None


def test_a_compiled_template_serves_many_rows_given_as_lists_or_tuples() -> None:
    make_key = template("u:{id}:{team}:{email}").compile({"id": 2, "team": 1, "email": 0})
    assert [make_key(row) for row in ([b"e", b"t", b"i"], (b"", b"", b""))] == [b"u:i:t:e", b"u:::"]


def test_an_empty_value_is_not_null() -> None:
    assert template("user:{id}").render({"id": ""}) == b"user:"


def test_a_value_with_braces_or_percent_signs_stays_as_it_is() -> None:
    assert template("u:{a}:{b}").render({"a": "{b}", "b": "%s"}) == b"u:{b}:%s"


def test_bytes_that_are_not_utf8_pass_through_filters_unharmed() -> None:
    assert template("{a|lower}").render({"a": b"A\xff"}) == b"a\xff"


def test_render_takes_text_and_bytes_and_misses_no_parameter() -> None:
    assert template("{a}:{b}").render({"a": "é", "b": b"\xff", "c": None}) == b"\xc3\xa9:\xff"
    with pytest.raises(KeyError, match="b"):
        template("{a}:{b}").render({"a": "1"})
    with pytest.raises(KeyError, match="b"):
        template("{a}:{b}").compile({"a": 0})


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("counts", b"counts", {}),
        ("counts", b"counts2", None),
        ("user:{id}", b"user:42", {"id": b"42"}),
        ("user:{id}", b"user:", {"id": b""}),
        ("user:{id}", b"xuser:42", None),
        ("user:{id}:v{version}", b"user:42:v7", {"id": b"42", "version": b"7"}),
        ("{a}:{b}", b"1:2:3", {"a": b"1", "b": b"2:3"}),
        ("{a}:{b}:", b"1:2:3:", {"a": b"1", "b": b"2:3"}),
        ("{a}:{b}", b"1:\n", {"a": b"1", "b": b"\n"}),
        ("{id}:{id}", b"7:7", {"id": b"7"}),
        ("{id}:{id}", b"7:8", None),
        ("{id}1", b"71", {"id": b"7"}),
        ("{id}:{id}1", b"7:71", {"id": b"7"}),
        ("{email|sha256}", b"ab" * 32, {"email": b"ab" * 32}),
        ("{email|sha256}", b"abc", None),
        ("{email|lower}:{email}", b"ada:Ada", {"email": b"Ada"}),
        ("{email}:{email|lower}", b"Ada:ada", {"email": b"Ada"}),
        ("a.b**{größe}", b"a.b*\xff", {"größe": b"\xff"}),
        ("a.b**{größe}", b"axbb\xff", None),
        ("m:{id}:*", b"m:7:name:de", {"id": b"7", "*": b"name:de"}),
        ("m:{id}:*", b"m:7:", {"id": b"7", "*": b""}),
        ("m:{id}:*", b"m:7", None),
        ("m:*", b"m:7", {"*": b"7"}),
        ("user:{{{id}}}", b"user:{42}", {"id": b"42"}),
    ],
)
def test_a_key_gives_its_parameters_back(text: str, key: bytes, values: dict[str, bytes] | None) -> None:
    assert template(text).match(key) == values


def test_a_template_may_have_more_parameters_than_a_regular_expression_has_short_references() -> None:
    names = [f"p{number}" for number in range(120)]
    text = ":".join(f"{{{name}}}" for name in [*names, *names])
    values = {name: name.encode() for name in names}
    key = template(text).render(values)
    assert key is not None
    assert template(text).match(key) == values


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["{a}", "{b}", "{a|lower}", "**", "??", "[[", "]]"]),
            st.text("\\^x%.:", min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.text("ab*[\\%", max_size=3),
    st.one_of(st.none(), st.text("ab*[\\%", max_size=3)),
)
def test_every_key_of_a_template_matches_it_and_its_glob(pieces: list[str], value: str, rest: str | None) -> None:
    parsed = template("".join(pieces) + ("" if rest is None else "*"))
    key = parsed.render({"a": value, "b": value})
    assert key is not None
    key += (rest or "").encode()
    assert parsed.match(key) is not None
    assert parsed.like().fullmatch(key)
    assert glob_finds(parsed.glob(), key)


@pytest.mark.parametrize(
    ("text", "parts", "rest"),
    [
        ("m:{id}:*", (b"m:", Param("id"), b":"), True),
        ("m:{id}*", (b"m:", Param("id")), True),
        ("m:{id}:**", (b"m:", Param("id"), b":*"), False),
        ("m:{id}:***", (b"m:", Param("id"), b":*"), True),
        ("**??[[]]", (b"*?[]",), False),
        ("m:${SIGNS}", (b"m:*?[x]*",), False),
        ("m:${NONE:-a*}", (b"m:a*",), False),
    ],
)
def test_a_star_at_the_end_is_the_rest_and_doubled_signs_are_themselves(
    text: str, parts: tuple[bytes | Param, ...], *, rest: bool
) -> None:
    parsed = template(text, SIGNS="*?[x]*")
    assert (parsed.parts, parsed.rest) == (parts, rest)


def test_of_keys_with_a_rest_the_prefix_is_made() -> None:
    parsed = template("m:{id}:*")
    assert parsed.compile({"id": 0})([b"7*"]) == b"m:7*:"
    assert parsed.compile({"id": 0})([None]) is None


@pytest.mark.parametrize(
    ("text", "offset", "remedy"),
    [
        ("m:*:{id}", 2, "write `**` for the sign itself, or a parameter"),
        ("m:*${EMPTY}", 2, "write `**` for the sign itself, or a parameter"),
        ("m:{id}?", 6, "write `??` for the sign itself, or a parameter"),
        ("m:[ab]", 2, "write `[[` for the sign itself, or a parameter"),
        ("m:[[ab]", 6, "write `]]` for the sign itself, or a parameter"),
    ],
)
def test_a_sign_of_patterns_that_stands_alone_is_refused_with_the_remedy(text: str, offset: int, remedy: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(remedy)) as refused:
        template(text, EMPTY="")
    assert refused.value.offset == offset
