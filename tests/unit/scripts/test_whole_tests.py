"""`scripts/cluster-test.sh` and `scripts/compose-test.sh`: what they leave alone and take down."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import EXIT_TRY_LATER

PROJECT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("script", "lock"), [("cluster-test", "cluster-test.lock"), ("compose-test", "compose/compose-test.lock")]
)
def test_whole_test__beside_another_run__says_who_it_is_and_touches_nothing(
    tmp_path: Path, script: str, lock: str
) -> None:
    kube, cache = tmp_path / "kube", tmp_path / "cache"
    kube.mkdir()
    for name in ("build", "up", "down"):
        (kube / f"{name}.sh").write_text(f"touch {tmp_path}/{name}\n")
        (kube / f"{name}.sh").chmod(0o755)
    (cache / lock).parent.mkdir(parents=True)
    with (cache / lock).open("w") as held:
        held.write("process 7, begun at noon")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        done = subprocess.run(
            ["bash", PROJECT / f"scripts/{script}.sh", sys.executable],
            env={**os.environ, "PERCH_KUBE_SCRIPTS": str(kube), "PERCH_IMAGE_CACHE": str(cache)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == EXIT_TRY_LATER, done.stdout + done.stderr
    assert "another run uses them (process 7, begun at noon)" in done.stderr
    assert f"flock {cache / lock} true" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "kube"]


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine with all parts, none of which does anything; `down` has what is taken down."""
    (programs := tmp_path / "programs").mkdir()
    (kube := tmp_path / "kube").mkdir()
    scripts = {
        kube / "build.sh": "",
        kube / "up.sh": "",
        kube / "down.sh": f'echo "${{K8S_RUN:-node}}" >>{tmp_path}/down',
    }
    for name in ("buildah", "etcd", "containerd", "runc", "socat", "prometheus", "unshare", "debootstrap"):
        scripts[programs / name] = ""
    scripts |= {programs / "id": "echo 0", programs / "df": "echo 99"}
    for file, code in scripts.items():
        file.write_text(f"#!/bin/sh\n{code}\n")
        file.chmod(0o755)
    (tmp_path / "cache/base-root").mkdir(parents=True)
    (tmp_path / "cache/base-root/.complete").touch()
    images = {f"PERCH_{name}_{kind}": "given" for name in ("SERVING", "PIPELINE") for kind in ("IMAGE", "ARCHIVE")}
    return {
        **os.environ,
        **images,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PERCH_KUBE_SCRIPTS": str(kube),
        "PERCH_IMAGE_CACHE": str(tmp_path / "cache"),
        "K8S_CACHE": str(tmp_path / "kubernetes"),
        "TMPDIR": str(tmp_path),
    }


def cluster_test(machine: dict[str, str], python: Path) -> subprocess.CompletedProcess[str]:
    (Path(machine["K8S_CACHE"]) / "bin").mkdir(parents=True)
    return subprocess.run(
        ["bash", PROJECT / "scripts/cluster-test.sh", python], env=machine, capture_output=True, text=True, check=False
    )


def test_cluster_test__tests_killed__takes_both_clusters_down(tmp_path: Path, machine: dict[str, str]) -> None:
    killed = tmp_path / "python"
    killed.write_text(
        '#!/bin/bash\nwhile [ "$1" != --basetemp ]; do shift; done\n'
        'mkdir -p "$2/control-plane0/run/pids"\nkill -KILL $$\n'
    )
    killed.chmod(0o755)
    done = cluster_test(machine, killed)
    assert done.returncode == 128 + 9, done.stdout + done.stderr
    beside, node = (tmp_path / "down").read_text().split()
    assert beside.endswith("/tests/control-plane0/run")
    assert node == "node"


def test_cluster_test__a_cluster_is_there__leaves_it_alone_and_says_how_it_ends(
    tmp_path: Path, machine: dict[str, str]
) -> None:
    (tmp_path / "perch-kube/pids").mkdir(parents=True)
    done = cluster_test(machine, tmp_path / "no-python")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"a cluster is in {tmp_path}/perch-kube already" in done.stderr
    assert f"bash {tmp_path}/kube/down.sh" in done.stderr
    assert not (tmp_path / "down").exists()
