"""The watchdog as a process beside the services: killed while it probes, and what it weighs after hundreds of looks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.core.api_keys import editing, read_keys
from pipelines.core.request_origins import PROBER
from pipelines.release.rollout_state import RolloutState
from pipelines.release.staging import KEY_LIFE
from pipelines.release.steps import PROMOTED, SHADOW
from pipelines.services.secrets import api_keys_file, ensure_demo_key
from pipelines.settings import Settings
from tests.integration import test_prober
from tests.integration.local_rig import Rig
from tests.integration.release_target_behaviour import PROJECT
from tests.integration.test_prober import Begin, begin, draw_images  # noqa: F401 - a fixture
from tests.integration.traffic import Traffic

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def nobody_else_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prober of the other module's fixture does nothing."""
    monkeypatch.setattr(test_prober, "open_prober", lambda settings: SimpleNamespace(run=lambda stop, pause_s: None))


@contextmanager
def running_watchdog(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`perch watchdog` as it runs beside the services, prober included; MLflow is away."""
    environment = os.environ | {"PERCH_HOME": str(settings.home), "PERCH_MLFLOW_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pipelines", "watchdog"]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("nobody_else_probes")
def test_watchdog__killed_while_it_probes_at_each_step__the_next_one_goes_on_and_no_client_notices(
    begin: Begin,  # noqa: F811 - the fixture
    settled: Rig,
    tmp_path: Path,
) -> None:
    scene = begin(min_step_s=12, max_step_s=120, abandoned_after_s=60)
    engine, log = scene.engine("engine"), tmp_path / "watchdog.log"
    few = Traffic(settled.target.client_url(), ensure_demo_key(settled.settings), draw_images(1)[0], pause_s=0.5)
    killed_at: list[str] = []

    def go_on(until: Callable[[RolloutState], bool]) -> RolloutState:
        deadline = time.monotonic() + 120
        while True:
            state = engine.advance(scene.rollout.rollout_id)
            if state.is_finished or (state.settled and until(state)):
                return state
            assert time.monotonic() < deadline, (state.step, state.reading, log.read_text()[-1500:])
            time.sleep(0.3)

    with few:
        for name in ("shadow", "canary@30", "canary@100"):
            with running_watchdog(settled.settings, log):
                state = go_on(lambda now, name=name: now.step.name == name and bool(now.reading and now.reading.probes))
                assert state.step.name == name, (state.reason, log.read_text()[-1500:])
                killed_at.append(name)
        with running_watchdog(settled.settings, log):
            state = go_on(lambda _: False)
    left_behind = [key for key in read_keys(api_keys_file(settled.settings)).keys if key.name == PROBER]
    with editing(api_keys_file(settled.settings)) as keys:
        keys[:] = [key for key in keys if key.name != PROBER]
    assert state.step == PROMOTED, (state.reason, log.read_text()[-1500:])
    assert killed_at == ["shadow", "canary@30", "canary@100"]
    assert all(passage.probes > 0 for passage in state.passages[2:])
    assert few.failed == []
    # Nobody could take these away; nobody else knows them, and they end by themselves.
    assert 1 <= len(left_behind) <= 4
    assert all(key.expires is not None and key.expires < datetime.now(UTC) + KEY_LIFE for key in left_behind)


WATCHED = """
import sys
import psutil
from pipelines.release import gates
from pipelines.release.watchdog import Watchdog
from pipelines.registry.ledger_watch import LedgerWatch
from pipelines.services.rollouts import open_world
from pipelines.settings import get_settings

gates._MIRROR_KEPT_S = 0.0  # reads the kept predictions at each look, as it does every three seconds otherwise
settings = get_settings()
watchdog, rows = Watchdog(open_world(settings, patient=False), print), LedgerWatch(settings.ledger_url)
for look in range(1, int(sys.argv[1]) + 1):
    assert watchdog.check() == [] and watchdog._readings  # it judges, and finds nothing to do
    rows.find_changes()
    if look % 50 == 0:
        print(look, psutil.Process().memory_info().rss, flush=True)
"""


def test_watchdog__hundreds_of_looks_at_a_shadow__take_no_more_and_more_memory(
    begin: Begin,  # noqa: F811 - the fixture
    settled: Rig,
) -> None:
    """As many as in a quarter of an hour, without the pauses: what a look leaves behind does not depend on them."""
    scene = begin(probe_requests_per_s=0, min_step_s=3000, max_step_s=3600, abandoned_after_s=2000)
    assert scene.run_to(SHADOW).step == SHADOW
    with settled.traffic() as traffic:
        traffic.wait_for(500, limit_s=60)
    time.sleep(2)  # until the last of them are kept
    environment = os.environ | {"PERCH_HOME": str(settled.settings.home), "PERCH_MLFLOW_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", WATCHED, "300"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = {int(look): int(size) / 2**20 for look, size in (line.split() for line in done.stdout.splitlines())}
    print("watchdog: MiB by looks:", {look: round(size, 1) for look, size in sizes.items()})
    assert sizes[300] - sizes[150] < 0.1 * sizes[150]
    assert sizes[300] < 256
