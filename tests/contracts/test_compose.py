"""`docker/compose.yaml` by path: what it sets exists, what it mounts is there, and whom it asks it starts."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema.validators import validator_for

from pipelines.object_storage.settings import S3Settings
from pipelines.release.local_layout import LocalLayout
from pipelines.release.local_plan import PROCESSES
from pipelines.services.slots import PORTS
from pipelines.settings import Settings
from serving.settings import ServingSettings

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "docker"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (FOLDER / "server.Dockerfile").read_text()
MAKE_ENV = FOLDER / "one-server/make-env.sh"

HOME = LocalLayout(Path("/var/lib/perch"))
OWN = {name for name, service in SERVICES.items() if "PERCH_IMAGE" in service["image"]}
# What has nothing to be asked: one ends, one sleeps, and the watchdog's looks may fail.
WITHOUT_HEALTH = {"setup", "loopback", "watchdog"}

each_service = pytest.mark.parametrize("name", SERVICES)
each_own = pytest.mark.parametrize("name", sorted(OWN))


def interpolations() -> Iterator[tuple[str, str, str]]:
    """Name, `?` or `-`, and what follows it, of each variable that comes from the environment."""
    yield from re.findall(r"(?<!\$)\$\{(\w+)(?::([?-])([^}]*))?\}", TEXT)


def resolved(text: str) -> str:
    """With the defaults of what has some, and the name of what has none."""
    return re.sub(r"\$\{(\w+):([?-])([^}]*)\}", lambda found: found[3] if found[2] == "-" else found[1], text)


def environment(name: str) -> dict[str, str]:
    return {key: resolved(str(value)) for key, value in SERVICES[name].get("environment", {}).items()}


def mounts(name: str) -> dict[str, dict[str, Any]]:
    return {mount["target"]: mount for mount in SERVICES[name].get("volumes", ())}


def networks(name: str) -> set[str]:
    mode = SERVICES[name].get("network_mode", "")
    return networks(mode.removeprefix("service:")) if mode else set(SERVICES[name]["networks"])


def names_of_services() -> dict[str, str]:
    """Each name under which a service is found, and the service."""
    found = {name: name for name in SERVICES if "network_mode" not in SERVICES[name]}
    for name, service in SERVICES.items():
        attached = service.get("networks", ())
        for settings in attached.values() if isinstance(attached, dict) else ():
            found |= dict.fromkeys(settings.get("aliases", ()), name)
    return found


@pytest.fixture(scope="module")
def secrets_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("server") / ".env"
    subprocess.run(["bash", MAKE_ENV, "perch-server:v1", file], check=True, capture_output=True)
    return file


def read_env(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_compose__its_form__is_that_of_the_specification() -> None:
    schema = json.loads(
        resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    )
    validator = validator_for(schema)(schema)
    assert [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(COMPOSE)] == []
    misspelt = {**COMPOSE, "services": {**SERVICES, "grafana": {**SERVICES["grafana"], "read_onyl": True}}}
    assert not validator.is_valid(misspelt)


@each_service
def test_service__as_declared__is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert service["init"] is True
    assert service["restart"] == ("no" if name == "setup" else "unless-stopped")
    assert ("healthcheck" in service) != (name in WITHOUT_HEALTH)
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)
    assert not any("docker.sock" in str(mount) for mount in service.get("volumes", ()))


@each_service
def test_image__of_each_service__is_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    if name in OWN:
        assert image.startswith("${PERCH_IMAGE:?")
    else:
        assert re.fullmatch(r"docker\.io/[\w./-]+:v?\d+\.\d+[\w.-]*", image)


def test_ports__that_are_published__are_this_machines_unless_it_is_said_otherwise() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"mlflow", "airflow-api", "loopback", "alertmanager", "grafana"}
    assert all(port.startswith("${PERCH_BIND:-127.0.0.1}:") for ports in published.values() for port in ports)
    numbers = [resolved(port).split(":")[1] for ports in published.values() for port in ports]
    assert len(numbers) == len(set(numbers))


def test_secrets__of_all_services__are_demanded_and_made_by_the_script(secrets_file: Path) -> None:
    demanded = {name for name, kind, _ in interpolations() if kind == "?"}
    assert demanded == set(read_env(secrets_file))
    with_default = {name for name, kind, _ in interpolations() if kind != "?"}
    assert not demanded & with_default
    assert not [name for name in with_default if re.search("PASSWORD|SECRET|KEY|TOKEN", name)]
    # A secret that is written out: a value of such a variable that holds no name of one.
    for name in SERVICES:
        for variable, value in SERVICES[name].get("environment", {}).items():
            if re.search("PASSWORD$|SECRET|_KEY$|ACCESS_KEY_ID", variable) and value:
                assert "${" in str(value) or str(value).startswith("/"), f"{name}: {variable}"
    assert read_env(secrets_file)["PERCH_IMAGE"] == "perch-server:v1"


def test_make_env__run__writes_random_secrets_that_only_their_owner_reads_and_never_twice(
    secrets_file: Path, tmp_path: Path
) -> None:
    assert stat.S_IMODE(secrets_file.stat().st_mode) == 0o600
    own = read_env(secrets_file)
    again = subprocess.run(["bash", MAKE_ENV, "perch-server:v2", secrets_file], capture_output=True, text=True)
    assert again.returncode == 65
    assert "is there already" in again.stderr
    assert read_env(secrets_file) == own
    subprocess.run(["bash", MAKE_ENV, "perch-server:v1", tmp_path / ".env"], check=True, capture_output=True)
    other = read_env(tmp_path / ".env")
    values = [value for name, value in [*own.items(), *other.items()] if name != "PERCH_IMAGE"]
    assert len(values) == len(set(values))
    # They stand in URLs, and Compose would expand a dollar.
    assert all(re.fullmatch(r"[\w=-]{16,}", value) for value in values)
    from cryptography.fernet import Fernet

    Fernet(own["AIRFLOW_FERNET_KEY"].encode())
    assert [file.name for file in tmp_path.iterdir()] == [".env"]


@each_own
def test_settings_of_perch__that_a_service_gets__exist(name: str) -> None:
    documented = (PROJECT / "docs/reference/settings.md").read_text()
    known = {
        *(f"PERCH_{field.upper()}" for field in Settings.model_fields),
        *(f"PERCH_SERVING_{field.upper()}" for field in ServingSettings.model_fields),
        *(f"PERCH_S3_{field.upper()}" for field in S3Settings.model_fields),
        *re.findall(r"^- `(PERCH_\w+)`", documented, re.MULTILINE),
    }
    # For the script that makes the accounts.
    own = {"PERCH_DATABASE_PASSWORD"} if name == "setup" else set()
    assert {variable for variable in environment(name) if variable.startswith("PERCH_")} - known == own


def test_settings_of_perch__in_all_services__can_be_read() -> None:
    for name in OWN:
        given = {
            variable.removeprefix("PERCH_").lower(): value
            for variable, value in environment(name).items()
            if variable.startswith("PERCH_") and value
        }
        Settings(**{key: value for key, value in given.items() if key in Settings.model_fields})


def test_settings_of_airflow__that_are_set__exist() -> None:
    from airflow.configuration import conf

    known = conf.configuration_description
    found = {variable for name in SERVICES for variable in environment(name) if variable.startswith("AIRFLOW__")}
    assert len(found) > 10
    for variable in found:
        _, section, option = variable.lower().split("__")
        assert option in known[section]["options"], variable


def test_memory__of_what_trains__is_limited_and_it_is_ended_first() -> None:
    limits = {name: resolved(service["mem_limit"]) for name, service in SERVICES.items() if "mem_limit" in service}
    assert limits.pop("airflow-scheduler") == "6g"  # the local runner's steps are its children
    assert limits == dict.fromkeys(("mlflow", "airflow-api", "airflow-triggerer", "airflow-dag-processor"), "2g")
    # Only upwards: the other way needs a right that Docker without root has not.
    adjusted = {name: service["oom_score_adj"] for name, service in SERVICES.items() if "oom_score_adj" in service}
    assert adjusted == {"airflow-scheduler": 500}


@each_service
def test_mounts__of_each_service__are_there(name: str) -> None:
    for target, mount in mounts(name).items():
        if mount["type"] == "bind":
            assert (FOLDER / resolved(mount["source"])).exists(), mount
            assert mount["read_only"] is True
        else:
            assert mount["source"] in COMPOSE["volumes"]
        assert target.startswith("/")
    temporary = [str(entry).split(":")[0] for entry in SERVICES[name].get("tmpfs", ())]
    assert not set(temporary) & set(mounts(name))
    if name != "loopback":
        assert "/tmp" in temporary
    if name in OWN - {"loopback", "envoy"}:
        assert {"/var/lib/perch"} & {*temporary, *mounts(name)}


def test_volumes__all_that_are_declared__are_used() -> None:
    used = {mount["source"] for name in SERVICES for mount in mounts(name).values() if mount["type"] == "volume"}
    assert used == set(COMPOSE["volumes"])


def test_volumes__of_the_own_image__have_a_folder_of_its_user_there() -> None:
    """A new volume takes its owner from the image; without a folder there it would be root's."""
    assert "chown -R 10001:10001 /var/lib/perch /etc/perch" in DOCKERFILE
    made = {"/var/lib/perch", *re.findall(r"/etc/perch/[\w-]+", DOCKERFILE)}
    (listed,) = re.findall(r"for folder in ([\w ]+);", DOCKERFILE)
    made |= {f"/var/lib/perch/{folder}" for folder in listed.split()}
    for name in OWN:
        for target, mount in mounts(name).items():
            if mount["type"] == "volume":
                assert target in made, f"{name}: {target}"
    assert "USER 10001:10001\n" in DOCKERFILE
    assert {SERVICES[name]["user"] for name in OWN} == {"10001:10001"}


def variables_of(image: str) -> dict[str, str]:
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (FOLDER / f"{image}.Dockerfile").read_text(), re.MULTILINE)
    return dict(variable.split("=", 1) for variable in block.replace("\\\n", " ").split())


def test_image__its_variables__are_those_of_the_steps_and_of_airflows_image() -> None:
    assert variables_of("pipeline").items() <= variables_of("server").items()
    assert variables_of("airflow").items() <= variables_of("server").items()


@pytest.mark.parametrize("image", ["airflow", "server"])
def test_image_of_airflow__its_user__has_a_name_though_no_file_has_it(image: str) -> None:
    """Airflow asks for it and ends without; podman writes one into the container, Docker and Kubernetes do not."""
    assert variables_of(image)["USER"]


def test_secrets_on_disk__each__are_seen_by_who_needs_them_alone() -> None:
    seen = {
        volume: {name for name in SERVICES for mount in mounts(name).values() if mount["source"] == volume}
        for volume in ("signing-keys", "home", "postgres", "store")
    }
    assert seen["signing-keys"] == {"setup", "airflow-scheduler"}
    assert seen["home"] == {"setup", "airflow-scheduler"}
    assert seen["postgres"] == {"postgres"}
    assert seen["store"] == {"store"}
    # What clients reach has neither the database nor Airflow's log-in.
    assert not [value for value in environment("slots").values() if "postgres" in value]
    assert not environment("slots")["PERCH_AIRFLOW_PASSWORD"]
    assert not environment("envoy")


def test_hosts__that_services_ask__are_services_they_share_a_network_with() -> None:
    names = names_of_services()
    asked = set()
    for name in SERVICES:
        health = " ".join(SERVICES[name].get("healthcheck", {}).get("test", ()))
        words = " ".join([*environment(name).values(), *SERVICES[name].get("command", ()), health])
        for url in re.findall(r"\b(?:https?|postgresql(?:\+psycopg)?)://[^\s'\",]+", words):
            host = urlsplit(url).hostname
            if host in {"127.0.0.1", "localhost"}:
                continue
            assert host in names, f"{name} asks {host}"
            assert networks(name) & networks(names[host]), f"{name} cannot reach {host}"
            asked.add(names[host])
    assert asked == {"postgres", "store", "mlflow", "airflow-api"}


def test_dependencies__of_each_service__exist_and_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert (condition == "service_completed_successfully") == (other == "setup"), f"{name}: {other}"
            if condition == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name}: {other}"
        mode = service.get("network_mode", "")
        if mode:
            assert service["depends_on"][mode.removeprefix("service:")]["restart"] is True


def test_scheduler__after_a_start_of_the_machine__waits_for_the_api_itself() -> None:
    """Docker starts containers again all at once; `depends_on` is heeded by `docker compose` alone."""
    shell, flag, script = SERVICES["airflow-scheduler"]["command"]
    assert (shell, flag) == ("sh", "-c")
    waits, runs = script.split("\ndone\n")
    assert "until python" in waits
    assert f"{environment('airflow-scheduler')['AIRFLOW__CORE__EXECUTION_API_SERVER_URL']}health" in waits
    assert runs.strip() == "exec airflow scheduler"


def test_unit__of_the_machine__starts_all_in_order_and_again_after_docker() -> None:
    """Docker's own start fails what shares the network of `loopback` and comes before it."""
    text = (FOLDER / "one-server/perch.service").read_text()
    unit = ConfigParser()
    unit.read_string(text)
    assert unit["Service"]["ExecStart"].split()[1:] == [
        "compose", "--file", "/opt/perch/docker/compose.yaml", "up", "--detach"
    ]  # fmt: skip
    assert unit["Unit"]["After"] == unit["Unit"]["PartOf"] == unit["Unit"]["Requires"] == "docker.service"
    assert "docker.service" in unit["Install"]["WantedBy"].split()
    assert "systemctl enable --now perch" in (PROJECT / "docs/runbooks/one-server.md").read_text()


def test_traffic__its_parts__share_a_loopback_interface_and_the_local_targets_folders() -> None:
    parts = {name for name in SERVICES if SERVICES[name].get("network_mode") == "service:loopback"}
    assert parts == {"slots", "envoy", "watchdog", "airflow-scheduler", "prometheus"}
    for name in ("slots", "watchdog", "airflow-scheduler"):
        assert {str(HOME.folder), str(HOME.log_file("x").parent)} <= set(mounts(name))
        assert any(HOME.spool_folder("serving-a").is_relative_to(target) for target in mounts(name))
        assert Path(environment(name)["PERCH_SUPERVISOR_SOCKET"]).parent == HOME.log_file("x").parent
        assert environment(name)["PERCH_TARGET"] == "local"
        assert Path(environment(name)["PERCH_SERVING_API_KEYS_FILE"]).parent == HOME.home / "serving"
    command = SERVICES["envoy"]["command"]
    assert command[command.index("--config-path") + 1] == str(HOME.bootstrap_file)
    assert mounts("envoy")[str(HOME.folder)]["read_only"] is True
    assert f"127.0.0.1:{PORTS.admin}/" in SERVICES["envoy"]["healthcheck"]["test"][-1]
    assert [port.split(":")[-1] for port in SERVICES["loopback"]["ports"]] == [str(PORTS.clients), "9090"]


def test_prometheus__its_configuration__is_valid_and_looks_at_every_slot(tmp_path: Path) -> None:
    file = FOLDER / "one-server/prometheus.yaml"
    config = yaml.safe_load(file.read_text())
    (serving,) = (job for job in config["scrape_configs"] if job["job_name"] == "perch-serving")
    targets = {entry["targets"][0]: entry["labels"]["server"] for entry in serving["static_configs"]}
    assert targets == {
        f"127.0.0.1:{PORTS.slots[process].metrics}": process.removeprefix("serving-") for process in PROCESSES
    }
    # The rules are the chart's, mounted where the configuration looks for them.
    (pattern,) = config["rule_files"]
    found = {target: mount["source"] for target, mount in mounts("prometheus").items()}
    rules = {target for target in found if Path(target).match(pattern)}
    assert {found[target] for target in rules} == {"../helm/perch/files/serving-alerts.yaml"}
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: scripts/debian-packages.sh installs it (Debian's package prometheus)"
    here = file.read_text().replace("/etc/prometheus/rules", str(PROJECT / "helm/perch/files"))
    (tmp_path / "prometheus.yaml").write_text(here.replace("*.yaml", "serving-alerts.yaml"))
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ((manager,),) = (entry["static_configs"] for entry in config["alerting"]["alertmanagers"])
    assert manager["targets"] == ["alertmanager:9093"]
    assert networks("prometheus") & networks("alertmanager")


def test_grafana__its_dashboard__is_the_charts_with_prometheus_behind_it() -> None:
    found = {target: mount["source"] for target, mount in mounts("grafana").items()}
    providers = yaml.safe_load((FOLDER / "one-server/grafana-dashboards.yaml").read_text())["providers"]
    (folder,) = (provider["options"]["path"] for provider in providers)
    assert {source for target, source in found.items() if target.startswith(f"{folder}/")} == {
        "../helm/perch/files/serving-dashboard.json"
    }
    (source,) = yaml.safe_load((FOLDER / "one-server/grafana-datasources.yaml").read_text())["datasources"]
    assert urlsplit(source["url"]).hostname in SERVICES
    assert networks("grafana") & networks("prometheus")
    assert source["type"] == "prometheus"


def test_alertmanager__its_configuration__leads_to_a_receiver() -> None:
    config = yaml.safe_load((FOLDER / "one-server/alertmanager.yaml").read_text())
    assert config["route"]["receiver"] in {receiver["name"] for receiver in config["receivers"]}


def test_page__of_one_server__names_every_variable_and_every_page() -> None:
    page = (PROJECT / "docs/runbooks/one-server.md").read_text()
    named = {name for name, kind, _ in interpolations() if kind == "-"} | {"PERCH_IMAGE"}
    assert {name for name in named if f"`{name}`" not in page} == set()
    numbers = {resolved(port).split(":")[1] for service in SERVICES.values() for port in service.get("ports", ())}
    assert {number for number in numbers if f":{number}" not in page} == set()
    # Names that lead people and containers to the same page.
    for name in ("PERCH_AIRFLOW_URI", "PERCH_MLFLOW_URI"):
        (address,) = {environment(service)[name] for service in OWN if environment(service).get(name)}
        host, port = urlsplit(address).hostname, urlsplit(address).port
        published = [resolved(known) for known in SERVICES[names_of_services()[str(host)]]["ports"]]
        assert f"127.0.0.1:{port}:{port}" in published
        assert address in page
