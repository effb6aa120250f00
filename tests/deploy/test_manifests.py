"""The Kubernetes manifests: nothing is wrong with them, and each kind of mistake would be found.

They are held against the API's schemas and against a running daemon; no cluster has seen them.
"""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

import charts
import pytest
import yaml
from manifests import DEPLOY, KUBERNETES, Document, kustomize, pods, problems, schema_problems, volume_source
from running import RunningDaemon
from writing import create, rules_file

from cdc_invalidator import __version__, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cdc_invalidator.embedded.servers import Postgres, Valkey

EXAMPLES = DEPLOY / "kustomize/example"
SECRET = {path.name: path.read_text() for path in (EXAMPLES / "standalone/secret").iterdir()}
VALUES = {"rules": {"rules.yaml": (EXAMPLES / "standalone/rules.yaml").read_text()}}


@pytest.fixture(scope="module")
def page(
    postgres: Postgres, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], int]]:
    """The status that a running daemon, which streams, answers a request for a path with."""
    name = "manifests"
    dsn = postgres.create_database(name)
    create(dsn)
    rules = rules_file(tmp_path_factory.mktemp(name))
    with RunningDaemon(dsn=dsn, redis_url=valkey.url, rules=rules, slot=name) as daemon:
        daemon.ready()
        yield lambda path: daemon.get(path)[0]
    postgres.drop_database(name)


@pytest.fixture(scope="module")
def forms() -> dict[str, list[Document]]:
    """What kustomize makes of the examples, and Helm of the chart."""
    built = {name: kustomize(EXAMPLES / name) for name in ("sidecar", "standalone")}
    return built | {"helm": charts.render(VALUES, SECRET, namespace="shop")}


@pytest.mark.parametrize("form", ["sidecar", "standalone", "helm"])
def test_nothing_is_wrong_with_it(form: str, forms: dict[str, list[Document]], page: Callable[[str], int]) -> None:
    assert problems(forms[form], page) == []


def find(documents: list[Document], kind: str) -> Document:
    (document,) = [one for one in documents if one["kind"] == kind]
    return document


def ours(documents: list[Document]) -> dict[str, Any]:
    (pod,) = pods(documents)
    return pod.ours


def spec(documents: list[Document]) -> dict[str, Any]:
    found: dict[str, Any] = find(documents, "Deployment")["spec"]
    return found


Mistake = tuple[str, "Callable[[list[Document]], object]", str]

# Of each form: what is done to it, and what must be said then.
MISTAKES: list[Mistake] = [
    ("a misspelt field", lambda d: ours(d).update(livenesProbe=ours(d).pop("livenessProbe")), "livenesProbe"),
    ("a wrong type", lambda d: spec(d).update(replicas="2"), "replicas"),
    ("a port that is text", lambda d: ours(d)["ports"][0].update(containerPort="9479"), "containerPort"),
    ("an old API", lambda d: find(d, "Deployment").update(apiVersion="apps/v1beta1"), "apps/v1beta1"),
    ("no such enum", lambda d: ours(d).update(imagePullPolicy="WhenMissing"), "imagePullPolicy is WhenMissing"),
    ("no such strategy", lambda d: spec(d).update(strategy={"type": "Rolling"}), "type is Rolling"),
    (
        "a lower-case word",
        lambda d: spec(d)["template"]["spec"].update(restartPolicy="always"),
        "restartPolicy is always",
    ),
    ("root", lambda d: ours(d)["securityContext"].update(runAsUser=0), "runAsUser is root"),
    ("maybe root", lambda d: ours(d)["securityContext"].update(runAsNonRoot=False), "runAsNonRoot"),
    ("privileges", lambda d: ours(d)["securityContext"].update(privileged=True), "privileged"),
    ("escalation", lambda d: ours(d)["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    ("a writable root", lambda d: ours(d)["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRootFilesystem"),
    ("capabilities", lambda d: ours(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]), "capabilities"),
    (
        "no seccomp",
        lambda d: ours(d)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "seccompProfile",
    ),
    ("the node's network", lambda d: spec(d)["template"]["spec"].update(hostNetwork=True), "hostNetwork"),
    (
        "a token",
        lambda d: spec(d)["template"]["spec"].pop("automountServiceAccountToken"),
        "automountServiceAccountToken",
    ),
    (
        "service links",
        lambda d: (
            spec(d)["template"]["spec"].pop("enableServiceLinks", None),
            ours(d).update(env=[each for each in ours(d)["env"] if each["name"] != "CDC_HTTP_PORT"]),
        ),
        "would set CDC_HTTP_PORT",
    ),
    ("a wrong port", lambda d: ours(d)["livenessProbe"]["httpGet"].update(port=8080), "asks port 8080"),
    ("a wrong port name", lambda d: ours(d)["livenessProbe"]["httpGet"].update(port="metrics"), "asks port metrics"),
    ("a port where nobody listens", lambda d: ours(d)["ports"][0].update(containerPort=9480), "its port is not 9479"),
    ("a wrong path", lambda d: ours(d)["livenessProbe"]["httpGet"].update(path="/healthz"), "asks /healthz"),
    (
        "life by readiness",
        lambda d: ours(d)["livenessProbe"]["httpGet"].update(path="/readyz"),
        "/readyz is for readiness",
    ),
    ("a long port name", lambda d: ours(d)["ports"][0].update(name="cdc-invalidator-metrics"), "name of a port"),
    ("another selector", lambda d: spec(d)["selector"]["matchLabels"].update(app="other"), "does not match"),
    ("an unknown volume", lambda d: ours(d)["volumeMounts"][0].update(name="rules"), "a volume rules that"),
    (
        "no such ConfigMap",
        lambda d: find(d, "ConfigMap")["metadata"].update(name="other"),
        "ConfigMap cdc-invalidator-rules",
    ),
    ("no such Secret", lambda d: find(d, "Secret")["metadata"].update(name="other"), "that is not there"),
    ("a subPath", lambda d: ours(d)["volumeMounts"][0].update(subPath="rules.yaml"), "is a subPath"),
    (
        "an unknown setting",
        lambda d: ours(d)["env"].append({"name": "CDC_REDIS", "value": "x"}),
        "no setting CDC_REDIS",
    ),
    ("an unknown secret", lambda d: find(d, "Secret")["data"].update(redis_url="eA=="), "no setting redis_url"),
    ("a missing secret", lambda d: find(d, "Secret")["data"].pop("cdc_redis_url"), "CDC_REDIS_URL is not set"),
    ("a wrong value", lambda d: ours(d)["env"].append({"name": "CDC_ON_GAP", "value": "no"}), "CDC_ON_GAP is wrong"),
    ("rules elsewhere", lambda d: ours(d)["env"][1].update(value="/rules"), "CDC_RULES is /rules"),
    ("a wrong rule file", lambda d: find(d, "ConfigMap")["data"].update({"rules.yaml": "version: 2"}), "refuses"),
    ("no tag", lambda d: ours(d).update(image="cdc-invalidator"), "no tag"),
    ("whatever is latest", lambda d: ours(d).update(image="a.example/cdc-invalidator:latest"), "no tag"),
    ("another version", lambda d: ours(d).update(image="a.example/cdc-invalidator:0.0.9"), "is not of version"),
    ("no quantity", lambda d: ours(d)["resources"]["limits"].update(memory="64MiB"), "no quantity"),
    (
        "more than the limit",
        lambda d: ours(d)["resources"]["requests"].update(memory="1Gi"),
        "more memory than its limit",
    ),
    ("no limit", lambda d: ours(d)["resources"].pop("limits"), "no limit"),
    ("no probe", lambda d: ours(d).pop("livenessProbe"), "no livenessProbe"),
    ("a short farewell", lambda d: spec(d)["template"]["spec"].update(terminationGracePeriodSeconds=1), "too short"),
    (
        "a policy of nobody",
        lambda d: find(d, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].update(app="other"),
        "matches no Pod",
    ),
    (
        "a budget of nobody",
        lambda d: find(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(app="other"),
        "matches no Pod",
    ),
    (
        "a policy in another namespace",
        lambda d: find(d, "NetworkPolicy")["metadata"].update(namespace="other"),
        "matches no Pod",
    ),
    (
        "a policy for another port",
        lambda d: find(d, "NetworkPolicy")["spec"]["ingress"][-1]["ports"][0].update(port=9187),
        "lets in port 9187",
    ),
]
SIDECAR: list[Mistake] = [
    ("readiness", lambda d: ours(d).update(readinessProbe=ours(d)["livenessProbe"]), "takes the application out"),
    ("no sidecar", lambda d: ours(d).pop("restartPolicy"), "is no sidecar"),
    ("a lower-case word of its own", lambda d: ours(d).update(restartPolicy="always"), "restartPolicy is always"),
    ("one name twice", lambda d: ours(d)["ports"][0].update(name="http"), "two ports are named http"),
]
STANDALONE: list[Mistake] = [
    ("no readiness", lambda d: ours(d).pop("readinessProbe"), "does not wait for the standby"),
    ("readiness by life", lambda d: ours(d)["readinessProbe"]["httpGet"].update(path="/livez"), "/readyz is for"),
]


@pytest.mark.parametrize(
    ("form", "mistake"),
    [
        *[pytest.param("sidecar", mistake, id=f"sidecar: {mistake[0]}") for mistake in MISTAKES + SIDECAR],
        *[pytest.param("standalone", mistake, id=f"standalone: {mistake[0]}") for mistake in MISTAKES + STANDALONE],
    ],
)
def test_a_mistake_is_found(
    form: str, mistake: Mistake, forms: dict[str, list[Document]], page: Callable[[str], int]
) -> None:
    documents = copy.deepcopy(forms[form])
    _, make, words = mistake
    make(documents)
    found = problems(documents, page, KUBERNETES[-1:])
    assert any(words in problem for problem in found), found


def test_a_kubernetes_that_is_too_old_for_sidecars_refuses_them(forms: dict[str, list[Document]]) -> None:
    assert any("restartPolicy" in problem for problem in schema_problems(forms["sidecar"], ["1.27"]))


# Injecting.


def test_the_component_goes_before_what_a_stateful_set_starts_with_and_leaves_others_alone(tmp_path: Path) -> None:
    one = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "one", "labels": {"cdc-invalidator.io/inject": "true"}},
        "spec": {
            "serviceName": "one",
            "selector": {"matchLabels": {"app": "one"}},
            "template": {
                "metadata": {"labels": {"app": "one"}},
                "spec": {
                    "initContainers": [{"name": "migrate", "image": "one:1"}],
                    "containers": [{"name": "one", "image": "one:1"}],
                    "volumes": [{"name": "data", "emptyDir": {}}],
                },
            },
        },
    }
    other = copy.deepcopy(one)
    other["metadata"] = {"name": "other", "labels": {"cdc-invalidator.io/inject": "false"}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump_all([one, other]))
    component = os.path.relpath(DEPLOY / "kustomize/sidecar", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["both.yaml"], "components": [component]})
    )
    first, second = pods(kustomize(tmp_path))
    assert [container["name"] for container in first.containers] == ["cdc-invalidator", "migrate", "one"]
    assert {volume["name"] for volume in first.spec["volumes"]} >= {"data", "cdc-invalidator-rules"}
    assert second.spec == other["spec"]["template"]["spec"]  # type: ignore[index]


# The chart.


def test_the_chart_has_no_lint() -> None:
    assert charts.lint(VALUES) == []


def test_the_chart_is_of_the_same_version_as_the_daemon() -> None:
    about = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (__version__, __version__)


def test_chart_and_kustomization_make_the_same_pod(forms: dict[str, list[Document]]) -> None:
    (ours,), (theirs,) = pods(copy.deepcopy(forms["standalone"])), pods(copy.deepcopy(forms["helm"]))
    assert ours.labels.items() <= theirs.labels.items()
    for pod in (ours, theirs):
        pod.spec["topologySpreadConstraints"][0].pop("labelSelector")
        pod.ours.pop("imagePullPolicy", None)
        pod.ours["image"] = "cdc-invalidator"
        for volume in pod.spec["volumes"]:
            source = volume_source(volume)
            assert source
            volume.update({"configMap": None, "secret": None, "shows": source[0]})
    assert ours.spec == theirs.spec
    assert deployment(forms["standalone"]) == deployment(forms["helm"])


def deployment(documents: list[Document]) -> dict[str, Any]:
    return {name: value for name, value in spec(documents).items() if name not in {"selector", "template"}}


def test_the_chart_takes_the_settings_that_are_no_secrets_and_hands_them_on(page: Callable[[str], int]) -> None:
    schema = json.loads((charts.CHART / "values.schema.json").read_text())
    offered = schema["properties"]["settings"]["properties"]
    fields = settings.fields(settings.Settings)
    secret = {name for name, field in fields.items() if field.type is settings.Secret}
    assert offered.keys() == fields.keys() - secret - {"rules", "http_port"}
    for name, known in offered.items():
        if "enum" in known:
            assert set(known["enum"]) == set(fields[name].variants)
    more = {"settings": {"slot": "shop", "sweep_rate": "5000"}, "env": {"APP_ENV": "staging"}, "replicas": 3}
    documents = charts.render(VALUES | more, SECRET, namespace="shop")
    assert problems(documents, page) == []
    given = {one["name"]: one["value"] for one in ours(documents)["env"]}
    assert given.items() >= {"CDC_SLOT": "shop", "CDC_SWEEP_RATE": "5000", "APP_ENV": "staging"}.items()
    assert spec(documents)["replicas"] == 3


def test_the_chart_writes_large_numbers_in_full() -> None:
    given = {"sweep_rate": 5_000_000, "event_stream_length": 10**9, "verify_sample": 0.05, "standby_limit": 30}
    documents = charts.render(VALUES | {"settings": given, "env": {"SHARD": 12_000_000}}, SECRET, namespace="shop")
    shown = {one["name"]: one["value"] for one in ours(documents)["env"]}
    assert shown.items() >= {f"CDC_{name.upper()}": str(value) for name, value in given.items()}.items()
    assert shown["SHARD"] == "12000000"


EVERYTHING = {
    "fullnameOverride": "busts",
    "nameOverride": "shop-busts",
    "commonLabels": {"team": "shop"},
    "image": {"digest": "sha256:" + "a" * 64},
    "serviceAccount": {"create": True, "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/cdc"}},
    "extraEnv": [{"name": "REGION", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}],
    "extraEnvFrom": [{"configMapRef": {"name": "application"}}],
    "extraVolumes": [{"name": "certificates", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "certificates", "mountPath": "/certificates", "readOnly": True}],
    "extraContainers": [{"name": "vault-agent", "image": "vault:1.20.0"}],
    "extraInitContainers": [{"name": "sql-proxy", "image": "cloud-sql-proxy:2.18.0", "restartPolicy": "Always"}],
    "priorityClassName": "high",
    "networkPolicy": {"extraEgress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
    "service": {"enabled": True},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "podSecurityContext": {"fsGroup": 65532},
    "topologySpreadConstraints": [
        {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "dnsConfig": {"options": [{"name": "ndots", "value": "1"}]},
}


def test_the_chart_takes_what_people_put_beside_a_daemon(page: Callable[[str], int]) -> None:
    documents = charts.render(VALUES | EVERYTHING, SECRET, namespace="shop")
    # What runs beside it is the user's; its own container, and all objects, must be right.
    beside = ("cloud-sql-proxy", "sql-proxy", "vault-agent")
    assert [problem for problem in problems(documents, page) if not any(name in problem for name in beside)] == []
    made = {document["kind"]: document for document in documents if document["kind"] != "Secret"}
    assert sorted(made) == [
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "Service",
        "ServiceAccount",
    ]
    for document in made.values():
        assert document["metadata"]["name"].startswith("busts")
        assert (
            document["metadata"]["labels"].items() >= {"team": "shop", "app.kubernetes.io/name": "shop-busts"}.items()
        )
    (pod,) = pods(documents)
    assert pod.ours["image"] == "cdc-invalidator@sha256:" + "a" * 64
    assert pod.ours["env"][-1] == EVERYTHING["extraEnv"][0]  # type: ignore[index]
    assert [container["name"] for container in pod.containers] == ["sql-proxy", "cdc-invalidator", "vault-agent"]
    assert pod.spec["serviceAccountName"] == "busts"
    assert made["ServiceAccount"]["metadata"]["annotations"] == EVERYTHING["serviceAccount"]["annotations"]  # type: ignore[index]
    # What is given is added to what makes the Pod safe.
    assert pod.spec["securityContext"].items() >= {"fsGroup": 65532, "runAsNonRoot": True}.items()
    assert pod.spec["topologySpreadConstraints"] == EVERYTHING["topologySpreadConstraints"]
    assert made["PodMonitor"]["metadata"]["labels"]["release"] == "prometheus"


def test_the_rules_and_monitors_of_the_chart_are_those_beside_it() -> None:
    documents = charts.render(
        VALUES | {"prometheusRule": {"enabled": True}, "serviceMonitor": {"enabled": True}}, SECRET, namespace="shop"
    )
    alone = yaml.safe_load((DEPLOY / "monitoring/prometheusrule.yaml").read_text())
    assert find(documents, "PrometheusRule")["spec"] == alone["spec"]
    (endpoint,) = find(documents, "ServiceMonitor")["spec"]["endpoints"]
    (port,) = find(documents, "Service")["spec"]["ports"]
    assert endpoint["port"] == port["name"]


def test_the_chart_takes_a_config_map_that_is_there_and_leaves_out_what_is_not_wanted() -> None:
    values = {"rulesConfigMap": "rules", "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}}
    documents = charts.render(values, SECRET, namespace="shop")
    assert sorted(document["kind"] for document in documents) == ["Deployment", "Secret"]
    (pod,) = pods(documents)
    assert {"name": "cdc-invalidator-rules", "configMap": {"name": "rules"}} in pod.spec["volumes"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "2"}, "replicas"),
        ({"settings": {"slots": "shop"}}, "slots"),
        ({"settings": {"postgres_dsn": "postgresql://u:p@h/d"}}, "postgres_dsn"),
        ({"settings": {"on_gap": "no"}}, "on_gap"),
        ({"settings": {"sweep_rate": "many"}}, "sweep_rate"),
        ({"settings": {"sweep_rate": 0.5}}, "sweep_rate"),
        ({"settings": {"standby_limit": -1}}, "standby_limit"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"fullnameOverride": "Shop"}, "fullnameOverride"),
        ({"extraEnv": [{"name": "A", "valeu": "x"}]}, "valeu"),
        ({"extraVolumes": [{"emptyDir": {}}]}, "extraVolumes"),
        ({"serviceAccount": {"creat": True}}, "creat"),
        ({"podMonitor": {"enabled": True, "interval": 15}}, "interval"),
        ({"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}, "scraped twice"),
        ({"env": {"CDC_SLOT": "shop"}}, "CDC_SLOT"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"rules": {"rules": "version: 1"}}, "rules"),
        ({"rules": {}}, "There are no rules"),
        ({"rulesConfigMap": "also"}, "leave one of them out"),
    ],
    ids=str,
)
def test_the_chart_refuses_wrong_values_by_their_names(values: dict[str, Any], words: str) -> None:
    with pytest.raises(charts.helm().HelmError, match=words):
        charts.render(VALUES | values, SECRET, namespace="shop")
