"""CDC_REDIS_URL: which Redis of which kind it means, and the driver's URLs that are made of it."""

from __future__ import annotations

import traceback
from urllib.parse import quote, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.asyncio.connection import parse_url

from cdc_invalidator import errors
from cdc_invalidator.redis.endpoint import Address, Endpoint
from cdc_invalidator.redis.source import EndpointSource

ASKED = Address("10.0.0.1", 7000)


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("a", Address("a", 6379), "a:6379"),
        ("a:", Address("a", 6379), "a:6379"),
        ("a:1", Address("a", 1), "a:1"),
        ("10.0.0.1:26379", Address("10.0.0.1", 26379), "10.0.0.1:26379"),
        ("[::1]", Address("::1", 6379), "[::1]:6379"),
        ("[2001:db8::7]:7000", Address("2001:db8::7", 7000), "[2001:db8::7]:7000"),
    ],
)
def test_an_address_is_a_host_and_perhaps_a_port(text: str, address: Address, shown: str) -> None:
    assert Address.parse(text) == address
    assert str(address) == shown


def test_an_address_without_a_port_takes_that_of_its_kind() -> None:
    assert Address.parse("a", 26379) == Address("a", 26379)


@pytest.mark.parametrize("text", ["", ":1", "a:b", "a:-1", "a:1:2", "::1", "[::1", "[]:1", "[::1]x", "a:1.5", "a: 1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the caller has the words
        Address.parse(text)


@given(st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True), st.integers(1, 65535))
def test_an_address_that_is_written_is_read_again(host: str, port: int) -> None:
    assert Address.parse(str(Address(host, port))) == Address(host, port)


# ── What is right ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache",
        "redis://user:secret@[::1]:6379/2?socket_keepalive=yes",
        "rediss://cache:6380?ssl_ca_certs=/ca.pem",
        "unix:///run/valkey.sock?db=1",
    ],
)
def test_the_url_of_one_server_is_given_to_the_driver_as_it_is(url: str) -> None:
    endpoint = Endpoint.parse(url)

    assert (endpoint.kind, endpoint.url, endpoint.addresses) == ("server", url, ())


@pytest.mark.parametrize(
    ("url", "kind", "addresses", "service"),
    [
        ("redis+sentinel://s/shop", "sentinel", ["s:26379"], "shop"),
        ("redis+sentinel://s1,s2:7,[::3]:8/shop/4", "sentinel", ["s1:26379", "s2:7", "[::3]:8"], "shop"),
        ("rediss+sentinel://u:p@[::1],[::2]/shop", "sentinel", ["[::1]:26379", "[::2]:26379"], "shop"),
        ("redis+cluster://n", "cluster", ["n:6379"], ""),
        ("redis+cluster://n1:1, n2:2 ,n3:3/", "cluster", ["n1:1", "n2:2", "n3:3"], ""),
        ("rediss+cluster://:p@[2001:db8::1]:7000,[2001:db8::2]:7000/0", "cluster",
         ["[2001:db8::1]:7000", "[2001:db8::2]:7000"], ""),
    ],
)  # fmt: skip
def test_the_others_name_the_servers_to_ask(url: str, kind: str, addresses: list[str], service: str) -> None:
    endpoint = Endpoint.parse(url)

    assert (endpoint.kind, [str(each) for each in endpoint.addresses], endpoint.service) == (kind, addresses, service)
    assert str(endpoint) == f"{kind} {','.join(addresses)}"


@pytest.mark.parametrize(
    ("url", "at"),
    [
        ("redis+sentinel://s/shop", "redis://10.0.0.1:7000"),
        ("redis+sentinel://s/shop/4", "redis://10.0.0.1:7000/4"),
        ("redis+cluster://n/0", "redis://10.0.0.1:7000/0"),
        ("rediss+cluster://n?ssl_ca_certs=/ca.pem", "rediss://10.0.0.1:7000?ssl_ca_certs=%2Fca.pem"),
        ("redis+cluster://user@n", "redis://user@10.0.0.1:7000"),
        ("redis+cluster://:p%40ss@n", "redis://:p%40ss@10.0.0.1:7000"),
        ("redis+cluster://u:a@b@n", "redis://u:a@b@10.0.0.1:7000"),
        (
            "redis+sentinel://user:p%2Fw@s/shop/4?sentinel_username=su&sentinel_password=sp&socket_timeout=3",
            "redis://user:p%2Fw@10.0.0.1:7000/4?socket_timeout=3",
        ),
    ],
)
def test_a_server_of_caches_has_the_user_the_database_and_the_options_of_the_url(url: str, at: str) -> None:
    assert Endpoint.parse(url).at(ASKED) == at


@pytest.mark.parametrize(
    ("query", "of_sentinel"),
    [
        ("", "redis://10.0.0.1:7000"),
        ("?sentinel_username=su", "redis://su:@10.0.0.1:7000"),
        ("?sentinel_password=p%40%2F%3A", "redis://:p%40%2F%3A@10.0.0.1:7000"),
        ("?sentinel_username=s%3Au&sentinel_password=sp&a=b", "redis://s%3Au:sp@10.0.0.1:7000?a=b"),
    ],
)
def test_a_sentinel_has_its_own_user_no_database_and_the_options_of_the_url(query: str, of_sentinel: str) -> None:
    endpoint = Endpoint.parse(f"redis+sentinel://user:secret@s/shop/4{query}")

    assert endpoint.of_sentinel(ASKED) == of_sentinel


SECRETS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
HOSTS = st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9-]{0,9}(\.[a-z][a-z0-9]{0,5})?", fullmatch=True)
ADDRESSES = st.builds(Address, HOSTS, st.integers(1, 65535))


@given(
    kind=st.sampled_from(["sentinel", "cluster"]),
    seeds=st.lists(ADDRESSES, min_size=1, max_size=3),
    address=ADDRESSES,
    user=st.just("") | SECRETS,
    password=SECRETS,
    own=SECRETS,
    client=SECRETS,
    database=st.integers(0, 99),
)
@example("sentinel", [ASKED], ASKED, "a:b@/", "%25?#[", "+ &=%2B", "é ", 3)
def test_the_driver_reads_from_it_what_was_percent_encoded(
    kind: str, seeds: list[Address], address: Address, user: str, password: str, own: str, client: str, database: int
) -> None:
    database = database if kind == "sentinel" else 0
    query = urlencode({"client_name": client, "sentinel_username": "watch", "sentinel_password": own})
    path = f"/shop/{database}" if kind == "sentinel" else f"/{database}"
    credentials = f"{quote(user, safe='')}:{quote(password, safe='')}"
    endpoint = Endpoint.parse(f"redis+{kind}://{credentials}@{','.join(map(str, seeds))}{path}?{query}")

    assert endpoint.addresses == tuple(seeds)
    expected = {"host": address.host, "port": address.port, "client_name": client, "password": password}
    assert parse_url(endpoint.at(address)) == expected | {"db": database} | ({"username": user} if user else {})
    assert parse_url(endpoint.of_sentinel(address)) == expected | {"username": "watch", "password": own}


# ── What is wrong ────────────────────────────────────────────────────────────────────────────────────────────────────


def log_of(error: BaseException) -> str:
    """All that a log may show of an error: also the errors that it came from."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://h",
        "REDIS+CLUSTER://h",
        "unix+cluster:///run/valkey.sock",
        "redis+master://h",
        "redis+cluster+sentinel://h/shop",
        "redis+sentinel:h/shop",
    ],
)
def test_other_schemes_are_told_with_those_there_are(url: str) -> None:
    with pytest.raises(errors.WrongSettings, match=r"^CDC_REDIS_URL has a scheme .+ redis\+cluster://\.$"):
        Endpoint.parse(url)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("redis+sentinel://s", "redis+sentinel://"),
        ("redis+sentinel://s/", "redis+sentinel://"),
        ("redis+sentinel:///shop", "redis+sentinel://"),
        ("redis+sentinel://s,/shop", "redis+sentinel://"),
        ("redis+sentinel://s/shop/db", "redis+sentinel://"),
        ("redis+sentinel://s/shop/1/2", "redis+sentinel://"),
        ("redis+sentinel://u:hunter2[@s/shop", "redis+sentinel://"),
        ("redis+cluster://", "redis+cluster://"),
        ("redis+cluster://n/shop", "redis+cluster://"),
        ("redis+cluster://n:port", "redis+cluster://"),
        ("redis+cluster://::1:7000", "redis+cluster://"),
        ("redis+cluster://u:hunter2/@n:7000", "redis+cluster://"),
        ("redis+cluster://u:hunter2#@n:7000", "redis+cluster://"),
    ],
)
def test_what_cannot_be_read_is_told_by_how_it_is_written_right(url: str, remedy: str) -> None:
    with pytest.raises(errors.WrongSettings) as caught:
        Endpoint.parse(url)

    assert str(caught.value).startswith(f"CDC_REDIS_URL can't be read; write {remedy}")
    assert "hunter2" not in log_of(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:57#hunter2@h:6379/0",
        "redis://default:1234/56hunter2@h:6379/0",
        "redis://:12?34hunter2@h:6379/0",
        "rediss://u:hun@ter2/x#1@h",
        "redis://u:hunter2@h/0?client_name=a@b",
        "redis://h/0#hunter2",
        "unix://u:hun/ter2@/run/valkey.sock",
        "redis://u:hun[ter2@h",
        "redis://u:hun]ter2@h/0",
    ],
)
def test_a_password_that_can_be_read_as_something_else_is_told_without_a_part_of_it(url: str) -> None:
    with pytest.raises(errors.WrongSettings, match="can be read in two ways") as caught:
        Endpoint.parse(url)

    assert not any(part in log_of(caught.value) for part in ("hunter2", "ter2", "1234", "57", "12?"))


def test_a_database_that_is_no_number_is_told() -> None:
    with pytest.raises(errors.WrongSettings, match="a database that is no number"):
        Endpoint.parse("redis://u:hunter2@h/shop")


@pytest.mark.parametrize("url", ["unix:///run/app@1/valkey.sock?db=1", "redis://:hun@ter2@h:6379/0", "redis://h/0/"])
def test_an_at_sign_that_can_only_be_read_in_one_way_is_taken(url: str) -> None:
    assert Endpoint.parse(url).url == url


@given(SECRETS, st.sampled_from(["redis://", "redis://:", "redis://default:", "rediss://u:"]))
@example("1234/56secret", "redis://:")
@example("57#Wc903z", "redis://:")
def test_no_part_of_a_raw_password_becomes_the_host(password: str, beginning: str) -> None:
    try:
        read = parse_url(Endpoint.parse(f"{beginning}{password}@cache.example:6379/0").url)
    except (errors.WrongSettings, ValueError):
        return
    assert read["host"] == "cache.example"
    assert read["port"] == 6379


def test_a_cluster_has_only_database_0() -> None:
    with pytest.raises(errors.WrongSettings, match="names a database of a cluster, which has only 0; leave it out"):
        Endpoint.parse("redis+cluster://n/1")


@pytest.mark.parametrize(
    "url",
    [
        "redis+://u:hunter2@h",
        "redis://u:hunter2@h:port",
        "redis://u:hunter2@h?max_connections=hunter2",
        "redis://u:hunter2@h?hunter2=1",
        "redis+sentinel://u:hunter2@h/shop?hunter2=1",
        "redis+cluster://u:hunter2@h:99999",
    ],
)
def test_options_that_the_driver_does_not_take_are_told_without_its_words(url: str) -> None:
    with pytest.raises(errors.WrongSettings, match=r"only options that redis-py knows\.$") as caught:
        EndpointSource.fixed(url)

    assert "hunter2" not in log_of(caught.value)


PASSWORD = "hunter2"
PIECES = [
    *":/?#[]@&=%, ",
    "redis",
    "rediss",
    "unix",
    "+sentinel",
    "+cluster",
    "://",
    "user:",
    PASSWORD,
    "[::1]",
    "host",
    "127.0.0.1",
    ":6379",
    "/0",
    "/shop",
    "db=1",
    "sentinel_password=",
    "%zz",
    "℀",
    "\n",
]
SCHEMES = ["", "redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+cluster://"]


@given(
    st.sampled_from(SCHEMES),
    st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=2), max_size=10),
)
@example("redis+sentinel://", ["user:", PASSWORD, "[", "@", "host", "/shop"])
@example("redis://", ["user:", PASSWORD, "@", "host"])
def test_any_text_is_an_endpoint_or_wrong_settings_and_shows_no_password(scheme: str, pieces: list[str]) -> None:
    url = scheme + "".join(pieces)
    try:
        endpoint = Endpoint.parse(url)
    except errors.WrongSettings as wrong:
        shown = [log_of(wrong)]
    else:
        # A host may be called as the password is; then it is shown.
        named = any(PASSWORD in address.host for address in endpoint.addresses)
        shown = [] if named else [str(endpoint), repr(endpoint), f"{endpoint}"]
        try:
            EndpointSource.fixed(url)
        except errors.WrongSettings as wrong:
            shown.append(log_of(wrong))
    assert not any(PASSWORD in text for text in shown)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://cdc:secret@cache/3", "cache:6379, database 3"),
        ("rediss://:sec%40ret@[::1]:7000", "[::1]:7000, database 0"),
        ("unix:///run/redis.sock?db=1&password=secret", "socket /run/redis.sock"),
        ("redis+sentinel://u:secret@a,b:1/main/2?sentinel_password=secret", "sentinel of service main at a:26379, b:1"),
        ("redis+cluster://u:secret@a:1", "cluster at a:1"),
    ],
)
def test_a_place_is_where_it_leads_and_nothing_else(url: str, shown: str) -> None:
    assert Endpoint.parse(url).place == shown
