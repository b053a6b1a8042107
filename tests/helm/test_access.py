"""Who may call the Kubernetes API for what, who may talk to whom, and where secrets come from."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm import rendering
from tests.helm.rendering import ENVIRONMENTS, NAMESPACE, RELEASE, SERVERS, Document

each_environment = pytest.mark.parametrize("environment", [*ENVIRONMENTS, "everything"])

Rights = dict[tuple[str, str], tuple[list[str] | None, list[str]]]

SERVER_OBJECTS = [f"{RELEASE}-serving-{server}" for server in SERVERS]


def _rights(role: Document) -> Rights:
    """Group and resource to the objects' names, or None for all of them, and the verbs."""
    return {
        (group, resource): (rule.get("resourceNames"), rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@each_environment
def test_role__of_the_engine__is_for_its_own_objects_and_verbs_alone(environment: str) -> None:
    found = rendering.documents(environment)
    assert _rights(rendering.find(found, "Role", f"{RELEASE}-engine")) == {
        ("apps", "deployments"): (SERVER_OBJECTS, ["get", "patch"]),
        ("gateway.networking.k8s.io", "httproutes"): ([f"{RELEASE}-serving"], ["get", "patch"]),
        ("", "services"): (SERVER_OBJECTS, ["get"]),
        # The API knows no names for lists; neither tells a secret.
        ("", "pods"): (None, ["list"]),
        ("", "pods/log"): (None, ["get"]),
    }
    assert not rendering.of_kind(found, "ClusterRole", "ClusterRoleBinding")
    named = {known["metadata"]["name"] for known in found if known["kind"] in {"Deployment", "Service"}}
    assert set(SERVER_OBJECTS) <= named
    assert rendering.find(found, "HTTPRoute", f"{RELEASE}-serving")


def test_role__of_what_starts_steps__is_for_pods_alone() -> None:
    found = rendering.documents("production")
    assert _rights(rendering.find(found, "Role", f"{RELEASE}-launcher")) == {
        ("", "pods"): (None, ["create", "get", "list", "watch", "patch", "delete"]),
        ("", "pods/log"): (None, ["get"]),
        ("", "events"): (None, ["list"]),
    }
    assert [role["metadata"]["name"] for role in rendering.of_kind(rendering.documents("dev"), "Role")] == [
        f"{RELEASE}-engine"
    ]


@pytest.mark.parametrize(
    ("role", "bearers"),
    [
        (f"{RELEASE}-engine", [(NAMESPACE, f"{RELEASE}-engine"), ("airflow", "airflow-worker")]),
        (f"{RELEASE}-launcher", [("airflow", "airflow-worker"), ("airflow", "airflow-triggerer")]),
    ],
)
@pytest.mark.parametrize("environment", ["staging", "production"])
def test_role__its_bearers__are_those_named(role: str, bearers: list[tuple[str, str]], environment: str) -> None:
    binding = rendering.find(rendering.documents(environment), "RoleBinding", role)
    assert binding["roleRef"]["name"] == role
    assert [(subject["namespace"], subject["name"]) for subject in binding["subjects"]] == bearers


# Networks.


def _policies(environment: str) -> list[Document]:
    return rendering.of_kind(rendering.documents(environment), "NetworkPolicy")


def _selects(policy: Document, labels: dict[str, str]) -> bool:
    return bool(policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items())


@pytest.mark.parametrize("environment", ["default", "staging", "production", "everything"])
def test_network__by_default__is_closed_for_every_pod_in_both_directions(environment: str) -> None:
    deny = next(policy for policy in _policies(environment) if policy["metadata"]["name"].endswith("default-deny"))
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("environment", ["default", "staging", "production", "everything"])
def test_network__of_every_component__is_opened_by_a_policy_of_its_own(environment: str) -> None:
    policies = [policy for policy in _policies(environment) if policy["spec"]["podSelector"]]
    for name, template in rendering.workloads(rendering.documents(environment)):
        labels = template["metadata"]["labels"]
        own = [policy["metadata"]["name"] for policy in policies if _selects(policy, labels)]
        component = labels["app.kubernetes.io/component"]
        assert own == [f"{RELEASE}-dns", f"{RELEASE}-{component}"], name


def test_network__of_a_steps_pod__is_that_of_the_pipeline() -> None:
    from dags.dag_support.pod_spec import LABELS

    labels = {**LABELS, "app.kubernetes.io/instance": RELEASE, "perch/step": "model_training"}
    policies = [policy for policy in _policies("production") if policy["spec"]["podSelector"]]
    assert [policy["metadata"]["name"] for policy in policies if _selects(policy, labels)] == [
        f"{RELEASE}-dns",
        f"{RELEASE}-pipeline",
    ]


def test_network__switched_off__has_no_policies() -> None:
    assert not _policies("dev")


def _allowed(direction: str, component: str, environment: str = "everything") -> dict[int, list[Any]]:
    """Port to whom it is open for: peers, or [] for everybody."""
    policy = next(known for known in _policies(environment) if known["metadata"]["name"] == f"{RELEASE}-{component}")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    side = "from" if direction == "ingress" else "to"
    return {
        port["port"]: [_peer(peer) for peer in rule.get(side, ())]
        for rule in policy["spec"].get(direction, ())
        for port in rule["ports"]
    }


def _peer(peer: Document) -> str:
    ((kind, selector),) = peer.items()
    labels = selector["matchLabels"]
    return str(labels["app.kubernetes.io/component"] if kind == "podSelector" else next(iter(labels.values())))


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("serving", {3000: ["envoy-gateway-system", "airflow", "watchdog", "pipeline"], 9464: ["monitoring"]}),
        ("mlflow", {5000: ["airflow", "watchdog", "pipeline"]}),
        ("watchdog", {}),
        ("pipeline", {}),
        ("setup", {}),
    ],
)
def test_network__into_a_component__is_open_for_whom_it_serves(component: str, expected: dict[int, list[str]]) -> None:
    assert _allowed("ingress", component) == expected


MOVING_RELEASES = {
    5432: [],
    443: [],
    6443: [],
    465: [],
    587: [],
    9090: ["monitoring"],
    3000: ["serving"],
    5000: ["mlflow"],
}


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("serving", {443: [], 4318: []}),
        ("mlflow", {5432: [], 443: []}),
        # The gateway, as its clients and as its pods see it: the prober comes in as clients do.
        ("watchdog", {**MOVING_RELEASES, 80: [], 10080: [], 10443: []}),
        ("pipeline", MOVING_RELEASES),
        ("setup", {443: [], 6443: []}),
    ],
)
def test_network__out_of_a_component__is_open_for_what_it_asks(component: str, expected: dict[int, list[str]]) -> None:
    assert _allowed("egress", component) == expected


@pytest.mark.parametrize(
    ("uri", "port"),
    [
        ("http://tracking.example.org:5000", 5000),
        ("https://tracking.example.org:8443/mlflow", 8443),
        ("https://tracking.example.org", 443),
        ("http://tracking.example.org/", 80),
        ("http://[2001:db8::1]:5001", 5001),
        ("http://[2001:db8::1]", 80),
    ],
)
@pytest.mark.parametrize("component", ["watchdog", "pipeline"])
def test_network__to_an_mlflow_elsewhere__is_open_at_its_port(component: str, uri: str, port: int) -> None:
    values = rendering.values_of("default", mlflow={"enabled": False, "externalUri": uri})
    policy = rendering.find(rendering.render(values), "NetworkPolicy", f"{RELEASE}-{component}")
    opened = [rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule]
    assert [{"protocol": "TCP", "port": port}] in opened


@pytest.mark.parametrize("environment", ["production", "everything"])
def test_network__between_components__is_open_at_both_ends(environment: str) -> None:
    components = ("serving", "watchdog", "pipeline", "mlflow", "setup")
    for one in components:
        for port, peers in _allowed("egress", one, environment).items():
            for other in set(peers) & set(components):
                assert one in _allowed("ingress", other, environment)[port], f"{one} asks {other} at {port}"


# Secrets.


def _wanted_secrets(found: list[Document]) -> set[str]:
    """Secrets that pods read."""
    wanted = set()
    for _, template in rendering.workloads(found):
        wanted |= {volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume}
        for container in rendering.containers(template):
            for value in rendering.environment_of(container).values():
                if isinstance(value, dict) and "secretKeyRef" in value:
                    wanted.add(value["secretKeyRef"]["name"])
    return wanted


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_secrets__from_an_external_store__are_those_that_pods_read(environment: str) -> None:
    found = rendering.documents(environment)
    made = rendering.of_kind(found, "ExternalSecret")
    assert {known["spec"]["target"]["name"] for known in made} == _wanted_secrets(found)
    for known in made:
        assert known["spec"]["secretStoreRef"] == {"kind": "ClusterSecretStore", "name": environment}
        (source,) = known["spec"]["dataFrom"]
        assert source["extract"]["key"].startswith("perch/")


def test_secrets__without_an_external_store__are_only_named() -> None:
    found = rendering.documents("dev")
    assert not rendering.of_kind(found, "ExternalSecret")
    wanted = {"api-keys", "own-keys", "object-store", "database", "mlflow-database"}
    assert _wanted_secrets(found) == {f"perch-{name}" for name in wanted}


def test_secrets__of_a_cloud_with_roles__are_not_needed_for_the_store() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/perch"}
    accounts = {name: {"annotations": role} for name in ("serving", "engine", "mlflow", "pipeline")}
    found = rendering.render(
        rendering.values_of("default", objectStore={"existingSecret": ""}, serviceAccounts=accounts)
    )
    assert "perch-object-store" not in _wanted_secrets(found)
    for account in rendering.of_kind(found, "ServiceAccount"):
        assert account["metadata"]["annotations"] == role
