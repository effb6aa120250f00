"""A real Prometheus that scrapes daemons of a test, and its tool for rules and metrics."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from running import RunningDaemon, eventually
from tools import tool

from cdc_invalidator.embedded.process import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MONITORING = Path(__file__).parents[1] / "deploy" / "monitoring"


def promtool(*words: str | Path, given: str = "", folder: Path = MONITORING) -> str:
    """Run ``promtool`` with this on its standard input, and give what it said; it must be content.

    It comes with Debian's package prometheus.
    """
    done = subprocess.run(
        [tool("promtool"), *words], input=given, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


class Prometheus:
    """Scrapes daemons every second, with our rules loaded; use it as a context manager.

    Args:
        folder: where its files go.
        daemons: what is scraped; each has a ``pod`` label, as in Kubernetes.
        application: the port of an application's metrics, another job.
        rules: the rule file.
    """

    def __init__(
        self,
        folder: Path,
        daemons: Iterable[RunningDaemon],
        application: int,
        rules: Path = MONITORING / "rules.yml",
    ) -> None:
        self.port = free_port()
        self._log = folder / "prometheus.log"
        self._config = folder / "prometheus.yml"
        self._data = folder / "prometheus"
        self._config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(rules)],
                    "scrape_configs": [
                        {
                            "job_name": "cdc-invalidator",
                            "static_configs": [
                                {
                                    "targets": [f"{HOST}:{daemon.port}"],
                                    "labels": {"namespace": "shop", "pod": f"shop-{at}"},
                                }
                                for at, daemon in enumerate(daemons)
                            ],
                        },
                        {
                            "job_name": "shop",
                            "static_configs": [{"targets": [f"{HOST}:{application}"], "labels": {"namespace": "shop"}}],
                        },
                    ],
                }
            )
        )

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._data}",
                    f"--web.listen-address={HOST}:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            eventually(self._ready, "Prometheus is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def _ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """Ask its API and give the ``data`` of the answer.

        Raises:
            AssertionError: with what it says is wrong, as with a query.
        """
        url = f"http://{HOST}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """Give what an expression is now: labels and value of each series."""
        found = self.ask("query", query=expression)
        assert found["resultType"] == "vector", expression
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]
