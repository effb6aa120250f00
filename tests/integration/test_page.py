"""The page at /, as a browser shows it: what is wrong, since when, what to do, and nothing that nobody may see.

With PICTURES=folder, the screenshots are kept there, to be looked at.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browser
import psycopg
import pytest
import redis
from running import RunningDaemon, eventually, execute, settled

from cdc_invalidator.embedded.servers import Postgres, Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

RULES = """
version: 1
caches:
  user: {key: "p:user:{id}", ttl: 5m}
  page: {key: "p:page:{id}:v{version}", version: "p:page:{id}:ver", ttl: 5m}
  orders: {key: "p:orders:{user_id}", ttl: 5m}
rules:
  - {name: user-changed, table: public.users, bust: [user, page]}
  - {name: order-changed, table: public.orders, old_row: ignore, bust: [orders]}
"""
TABLES = ("CREATE TABLE users (id int PRIMARY KEY, name text)", "CREATE TABLE orders (id int PRIMARY KEY, user_id int)")
WIDE, NARROW = (1280, 1100), (420, 1800)


class Scene:
    """A daemon with servers of its own, and its page."""

    def __init__(self, postgres: Postgres, valkey: Valkey, folder: Path) -> None:
        self.valkey = valkey
        self.dsn = postgres.create_database("page")
        execute(self.dsn, *TABLES)
        self.rules = folder / "rules.yaml"
        self.rules.write_text(RULES)
        self.client = redis.Redis.from_url(valkey.url)

    def daemon(self, **settings: str) -> RunningDaemon:
        given = {"event_stream": "", **settings}
        return RunningDaemon(dsn=self.dsn, redis_url=self.valkey.url, rules=self.rules, slot="page", **given)

    def settle(self) -> None:
        settled(self.dsn, self.client, "page")

    def change(self, *ids: int) -> None:
        for each in ids:
            self.client.set(f"p:user:{each}", "cached")
            text = "INSERT INTO users VALUES (%s, 'a') ON CONFLICT (id) DO UPDATE SET name = users.name || 'b'"
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                connection.execute(text, [each])
        self.settle()


@pytest.fixture(scope="module")
def scene(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Valkey() as valkey:
        made = Scene(postgres, valkey, tmp_path_factory.mktemp("page"))
        yield made
        made.client.close()
    postgres.drop_database("page")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("PICTURES", tmp_path))
    folder.mkdir(exist_ok=True)
    return folder


def url(daemon: RunningDaemon, path: str = "/") -> str:
    return f"http://127.0.0.1:{daemon.port}{path}"


def words(page: str) -> str:
    """The page's text."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page))).strip()


def verdict(daemon: RunningDaemon) -> str:
    """The first part of the page, as the daemon gives it: its level, and its words."""
    code, body = daemon.get("/live")
    part = json.loads(body)["verdict"] if code == 200 else ""
    level = re.search(r'class="verdict (\w+)"', part)
    return f"{level[1] if level else ''}: {words(part)}"


def says(daemon: RunningDaemon, *wanted: str) -> str:
    """Wait until the first part of the page says this."""
    text = ""

    def said() -> bool:
        nonlocal text
        text = verdict(daemon)
        return all(each in text for each in wanted)

    try:
        eventually(said, "the page says it")
    except AssertionError as error:
        raise AssertionError(f"it should say {wanted}: {text}") from error
    return text


def seen(daemon: RunningDaemon, name: str, pictures: Path, *, both: bool = False) -> str:
    """What a browser shows; pictures of it are taken."""
    sizes = [WIDE, NARROW] if both else [WIDE]
    for width, height in sizes:
        for dark in (False, True) if both else (False,):
            path = pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png"
            browser.picture(url(daemon), path, width=width, height=height, dark=dark)
    return browser.dom(url(daemon))


def test_a_healthy_daemon_says_how_old_caches_are_and_what_it_busted(scene: Scene, pictures: Path) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        scene.settle()
        scene.change(*range(1, 9))
        text = says(daemon, "ok: OK Caches are at most")
        assert re.search(r"at most \d\.\d s old\.", text)
        # A line beside its axis, not in it; there is one from the first sample on.
        line = re.compile(r'class="axis"></polyline><polyline points="\d')
        eventually(lambda: line.search(browser.dom(url(daemon))), "the plots have lines")
        page = seen(daemon, "healthy", pictures, both=True)
        shown = words(page)
        assert "leads and busts" in shown
        assert re.search(r"user up to date \d+(\.\d)? s ago", shown)
        assert "user delete by user-changed (insert of public.users): 1 key, 1 there" in shown
        assert "gap reason=new_slot" in shown
        assert line.search(page)
        # No raw key, and no value.
        assert "p:user:" not in page
        assert scene.valkey.url not in page


def test_the_script_fetches_what_changes_and_tells_when_nobody_answers(scene: Scene) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        page = browser.dom(url(daemon), milliseconds=9000)
        assert re.search(r'<body data-turns="[2-9]"', page)
        assert '<p id="gone" hidden' in page


class Relay(BaseHTTPRequestHandler):
    """Passes the page on, but for one of its files."""

    daemon: RunningDaemon
    missing: str

    def do_GET(self) -> None:
        code, body = self.daemon.get(self.path) if not self.path.startswith(self.missing) else (503, "")
        self.send_response(code)
        self.send_header("Content-Type", "text/javascript" if self.path.endswith(".js") else "text/html")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def without(file: str, daemon: RunningDaemon, path: str = "/") -> str:
    """What a browser shows that does not get this file."""
    Relay.daemon, Relay.missing = daemon, file
    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as relay:
        thread = threading.Thread(target=relay.serve_forever)
        thread.start()
        try:
            return browser.dom(f"http://127.0.0.1:{relay.server_port}{path}", milliseconds=9000, quiet=False)
        finally:
            relay.shutdown()
            thread.join()


def test_an_open_page_says_when_the_daemon_answers_no_more(scene: Scene) -> None:
    with scene.daemon() as daemon:
        page = without("/live", daemon.ready())
        assert '<body class="gone">' in page
        assert '<p id="gone">The daemon does not answer any more.' in page


def test_without_its_script_the_page_is_whole(scene: Scene) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        scene.settle()
        scene.change(1)
        page = without("/page.js", daemon)
        assert "data-turns" not in page
        assert "Caches are at most" in words(page)
        assert "user delete by user-changed" in words(page)
        answer = words(without("/page.js", daemon, "/?key=p%3Auser%3A1#explain"))
        assert "It is a key of cache user" in answer
        assert "delete by rule user-changed on insert, update, delete, truncate of public.users" in answer


@pytest.mark.parametrize(
    ("form", "shown", "hidden"),
    [
        ("raw", ["p:user:77", "id = 77"], []),
        ("hash", ["its hash is"], ["p:user:77", "= 77"]),
        ("prefix", [], ["p:user:77"]),
    ],
)
def test_keys_are_shown_as_the_setting_allows(scene: Scene, form: str, shown: list[str], hidden: list[str]) -> None:
    with scene.daemon(log_keys=form, log_hash_key="secret") as daemon:
        daemon.ready()
        scene.settle()
        scene.change(77)
        _, page = daemon.get("/?key=p%3Auser%3A77")
        _, nobody = daemon.get("/?key=another%3A77")
        assert "No cache has this key; the nearest is cache" in words(nobody)
        assert "another:77" not in nobody
        for each in shown:
            assert each in words(page)
        for each in hidden:
            assert each not in page
        if form == "hash":
            (hashed,) = re.findall(r"its hash is ([0-9a-f]{16})", page)
            assert f"<code>{hashed}</code>" in page


def test_the_page_can_be_turned_off(scene: Scene) -> None:
    with scene.daemon(page="false") as daemon:
        daemon.ready()
        for path in ("/", "/live", "/page.css", "/page.js"):
            assert daemon.get(path)[0] == 404
        assert daemon.get("/status")[0] == 200


def test_the_pages_files_come_with_a_policy_that_lets_nothing_else_in(scene: Scene) -> None:
    import urllib.request

    with scene.daemon() as daemon:
        daemon.ready()
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            with urllib.request.urlopen(url(daemon, path), timeout=20) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert answer.headers["Content-Type"].startswith(kind)
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                body = answer.read().decode()
        _, page = daemon.get("/")
        assert not re.search(r"https?://|style=|<script>|onclick", page)
        assert body


def test_names_with_signs_of_html_and_of_terminals_are_only_text(scene: Scene, pictures: Path) -> None:
    table = '<script>alert(1)</script>\x1b[31m"&'
    rules = scene.rules.read_text()
    quoted = json.dumps('public."' + table.replace('"', '""') + '"')
    execute(scene.dsn, psycopg.sql.SQL("CREATE TABLE {} (id int PRIMARY KEY)").format(psycopg.sql.Identifier(table)))
    try:
        scene.rules.write_text(f"{rules}  - {{name: odd, table: {quoted}, bust: [user]}}\n")
        with scene.daemon() as daemon:
            daemon.ready()
            scene.settle()
            execute(scene.dsn, psycopg.sql.SQL("INSERT INTO {} VALUES (5)").format(psycopg.sql.Identifier(table)))
            scene.settle()
            page = seen(daemon, "odd-names", pictures)
            _, body = daemon.get("/")
            assert "<script>alert" not in page
            assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in body
            assert "\x1b" not in body
    finally:
        scene.rules.write_text(rules)
        execute(scene.dsn, psycopg.sql.SQL("DROP TABLE {}").format(psycopg.sql.Identifier(table)))


def test_a_redis_that_is_away_is_told_with_its_time(scene: Scene, pictures: Path) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        scene.settle()
        scene.valkey.stop()
        try:
            text = says(daemon, "wrong: Act", "Redis", "Since")
            page = seen(daemon, "redis-away", pictures, both=True)
            assert "not connected" in words(page)
        finally:
            scene.valkey.start()
        assert re.search(r"Since 20\d\d-\S+ \S+ UTC, \S+ s ago\.", text)
        says(daemon, "Caches are at most")


def test_a_postgres_that_is_away_is_told_with_its_time(scene: Scene, pictures: Path) -> None:
    with Postgres() as other, Valkey() as valkey:
        execute(other.dsn, *TABLES)
        with RunningDaemon(dsn=other.dsn, redis_url=valkey.url, rules=scene.rules, slot="away") as daemon:
            daemon.ready()
            says(daemon, "Caches are at most")
            other.stop()
            says(daemon, "wrong: Act", "PostgreSQL", "Since")
            page = words(seen(daemon, "postgres-away", pictures))
            assert "PostgreSQL 127.0.0.1:" in page
            assert "session_lost" in page
            assert other.password not in page


def test_a_table_that_is_not_published_is_told_with_the_sql_that_mends_it(scene: Scene, pictures: Path) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        scene.settle()
        execute(scene.dsn, "ALTER TABLE orders REPLICA IDENTITY NOTHING")
        try:
            text = says(daemon, "wrong: Act", "public.orders")
            assert "orders" in text
            page = seen(daemon, "unpublished", pictures, both=True)
            assert "Tables that are not published" in words(page)
            statements = [html.unescape(each) for each in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
            assert statements
            execute(scene.dsn, *statements[0].splitlines())
            says(daemon, "Caches are at most")
            assert "Tables that are not published" not in words(daemon.get("/")[1])
        finally:
            execute(scene.dsn, "ALTER TABLE orders REPLICA IDENTITY DEFAULT")


def test_rule_files_with_a_mistake_are_told_and_the_old_rules_stay(scene: Scene, pictures: Path) -> None:
    rules = scene.rules.read_text()
    with scene.daemon() as daemon:
        daemon.ready()
        scene.settle()
        try:
            scene.rules.write_text(rules.replace("bust: [orders]", "bust: [ordres]"))
            text = says(daemon, "wrong: Act", "rule files", "rules.yaml:9:")
            assert "Since" in text
            assert "reload_failed" in words(seen(daemon, "bad-rules", pictures))
        finally:
            scene.rules.write_text(rules)
        says(daemon, "ok: OK Caches are at most")
        assert "reload_unchanged" in daemon.get("/")[1]


def test_a_daemon_that_stands_by_says_so(scene: Scene, pictures: Path) -> None:
    with scene.daemon() as first:
        first.ready()
        with scene.daemon() as second:
            second.ready()
            says(second, "ok: OK This daemon stands by")
            assert "stands by" in words(seen(second, "standby", pictures))


def test_a_missing_right_of_redis_is_told_with_its_caches(scene: Scene, pictures: Path) -> None:
    rights = ["on", ">pw", "+@all", "~*", "&*"]
    may: Any = functools.partial(scene.client.execute_command, "ACL", "SETUSER", "weak")
    may(*rights)
    redis_url = scene.valkey.url.replace("redis://", "redis://weak:pw@")
    with RunningDaemon(dsn=scene.dsn, redis_url=redis_url, rules=scene.rules, slot="page") as daemon:
        daemon.ready()
        scene.settle()
        may("resetkeys", "~cdc:*", "~p:page:*", "~p:orders:*")
        execute(scene.dsn, "INSERT INTO users VALUES (900, 'x')")
        says(daemon, "wrong: Act", "user", "Since")
        page = seen(daemon, "denied", pictures)
        assert "Redis denies its busts" in words(page)
        assert "weak" not in page


def test_a_sweep_shows_how_far_it_is(scene: Scene, pictures: Path) -> None:
    with scene.client.pipeline(transaction=False) as pipe:
        for number in range(3000):
            pipe.set(f"other:{number}", "x")
        pipe.execute()
    with scene.daemon(sweep_rate="100") as daemon:
        daemon.ready()
        execute(scene.dsn, "TRUNCATE users")
        eventually(lambda: "sweep of user" in words(daemon.get("/")[1]), "the sweep is shown")
        page = seen(daemon, "sweep", pictures)
        assert re.search(r'<progress value="0\.\d+" max="1">', page)
        assert re.search(r"sweep of \w+: [\d,]+ keys looked at", words(page))
    scene.client.flushdb()


def test_the_explanation_of_keys_costs_no_more_than_a_part_of_the_time(scene: Scene) -> None:
    with scene.daemon() as daemon:
        daemon.ready()
        code, page = daemon.get("/?key=" + "x" * 3000)
        assert (code, "No key has more than" in page) == (200, True)
