"""The image, built for real with buildah on a stand-in for its bases, since tests reach no image registry.

The stand-in is this machine's own Python with the shared libraries that it needs, and no shell; the builder's is this
machine's ``/usr``, read-only. So every instruction of the Dockerfile is carried out, and what runs in the end is what
the Dockerfile put there. The real bases, other machine types and a push to a registry are not covered.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import RunningDaemon

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy/image/Dockerfile"
PYTHON = Path(sys.base_prefix)
# The official images have Python there; Debian's own stays where it is.
PREFIX = Path("/usr" if Path("/usr") == PYTHON else "/usr/local")
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
# The rest of the C library, and the compilers' own: every base has them, and wheels count on them.
MORE_LIBRARIES = ("libdl.so.2", "libgcc_s.so.1", "libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libutil.so.1")
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "__pycache__", "config-*", "_tkinter*", "idlelib")


class Images:
    """Images in a store of their own: all of it lies in that folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        policy = folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._policy = f"--signature-policy={policy}"

    def buildah(self, *words: str | Path) -> str:
        """Run buildah, and give what it printed."""
        store = ["--root", f"{self._folder}/store", "--runroot", f"{self._folder}/run", "--storage-driver", "vfs"]
        command = ["buildah", *store, *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
        assert ran.returncode == 0, f"buildah {words}: {ran.stdout[-4000:]}{ran.stderr[-4000:]}"
        return ran.stdout

    def build(self, tag: str) -> dict[str, Any]:
        """Build the Dockerfile, and give the image's configuration."""
        files = self._folder / "files"
        _make_root(files)
        self._stand_in(base("BUILDER"), files)
        _add_python(files)
        self._stand_in(base("BASE"), files)
        certificates = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
        pip = self._folder / "pip.conf"
        pip.write_text("[global]\ncert = /etc/certificates.pem\n")
        mounts = ["/usr:/usr:ro", f"{PYTHON}:{PREFIX}:ro", f"{PYTHON}:{PYTHON}:ro", f"{pip}:/etc/pip.conf:ro"]
        mounts += [f"{certificates}:/etc/certificates.pem:ro"]
        options = [
            "--isolation",
            "chroot",
            "--pull-never",
            "--format",
            "docker",
            "--file",
            str(DOCKERFILE),
            "--tag",
            tag,
        ]
        options += [f"--volume={mount}" for mount in dict.fromkeys(mounts)]
        self.buildah("bud", self._policy, *options, ROOT)
        configuration: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", tag))["Docker"]["config"]
        return configuration

    def root(self, tag: str) -> Path:
        """Give the folder of the image's root file system."""
        container = self.buildah("from", "--pull-never", self._policy, tag).strip()
        return Path(self.buildah("mount", container).strip())

    def _stand_in(self, name: str, files: Path) -> None:
        container = self.buildah("from", "scratch").strip()
        self.buildah("copy", container, f"{files}/", "/")
        self.buildah("commit", self._policy, "--rm", container, name)


def base(argument: str) -> str:
    """Give the base image that the Dockerfile names under this ARG."""
    found = re.search(rf"^ARG {argument}=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found, f"the Dockerfile has no ARG {argument}"
    return found[1]


def _make_root(root: Path) -> None:
    for folder in ("dev", "etc", "proc", "root", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var/tmp"):
        (root / folder).mkdir(parents=True)
    for link in ("bin", "lib", "lib64", "sbin"):
        (root / link).symlink_to(f"usr/{link}")
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    # Every runtime brings that one.
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")


def _add_python(root: Path) -> None:
    prefix = root / PREFIX.relative_to("/")
    (prefix / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy2(PYTHON / "bin" / VERSION, prefix / "bin")
    (prefix / "bin/python3").symlink_to(VERSION)
    library = prefix / "lib" / VERSION
    shutil.copytree(PYTHON / "lib" / VERSION, library, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in _libraries([prefix / "bin" / VERSION, *(library / "lib-dynload").glob("*.so")]):
        # The loader looks here without being told to.
        shutil.copy2(path, root / "usr/lib" / path.name)
    loader = next((root / "usr/lib").glob("ld-linux*"))
    shutil.copy2(loader, root / "usr/lib64")


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Find the shared libraries that programs are linked to."""
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    more = [re.findall(rf"{re.escape(name)} .* => (/\S+)", known)[0] for name in MORE_LIBRARIES]
    return {Path(path) for path in (*re.findall(r"(/\S+) \(0x", linked), *more)}


class Container(RunningDaemon):
    """A daemon that is started as the image says, by the image's user, from its root file system, which is read-only.

    Args:
        root: the folder of the root file system; what is mounted in it is seen by this process alone.
        image: the image's configuration.
        environment: the settings and whatever else the container gets; the image's own are added.
        mounts: a folder of ours for each path in the container.
    """

    def __init__(self, root: Path, image: dict[str, Any], environment: dict[str, str], mounts: dict[str, Path]) -> None:
        super().__init__(dsn="", redis_url="", rules=Path(), slot=environment.get("CDC_SLOT", "cdc_invalidator"))
        self.port = int(environment["CDC_HTTP_PORT"])
        self._root = root
        self._user = image["User"]
        self._variables = [*image["Env"], *(f"{name}={value}" for name, value in environment.items())]
        self._mounts = mounts
        self.command = self._inside([*image["Entrypoint"], *image["Cmd"]])

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as a health check does."""
        return subprocess.run(self._inside(list(words)), capture_output=True, text=True, check=False, timeout=60)

    def _inside(self, words: list[str]) -> list[str]:
        """Give the command that runs these words there, in a mount namespace of its own."""
        root = str(self._root)
        steps = [
            ["mount", "--bind", root, root],
            ["mount", "--rbind", "/dev", f"{root}/dev"],
            ["mount", "-t", "proc", "proc", f"{root}/proc"],
        ]
        for inside, outside in self._mounts.items():
            Path(root + inside).mkdir(parents=True, exist_ok=True)
            steps.append(["mount", "--bind", "-o", "ro", str(outside), root + inside])
        steps.append(["mount", "-o", "remount,bind,ro", root, root])
        user = [f"--userspec={self._user}", f"--groups={self._user.partition(':')[2]}"]
        # By its absolute name: the PATH is the image's by then, and finds the words in the image.
        steps.append(["exec", "env", "-i", *self._variables, "/usr/sbin/chroot", *user, root, *words])
        return ["unshare", "--mount", "sh", "-ec", "; ".join(map(shlex.join, steps))]
