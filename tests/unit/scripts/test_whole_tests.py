"""`scripts/cluster-test.sh` and `scripts/compose-test.sh` where another run is at work: it is left alone."""

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
