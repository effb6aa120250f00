"""The Helm chart, linted and rendered by Helm's own code, without a cluster."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from manifests import DEPLOY, Document
from tools import missing

if TYPE_CHECKING:
    from collections.abc import Mapping

CHART = DEPLOY / "helm/cdc-invalidator"


def helm() -> Any:
    """Give Helm's library, where there is a wheel of it."""
    try:
        import helm_python
    except ImportError:
        missing("helm-python-sdk is not installed here")
    return helm_python


def lint(values: Mapping[str, Any]) -> list[str]:
    """Give what `helm lint --strict` warns of; its advice is left out."""
    report = helm().lint(CHART, dict(values), strict=True)
    return [message["error"] for message in report["messages"] if message["severity"] > 1]


def render(values: Mapping[str, Any], secret: Mapping[str, str], *, namespace: str) -> list[Document]:
    """Render the chart as a release ``cdc-invalidator``, with the Secret that it expects to be there.

    Raises:
        helm_python.HelmError: the values are refused, in Helm's words.
    """
    with helm().Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        files: dict[str, str] = chart.render(dict(values), name="cdc-invalidator", namespace=namespace)
    documents = [
        document
        for name, text in sorted(files.items())
        if Path(name).suffix == ".yaml"
        for document in yaml.safe_load_all(text)
        if document
    ]
    for document in documents:
        # That is where Helm puts them.
        document["metadata"].setdefault("namespace", namespace)
    data = {name: base64.b64encode(text.encode()).decode() for name, text in secret.items()}
    metadata = {"name": values.get("secret", "cdc-invalidator"), "namespace": namespace}
    return [*documents, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}]
