"""The images, run as a cluster would run them: not as root, nothing writable but two volumes, no capabilities.

`make test-images` builds them first; without root, buildah and podman the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pipelines.core.api_keys import ApiKeyFile, new_key, write_keys
from pipelines.core.release_unit import release_name
from pipelines.core.scopes import Scope
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED
from pipelines.params import Params
from pipelines.registry.registration import register
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from pipelines.stages.model_packaging import package_version

PROJECT = Path(__file__).parents[2]
MAX_SERVING_MB = 500
USER = 10001
DIGIT = PROJECT / "docs/seven.png"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "podman", "runc"))),
        reason="needs root, buildah, podman and runc: scripts/debian-packages.sh --images",
    ),
]


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[str, int]]:
    """Image to its tag and size in MB; layers that are there already are not built again."""
    done = subprocess.run(
        ["bash", "docker/build.sh"], cwd=PROJECT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        tag, size, unit, *_ = line.split()
        assert unit == "MB"
        found[tag.partition(":")[0].removeprefix("perch-")] = (tag, int(size))
    return found


def podman(tag: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    limits = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000")
    # What podman else adds of its own accord, no cluster does: a user's name, and folders that can be written.
    alone = ("--read-only-tmpfs=false", "--passwd=false")
    locked = ("--read-only", *alone, "--cap-drop", "all", "--security-opt", "no-new-privileges")
    return ["podman", "run", "--rm", "--runtime", "runc", "--network", "host", *limits, *locked, *options, tag, *words]


def run(tag: str, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(podman(tag, *words, options=options), capture_output=True, text=True, check=False)


def packages(image: str) -> set[str]:
    tree = json.loads((PROJECT / f"dist/images/{image}.cdx.json").read_text())
    assert (tree["bomFormat"], tree["specVersion"]) == ("CycloneDX", "1.6")
    return {component["name"].lower() for component in tree["components"]}


def test_serving_image__as_built__is_small_and_holds_no_training(images: dict[str, tuple[str, int]]) -> None:
    _, size_mb = images["serving"]
    assert size_mb <= MAX_SERVING_MB
    found = packages("serving")
    assert {"bentoml", "onnxruntime", "libc6", "python"} <= found
    assert not {"torch", "mlflow", "apache-airflow", "pytorch-lightning", "pandas", "pip"} & found


def test_every_image__as_built__names_its_commit_and_runs_as_nobody_special(
    images: dict[str, tuple[str, int]],
) -> None:
    for tag, _ in images.values():
        shown = subprocess.run(["podman", "inspect", tag], capture_output=True, text=True, check=True)
        config = json.loads(shown.stdout)[0]["Config"]
        revision, _, changes = config["Labels"]["org.opencontainers.image.revision"].partition("-")
        assert len(revision) == 40
        assert f"-{revision[:7]}{'-changes' if changes else ''}" in tag
        assert config["User"] == f"{USER}:{USER}"


@pytest.fixture
def release(
    registry_settings: Settings, registry_params: Params, make_run: Callable[..., Workspace], tmp_path: Path
) -> tuple[Path, str]:
    """A folder with a release, the public key and an API key; and that key."""
    register(registry_settings, registry_params, make_run())
    package = package_version(registry_settings, registry_params.model_name, 1, make_key=True)
    folder = tmp_path / "given"
    shutil.copytree(registry_settings.releases_dir, folder)
    shutil.copy(registry_settings.keys_dir / "release.pub", folder)
    key, record = new_key("tests", (Scope.PREDICT, Scope.MODEL), rate_per_s=1e3)
    write_keys(folder / "api-keys.json", ApiKeyFile(keys=(record,)))
    for file in (folder, *folder.iterdir()):
        os.chown(file, USER, USER)
    for parent in folder.parents:
        if parent.is_relative_to(tmp_path.parents[1]):
            parent.chmod(parent.stat().st_mode | 0o055)
    return folder / release_name(package.digest), key


def serving(file: Path, port: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and options of a container that serves a release."""
    options = ("--volume", f"{file.parent}:/given:ro", "--env", "PERCH_SERVING_WORKERS=1")
    settings = {"PUBLIC_KEYS": "/given", "API_KEYS_FILE": "/given/api-keys.json", "PREDICTIONS_URL": "/tmp/predictions"}
    for name, value in settings.items():
        options += ("--env", f"PERCH_SERVING_{name}={value}")
    return (f"/given/{file.name}", "--port", str(port)), options


def test_serving_image__with_a_release__verifies_predicts_and_ends_when_told(
    images: dict[str, tuple[str, int]], release: tuple[Path, str]
) -> None:
    file, key = release
    port = any_free_port()
    words, options = serving(file, port)
    process = subprocess.Popen(
        podman(images["serving"][0], *words, options=options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": key}, timeout=10)
        deadline = time.monotonic() + 120
        while True:
            try:
                if client.get("/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        answer = client.post("/v1/predict", content=DIGIT.read_bytes(), headers={"Content-Type": "image/png"})
        assert (answer.status_code, answer.json()["model"]["version"]) == (200, "1")
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_serving_image__flipped_byte__does_not_start(
    images: dict[str, tuple[str, int]], release: tuple[Path, str]
) -> None:
    file, _ = release
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    words, options = serving(file, any_free_port())
    done = run(images["serving"][0], *words, options=options)
    assert done.returncode == EXIT_REFUSED
    assert "was changed" in done.stderr


def test_pipeline_image__runs_a_stage__and_holds_no_airflow(images: dict[str, tuple[str, int]]) -> None:
    tag, _ = images["pipeline"]
    found = packages("pipeline")
    assert {"torch", "mlflow", "dvc"} <= found
    assert "apache-airflow" not in found
    done = run(tag, "data_ingestion", "--run", "r", "--as-of", "2026-11-01", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["data/images"] == 897


def test_airflow_image__its_dags__can_be_imported(images: dict[str, tuple[str, int]]) -> None:
    tag, _ = images["airflow"]
    assert "torch" not in packages("airflow")
    code = (
        "from airflow.dag_processing.dagbag import DagBag; bag = DagBag('/opt/perch/project/dags', bundle_path=None);"
        "print(bag.import_errors, sorted(bag.dags))"
    )
    done = run(
        tag,
        "-c",
        f'airflow db migrate >/tmp/migrate.log 2>&1 || {{ cat /tmp/migrate.log; exit 1; }}; python -c "{code}"',
        options=("--entrypoint", "sh"),
    )
    last = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    dags = sorted(file.stem for file in (PROJECT / "dags").glob("[a-z]*.py"))
    assert last == f"{{}} {dags}", done.stdout + done.stderr
    done = run(tag, "releases", "--help", options=("--entrypoint", "perch"))
    assert done.returncode == 0, done.stderr
