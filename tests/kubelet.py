"""A container of ours with its volumes, as a kubelet makes them of manifests, and probed as it would."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests import Document, Pod, content, probes, volume_source
from running import RunningDaemon

from cdc_invalidator.embedded.process import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping


class Volumes:
    """The folders of a Pod's ConfigMaps and Secrets, one for each mount of our container.

    Args:
        folder: where they are made.
        documents: the manifests.
        pod: one of their Pods.
        secrets: what stands in the Secret's files instead, by file name; a file that the Secret lacks is not made.
    """

    def __init__(self, folder: Path, documents: list[Document], pod: Pod, secrets: Mapping[str, str]) -> None:
        self.mounts: dict[str, Path] = {}
        sources = {volume["name"]: volume_source(volume) for volume in pod.spec["volumes"]}
        for mount in pod.ours["volumeMounts"]:
            source = sources[mount["name"]]
            assert source, f"the test does not know the volume {mount['name']}"
            files = content(documents, *source)
            assert files is not None
            self.mounts[mount["mountPath"]] = folder / mount["name"]
            self.write(mount["mountPath"], {file: secrets.get(file, text) for file, text in files.items()})

    def write(self, path: str, files: Mapping[str, str]) -> None:
        """Put new content there: a new folder, and the symbolic link to it swapped."""
        folder = self.mounts[path]
        folder.mkdir(exist_ok=True)
        version = Path(tempfile.mkdtemp(prefix="..", dir=folder))
        version.chmod(0o755)
        for file, text in files.items():
            (version / file).write_text(text)
            if not (folder / file).is_symlink():
                (folder / file).symlink_to(f"..data/{file}")
        (folder / "..new").symlink_to(version.name)
        (folder / "..new").rename(folder / "..data")


def environment(pod: Pod) -> dict[str, str]:
    """Give the container's variables."""
    return {one["name"]: one["value"] for one in pod.ours["env"]}


class Container(RunningDaemon):
    """A daemon with a container's settings and volumes, run by this Python.

    Args:
        pod: the Pod.
        volumes: its folders.
        more: variables beside the manifest's.
    """

    def __init__(self, pod: Pod, volumes: Volumes, more: Mapping[str, str]) -> None:
        port = str(free_port())
        super().__init__(dsn="", redis_url="", rules=Path(), slot=more["CDC_SLOT"], http_port=port)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("CDC_")}
        given = {
            name: str(volumes.mounts[value]) if value in volumes.mounts else value
            for name, value in environment(pod).items()
        }
        self._env = {**plain, **given, **more, "CDC_HTTP_PORT": port}


def probe(daemon: RunningDaemon, container: dict[str, Any], name: str) -> bool:
    """Tell whether a probe of the container's succeeds."""
    return 200 <= daemon.get(probes(container)[name]["httpGet"]["path"])[0] < 400
