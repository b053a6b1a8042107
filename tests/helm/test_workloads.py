"""Every pod of the chart: locked down, bounded, fed with settings that exist, and found by what looks for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helm_python import Chart, HelmRenderError

from pipelines.object_storage.settings import S3Settings
from pipelines.params import load_params
from pipelines.settings import Settings
from serving.metrics import ROUTES
from serving.settings import ServingSettings
from tests.helm import rendering
from tests.helm.rendering import ENVIRONMENTS, PROJECT, RELEASE, SERVERS, Document

each_environment = pytest.mark.parametrize("environment", [*ENVIRONMENTS, "everything"])
each_server = pytest.mark.parametrize("server", SERVERS)

PERCH_VARIABLES = {f"PERCH_{name.upper()}" for name in Settings.model_fields}
PERCH_VARIABLES |= {f"PERCH_S3_{name.upper()}" for name in S3Settings.model_fields}

DOCKERFILES = {name: (PROJECT / f"docker/{name}.Dockerfile").read_text() for name in ("serving", "pipeline")}


def deployment(server: str, environment: str = "everything") -> Document:
    return rendering.find(rendering.documents(environment), "Deployment", f"{RELEASE}-serving-{server}")


def pods(environment: str) -> list[tuple[str, Document]]:
    found = list(rendering.workloads(rendering.documents(environment)))
    assert {name for name, _ in found} == {
        *(f"{RELEASE}-serving-{server}" for server in SERVERS),
        f"{RELEASE}-watchdog",
        f"{RELEASE}-mlflow",
        f"{RELEASE}-setup-1",
    }
    return found


@each_environment
def test_pods__by_pod_security_restricted__are_allowed(environment: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a root that is read-only."""
    for name, template in pods(environment):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {"emptyDir", "configMap", "secret"}
        for container in rendering.containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert not any("hostPort" in port for port in container.get("ports", ()))


@each_environment
def test_pods__what_they_write__are_volumes_with_a_bound(environment: str) -> None:
    for name, template in pods(environment):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for volume in volumes.values():
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], name
        for container in rendering.containers(template):
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert "emptyDir" in volumes[mounts["/tmp"]["name"]], name
            for mount in mounts.values():
                assert mount["name"] in volumes, f"{name} mounts {mount['name']}"
                assert mount.get("readOnly") or "emptyDir" in volumes[mount["name"]], f"{name} {mount['mountPath']}"


@each_environment
def test_pods__their_user_and_their_folders__are_those_of_the_images(environment: str) -> None:
    for name, template in pods(environment):
        user = template["spec"]["securityContext"]["runAsUser"]
        for container in rendering.containers(template):
            image = re.search(r"perch-(\w+):", container["image"])
            assert image, container["image"]
            text = DOCKERFILES[image[1]]
            assert f"USER {user}:" in text, name
            for folder in json.loads(re.search(r"^VOLUME (.*)$", text, re.MULTILINE)[1]):
                # The set-up is a script of the standard library, which has no home.
                assert folder in {mount["mountPath"] for mount in container["volumeMounts"]} or "setup" in name


@each_environment
def test_containers__their_resources__are_asked_for_and_bounded(environment: str) -> None:
    for name, template in pods(environment):
        for container in rendering.containers(template):
            for side in ("requests", "limits"):
                assert set(container["resources"][side]) == {"cpu", "memory", "ephemeral-storage"}, name


def _mebibytes(size: str) -> int:
    return int(size[:-2]) * {"Mi": 1, "Gi": 1024, "Ti": 1024**2}[size[-2:]]


@each_environment
def test_containers__the_disk_they_may_take__is_what_their_volumes_may_hold(environment: str) -> None:
    """A pod is evicted beyond the sum of its containers' limits, whatever its volumes' own limits say."""
    for name, template in pods(environment):
        volumes = sum(
            _mebibytes(known["emptyDir"]["sizeLimit"]) for known in template["spec"]["volumes"] if "emptyDir" in known
        )
        for container in rendering.containers(template):
            resources = container["resources"]
            assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"], name
            # And its logs: a kubelet keeps five files of 10 MiB.
            assert volumes + 50 < _mebibytes(resources["limits"]["ephemeral-storage"]) <= volumes + 128, name


def test_containers__other_volumes_or_a_limit_of_ones_own__are_what_counts() -> None:
    small = {"volumes": {"release": "512Mi", "home": "1Gi", "tmp": "1024Ki"}}
    own = {"limits": {"ephemeral-storage": "9Gi"}}
    found = rendering.render(rendering.values_of("default", serving={**small, "resources": own}))
    spec = rendering.find(found, "Deployment", f"{RELEASE}-serving-a")["spec"]["template"]["spec"]
    disks = [
        container["resources"][side]["ephemeral-storage"]
        for container in (*spec["initContainers"], *spec["containers"])
        for side in ("requests", "limits")
    ]
    assert disks == ["1665Mi", "1665Mi", "1665Mi", "9Gi"]


@each_environment
def test_images__of_an_installation__are_of_one_version(environment: str) -> None:
    images = {container["image"] for _, template in pods(environment) for container in rendering.containers(template)}
    prefix = "registry.example/perch/" if environment == "everything" else ""
    assert images == {f"{prefix}perch-serving:{rendering.TAG}", f"{prefix}perch-pipeline:{rendering.TAG}"}


@each_environment
def test_pods__settings_they_are_given__exist(environment: str) -> None:
    known = PERCH_VARIABLES | {f"PERCH_SERVING_{name.upper()}" for name in ServingSettings.model_fields}
    for name, template in pods(environment):
        for container in rendering.containers(template):
            given = {variable for variable in rendering.environment_of(container) if variable.startswith("PERCH_")}
            assert given <= known, name


@each_environment
def test_pods__no_secret__is_written_out(environment: str) -> None:
    """Credentials come from Secrets that others make; the chart has none of its own."""
    found = rendering.documents(environment)
    assert not rendering.of_kind(found, "Secret")
    secret = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|DATABASE_URL|BACKEND_STORE_URI|NOTICE_URLS")
    seen = set()
    for _, template in pods(environment):
        for container in rendering.containers(template):
            for variable, value in rendering.environment_of(container).items():
                if secret.search(variable):
                    assert set(value) == {"secretKeyRef"}, variable
                    seen.add(variable)
    assert {"AWS_SECRET_ACCESS_KEY", "PERCH_DATABASE_URL", "MLFLOW_BACKEND_STORE_URI"} <= seen


@each_environment
def test_pods__addresses_of_services__are_not_put_into_their_environment(environment: str) -> None:
    """Kubernetes would set PERCH_SERVING_A_PORT and PERCH_MLFLOW_PORT, the second of which is a setting."""
    assert all(template["spec"]["enableServiceLinks"] is False for _, template in pods(environment))


@each_environment
def test_pods__their_accounts__exist_and_only_who_calls_the_api_has_a_token(environment: str) -> None:
    accounts = {
        known["metadata"]["name"] for known in rendering.of_kind(rendering.documents(environment), "ServiceAccount")
    }
    for name, template in pods(environment):
        spec = template["spec"]
        assert spec["serviceAccountName"] in accounts
        is_engine = spec["serviceAccountName"] == f"{RELEASE}-engine"
        assert spec["automountServiceAccountToken"] is is_engine
        assert is_engine == (name in {f"{RELEASE}-watchdog", f"{RELEASE}-setup-1"})


def services_with_pods(found: list[Document]) -> list[Document]:
    """All but the one that the route leads to before there is a release."""
    return [known for known in rendering.of_kind(found, "Service") if not known["metadata"]["name"].endswith("-none")]


@each_environment
def test_selectors__of_whatever_chooses_pods__choose_just_those_meant(environment: str) -> None:
    found = rendering.documents(environment)
    labels = {name: template["metadata"]["labels"] for name, template in pods(environment)}

    def chosen(selector: dict[str, str]) -> set[str]:
        return {name for name, known in labels.items() if selector.items() <= known.items()}

    for known in rendering.of_kind(found, "Deployment", "PodDisruptionBudget"):
        assert chosen(known["spec"]["selector"]["matchLabels"]) == {known["metadata"]["name"]}
    for known in services_with_pods(found):
        assert chosen(known["spec"]["selector"]) == {known["metadata"]["name"]}
    for known in rendering.of_kind(found, "HorizontalPodAutoscaler"):
        assert known["spec"]["scaleTargetRef"]["name"] == known["metadata"]["name"] in labels
    serving = labels[f"{RELEASE}-serving-a"]
    for constraint in deployment("a", environment)["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= serving.items()
        assert constraint["labelSelector"]["matchLabels"]["perch/server"] == "a"


@each_environment
def test_services__their_ports__are_those_of_the_pods_behind_them(environment: str) -> None:
    found = rendering.documents(environment)
    templates = dict(pods(environment))
    for service in services_with_pods(found):
        template = templates[service["metadata"]["name"]]
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for server in SERVERS:
        (container,) = deployment(server, environment)["spec"]["template"]["spec"]["containers"]
        variables = rendering.environment_of(container)
        assert {port["name"]: str(port["containerPort"]) for port in container["ports"]} == {
            "http": variables["PERCH_SERVING_PORT"],
            "metrics": variables["PERCH_SERVING_METRICS_PORT"],
        }
        assert f"EXPOSE {variables['PERCH_SERVING_PORT']}\n" in DOCKERFILES["serving"]


# The servers.


@each_server
@pytest.mark.parametrize("is_install", [True, False], ids=["install", "upgrade"])
def test_server__what_the_engine_decides__is_not_in_the_chart(server: str, is_install: bool) -> None:
    """A chart that named it would take it back at the next upgrade or rollback."""
    found = rendering.render(rendering.everything(), is_install=is_install, is_upgrade=not is_install)
    known = rendering.find(found, "Deployment", f"{RELEASE}-serving-{server}")
    assert "replicas" not in known["spec"]
    assert not any(key.startswith("perch/release") for key in known["spec"]["template"]["metadata"]["annotations"])


@pytest.mark.parametrize(
    ("environment", "replicas"),
    [("dev", ["1", "1", "1"]), ("staging", ["2", "2", "1"]), ("production", ["3", "3", "1"])],
)
def test_server__how_many_the_engine_begins_with__is_what_the_autoscaler_would_leave(
    environment: str, replicas: list[str]
) -> None:
    assert [
        deployment(server, environment)["metadata"]["annotations"]["perch/replicas"] for server in SERVERS
    ] == replicas


@each_server
def test_server__its_release__reaches_it_verified_through_a_volume(server: str) -> None:
    template = deployment(server)["spec"]["template"]
    (first,), (second,) = template["spec"]["initContainers"], template["spec"]["containers"]
    assert first["args"] == ["--fetch-only", "/release"]
    fetching, serving = rendering.environment_of(first), rendering.environment_of(second)
    for name, annotation in (("URL", "perch/release-url"), ("DIGEST", "perch/release-digest")):
        path = {"fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}
        assert fetching[f"PERCH_SERVING_RELEASE_{name}"] == path
    assert serving["PERCH_SERVING_RELEASE_DIGEST"] == fetching["PERCH_SERVING_RELEASE_DIGEST"]
    assert serving["PERCH_SERVING_RELEASE_URL"] == "/release"
    mounts = [{mount["mountPath"]: mount for mount in container["volumeMounts"]} for container in (first, second)]
    assert mounts[0]["/release"]["name"] == mounts[1]["/release"]["name"] == "release"
    assert mounts[1]["/release"]["readOnly"] is True
    for container, mount in zip((fetching, serving), mounts, strict=True):
        assert container["PERCH_SERVING_PUBLIC_KEYS"] in mount


def test_server__keeps_no_predictions__has_no_credentials() -> None:
    """Only the container that fetches needs the store then."""
    found = rendering.render(rendering.values_of("production", objectStore={"predictionsUrl": ""}))
    template = rendering.find(found, "Deployment", f"{RELEASE}-serving-a")["spec"]["template"]
    (first,), (second,) = template["spec"]["initContainers"], template["spec"]["containers"]
    assert "AWS_SECRET_ACCESS_KEY" in rendering.environment_of(first)
    assert not any(name.startswith("AWS") for name in rendering.environment_of(second))


@each_server
def test_server__an_exchange_of_releases__leaves_nobody_without_an_answer(server: str) -> None:
    spec = deployment(server)["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (container,) = spec["template"]["spec"]["containers"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    timeout_s = ServingSettings.model_fields["request_timeout_s"].default
    assert 0 < int(seconds) + timeout_s < spec["template"]["spec"]["terminationGracePeriodSeconds"]


@each_server
def test_server__its_probes__ask_what_the_service_answers(server: str) -> None:
    (container,) = deployment(server)["spec"]["template"]["spec"]["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    for probe in probes.values():
        assert probe["httpGet"]["path"] in ROUTES
        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@pytest.mark.parametrize("server", ["a", "b"])
def test_server__its_autoscaler_and_its_budget__are_those_asked_for(server: str) -> None:
    found, name = rendering.documents("production"), f"{RELEASE}-serving-{server}"
    spec = rendering.find(found, "HorizontalPodAutoscaler", name)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 20)
    targets = {
        (metric.get("resource") or metric["pods"]["metric"])["name"]: (metric.get("resource") or metric["pods"])[
            "target"
        ]
        for metric in spec["metrics"]
    }
    assert targets == {
        "cpu": {"type": "Utilization", "averageUtilization": 70},
        "memory": {"type": "Utilization", "averageUtilization": 80},
        "perch_requests_per_second": {"type": "AverageValue", "averageValue": "100"},
    }
    assert rendering.find(found, "PodDisruptionBudget", name)["spec"]["minAvailable"] == 2
    assert len(rendering.of_kind(found, "HorizontalPodAutoscaler", "PodDisruptionBudget")) == 4


@pytest.mark.parametrize("environment", ["default", "staging", "production"])
def test_autoscaler__while_a_canary_takes_the_traffic__leaves_stable_what_a_rollback_needs(environment: str) -> None:
    """From the first step on stable has less to do; had it fewer pods by then, a rollback would send them everybody."""
    rollout = load_params(PROJECT / "params.yaml").model_release
    steps_s = len(rollout.canary_percents) * rollout.min_step_s
    found = rendering.of_kind(rendering.documents(environment), "HorizontalPodAutoscaler")
    assert len(found) == 2
    for scaler in found:
        assert scaler["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= steps_s


@pytest.mark.parametrize(
    ("section", "version"), [("autoscaling", "autoscaling/v2"), ("podDisruptionBudget", "policy/v1")]
)
def test_chart__on_a_cluster_that_does_not_serve_what_it_needs__says_so(
    section: str, version: str, tmp_path: Path
) -> None:
    """Rendered offline, Helm takes every cluster for a new one: so the chart asks for what none serves yet."""
    copy = tmp_path / "perch"
    shutil.copytree(rendering.CHART, copy)
    template = copy / "templates/serving-availability.yaml"
    template.write_text(template.read_text().replace(version, later := f"{version}9"))
    with Chart.load(copy) as chart:
        with pytest.raises(HelmRenderError, match=rf"{section}.enabled: this cluster .* does not serve {later}"):
            chart.render(rendering.values_of("default"), name=RELEASE, namespace=rendering.NAMESPACE)
        assert chart.render(
            rendering.values_of("default", **{section: {"enabled": False}}),
            name=RELEASE,
            namespace=rendering.NAMESPACE,
        )


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_budget__of_an_environment__leaves_a_drain_a_pod_to_take(environment: str) -> None:
    found = rendering.documents(environment)
    for budget in rendering.of_kind(found, "PodDisruptionBudget"):
        scaler = rendering.find(found, "HorizontalPodAutoscaler", budget["metadata"]["name"])
        assert budget["spec"]["minAvailable"] < scaler["spec"]["minReplicas"]


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_server__its_pods__are_kept_on_different_nodes_and_zones(environment: str) -> None:
    spec = deployment("a", environment)["spec"]["template"]["spec"]
    zones, nodes = spec["topologySpreadConstraints"]
    assert (zones["topologyKey"], nodes["topologyKey"]) == ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
    assert zones["whenUnsatisfiable"] == ("DoNotSchedule" if environment == "production" else "ScheduleAnyway")
    (term,) = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"


def test_server__other_public_keys__start_its_pods_anew() -> None:
    """They are read at the start alone."""
    one, other = (
        rendering.find(
            rendering.render(rendering.values_of("dev", serving={"publicKeys": {"2026-a.pub": pem}})),
            "Deployment",
            f"{RELEASE}-serving-a",
        )["spec"]["template"]["metadata"]["annotations"]["checksum/public-keys"]
        for pem in ("one", "other")
    )
    assert one != other


# The others.


def test_watchdog__on_a_cluster__is_one_and_knows_where_it_is() -> None:
    watchdog = rendering.find(rendering.documents("everything"), "Deployment", f"{RELEASE}-watchdog")
    assert (watchdog["spec"]["replicas"], watchdog["spec"]["strategy"]["type"]) == (1, "Recreate")
    (container,) = watchdog["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["watchdog"]
    assert 'ENTRYPOINT ["perch"]' in DOCKERFILES["pipeline"]
    variables = rendering.environment_of(container)
    plain = {name: value for name, value in variables.items() if isinstance(value, str) and name.startswith("PERCH_")}
    settings = Settings.model_validate({name.removeprefix("PERCH_").lower(): value for name, value in plain.items()})
    assert (settings.target, settings.kubernetes_namespace) == ("kubernetes", rendering.NAMESPACE)
    assert settings.kubernetes_release == RELEASE
    assert settings.mlflow_uri == f"http://{RELEASE}-mlflow.{rendering.NAMESPACE}:5000"
    assert settings.prometheus_url
    # The rest works without a prober.
    assert variables["PERCH_PROBER_API_KEY"]["secretKeyRef"]["optional"]


@each_environment
def test_settings__for_the_steps_pods__exist_and_are_the_watchdogs(environment: str) -> None:
    found = rendering.documents(environment)
    settings = rendering.find(found, "ConfigMap", f"{RELEASE}-settings")["data"]
    assert set(settings) <= PERCH_VARIABLES
    assert {"PERCH_RUNS_URL", "PERCH_RELEASES_URL", "PERCH_MLFLOW_URI", "PERCH_TARGET"} <= set(settings)
    watchdog = rendering.find(found, "Deployment", f"{RELEASE}-watchdog")["spec"]["template"]["spec"]["containers"][0]
    assert settings.items() <= rendering.environment_of(watchdog).items()


def test_mlflow__its_address_for_others__is_one_it_lets_in() -> None:
    found = rendering.documents("everything")
    mlflow = rendering.find(found, "Deployment", f"{RELEASE}-mlflow")["spec"]["template"]["spec"]["containers"][0]
    allowed = rendering.environment_of(mlflow)["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    watchdog = rendering.find(found, "Deployment", f"{RELEASE}-watchdog")["spec"]["template"]["spec"]["containers"][0]
    host = rendering.environment_of(watchdog)["PERCH_MLFLOW_URI"].removeprefix("http://").rpartition(":")[0]
    assert f"{host}:*" in allowed


def test_mlflow__its_options_and_variables__are_mlflows() -> None:
    from mlflow import environment_variables
    from mlflow.cli import server

    known = {option for parameter in server.params for option in parameter.opts}
    template = rendering.find(rendering.documents("everything"), "Deployment", f"{RELEASE}-mlflow")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    assert {argument.partition("=")[0] for argument in container["args"]} <= known
    by_option = {parameter.envvar for parameter in server.params}
    for name in rendering.environment_of(container):
        if name.startswith("MLFLOW_"):
            assert hasattr(environment_variables, name) or name in by_option, name


def test_mlflow__elsewhere__is_asked_there_and_leaves_nothing_here() -> None:
    uri = "https://mlflow.example.org"
    found = rendering.render(rendering.values_of("production", mlflow={"enabled": False, "externalUri": uri}))
    assert not [known for known in found if known["metadata"]["name"].endswith("mlflow")]
    (container,) = rendering.find(found, "Deployment", f"{RELEASE}-watchdog")["spec"]["template"]["spec"]["containers"]
    assert rendering.environment_of(container)["PERCH_MLFLOW_URI"] == uri


def test_setup__of_each_revision__is_a_job_of_its_own() -> None:
    jobs = [
        rendering.of_kind(rendering.render(rendering.values_of("dev"), revision=revision), "Job")[0]
        for revision in (1, 2)
    ]
    assert [job["metadata"]["name"] for job in jobs] == [f"{RELEASE}-setup-1", f"{RELEASE}-setup-2"]
    (container,) = jobs[0]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [rendering.NAMESPACE, *(f"{RELEASE}-serving-{server}" for server in SERVERS)]
    script = rendering.find(rendering.documents("dev"), "ConfigMap", f"{RELEASE}-setup")["data"]
    (name,) = script
    assert container["command"] == ["python", str(Path("/scripts") / name)]
    compile(script[name], name, "exec")
