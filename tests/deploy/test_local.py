"""What runs without Kubernetes: the compose file and the systemd unit, held against their own tools and the daemon.

No Docker and no systemd runs here: nothing of this has been started by either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import yaml
from manifests import DEPLOY
from prometheus import promtool
from psycopg.conninfo import conninfo_to_dict
from running import RunningDaemon, execute, settled
from tools import tool

from cdc_invalidator import __version__, errors, settings
from cdc_invalidator.commands import trial
from cdc_invalidator.daemon import LEAVE_SECONDS
from cdc_invalidator.rules.load import load_rules

if TYPE_CHECKING:
    import redis

    from cdc_invalidator.embedded.servers import Postgres

COMPOSE = DEPLOY / "compose"
UNIT = DEPLOY / "systemd/cdc-invalidator.service"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """What docker-compose understands."""
    ran = subprocess.run(
        [tool("docker-compose"), "--file", COMPOSE / "compose.yaml", "config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = yaml.safe_load(ran.stdout)["services"]
    return found


def test_the_daemon_of_the_compose_file_takes_its_settings_and_rules(services: dict[str, Any]) -> None:
    daemon = services["cdc-invalidator"]
    assert daemon["image"] == f"cdc-invalidator:{__version__}"
    assert Path(daemon["build"]["context"], daemon["build"]["dockerfile"]).is_file()
    mounted = {to: Path(here) for here, to, _ in (each.split(":") for each in daemon["volumes"])}
    given = daemon["environment"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(settings.PREFIX)}
    with mock.patch.dict(os.environ, plain | given, clear=True):
        loaded = settings.load(settings.Settings, {})
    rules = load_rules(mounted[str(loaded.rules)], {})
    assert all(result.passed for result in trial.run(rules))
    # The servers, by the names that the daemon knows them by.
    assert {"postgres", "valkey"} <= services.keys()
    assert "@postgres:5432/shop" in given["CDC_POSTGRES_DSN"]
    assert f":{services['postgres']['environment']['CDC_PASSWORD']}@" in given["CDC_POSTGRES_DSN"]
    assert given["CDC_REDIS_URL"] == "redis://valkey:6379/0"


def test_every_file_that_the_compose_file_mounts_is_there_and_no_port_is_open_to_others(
    services: dict[str, Any],
) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            here = volume.split(":")[0]
            assert not here.startswith("/") or Path(here).exists(), volume
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_tables_of_the_compose_file_are_those_of_its_rules(
    postgres: Postgres, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    psql: list[str | Path] = [
        postgres.bin_dir / "psql",
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        f"--file={COMPOSE / 'tables.sql'}",
        database,
    ]
    subprocess.run(psql, check=True)
    # As the image of PostgreSQL runs it, but for the role's name: it belongs to the whole server.
    script = tmp_path / "postgresql.sql"
    script.write_text((DEPLOY / "postgresql.sql").read_text().replace("cdc_invalidator", slot_name))
    parts = conninfo_to_dict(database)
    environment = {f"PG{name.upper()}": str(parts[name]) for name in ("host", "port", "password")}
    environment |= {"POSTGRES_USER": str(parts["user"]), "POSTGRES_DB": str(parts["dbname"]), "CDC_PASSWORD": "local"}
    path = f"{postgres.bin_dir}:{os.environ['PATH']}"
    subprocess.run(["sh", COMPOSE / "role.sh", script], env=os.environ | environment | {"PATH": path}, check=True)
    dsn = postgres.dsn_for(str(parts["dbname"]), user=slot_name, password="local")
    with RunningDaemon(dsn=dsn, redis_url=redis_url, rules=COMPOSE / "rules", slot=slot_name) as daemon:
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.set("shop:prod:user:7", "cached")
        execute(database, "UPDATE users SET name = 'Ada' WHERE id = 7")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("shop:prod:user:7")
        assert daemon.terminate() == 0
        assert not daemon.errors
    ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{slot_name}'"
    execute(database, ended, f"REASSIGN OWNED BY {slot_name} TO CURRENT_USER", f"DROP OWNED BY {slot_name}")
    execute(database, f"DROP ROLE {slot_name}")


def test_prometheus_takes_its_configuration(services: dict[str, Any], tmp_path: Path) -> None:
    (target,) = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    host, port = target["targets"][0].split(":")
    assert host in services
    assert int(port) == settings.fields(settings.Settings)["http_port"].default
    mounted = {to: Path(here) for here, to, _ in (each.split(":") for each in services["prometheus"]["volumes"])}
    text = mounted["/etc/prometheus/prometheus.yml"].read_text()
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/rules.yml", str(mounted["/etc/prometheus/rules.yml"])))
    assert "SUCCESS" in promtool("check", "config", config)


# The unit.


def unit(text: str) -> dict[str, list[str]]:
    """Give the unit's assignments, by name."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def verified(text: str, folder: Path) -> str:
    """Give what systemd-analyze has to say of a unit."""
    path = folder / UNIT.name
    path.write_text(text)
    ran = subprocess.run([tool("systemd-analyze"), "verify", path], capture_output=True, text=True, check=False)
    # It looks at the units of this machine as well.
    return "\n".join(line for line in ran.stderr.splitlines() if UNIT.stem in line)


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    here = UNIT.read_text().replace("/opt/cdc-invalidator/bin/cdc-invalidator", str(Path(sys.executable).resolve()))
    assert verified(here, tmp_path) == ""
    assert "Protectsystem" in verified(here.replace("ProtectSystem=", "Protectsystem="), tmp_path)


def test_the_unit_exposes_little() -> None:
    ran = subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true", "--threshold=15", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-300:]


def test_the_unit_gives_the_daemon_settings_that_there_are_and_the_time_that_it_needs() -> None:
    given = unit(UNIT.read_text())
    variables = dict(each.split("=", 1) for each in given["Environment"])
    known = {settings.PREFIX + name.upper() for name in settings.fields(settings.Settings)} | {"CDC_SECRETS_DIR"}
    assert variables.keys() <= known
    credentials = dict(each.split(":", 1) for each in given["LoadCredential"])
    assert {name.upper() for name in credentials} == {"CDC_POSTGRES_DSN", "CDC_REDIS_URL"}
    assert int(given["TimeoutStopSec"][0]) > LEAVE_SECONDS
    assert given["RestartPreventExitStatus"] == [str(errors.WrongSettings.exit_code)]
