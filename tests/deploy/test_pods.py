"""The manifests' containers, run as a kubelet would: their settings, volumes and probes, beside real servers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
from kubelet import Container, Volumes, environment, probe
from manifests import DEPLOY, Document, kustomize, pods, probes
from running import eventually, execute, settled

if TYPE_CHECKING:
    from pathlib import Path

    import redis


@pytest.mark.parametrize("form", ["sidecar", "standalone"])
def test_the_container_starts_is_probed_busts_and_reads_new_rules(
    form: str, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    documents: list[Document] = kustomize(DEPLOY / "kustomize/example" / form)
    (pod,) = pods(documents)
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)", "CREATE TABLE orders (id int PRIMARY KEY)")
    # A file that an editor wrote ends with a newline.
    secrets = {"cdc_postgres_dsn": f"{database}\n", "cdc_redis_url": f"{redis_url}\n"}
    volumes = Volumes(tmp_path, documents, pod, secrets)
    more = {"CDC_SLOT": slot_name, "CDC_PUBLICATION": slot_name}
    with Container(pod, volumes, more) as daemon:
        for name in probes(pod.ours):
            eventually(partial(probe, daemon, pod.ours, name), name)
        daemon.ready()
        settled(database, redis_client, slot_name)
        redis_client.set("shop:prod:user:1", "cached")
        execute(database, "INSERT INTO users VALUES (1, 'Ada')")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("shop:prod:user:1")
        rules = environment(pod)["CDC_RULES"]
        text = (volumes.mounts[rules] / "rules.yaml").read_text()
        volumes.write(rules, {"rules.yaml": text.replace("public.users", "public.orders")})
        daemon.seen("reloaded")
        eventually(lambda: len(daemon.named("streaming")) >= 2, "it streams by the new rules")
        settled(database, redis_client, slot_name)
        redis_client.set("shop:prod:user:2", "cached")
        execute(database, "INSERT INTO orders VALUES (2)")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("shop:prod:user:2")
        assert daemon.terminate() == 0
        assert not daemon.errors
