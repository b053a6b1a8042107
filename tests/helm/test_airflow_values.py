"""The values for Airflow's own chart, by path: that chart is not here, but the images that they name are."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.object_storage.settings import S3Settings
from pipelines.settings import Settings
from tests.helm import rendering
from tests.helm.rendering import NAMESPACE, PROJECT

TEXT = (PROJECT / "helm/airflow-values.yaml").read_text()
VALUES: dict[str, Any] = yaml.safe_load(TEXT)
DOCKERFILE = (PROJECT / "docker/airflow.Dockerfile").read_text()
ENTRYPOINT = PROJECT / "docker/airflow-entrypoint.sh"
ENVIRONMENT = {variable["name"]: variable["value"] for variable in VALUES["env"]}
SECRETS = {known["envName"]: known for known in VALUES["secret"]}
OPTIONAL = {known["name"]: known["valueFrom"]["secretKeyRef"] for known in yaml.safe_load(VALUES["extraEnv"])}


def _in_the_image(variable: str) -> str:
    found = re.search(rf"^ +(?:ENV )?{variable}=(\S+)", DOCKERFILE, re.MULTILINE)
    assert found, variable
    return found[1]


def test_airflow__its_version__is_the_images() -> None:
    assert VALUES["airflowVersion"] == metadata.version("apache-airflow")
    assert VALUES["executor"] == "KubernetesExecutor"


def test_airflow__its_folders_and_user__are_the_images() -> None:
    assert VALUES["airflowHome"] == _in_the_image("AIRFLOW_HOME")
    assert VALUES["config"]["core"]["dags_folder"] == _in_the_image("AIRFLOW__CORE__DAGS_FOLDER")
    assert f"USER {VALUES['uid']}:{VALUES['gid']}\n" in DOCKERFILE
    assert not VALUES["dags"]["gitSync"]["enabled"]
    assert not VALUES["dags"]["persistence"]["enabled"]


def test_airflow__its_pods__are_locked_down_as_the_charts() -> None:
    template = rendering.find(rendering.documents("production"), "Deployment", f"{rendering.RELEASE}-watchdog")
    spec = template["spec"]["template"]["spec"]
    assert VALUES["securityContexts"]["pod"] == spec["securityContext"]
    (container,) = spec["containers"]
    assert VALUES["securityContexts"]["containers"].items() <= container["securityContext"].items()
    mounts = {mount["mountPath"]: mount["name"] for mount in VALUES["volumeMounts"]}
    assert {"/var/lib/perch", "/tmp"} <= set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in VALUES["volumes"]}


@pytest.mark.parametrize("part", ["apiServer", "scheduler", "dagProcessor", "triggerer", "workers"])
def test_airflow__each_part__asks_for_resources_and_has_a_bound(part: str) -> None:
    for side in ("requests", "limits"):
        assert set(VALUES[part]["resources"][side]) == {"cpu", "memory", "ephemeral-storage"}
        volumes = sum(int(known["emptyDir"]["sizeLimit"][:-2]) for known in VALUES["volumes"] if "emptyDir" in known)
        assert VALUES[part]["resources"][side]["ephemeral-storage"] == f"{volumes * 1024 + 128}Mi"


def test_airflow__what_its_own_image_alone_can__is_not_asked_of_this_one() -> None:
    """The chart's defaults run `/clean-logs`, and `airflow users create`, which the simple log-in does not have."""
    assert VALUES["createUserJob"] == {"enabled": False}
    shell, option, script = VALUES["scheduler"]["logGroomerSidecar"]["args"]
    assert (shell, option) == ("bash", "-c")
    assert f"find {VALUES['airflowHome']}/logs " in script
    assert all(VALUES[part]["logGroomerSidecar"] == {"enabled": False} for part in ("dagProcessor", "triggerer"))
    assert VALUES["logs"]["persistence"]["enabled"]  # the others' logs are on the same volume


def test_airflow__options_of_its_configuration__exist() -> None:
    from airflow.configuration import conf

    known = conf.configuration_description
    for section, options in VALUES["config"].items():
        for option in options:
            assert option in known[section]["options"], f"{section}.{option}"
    module, _, name = VALUES["config"]["core"]["auth_manager"].rpartition(".")
    assert hasattr(import_module(module), name)


def test_airflow__settings_of_perch__exist_and_say_what_the_chart_says() -> None:
    assert {name.removeprefix("PERCH_").lower() for name in ENVIRONMENT if name.startswith("PERCH")} <= set(
        Settings.model_fields
    )
    assert ENVIRONMENT["PERCH_KUBERNETES_NAMESPACE"] == NAMESPACE
    release = ENVIRONMENT["PERCH_KUBERNETES_RELEASE"]
    found = rendering.render(rendering.values_of("production"), name=release)
    settings = rendering.find(found, "ConfigMap", ENVIRONMENT["PERCH_POD_CONFIG_MAPS"])["data"]
    for name in set(settings) & set(ENVIRONMENT):
        assert ENVIRONMENT[name] == settings[name], name
    accounts = {known["metadata"]["name"] for known in rendering.of_kind(found, "ServiceAccount")}
    assert ENVIRONMENT["PERCH_POD_SERVICE_ACCOUNT"] in accounts
    # The engine's steps in pods have the engine's account, whose name follows from the release.
    assert f"{release}-engine" in accounts


def test_airflow__a_store_that_is_not_aws__is_written_out_to_be_switched_on() -> None:
    """Commented entries, which whoever edits the file makes real: they have to be settings, and the steps' pods'."""
    entries = yaml.safe_load("\n".join(re.findall(r"^  # (- \{name: .*)$", TEXT, re.MULTILINE)))
    written = {known["name"] for known in entries}
    assert written == {"PERCH_S3_ENDPOINT_URL", "PERCH_S3_REGION"}
    assert {name.removeprefix("PERCH_S3_").lower() for name in written} <= set(S3Settings.model_fields)
    found = rendering.documents("everything")
    assert written <= set(rendering.find(found, "ConfigMap", f"{rendering.RELEASE}-settings")["data"])


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_airflow__who_is_told_of_failures__is_told_by_airflow_and_by_the_steps_pods(environment: str) -> None:
    """`FailureNotice` is sent by Airflow, `notify_team` by a step's pod, and the watchdog's by the chart."""
    found = rendering.documents(environment)
    watchdog = rendering.find(found, "Deployment", f"{rendering.RELEASE}-watchdog")
    (container,) = watchdog["spec"]["template"]["spec"]["containers"]
    reference = rendering.environment_of(container)["PERCH_NOTICE_URLS"]["secretKeyRef"]
    assert OPTIONAL["PERCH_NOTICE_URLS"] == {**reference, "optional": True}
    assert reference["key"] == "PERCH_NOTICE_URLS"  # by this name the steps' pods see it
    assert reference["name"] in ENVIRONMENT["PERCH_POD_SECRETS"].split()


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_airflow__secrets_of_the_steps_pods__are_there_in_the_environments_it_is_for(environment: str) -> None:
    """A pod that is given all keys of a Secret which is not there does not start."""
    made = {
        known["spec"]["target"]["name"]
        for known in rendering.of_kind(rendering.documents(environment), "ExternalSecret")
    }
    assert set(ENVIRONMENT["PERCH_POD_SECRETS"].split()) <= made


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_airflow__in_an_environment__may_do_what_its_tasks_do(environment: str) -> None:
    found = rendering.documents(environment)
    for name, parts in (("engine", {"worker"}), ("launcher", {"worker", "triggerer"})):
        subjects = rendering.find(found, "RoleBinding", f"{rendering.RELEASE}-{name}")["subjects"]
        assert {f"airflow-{part}" for part in parts} <= {subject["name"] for subject in subjects}


def test_airflow__its_secrets__are_named_and_not_written_out() -> None:
    values = yaml.safe_load((rendering.CHART / "values.yaml").read_text())
    database, store = values["database"], values["objectStore"]["existingSecret"]
    assert SECRETS["PERCH_DATABASE_URL"]["secretName"] == database["existingSecret"]
    assert SECRETS["PERCH_DATABASE_URL"]["secretKey"] == database["key"]
    assert {SECRETS[name]["secretName"] for name in SECRETS if name.startswith("AWS")} == {store}
    # As variables of the steps' pods the Secrets' keys have to be the variables' names.
    assert {database["existingSecret"], store} <= set(ENVIRONMENT["PERCH_POD_SECRETS"].split())
    assert ENVIRONMENT["PERCH_POD_STAGING_SECRET"] == values["serving"]["apiKeys"]["ownSecret"]
    assert all(known["secretKey"] == name for name, known in SECRETS.items())
    assert not any(
        re.search("PASSWORD|SECRET|TOKEN|DATABASE_URL|KEY$", name) for name in ENVIRONMENT if "POD" not in name
    )
    for path in ("fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName"):
        assert VALUES[path]
        assert path.removesuffix("SecretName") not in VALUES
    assert set(VALUES["data"]) == {"metadataSecretName"}


def test_airflow__database_for_trials__is_a_key_that_the_secret_may_lack() -> None:
    assert {name.removeprefix("PERCH_").lower() for name in OPTIONAL} <= set(Settings.model_fields)
    reference = OPTIONAL["PERCH_TUNING_URL"]
    # The steps' pods take all keys of this Secret, by the same name.
    assert reference == {
        "name": SECRETS["PERCH_DATABASE_URL"]["secretName"],
        "key": "PERCH_TUNING_URL",
        "optional": True,
    }
    assert reference["name"] in ENVIRONMENT["PERCH_POD_SECRETS"].split()


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (("scheduler",), "airflow scheduler"),
        (("airflow", "db", "check-migrations"), "airflow db check-migrations"),
        (("bash", "-c", "exec airflow api-server"), "airflow api-server"),
        (("python", "-m", "a.module"), "python -m a.module"),
        ((), "airflow"),
    ],
    ids=lambda known: known if isinstance(known, str) else "",
)
def test_entrypoint__what_airflows_chart_gives__is_what_starts(
    words: tuple[str, ...], started: str, tmp_path: Path
) -> None:
    """That chart sets arguments and no command, also where there is no value for one."""
    for program in ("airflow", "python"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/sh", ENTRYPOINT, *words], env={"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == started
    assert f'ENTRYPOINT ["{ENTRYPOINT.name}"]' in DOCKERFILE
    assert f"!docker/{ENTRYPOINT.name}\n" in (PROJECT / ".dockerignore").read_text()
    assert f"docker/{ENTRYPOINT.name} /opt/perch/bin/{ENTRYPOINT.name}" in DOCKERFILE


def test_entrypoint__log_ins_of_a_mounted_secret__are_copied_to_where_airflow_may_write_them(tmp_path: Path) -> None:
    """Airflow's simple log-in opens its file for writing; on a Secret's volume its API server would not start."""
    (tmp_path / "secret").mkdir()
    (given := tmp_path / "secret/passwords.json").write_text('{"admin": "x"}')
    given.chmod(0o400)
    (home := tmp_path / "home").mkdir()
    copied = home / Path(VALUES["config"]["core"]["simple_auth_manager_passwords_file"]).name
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "AIRFLOW_LOGINS_FROM": str(given)}
    for content in ('{"admin": "x"}', '{"admin": "y"}'):
        given.chmod(0o600)
        given.write_text(content)
        subprocess.run(["/bin/sh", ENTRYPOINT, "sh", "-c", "true"], env=environment, check=True)
        assert copied.read_text() == content
        assert copied.stat().st_mode & 0o777 in {0o400, 0o600}
    given.unlink()
    subprocess.run(["/bin/sh", ENTRYPOINT, "sh", "-c", "true"], env=environment, check=True)
    secret = VALUES["volumes"][-1]
    (mount,) = (known["mountPath"] for known in VALUES["volumeMounts"] if known["name"] == secret["name"])
    assert ENVIRONMENT["AIRFLOW_LOGINS_FROM"].startswith(f"{mount}/")
    assert _in_the_image("HOME") == str(Path(VALUES["config"]["core"]["simple_auth_manager_passwords_file"]).parent)
