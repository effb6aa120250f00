"""What is wrong with Kubernetes manifests: by the API's schemas, and by what those don't say.

Documents are parsed YAML; each problem is a sentence that begins with the document's kind and name.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import kubernetes_validate
import yaml
from tools import tool

from cdc_invalidator import __version__, errors, settings
from cdc_invalidator.rules.load import load_rules
from cdc_invalidator.session import DRAIN_SECONDS, FAREWELL_SECONDS

Document = dict[str, Any]

DEPLOY = Path(__file__).parents[1] / "deploy"
# The oldest that has sidecars without a feature gate, one in the middle, and the newest.
KUBERNETES = ("1.29", "1.32", "1.37")
# Kinds of the Prometheus Operator: their schemas are not part of Kubernetes.
WITHOUT_SCHEMA = ("PodMonitor", "PrometheusRule", "ServiceMonitor")
OURS = "cdc-invalidator"

_ENUMS = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "scheme": {"HTTP", "HTTPS"},
    "policyTypes": {"Ingress", "Egress"},
    "strategy.type": {"RollingUpdate", "Recreate"},
    "updateStrategy.type": {"RollingUpdate", "OnDelete"},
    "seccompProfile.type": {"RuntimeDefault", "Localhost", "Unconfined"},
}
_FACTORS = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)}
_FACTORS |= {"Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30)}


def kustomize(folder: Path) -> list[Document]:
    """Build a kustomization.

    Raises:
        AssertionError: kustomize refuses it; with its words.
    """
    ran = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def schema_problems(documents: list[Document], versions: Sequence[str] = KUBERNETES) -> Iterator[str]:
    """Hold documents against the schemas of these versions, which know no field but those that there are."""
    for document in documents:
        for version in versions:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as problem:
                yield f"{_name(document)}: {version}: {'.'.join(map(str, problem.path))}: {problem.message}"
            except kubernetes_validate.SchemaNotFoundError:
                if document.get("kind") not in WITHOUT_SCHEMA:
                    yield f"{_name(document)}: {version} has no {document.get('apiVersion')} {document.get('kind')}"


def problems(documents: list[Document], page: Callable[[str], int], versions: Sequence[str] = KUBERNETES) -> list[str]:
    """Find all that is wrong.

    Args:
        documents: all that is applied together.
        page: the status that a running daemon answers a request for a path with.
        versions: of Kubernetes.
    """
    found = [*schema_problems(documents, versions)]
    for document in documents:
        found += [f"{_name(document)}: {problem}" for problem in (*_enums(document), *_selector(document))]
    for pod in pods(documents):
        for problem in (*_volumes(pod, documents), *_ports(pod), *_pod_security(pod)):
            found.append(f"{pod.name}: {problem}")
        for container in pod.containers:
            for problem in (
                *_resources(container),
                *_security(pod, container),
                *_image(container),
                *_probes(container),
            ):
                found.append(f"{pod.name}: {container['name']}: {problem}")
            if is_ours(container):
                for problem in (
                    *_pages(container, page),
                    *_settings(pod, container, documents),
                    *_shape(pod, container),
                ):
                    found.append(f"{pod.name}: {container['name']}: {problem}")
    return [*found, *_others(documents)]


@dataclass(frozen=True)
class Pod:
    """A workload's Pod template."""

    name: str
    namespace: str | None
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def sidecars(self) -> list[dict[str, Any]]:
        return [one for one in self.spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ours(self) -> dict[str, Any]:
        (container,) = [one for one in self.containers if is_ours(one)]
        return container


def pods(documents: list[Document]) -> list[Pod]:
    """Give the Pods of all workloads."""
    return [
        Pod(
            _name(document),
            document["metadata"].get("namespace"),
            document["spec"]["template"]["metadata"].get("labels", {}),
            document["spec"]["template"]["spec"],
        )
        for document in documents
        if document.get("kind") in {"Deployment", "StatefulSet"}
    ]


def is_ours(container: dict[str, Any]) -> bool:
    return bool(re.fullmatch(rf"(.*/)?{OURS}(:.*|@.*)?", str(container.get("image"))))


def content(documents: list[Document], kind: str, name: str) -> dict[str, str] | None:
    """Give the files of a ConfigMap or a Secret; None when there is none of that name."""
    for document in documents:
        if document.get("kind") == kind and document["metadata"]["name"] == name:
            encoded: dict[str, str] = document.get("data", {}) if kind == "Secret" else {}
            plain: dict[str, str] = document.get("stringData" if kind == "Secret" else "data", {})
            return {file: base64.b64decode(text).decode() for file, text in encoded.items()} | plain
    return None


def volume_source(volume: dict[str, Any]) -> tuple[str, str] | None:
    """Give kind and name of what a volume shows, if it is a ConfigMap or a Secret."""
    if "configMap" in volume:
        return "ConfigMap", volume["configMap"].get("name", "")
    return ("Secret", volume["secret"].get("secretName", "")) if "secret" in volume else None


def probes(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in container}


def _name(document: Document) -> str:
    return f"{document.get('kind')} {document.get('metadata', {}).get('name')}"


def _enums(node: Any, parent: str = "") -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _enums(item, parent)
    elif isinstance(node, dict):
        for key, value in node.items():
            allowed = _ENUMS.get(key) or _ENUMS.get(f"{parent}.{key}")
            for word in value if isinstance(value, list) else [value]:
                if allowed and isinstance(word, str) and word not in allowed:
                    yield f"{key} is {word}; it is one of {', '.join(sorted(allowed))}"
            yield from _enums(value, key)


def _selector(document: Document) -> Iterator[str]:
    if document.get("kind") in {"Deployment", "StatefulSet"}:
        wanted = document["spec"]["selector"]["matchLabels"]
        labels = document["spec"]["template"]["metadata"].get("labels", {})
        if not wanted.items() <= labels.items():
            yield f"the selector {wanted} does not match the template's labels {labels}"


def _volumes(pod: Pod, documents: list[Document]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounts = [(one["name"], mount["name"]) for one in pod.containers for mount in one.get("volumeMounts", [])]
    for container, name in mounts:
        if name not in volumes:
            yield f"{container} mounts a volume {name} that the Pod does not have"
    for name in volumes.keys() - {mounted for _, mounted in mounts}:
        yield f"nobody mounts the volume {name}"
    for volume in volumes.values():
        source = volume_source(volume)
        if source and content(documents, *source) is None and not volume.get(source[0], {}).get("optional"):
            yield f"the volume {volume['name']} shows a {source[0]} {source[1]} that is not there"


def _ports(pod: Pod) -> Iterator[str]:
    names: list[str] = []
    for container in pod.containers:
        for port in container.get("ports", []):
            name = port.get("name", "")
            names.append(name)
            if not re.fullmatch(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?", name) or "--" in name:
                yield f"{name!r} can't be the name of a port: at most 15 of a-z, 0-9 and single hyphens"
    for name in {name for name in names if names.count(name) > 1}:
        yield f"two ports are named {name}"


def _pod_security(pod: Pod) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield f"{field} is set"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false"
    if pod.spec.get("enableServiceLinks") is not False and "CDC_HTTP_PORT" not in str(pod.ours.get("env")):
        yield "a Service called cdc-http would set CDC_HTTP_PORT"


def _security(pod: Pod, container: dict[str, Any]) -> Iterator[str]:
    context = pod.spec.get("securityContext", {}) | container.get("securityContext", {})
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if not context.get("runAsUser"):
        yield "runAsUser is root, or left to the image"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("privileged"):
        yield "it is privileged"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    if "ALL" not in context.get("capabilities", {}).get("drop", []) or context["capabilities"].get("add"):
        yield "its capabilities are not dropped"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "its seccompProfile is not RuntimeDefault"


def quantity(text: object) -> Decimal | None:
    """Read a resource quantity; None when it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|M|G|Ki|Mi|Gi)?", str(text))
    return Decimal(found[1]) * _FACTORS[found[2] or ""] if found else None


def _resources(container: dict[str, Any]) -> Iterator[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for kind in ("requests", "limits"):
        for name, text in resources.get(kind, {}).items():
            if quantity(text) is None:
                yield f"{kind}.{name} is {text}, which is no quantity"
    if "cpu" not in requests or "memory" not in requests:
        yield "it requests no cpu or no memory"
    if "memory" not in limits:
        yield "its memory has no limit"
    for name in requests.keys() & limits.keys():
        least, most = quantity(requests[name]), quantity(limits[name])
        if least is not None and most is not None and least > most:
            yield f"it requests more {name} than its limit"


def _image(container: dict[str, Any]) -> Iterator[str]:
    if re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
        return
    tag = re.fullmatch(r".+?:([\w][\w.-]*)", container["image"].rpartition("/")[2])
    if not tag or tag[1] == "latest":
        yield f"image {container['image']} has no tag of its own"
    elif is_ours(container) and tag[1] != __version__:
        yield f"image {container['image']} is not of version {__version__}"


def _probes(container: dict[str, Any]) -> Iterator[str]:
    names = {port.get("name") for port in container.get("ports", [])}
    numbers = {port["containerPort"] for port in container.get("ports", [])}
    for name, probe in probes(container).items():
        port = probe.get("httpGet", {}).get("port")
        if port not in names | numbers:
            yield f"{name} asks port {port}, which the container does not have"


def _pages(container: dict[str, Any], page: Callable[[str], int]) -> Iterator[str]:
    given = {one["name"]: one.get("value") for one in container.get("env", [])}
    served = int(given.get("CDC_HTTP_PORT") or settings.fields(settings.Settings)["http_port"].default)
    if [port.get("containerPort") for port in container.get("ports", [])] != [served]:
        yield f"its port is not {served}, where the daemon serves its pages"
    for name, probe in probes(container).items():
        path = probe.get("httpGet", {}).get("path")
        if page(path) != 200:
            yield f"{name} asks {path}, and a daemon that is well answers {page(path)}"
        if (path == "/readyz") != (name == "readinessProbe"):
            yield f"{name} asks {path}: /readyz is for readiness, and nothing else is"


def _settings(pod: Pod, container: dict[str, Any], documents: list[Document]) -> Iterator[str]:
    known = {settings.PREFIX + name.upper() for name in settings.fields(settings.Settings)} | {"CDC_SECRETS_DIR"}
    given = {one["name"]: one.get("value", "") for one in container.get("env", [])}
    for name in given:
        if name.startswith(settings.PREFIX) and name not in known:
            yield f"there is no setting {name}"
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    shown: dict[str, dict[str, str]] = {}
    for mount in container.get("volumeMounts", []):
        source = volume_source(volumes.get(mount["name"], {}))
        if source:
            shown[mount["mountPath"]] = content(documents, *source) or {}
            if "subPath" in mount:
                yield f"{mount['mountPath']} is a subPath, which never gets the {source[0]}'s new content"
    secrets, rule_files = given.get("CDC_SECRETS_DIR", ""), given.get("CDC_RULES", "")
    for name, path in (("CDC_SECRETS_DIR", secrets), ("CDC_RULES", rule_files)):
        if path not in shown:
            yield f"{name} is {path}, where no ConfigMap or Secret is mounted"
    for file in shown.get(secrets, {}):
        if file.upper() not in known:
            yield f"there is no setting {file}, as a file of the Secret is named"
    with TemporaryDirectory() as folder:
        for path, files in shown.items():
            Path(folder + path).mkdir(parents=True)
            for file, text in files.items():
                Path(folder + path, file).write_text(text.replace(settings.PLACEHOLDER, "chosen"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(settings.PREFIX)}
        environment |= given | {"CDC_SECRETS_DIR": folder + secrets, "CDC_RULES": folder + rule_files}
        with mock.patch.dict(os.environ, environment, clear=True):
            try:
                load_rules(settings.load(settings.Settings, {}).rules, os.environ)
            except errors.InvalidatorError as error:
                yield f"the daemon refuses: {str(error).replace(folder, '')}"


def _shape(pod: Pod, container: dict[str, Any]) -> Iterator[str]:
    sidecar = container in pod.spec.get("initContainers", [])
    if sidecar and container not in pod.sidecars:
        yield "an init container without restartPolicy Always is no sidecar: the Pod would wait for its end"
    if sidecar and "readinessProbe" in container:
        yield "a sidecar's readinessProbe takes the application out of service"
    if not sidecar and "readinessProbe" not in container:
        yield "without a readinessProbe a rollout does not wait for the standby"
    for name in ("startupProbe", "livenessProbe"):
        if name not in container:
            yield f"it has no {name}"
    if pod.spec.get("terminationGracePeriodSeconds", 30) < 2 * (DRAIN_SECONDS + FAREWELL_SECONDS):
        yield "terminationGracePeriodSeconds is too short for what was received to be applied"


def _others(documents: list[Document]) -> Iterator[str]:
    all_pods = pods(documents)
    for document in documents:
        spec = document.get("spec", {})
        selectors: dict[str, Any] = {
            "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
            "PodDisruptionBudget": (spec.get("selector") or {}).get("matchLabels"),
            "Service": spec.get("selector"),
        }
        if document.get("kind") not in selectors:
            continue
        wanted = selectors[document["kind"]]
        namespace = document["metadata"].get("namespace")
        chosen = [
            pod for pod in all_pods if pod.namespace == namespace and (wanted or {}).items() <= pod.labels.items()
        ]
        if not wanted or not chosen:
            yield f"{_name(document)}: its selector {wanted} matches no Pod"
        ports = [port for pod in chosen for one in pod.containers for port in one.get("ports", [])]
        known = {port.get("name") for port in ports} | {port["containerPort"] for port in ports}
        if document["kind"] == "NetworkPolicy":
            for port in (port for rule in spec.get("ingress", []) for port in rule.get("ports", [])):
                if port.get("port") not in known:
                    yield f"{_name(document)}: it lets in port {port.get('port')}, which no Pod has"
