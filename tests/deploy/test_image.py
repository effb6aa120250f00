"""The image: its Dockerfile linted, built, and its own command run as its user on a read-only root file system."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from images import DOCKERFILE, Container, Images
from kubelet import Volumes, environment
from manifests import DEPLOY, kustomize, pods
from running import execute, settled
from tools import missing, tool

from cdc_invalidator import __version__
from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis


def test_the_dockerfile_has_no_lint() -> None:
    ran = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_only_exec_forms_and_numbers_are_used_in_the_last_stage() -> None:
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    instructions = dict(re.findall(r"^([A-Z]+) (.+)$", last, re.MULTILINE))
    assert "RUN" not in instructions, "the base may have no shell"
    assert instructions["USER"] == "65532:65532"
    assert instructions["ENTRYPOINT"].startswith("[")
    assert instructions["CMD"].startswith("[")
    assert 'CMD ["' in instructions["HEALTHCHECK"]


@pytest.mark.parametrize("name", ["requirements.txt", "build-requirements.txt"])
def test_every_requirement_is_pinned_with_hashes_and_no_host_is_named(name: str) -> None:
    text = (DOCKERFILE.parent / name).read_text()
    pinned = re.findall(r"^([a-z0-9-]+)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert pinned
    assert len(pinned) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    assert "://" not in text
    assert "/" not in text.partition("\n#\n")[0]


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    """A store for images, where CI is set: to build one is 40 s of work."""
    if not os.environ.get("CI"):
        pytest.skip("the image is built where CI is set")
    if os.geteuid() != 0:
        missing("building without a registry needs root")
    for name in ("buildah", "chroot", "unshare"):
        tool(name)
    # Not pytest's own folder: it would keep the last three stores.
    with tempfile.TemporaryDirectory(prefix="images-") as folder:
        yield Images(Path(folder))


@pytest.mark.timeout(900)  # 40 s of work for one core, of which others may want their share
def test_the_image_busts_as_its_user_on_a_read_only_root_file_system(
    images: Images, database: str, redis_url: str, redis_client: redis.Redis, slot_name: str, tmp_path: Path
) -> None:
    image = images.build("cdc-invalidator:test")
    labels = image["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert image["User"] == "65532:65532"
    assert labels["org.opencontainers.image.base.name"].startswith("python:")
    root = images.root("cdc-invalidator:test")
    listed = json.loads((root / "opt/cdc-invalidator/sbom.cdx.json").read_text())
    names = {component["name"] for component in listed["components"]}
    assert {"psycopg", "redis", "orjson"} <= names
    assert "cyclonedx-bom" not in names, "what makes the list is no part of the image"
    assert not any((root / shell).exists() for shell in ("bin/sh", "usr/bin/sh", "bin/bash"))

    documents = kustomize(DEPLOY / "kustomize/example/standalone")
    (pod,) = pods(documents)
    execute(database, "CREATE TABLE users (id int PRIMARY KEY, name text)")
    secrets = {"cdc_postgres_dsn": database, "cdc_redis_url": redis_url}
    volumes = Volumes(tmp_path, documents, pod, secrets)
    more = {"CDC_SLOT": slot_name, "CDC_PUBLICATION": slot_name, "CDC_HTTP_PORT": str(free_port())}
    with Container(root, image, environment(pod) | more, volumes.mounts) as daemon:
        daemon.ready()
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert re.search(r"^Uid:\t65532\t65532\t65532\t65532$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        settled(database, redis_client, slot_name)
        redis_client.set("shop:prod:user:1", "cached")
        execute(database, "INSERT INTO users VALUES (1, 'Ada')")
        settled(database, redis_client, slot_name)
        assert not redis_client.exists("shop:prod:user:1")
        # HEALTHCHECK's own words, without a shell.
        kind, *words = image["Healthcheck"]["Test"]
        assert kind == "CMD"
        assert daemon.run(*words).returncode == 0
        assert "Read-only file system" in daemon.run("python3", "-c", "open('/tmp/written', 'w')").stderr
        assert daemon.terminate() == 0
        assert not daemon.errors
        assert daemon.run(*words).returncode == 1
