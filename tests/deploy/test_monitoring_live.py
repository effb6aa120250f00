"""Rules and dashboard against a real Prometheus, which scrapes a leader and a standby at work, and one that observes.

Everything that a panel or an alert may ask for happens first: reads that hit and miss, busts of all kinds, a sweep,
reloads, lost connections, a change of leaders.
"""

from __future__ import annotations

import functools
import json
import math
import re
import signal
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psycopg
import pytest
import redis
import yaml
from prometheus import MONITORING, Prometheus, promtool
from prometheus_client import CollectorRegistry, start_http_server
from running import RunningDaemon, eventually, execute
from tools import tool

from cdc_invalidator.embedded.process import HOST, free_port
from cdc_invalidator.embedded.servers import Postgres, Valkey
from cdc_invalidator.reader import Caches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  user: {key: "w:user:{id}", ttl: 5m, again_after: 1s, publish: "w:busts"}
  page: {key: "w:page:{id}:v{version}", version: "w:page:{id}:ver", ttl: 5m}
  team: {key: "w:team:{team_id}", ttl: 5m}
rules:
  - name: user-changed
    table: public.users
    bust:
      - user
      - page
      - team: {via: "SELECT team_id FROM members WHERE user_id = {id}"}
"""
MORE_RULES = RULES.replace("ttl: 5m}\nrules:", "ttl: 5m}\n  later: {key: 'w:later', ttl_only: true, ttl: 5m}\nrules:")
# What the daemon observes that busts nothing: the application never deletes these.
OBSERVED_RULES = """
version: 1
caches:
  name: {key: "w:name:{id}", ttl: 5m, given: true}
rules:
  - {name: name-changed, table: public.users, bust: [name]}
"""
USERS = 50

DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [
    (f"{panel['title']} {target['refId']}", target)
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]
ALERTS = {
    rule["alert"]
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
# Seconds; Prometheus scrapes every second here.
WINDOW = "30s"


class Load:
    """An application that reads and changes users, whatever happens; use it as a context manager.

    Users and pages are read through the library, whose metrics are at ``port``; teams by hand.
    """

    def __init__(self, dsn: str, url: str, rules: Path, port: int) -> None:
        self._dsn = dsn
        self._url = url
        self._rules = rules
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def metrics(self) -> str:
        """Give what it serves."""
        with urllib.request.urlopen(f"http://{HOST}:{self._port}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")

    def _run(self) -> None:
        registry = CollectorRegistry()
        server, thread = start_http_server(self._port, HOST, registry)
        try:
            with redis.Redis.from_url(self._url) as client, psycopg.connect(self._dsn, autocommit=True) as connection:
                caches = Caches.from_rules(self._rules, client, slot="monitoring", registry=registry)
                self._read(client, caches, connection)
        except Exception as error:  # noqa: BLE001  raised again by the test's own thread
            self._failure = error
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _read(self, client: redis.Redis, caches: Caches, connection: psycopg.Connection[Any]) -> None:
        def load(**given: Any) -> Any:
            row = connection.execute("SELECT name FROM users WHERE id = %s", [given["id"]]).fetchone()
            return row and row[0]

        number = 0
        while not self._stop.wait(0.01):
            number = (number + 1) % USERS
            caches.user.get(id=number, load=load)
            caches.page.get(id=(number + 7) % USERS, load=load)
            # What nobody has committed yet can't be in the cache.
            caches.at_least(2**62).user.get(id=number, load=load)
            client.set(f"w:team:{number % 5}", "cached")
            if number == 0:
                # Some entries are there, and stay as they are for long.
                client.mset({f"w:name:{other}": time.monotonic() for other in range(0, USERS, 3)})
            if number % 2:
                connection.execute("UPDATE users SET name = name || '.' WHERE id = %s", [number])


class Stage(NamedTuple):
    """All that runs."""

    prometheus: Prometheus
    daemons: list[RunningDaemon]
    observing: RunningDaemon
    load: Load

    def alerts(self) -> set[str]:
        """Name the alerts that fire, or soon will; busts may come late here, where machines are slow."""
        return {labels["alertname"] for labels, _ in self.prometheus.query("ALERTS")} - {"CdcInvalidatorSlowBusts"}

    def roles(self) -> tuple[RunningDaemon, RunningDaemon]:
        """Give who leads and who stands by; they may change places whenever a session begins anew."""

        def found() -> list[RunningDaemon]:
            by_role = {daemon.status().get("role"): daemon for daemon in self.daemons}
            return [by_role[role] for role in ("leader", "standby")] if by_role.keys() == {"leader", "standby"} else []

        leader, standby = eventually(found, "one leads, one stands by")
        return leader, standby

    def seen(self, event: str, **fields: Any) -> None:
        """Wait until one of the daemons has told this."""
        eventually(lambda: [each for daemon in self.daemons for each in daemon.named(event, **fields)], event)


@pytest.fixture(scope="module")
def stage(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    for name in ("prometheus", "promtool"):
        tool(name)
    folder = tmp_path_factory.mktemp("monitoring")
    rules = folder / "rules.yaml"
    rules.write_text(RULES)
    dsn = postgres.create_database("monitoring")
    execute(
        dsn,
        "CREATE TABLE users (id int PRIMARY KEY, name text NOT NULL)",
        "CREATE TABLE members (user_id int PRIMARY KEY, team_id int NOT NULL)",
        f"INSERT INTO users SELECT n, '' FROM generate_series(0, {USERS - 1}) n",
        f"INSERT INTO members SELECT n, n % 5 FROM generate_series(0, {USERS - 1}) n",
        "ALTER DATABASE monitoring SET wal_sender_timeout = '2s'",
    )
    port = free_port()
    # The server itself as its own standby: it has always replayed everything.

    def daemon(url: str) -> RunningDaemon:
        return RunningDaemon(
            dsn=dsn, redis_url=url, rules=rules, slot="monitoring", postgres_standbys=dsn, verify_sample="1"
        )

    def observing(url: str) -> RunningDaemon:
        observed = folder / "observed.yaml"
        observed.write_text(OBSERVED_RULES)
        settings = {"mode": "observe", "observe_grace": "0.2"}
        return RunningDaemon(dsn=dsn, redis_url=url, rules=observed, slot="observed", **settings)

    with (
        Valkey() as valkey,
        daemon(valkey.url) as first,
        daemon(valkey.url) as second,
        observing(valkey.url) as third,
        Prometheus(folder, [first, second, third], port) as prometheus,
        Load(dsn, valkey.url, rules, port) as load,
    ):
        yield played(Stage(prometheus, [first.ready(), second.ready()], third.ready(), load), dsn, valkey.url, rules)
    postgres.drop_database("monitoring")


def played(stage: Stage, dsn: str, url: str, rules: Path) -> Stage:
    """Let happen what the panels are there to show."""
    stage.roles()
    # A slot was made, which is a gap. Nothing else is wrong, though one of the two knows hardly anything.
    eventually(lambda: stage.alerts() == {"CdcInvalidatorGap"}, "all else is well")

    for text, event in ((MORE_RULES, "reloaded"), ("version: 2", "reload_failed"), (MORE_RULES, "reload_unchanged")):
        rules.write_text(text)
        for daemon in stage.daemons:
            daemon.seen(event)

    execute(dsn, "TRUNCATE users", f"INSERT INTO users SELECT n, '' FROM generate_series(0, {USERS - 1}) n")
    stage.seen("bust", action="sweep", reason="truncate")
    with redis.Redis.from_url(url) as client:
        clients: Any = client.client_list()
        for each in clients:
            if each["name"] == "cdc-invalidator":
                client.client_kill_filter(_id=each["id"])
    stage.seen("redis_unavailable")

    leader, standby = stage.roles()
    # Long enough for PostgreSQL to give it up.
    leader.send(signal.SIGSTOP)
    eventually(lambda: standby.status()["role"] == "leader", "the standby leads")
    leader.send(signal.SIGCONT)
    eventually(lambda: leader.status().get("role") == "standby", "who led stands by")
    return stage


def in_prometheus(expression: str) -> str:
    """Give an expression as Grafana sends it, with all values of the variables."""
    found = re.sub(r"\$(namespace|job|slot|cache)\b", ".*", expression).replace("$__rate_interval", WINDOW)
    assert "$" not in found.replace('"$1"', "")
    return found


@pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in QUERIES])
def test_each_query_of_the_dashboard_gives_data_that_its_legend_can_name(stage: Stage, target: dict[str, Any]) -> None:
    expression = in_prometheus(target["expr"])

    def found() -> list[Any]:
        return [labels for labels, value in stage.prometheus.query(expression) if not math.isnan(value)]

    series = eventually(found, f"data for {expression}")
    for labels in series:
        # Two lines with one legend can't be told from each other.
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"rule"} <= labels.keys()
    if target["legendFormat"]:
        legends = [
            re.sub(r"{{(\w+)}}", lambda match, labels=labels: labels.get(match[1], ""), target["legendFormat"])  # type: ignore[misc]
            for labels in series
        ]
        assert len(set(legends)) == len(legends)


@pytest.mark.parametrize("drawn", DASHBOARD["annotations"]["list"], ids=lambda drawn: drawn["name"])
def test_each_annotation_is_drawn_where_something_happened(stage: Stage, drawn: dict[str, Any]) -> None:
    now = time.time()
    series = stage.prometheus.ask(
        "query_range", query=in_prometheus(drawn["expr"]), start=str(now - 600), end=str(now), step="1"
    )["result"]
    assert series
    for each in series:
        assert set(re.findall(r"{{(\w+)}}", drawn["textFormat"])) <= each["metric"].keys()
        times = [float(value) / 1000 if drawn["useValueForTime"] else float(at) for at, value in each["values"]]
        assert all(now - 601 < at < now + 1 for at in times)


def test_each_rule_can_be_evaluated(stage: Stage) -> None:
    rules = [rule for group in stage.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == ALERTS
    for rule in rules:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            eventually(functools.partial(stage.prometheus.query, rule["name"]), f"data for {rule['name']}")


def test_each_metric_that_is_named_is_served_by_a_running_daemon_or_reader(stage: Stage) -> None:
    pages = [*(daemon.get("/metrics")[1] for daemon in (*stage.daemons, stage.observing)), stage.load.metrics()]
    served = {re.split(r"[{ ]", line)[0] for page in pages for line in page.splitlines() if not line.startswith("#")}
    rules = (MONITORING / "rules.yml").read_text()
    named = set(re.findall(r"(?<![\w:])cdc_invalidator_\w+", rules))
    # `slot:…` is recorded by the rules.
    named |= {
        name
        for each in (*(target for _, target in QUERIES), *DASHBOARD["annotations"]["list"])
        for name in re.findall(r"(?<![\w:])(?:cdc_invalidator|process)_\w+", each["expr"])
    }
    assert len(named) > 40
    assert named <= served


def test_promtool_has_nothing_against_the_metrics(stage: Stage) -> None:
    for daemon in (*stage.daemons, stage.observing):
        promtool("check", "metrics", given=daemon.get("/metrics")[1])
    promtool("check", "metrics", given=stage.load.metrics())


def test_a_leader_that_became_a_standby_raises_no_alarm(stage: Stage) -> None:
    eventually(
        lambda: {"CdcInvalidatorGap"} >= stage.alerts(),
        "what was wrong for a moment is over, and nothing is left of it",
    )


def test_a_daemon_that_is_gone_is_missed_only_if_it_was_the_last(stage: Stage) -> None:
    leader, standby = stage.roles()
    assert leader.terminate() == 0
    eventually(lambda: stage.prometheus.query("up == 0"), "Prometheus has noticed")
    assert {"CdcInvalidatorGap"} >= stage.alerts()
    assert standby.terminate() == 0
    eventually(lambda: stage.alerts() >= {"CdcInvalidatorAbsent"}, "nobody is left")
