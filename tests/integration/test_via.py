"""Rules with `via` when joined rows are gone, or others, by the time that the daemon asks: no entry stays stale.

A reader's entries hold what the database held when they were stored. After the writes, each entry that is left must
still be true. What was busted without need is counted.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from running import RunningDaemon, eventually, execute
from stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import redis

RULES = Path(__file__).parents[2] / "rules"
SCHEMAS = Path(__file__).parent / "rule_files"
# For each cache: its keys with the values that a reader would store.
Views = str


class Reader(Stage):
    """A reader with a cache: it knows by SQL what belongs under which key."""

    def __init__(self, daemon: RunningDaemon, views: Views, *, client: Any = None) -> None:
        super().__init__(daemon, client)
        self._views = views
        self._stored: dict[str, str] = {}

    def truth(self) -> dict[str, str]:
        with psycopg.connect(self.dsn) as connection:
            return dict(connection.execute(self._views).fetchall())

    def read(self) -> None:
        """Store an entry under each key, also under those of which there is nothing now, but once was."""
        truth = self.truth()
        self._stored = dict.fromkeys(self._stored, "nothing") | truth
        self.client.mset(self._stored)

    def stale(self) -> list[str]:
        """Return the entries that are there, and not true."""
        truth = self.truth()
        found = zip(self._stored, self.client.mget(list(self._stored)), strict=True)
        return [key for key, value in found if value is not None and value.decode() != truth.get(key, "nothing")]

    def busted_in_vain(self) -> list[str]:
        """Return the entries that are gone, and were true."""
        truth = self.truth()
        return [
            key
            for key, value in self._stored.items()
            if value == truth.get(key, "nothing") and not self.client.exists(key)
        ]

    def away(self, *statements: str) -> None:
        """Run statements, each in its own transaction, while the daemon does nothing; let it do all of it then."""
        self.daemon.send(signal.SIGSTOP)
        execute(self.dsn, *statements)
        self.daemon.send(signal.SIGCONT)
        self.settle()

    def unanswered(self, rule: str | None = None) -> list[dict[str, Any]]:
        """Return the sweeps and searches for questions without an answer."""
        found = self.daemon.named("bust", reason="unanswered")
        return [event for event in found if rule in {None, event["rule"]}]


def play(
    database: str, redis_url: str, client: redis.Redis, path: Path, slot: str, schema: str, rules: str, views: Views
) -> Any:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(schema.encode())
    text = path / "rules.yaml"
    text.write_text(rules)
    return Reader.playing(database, redis_url, text, slot, views, client=client, log_keys="raw")


# A key put together from two rows, of which no rule knows both.

FOLLOWS = """
CREATE TABLE accounts (id int PRIMARY KEY, uri text NOT NULL);
CREATE TABLE follows (
  id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  account_id int NOT NULL REFERENCES accounts ON DELETE CASCADE,
  target_account_id int NOT NULL REFERENCES accounts ON DELETE CASCADE);
ALTER TABLE accounts REPLICA IDENTITY FULL;
ALTER TABLE follows REPLICA IDENTITY FULL;
INSERT INTO accounts SELECT n, 'https://host' || n % 3 || '.example/' || n FROM generate_series(1, 9) n;
INSERT INTO follows (account_id, target_account_id) SELECT n, m FROM generate_series(1, 8) n, generate_series(7, 9) m
WHERE n <> m;
"""
FOLLOWERS = r"""
version: 1
caches:
  followers: {key: "followers_hash:{account}:{prefix}/", ttl: 5m}
rules:
  - name: follow-changed
    table: public.follows
    bust:
      - followers:
          account: target_account_id
          via: SELECT substring(uri, '^(https?://[^/]+)/') AS prefix FROM public.accounts WHERE id = {account_id}
  - name: account-changed
    table: public.accounts
    bust:
      - followers:
          via: >-
            SELECT target_account_id AS account, substring({uri}, '^(https?://[^/]+)/') AS prefix
            FROM public.follows WHERE account_id = {id}
"""
FOLLOWERS_VIEW = r"""
SELECT 'followers_hash:' || target_account_id || ':' || substring(uri, '^(https?://[^/]+)/') || '/',
  string_agg(uri, ' ' ORDER BY uri)
FROM follows JOIN accounts ON accounts.id = account_id GROUP BY target_account_id, substring(uri, '^(https?://[^/]+)/')
"""

ATTRIBUTES = """
CREATE TABLE key_dictionary (key text NOT NULL UNIQUE, key_id int PRIMARY KEY);
CREATE TABLE attribute_kv (entity_id text, attribute_type int, attribute_key int, long_v bigint,
  PRIMARY KEY (entity_id, attribute_type, attribute_key));
ALTER TABLE key_dictionary REPLICA IDENTITY FULL;
INSERT INTO key_dictionary SELECT 'key' || n, n FROM generate_series(1, 4) n;
INSERT INTO attribute_kv SELECT 'e' || e, t, k, 1
FROM generate_series(1, 3) e, generate_series(1, 3) t, generate_series(1, 4) k;
"""
ATTRIBUTE_RULES = """
version: 1
caches:
  attribute: {key: "attributes{{{entity_id}}}{scope}_SCOPE_{key}", ttl: 5m}
rules:
  - name: attribute
    table: public.attribute_kv
    bust:
      - attribute:
          entity_id: entity_id
          via: >-
            SELECT key, CASE {attribute_type} WHEN 1 THEN 'CLIENT' WHEN 2 THEN 'SERVER' ELSE 'SHARED' END AS scope
            FROM public.key_dictionary WHERE key_id = {attribute_key}
  - name: key
    table: public.key_dictionary
    bust:
      - attribute:
          key: key
          via: >-
            SELECT entity_id, CASE attribute_type WHEN 1 THEN 'CLIENT' WHEN 2 THEN 'SERVER' ELSE 'SHARED' END AS scope
            FROM public.attribute_kv WHERE attribute_key = {key_id}
"""
ATTRIBUTE_VIEW = """
SELECT 'attributes{' || entity_id || '}' || (ARRAY['CLIENT', 'SERVER', 'SHARED'])[attribute_type] || '_SCOPE_' || key,
  long_v::text
FROM attribute_kv JOIN key_dictionary ON key_id = attribute_key
"""

PUT_TOGETHER = {
    "followers": (
        FOLLOWS,
        FOLLOWERS,
        FOLLOWERS_VIEW,
        # By a cascade, and by statements in either order.
        [
            "DELETE FROM accounts WHERE id = 4",
            "DELETE FROM follows WHERE account_id = 5; DELETE FROM accounts WHERE id = 5",
            "BEGIN; SET CONSTRAINTS ALL DEFERRED; DELETE FROM accounts WHERE id IN (1, 2); COMMIT",
            "UPDATE accounts SET uri = 'https://elsewhere.example/6' WHERE id = 6",
            "UPDATE follows SET target_account_id = 6 WHERE account_id = 8 AND target_account_id = 7",
        ],
        # The account moves after it has stopped to follow the last one; the follow moves after the account is gone.
        [
            "DELETE FROM follows WHERE account_id = 3",
            "UPDATE accounts SET uri = 'https://elsewhere.example/3' WHERE id = 3",
            "DELETE FROM accounts WHERE id = 3",
        ],
    ),
    "attributes": (
        ATTRIBUTES,
        ATTRIBUTE_RULES,
        ATTRIBUTE_VIEW,
        [
            "DELETE FROM attribute_kv WHERE attribute_key = 1; DELETE FROM key_dictionary WHERE key_id = 1",
            "DELETE FROM key_dictionary WHERE key_id = 2; DELETE FROM attribute_kv WHERE attribute_key = 2",
            "UPDATE attribute_kv SET long_v = 2 WHERE entity_id = 'e3'",
        ],
        ["DELETE FROM attribute_kv WHERE attribute_key = 3", "DELETE FROM key_dictionary WHERE key_id = 3"],
    ),
}


@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_a_key_put_together_from_two_rows_goes_when_both_are_deleted(
    name: str, database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    schema, rules, views, writes, backlog = PUT_TOGETHER[name]
    with play(database, redis_url, redis_client, tmp_path, slot_name, schema, rules, views) as reader:
        for write in writes:
            reader.read()
            before = reader.truth()
            reader.run(write)
            assert reader.truth() != before, "the write changes what a reader would store"
            assert reader.stale() == [], write
        assert reader.unanswered(), "some answer was gone"
        reader.read()
        reader.away(*backlog)
        assert reader.stale() == []
        kinds = {event["action"] for event in reader.unanswered()}
        assert kinds == {"sweep", "search"}, "one of the two rules knows what the key begins with"
        assert not reader.daemon.named("query_failed")


# Cascades over more than one level.

LEVELS = """
CREATE TABLE orgs (id int PRIMARY KEY, slug text NOT NULL UNIQUE);
CREATE TABLE projects (id int PRIMARY KEY, org_id int NOT NULL REFERENCES orgs ON DELETE CASCADE);
CREATE TABLE tasks (id int PRIMARY KEY, project_id int NOT NULL REFERENCES projects ON DELETE CASCADE);
CREATE TABLE notes (id int PRIMARY KEY, task_id int REFERENCES tasks ON DELETE CASCADE, body text NOT NULL);
ALTER TABLE projects REPLICA IDENTITY FULL;
ALTER TABLE tasks REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
INSERT INTO orgs SELECT n, 'org' || n FROM generate_series(1, 4) n;
INSERT INTO projects SELECT n, 1 + n % 4 FROM generate_series(1, 8) n;
INSERT INTO tasks SELECT n, 1 + n % 8 FROM generate_series(1, 16) n;
INSERT INTO notes SELECT n, 1 + n % 16, 'note ' || n FROM generate_series(1, 32) n;
INSERT INTO notes VALUES (100, NULL, 'of nothing');
"""
# Of the tables above notes, none has a rule: only what has no answer tells that they are gone.
LEVEL_RULES = """
version: 1
caches:
  feed: {key: "feed:{slug}", ttl: 5m}
rules:
  - name: note-changed
    table: public.notes
    bust:
      - feed:
          via: >-
            SELECT o.slug FROM public.tasks t JOIN public.projects p ON p.id = t.project_id
            JOIN public.orgs o ON o.id = p.org_id WHERE t.id = {task_id}
"""
LEVEL_VIEW = """
SELECT 'feed:' || o.slug, coalesce(string_agg(n.body, ' ' ORDER BY n.id), 'nothing')
FROM orgs o LEFT JOIN projects p ON p.org_id = o.id LEFT JOIN tasks t ON t.project_id = p.id
LEFT JOIN notes n ON n.task_id = t.id GROUP BY o.slug
"""


def test_a_cascade_over_three_levels_leaves_nothing_and_what_was_in_vain_is_known(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with play(database, redis_url, redis_client, tmp_path, slot_name, LEVELS, LEVEL_RULES, LEVEL_VIEW) as reader:
        for write in (
            "DELETE FROM tasks WHERE id = 1",
            "DELETE FROM projects WHERE id = 2",
            "DELETE FROM orgs WHERE id = 3",
        ):
            reader.read()
            reader.run(write)
            assert reader.stale() == [], write
            # The whole cache was swept, once for a transaction.
            assert len(reader.busted_in_vain()) >= 2, write
            eventually(lambda: reader.unanswered("note-changed"), "the sweep is told")
        assert len(reader.unanswered()) == 3
        # A note of no task joins nothing: that is no question.
        reader.read()
        reader.run("UPDATE notes SET body = 'x' WHERE id = 100", "DELETE FROM notes WHERE id = 100")
        assert (reader.stale(), reader.busted_in_vain()) == ([], [])
        assert len(reader.unanswered()) == 3


def test_a_row_that_came_and_went_in_a_backlog_asks_for_what_it_was(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with play(database, redis_url, redis_client, tmp_path, slot_name, LEVELS, LEVEL_RULES, LEVEL_VIEW) as reader:
        reader.run("INSERT INTO notes VALUES (200, 4, 'new')")
        # What an INSERT joins may be gone when it is asked for; the DELETE of the cascade asks again.
        reader.read()
        reader.away("INSERT INTO notes VALUES (201, 5, 'newer')", "DELETE FROM tasks WHERE id = 5")
        assert reader.stale() == []
        reader.read()
        reader.away("UPDATE notes SET task_id = 6 WHERE id = 200", "DELETE FROM projects WHERE id = 5")
        assert reader.stale() == []


def test_many_rows_without_an_answer_are_one_sweep(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    with play(database, redis_url, redis_client, tmp_path, slot_name, LEVELS, LEVEL_RULES, LEVEL_VIEW) as reader:
        reader.run("INSERT INTO notes SELECT 1000 + n, 8, 'n' FROM generate_series(1, 100000) n")
        reader.read()
        reader.run("DELETE FROM tasks WHERE id = 8")
        assert reader.stale() == []
        eventually(reader.unanswered, "the sweep is told")
        (event,) = reader.unanswered()
        assert event["transactions"] == 1
        assert reader.daemon.metric("cdc_invalidator_sweeps_total", cache="feed", reason="unanswered") == 1


def test_on_empty_ignore_leaves_the_cache_alone(
    database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = LEVEL_RULES.replace("          via:", "          on_empty: ignore\n          via:")
    with play(database, redis_url, redis_client, tmp_path, slot_name, LEVELS, rules, LEVEL_VIEW) as reader:
        reader.read()
        reader.run("DELETE FROM tasks WHERE id = 1")
        assert len(reader.stale()) == 1
        assert not reader.unanswered()


# The file for Django, under random writes.

BLOG = """
SELECT ':1:article:' || a.id, a.title || ' ' || w.name || ' ' || coalesce(
  (SELECT string_agg(t.slug, ' ' ORDER BY t.slug) FROM blog_article_tags l JOIN blog_tag t ON t.id = l.tag_id
   WHERE l.article_id = a.id), '')
FROM blog_article a JOIN blog_author w ON w.id = a.author_id
UNION ALL
SELECT ':1:author:' || author_id || ':articles', string_agg(title, ' ' ORDER BY id) FROM blog_article GROUP BY author_id
UNION ALL
SELECT ':1:tag:' || t.slug || ':articles', string_agg(a.title, ' ' ORDER BY a.id)
FROM blog_tag t JOIN blog_article_tags l ON l.tag_id = t.id JOIN blog_article a ON a.id = l.article_id GROUP BY t.slug
"""
SOME = "(SELECT id FROM {} ORDER BY md5(id::text || '{}') LIMIT 1)"


def blog_writes(chance: random.Random) -> Iterator[str]:
    """Write to a blog without end: each a statement that may change much or nothing."""

    def some(table: str) -> str:
        return SOME.format(f"blog_{table}", chance.random())

    while True:
        slug = chance.choice("abcdefgh")
        free = f"NOT EXISTS (SELECT FROM blog_tag WHERE slug = '{slug}')"
        author, article, tag, link = map(some, ("author", "article", "tag", "article_tags"))
        rare = [
            f"DELETE FROM blog_tag WHERE id = {tag}",
            f"DELETE FROM blog_article WHERE id = {article}",
            f"DELETE FROM blog_author WHERE id = {author} AND random() < 0.3",
            f"DELETE FROM blog_article_tags WHERE id = {link}",
        ]
        usual = [
            f"UPDATE blog_tag SET slug = '{slug}' WHERE id = {tag} AND {free}",
            f"UPDATE blog_article_tags SET tag_id = {tag} WHERE id = {link}",
            f"UPDATE blog_article_tags SET article_id = {article} WHERE id = {link}",
            f"UPDATE blog_article SET author_id = {author}, title = title || '!' WHERE id = {article}",
            f"UPDATE blog_author SET name = name || '!' WHERE id = {author}",
            f"INSERT INTO blog_tag SELECT coalesce(max(id), 0) + 1, '{slug}' FROM blog_tag HAVING {free}",
            (
                "INSERT INTO blog_article SELECT coalesce(max(a.id), 0) + 1, w.id, 'T' || random() FROM blog_author w "
                f" LEFT JOIN blog_article a ON true WHERE w.id = {author} GROUP BY w.id"
            ),
            "INSERT INTO blog_author SELECT coalesce(max(id), 0) + 1, 'A' || random() FROM blog_author",
            (
                f"INSERT INTO blog_article_tags (article_id, tag_id) SELECT a.id, t.id FROM blog_article a, blog_tag t "
                f"WHERE a.id = {article} AND t.id = {tag}"
            ),
        ]
        yield chance.choice(rare + 3 * usual)


def transactions(writes: Iterator[str], chance: random.Random, count: int) -> Iterable[str]:
    return ["; ".join(next(writes) for _ in range(chance.randint(1, 4))) for _ in range(count)]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_rules_for_django_leave_nothing_stale_whatever_a_backlog_holds(
    seed: int, database: str, redis_url: str, redis_client: redis.Redis, tmp_path: Path, slot_name: str
) -> None:
    rules = (RULES / "django.yaml").read_text().replace("again_after: 1s", "again_after: 10ms")
    chance = random.Random(seed)
    writes = blog_writes(chance)
    schema = (SCHEMAS / "django.sql").read_text()
    with play(database, redis_url, redis_client, tmp_path, slot_name, schema, rules, BLOG) as reader:
        in_vain = changed = 0
        for number in range(25):
            execute(database, *transactions(writes, chance, 4))
            reader.settle()
            reader.read()
            before = reader.truth()
            some: Sequence[str] = list(transactions(writes, chance, chance.randint(1, 5)))
            (reader.away if number % 3 else reader.run)(*some)
            assert reader.stale() == [], some
            in_vain += len(reader.busted_in_vain())
            truth = reader.truth()
            changed += sum(truth.get(key) != before.get(key) for key in truth.keys() | before.keys())
        print(json.dumps({"seed": seed, "changed": changed, "busted in vain": in_vain}))
        assert changed > 100
        assert not reader.unanswered(), "each of its rules knows its keys"
        assert not reader.daemon.named("query_failed")
