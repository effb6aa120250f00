"""`init`: what it makes of the shop's and of real applications' keys, and what it must not do."""

from __future__ import annotations

import json
import re
import subprocess
from hashlib import md5
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from applications import CLASSIC, MASTODON, MATTERMOST, OUTLINE, THINGSBOARD, ZULIP, Application, Space, make
from clusters import Cluster
from paths import ROOT
from running import command, execute
from sentinels import Sentinels

from cdc_invalidator.embedded import shop
from cdc_invalidator.embedded.servers import Valkey
from cdc_invalidator.reader.keys import NUL, Keys
from cdc_invalidator.rules.load import load_rules, parse_rules
from cdc_invalidator.rules.model import Bust, RuleSet
from cdc_invalidator.rules.template import Template


def shop_keys() -> list[bytes]:
    """The keys that the shop's readers store, its versions, and a reader's locks."""
    keys: list[bytes] = [b"shop:prod:user:7\0lock", b"shop:prod:user:8\0stale", b"cdc:app:watermark"]
    caches = load_rules(shop.rules_file(), {}).caches
    for query in shop.QUERIES:
        of_cache = Keys(caches[query.cache])
        for number in query.numbers():
            key, version = of_cache.of(query.params(number))
            keys.append(key.replace(NUL, b"%d" % (1764000000000 + 977 * number)))
            keys += [version] if version else []
    return list(dict.fromkeys(keys))


def filled(client: redis.Redis, keys: list[bytes]) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.set(key, b"a value that nobody reads", ex=300)
        pipeline.execute()


class Made:
    """The file that a run of `init` has written."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert (done.returncode, done.stderr) == (0, "")
        self.text = done.stdout
        self.rules: RuleSet = parse_rules([("rules.yaml", self.text)], {})

    def every_template(self) -> list[Template]:
        """The templates of all families, also of those that no rule busts."""
        of_rest = re.findall(r'^#   .*\{key: ("(?:[^"\\]|\\.)*")', self.text, re.MULTILINE)
        told = [Template.parse(json.loads(text), {}) for text in of_rest]
        return [*told, *(cache.key for cache in self.rules.caches.values())]

    def busts(self) -> set[tuple[str, str, tuple[tuple[str, str], ...]]]:
        """Table, key, and the columns of each bust."""
        return {
            (str(rule.table), bust.cache.key.text, tuple(sorted(bust.columns.items())))
            for rule in self.rules.rules
            for bust in rule.busts
        }


@pytest.fixture
def shop_database(database: str) -> str:
    shop.create(database)
    return database


def test_the_shop_gets_its_own_caches(
    shop_database: str, redis_url: str, redis_client: redis.Redis, slot_name: str
) -> None:
    filled(redis_client, shop_keys())
    made = Made(command("init", postgres_dsn=shop_database, redis_url=redis_url, publication=slot_name))
    own = load_rules(shop.rules_file(), {})

    def bare(template: Template) -> bytes:
        return b"".join(part if isinstance(part, bytes) else b"{}" for part in template.parts)

    # All caches are found, and no others.
    assert {bare(template) for template in made.every_template()} == {bare(cache.key) for cache in own.caches.values()}
    assert made.busts() == {
        ("public.users", "shop:prod:user:{id}", (("id", "id"),)),
        ("public.users", "shop:prod:user:{id}:dash:v{version}", (("id", "id"),)),
        ("public.orders", "shop:prod:user:{user_id}:orders", (("user_id", "user_id"),)),
        ("public.products", "shop:prod:product:{id}", (("id", "id"),)),
        ("public.reviews", "shop:prod:product:{product_id}:reviews", (("product_id", "product_id"),)),
    }
    dash = made.rules.caches["user-dash"]
    assert dash.version is not None
    assert dash.version.text == "shop:prod:user:{id}:dash:ver"
    assert all(cache.given for cache in made.rules.caches.values())


def test_check_finds_no_error_in_what_was_written_nor_does_anything_change(
    shop_database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    filled(redis_client, shop_keys())
    before = sorted(redis_client.keys())
    path = tmp_path / "rules.yaml"
    given = {"postgres_dsn": shop_database, "redis_url": redis_url, "publication": slot_name}
    done = command("init", "-o", str(path), **given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    checked = command("check", "--format", "json", rules=str(path), slot=slot_name, **given)
    found = json.loads(checked.stdout)["findings"]
    assert [each for each in found if each["severity"] != "note"] == []
    assert sorted(redis_client.keys()) == before
    with psycopg.connect(shop_database) as connection:
        assert connection.execute("SELECT 1 FROM pg_publication").fetchall() == []


# Where the keys come from


@pytest.fixture
def given(shop_database: str, slot_name: str) -> dict[str, str]:
    return {"postgres_dsn": shop_database, "publication": slot_name}


def test_a_user_who_may_see_names_types_and_times_only_is_enough(given: dict[str, str]) -> None:
    acl = (ROOT / "deploy" / "init.acl").read_text().split()[1:]
    with Valkey() as server, redis.Redis.from_url(server.url) as client:
        filled(client, shop_keys())
        client.execute_command("ACL", "SETUSER", *acl)
        url = server.url.replace("://", "://cdc-init:secret@")
        with redis.Redis.from_url(url) as limited:
            for ask in (limited.get, limited.delete, limited.dump):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    ask("shop:prod:user:1")
        assert "user-orders" in Made(command("init", redis_url=url, **given)).rules.caches
        for right in ("scan", "type", "pttl"):
            client.execute_command("ACL", "SETUSER", "cdc-init", f"-{right}")
            refused = command("init", redis_url=url, **given)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert f"Redis failed at {right.upper()} (NOPERM" in refused.stderr
            client.execute_command("ACL", "SETUSER", "cdc-init", f"+{right}")
        # Without DBSIZE, nobody knows how many there are.
        client.execute_command("ACL", "SETUSER", "cdc-init", "-dbsize")
        assert "user-orders" in Made(command("init", redis_url=url, **given)).rules.caches


def test_the_keys_of_all_nodes_of_a_cluster_are_seen(given: dict[str, str]) -> None:
    with Cluster() as cluster:
        client = cluster.client()
        for key in shop_keys():
            client.set(key, b"a value that nobody reads", ex=300)
        made = Made(command("init", redis_url=cluster.url, **given))
    assert f"{len(shop_keys()):,} keys of Redis" in made.text.replace("\n# ", " ")
    assert "user-orders" in made.rules.caches


def test_sentinel_names_the_master_whose_keys_are_seen(given: dict[str, str]) -> None:
    with Sentinels() as sentinels:
        with redis.Redis.from_url(sentinels.current_url()) as client:
            filled(client, shop_keys())
        made = Made(command("init", redis_url=sentinels.url, **given))
    assert "user-orders" in made.rules.caches


def test_a_file_of_keys_does_instead_of_redis(given: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(b"".join(key + b"\n" for key in shop_keys()))
    made = Made(command("init", "--keys", str(path), **given))
    assert made.busts() >= {("public.orders", "shop:prod:user:{user_id}:orders", (("user_id", "user_id"),))}
    path.write_bytes(b"".join(key + b"\tstring\t60\n" for key in shop_keys()))
    assert made.rules.caches["user"].ttl is None
    assert Made(command("init", "--keys", str(path), **given)).rules.caches["user"].ttl == 60_000


def test_control_signs_in_names_of_tables_and_keys_are_escaped_in_the_file(
    database: str, slot_name: str, tmp_path: Path
) -> None:
    ugly = "us\x1b[31mers\x07\x7f\x9b"
    execute(
        database,
        f'CREATE TABLE "{ugly}" (id int PRIMARY KEY, "na\x1bme" text)',
        f"INSERT INTO \"{ugly}\" SELECT n, 'n' || n FROM generate_series(1, 50) n",
    )
    keys = tmp_path / "keys"
    keys.write_text("".join(f"shop:{ugly}:{n}\nshop:{ugly}\x1b:x:{n}\n" for n in range(1, 51)))
    ended = command("init", "--keys", str(keys), postgres_dsn=database, publication=slot_name)
    assert ended.stderr == ""
    assert ended.stdout.replace("\n", "").isprintable()
    assert r"us\x1b[31mers" in Made(ended).text


def test_a_dump_does_instead_of_redis(given: dict[str, str]) -> None:
    with Valkey() as server:
        for number in (0, 2):
            with redis.Redis.from_url(server.url_for(number)) as client:
                filled(client, shop_keys() if number else [b"other"])
                client.xadd("shop:stream", {"a": "b"})
                client.save()
        path = server.folder / "dump.rdb"
        made = Made(command("init", "--from-redis-dump", str(path), "--database", "2", **given))
        assert made.busts() >= {("public.orders", "shop:prod:user:{user_id}:orders", (("user_id", "user_id"),))}
        assert made.rules.caches["user"].ttl == 300_000
        seen = f"{len(shop_keys()) + 1:,} keys of database 2 in a dump of Redis"
        assert seen in made.text.replace("\n# ", " ")
        some = Made(command("init", "--from-redis-dump", str(path), "--database", "2", "--sample", "600", **given))
        assert f"600 keys of about {len(shop_keys()) + 1:,} of database 2" in some.text.replace("\n# ", " ")
        text = path.read_bytes()
        path.write_bytes(text[:-1000])
        refused = command("init", "--from-redis-dump", str(path), "--database", "2", **given)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == (
            f"{path} ends too early, so it is only a part of an RDB file; copy it again, or make a new one with "
            "`redis-cli --rdb FILE`.\n"
        )


def test_of_many_keys_only_a_sample_is_seen_and_the_file_says_so(
    given: dict[str, str], redis_url: str, redis_client: redis.Redis
) -> None:
    filled(redis_client, shop_keys())
    made = Made(command("init", "--sample", "600", redis_url=redis_url, **given))
    (seen, of) = re.findall(r"names of ([0-9]+) keys of about ([0-9,]+)\s", made.text)[0]
    assert 600 <= int(seen) <= 900
    assert of == f"{len(shop_keys()):,}"
    assert "a larger --sample finds them" in made.text


# What it refuses, and what it leaves out


def test_a_file_that_is_there_is_overwritten_only_by_force(given: dict[str, str], tmp_path: Path) -> None:
    keys, path = tmp_path / "keys.txt", tmp_path / "rules.yaml"
    keys.write_bytes(b"".join(key + b"\n" for key in shop_keys()))
    path.write_text("mine")
    refused = command("init", "--keys", str(keys), "-o", str(path), **given)
    assert (refused.returncode, path.read_text()) == (2, "mine")
    assert refused.stderr == f"{path} is there already; give another --output, or --force.\n"
    assert command("init", "--keys", str(keys), "-o", str(path), "--force", **given).returncode == 0
    assert load_rules(path, {}).caches


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "can't be read (No such file or directory); give another --keys."),
        (b"user:1\nuser:2\tstring\tsoon\n", ":2: this is not a key, or a key, its type and its remaining seconds"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_a_word_of_it(
    text: bytes | None, sentence: str, given: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "keys.txt"
    if text is not None:
        path.write_bytes(text)
    refused = command("init", "--keys", str(path), **given)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"{path}")
    assert sentence in refused.stderr
    assert "user" not in refused.stderr
    assert "soon" not in refused.stderr


def test_without_redis_and_without_a_file_it_says_what_to_give(given: dict[str, str]) -> None:
    refused = command("init", **given)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "CDC_REDIS_URL is not set; set it, or give --keys with a file of key names, or --from-redis-dump.\n"
    )
    refused = command("init", "--keys", "keys.txt", "--from-redis-dump", "dump.rdb", **given)
    assert (refused.returncode, refused.stderr) == (2, "Give either --keys or --from-redis-dump, not both.\n")


def test_a_table_that_can_not_be_published_gets_no_rule_but_the_sql_that_helps(
    database: str, slot_name: str, tmp_path: Path
) -> None:
    execute(database, "CREATE TABLE visits (id int, page text); CREATE UNIQUE INDEX ON visits (id)")
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"visit:{n}\n" for n in range(50)))
    made = Made(command("init", "--keys", str(keys), postgres_dsn=database, publication=slot_name))
    assert not made.rules.caches
    assert "visits" in made.text


def test_keys_of_an_index_and_of_few_values_get_their_columns(database: str, slot_name: str, tmp_path: Path) -> None:
    execute(
        database,
        "CREATE TYPE state AS ENUM ('open', 'paid', 'sent', 'lost')",
        "CREATE TABLE parcels (id int PRIMARY KEY, tenant_id int, weight int, status state, lane text)",
        "CREATE INDEX ON parcels (tenant_id, status)",
        "CREATE INDEX ON parcels (weight, status)",
        "INSERT INTO parcels SELECT n, n % 23, 900 - n, (ARRAY['open', 'paid', 'sent'])[1 + n % 3]::state, "
        "(ARRAY['north', 'south'])[1 + n % 2] FROM generate_series(1, 600) AS n",
        "ALTER TABLE parcels REPLICA IDENTITY FULL",
        "ANALYZE parcels",
    )
    states = ("open", "paid", "sent")
    keys = [f"app:parcels:{tenant}:{state}" for tenant in range(23) for state in states]
    keys += [f"app:parcels:lane:{lane}:{n}" for lane in ("north", "south") for n in range(1, 40)]
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"{key}\tstring\t60\n" for key in keys))
    made = Made(command("init", "--keys", str(path), postgres_dsn=database, publication=slot_name))
    (bust,) = made.busts()
    assert bust == (
        "public.parcels",
        "app:parcels:{tenant_id}:{status}",
        (("status", "status"), ("tenant_id", "tenant_id")),
    )
    assert "app:parcels:lane:{lane}:{" in made.text


def test_data_does_not_show_in_the_file(database: str, slot_name: str, tmp_path: Path) -> None:
    execute(
        database,
        "CREATE TABLE members (id int PRIMARY KEY, nick text UNIQUE);"
        "INSERT INTO members SELECT n, 'nick' || md5(n::text) FROM generate_series(1, 200) AS n; ANALYZE members",
    )
    nicks = [f"nick{md5(b'%d' % n).hexdigest()}" for n in range(1, 201)]
    keys = [f"app:member:{nick}" for nick in nicks] + [f"app:member:{nick}:friends" for nick in nicks]
    keys += [
        "app:hildegard",
        "app:hildegard@abbey.example",
        "hildegard:1",
        "app:member:hildegard",
        "hildegard von bingen",
    ]
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"{key}\n" for key in keys))
    made = Made(command("init", "--keys", str(path), postgres_dsn=database, publication=slot_name))
    assert ("public.members", "app:member:{nick}", (("nick", "nick"),)) in made.busts()
    assert "hildegard" not in made.text
    assert not any(nick[4:12] in made.text for nick in nicks)
    assert "4 keys in no family" in made.text


# Real applications


class Judged:
    """What was made of an application's keys: which of its families were found, and what the rules would bust."""

    def __init__(self, application: Application, space: Space, made: Made) -> None:
        self._name = application.name
        self._templates = made.every_template()
        self.every = {key for keys in space.keys for key in keys}
        of_key = {key: self._template_of(key) for key in self.every}
        self.found: list[str] = []
        self.lost: list[str] = []
        self.matched: list[str] = []
        self.wrong: list[str] = []
        for family, keys in zip(application.families, space.keys, strict=True):
            of_family = {of_key[key] for key in keys}
            # Keys of one table that look alike are one family for anybody who sees only them.
            own = {key for other, some in zip(application.families, space.keys, strict=True)
                   if other.tables & family.tables for key in some} | set(keys)  # fmt: skip
            whole = "" not in of_family and all(key in own for key in self.every if of_key[key] in of_family)
            (self.found if whole else self.lost).append(family.key)
            busts = [(rule.table.name, bust) for rule in made.rules.rules for bust in rule.busts
                     if bust.cache.key.text in of_family]  # fmt: skip
            if busts and {table for table, _ in busts} <= family.tables:
                self.matched.append(family.key)
            self.wrong += [f"{table}: {bust.cache.key.text}" for table, bust in busts if table not in family.tables]
        self.wrong += [
            f"{rule.table}: {bust.cache.key.text} busts nothing"
            for rule in made.rules.rules
            for bust in rule.busts
            if not self._busts(bust, space.rows[rule.table.name])
        ]

    def _template_of(self, key: str) -> str:
        """Return the most exact of the templates that a key fits."""
        fitting = [each for each in self._templates if each.match(key.encode()) is not None]
        literals = {each.text: sum(len(part) for part in each.parts if isinstance(part, bytes)) for each in fitting}
        return max(literals, key=literals.__getitem__, default="")

    def _busts(self, bust: Bust, rows: list[dict[str, Any]]) -> bool:
        """Whether at least a tenth of the rows names a key that is there."""
        hits = 0
        for row in rows:
            key = bust.cache.key.render({name: str(row[column]) for name, column in bust.columns.items()})
            assert key is not None
            text = key.decode()
            hits += any(other.startswith(text) for other in self.every) if bust.cache.key.rest else text in self.every
        return hits >= 0.1 * len(rows)

    def figures(self) -> str:
        return (
            f"{self._name}: {len(self.found)} of {len(self.found) + len(self.lost)} families found, "
            f"{len(self.matched)} with a rule on the right table, {len(self.wrong)} wrong rules"
        )


@pytest.mark.parametrize(
    ("application", "found", "matched"),
    [(THINGSBOARD, 38, 32), (MASTODON, 16, 7), (OUTLINE, 8, 0), (CLASSIC, 22, 14), (ZULIP, 13, 4), (MATTERMOST, 27, 6)],
    ids=lambda each: getattr(each, "name", ""),
)
def test_of_a_real_application_most_families_are_found_and_no_rule_is_wrong(
    application: Application,
    found: int,
    matched: int,
    database: str,
    redis_url: str,
    redis_client: redis.Redis,
    slot_name: str,
    tmp_path: Path,
) -> None:
    space = make(application, database)
    filled(redis_client, [key.encode() for keys in space.keys for key in keys])
    given = {"postgres_dsn": database, "redis_url": redis_url, "publication": slot_name}
    made = Made(command("init", **given))
    judged = Judged(application, space, made)
    print(judged.figures(), "\nnot found:", *judged.lost, "\nno rule:", *(set(judged.found) - set(judged.matched)))
    assert judged.wrong == []
    path = tmp_path / "rules.yaml"
    path.write_text(made.text)
    checked = command("check", "--format", "json", rules=str(path), slot=slot_name, **given)
    # Sweeps that others' keys match are the application's choice of names.
    grave = {each["code"] for each in json.loads(checked.stdout)["findings"] if each["severity"] != "note"}
    assert (checked.returncode, grave - {"sweeps_others"}) == (0, set())
    assert len(judged.found) >= found
    assert len(judged.matched) >= matched
