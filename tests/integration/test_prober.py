"""Releases without a single client, with real parts: the prober's images go through Envoy to both services."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.core.api_keys import read_keys
from pipelines.core.request_origins import PROBER
from pipelines.params import ModelReleaseParams
from pipelines.predictions.queries import Filter, Predictions
from pipelines.predictions.stores import open_store as open_predictions
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.approvals import Response
from pipelines.release.artifact_store import open_store
from pipelines.release.engine import ReleaseEngine, ReleaseRequest
from pipelines.release.gates import Gates
from pipelines.release.policy import PromotionPolicy
from pipelines.release.probe_images import keep_probe_images
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import PROMOTED, ROLLED_BACK, Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.release.world import World
from pipelines.services.faulty_releases import ERRORS, faulty_code
from pipelines.services.probing import open_prober
from pipelines.services.rollouts import _compare_answers
from pipelines.services.secrets import api_keys_file
from tests.integration import release_target_behaviour
from tests.integration.release_target_behaviour import TargetRig, make_release
from tests.integration.test_rollout import EVIDENCE, PARAMS, Scene
from tests.unit.release.simulated_release import RecordedAnswers, SimulatedAliases

pytestmark = pytest.mark.services

PROBED = PARAMS.model_copy(update={"probe_requests_per_s": 150})
Begin = Callable[..., Scene]


def draw_images(count: int = 120) -> Sequence[bytes]:
    random, images = np.random.default_rng(3), []
    for _ in range(count):
        Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8)).save(png := io.BytesIO(), "PNG")
        images.append(png.getvalue())
    return images


@pytest.fixture
def begin(settled: TargetRig) -> Iterator[Begin]:
    """Begins the release of the second release or another, approved; the first serves.  The prober runs."""
    settings, target = settled.settings, settled.target
    (settings.home / "ledger.db").unlink(missing_ok=True)
    target.remove(Slot.CANARY)
    answers = RecordedAnswers()
    world = World(
        target=target,
        rollouts=RolloutTable(settings.ledger_url),
        glance=RolloutTable(settings.ledger_url, patient=False),
        ledger=Ledger(settings.ledger_url),
        aliases=SimulatedAliases(),
        approvals=answers,
        policy=PromotionPolicy(),
        evidence=lambda release, plan: EVIDENCE,
        judge=Gates(lambda state: _compare_answers(settings, state)),
    )
    stop = threading.Event()
    thread = threading.Thread(target=open_prober(settings).run, args=(stop, 0.5))

    def begin(release: ReleaseRef | None = None, **changes: object) -> Scene:
        release = release or settled.second
        archive = keep_probe_images(open_store(settings), release.digest, draw_images())
        staged = {"release_sha256": release.digest, "probes_sha256": archive}
        world.ledger.append("staged", model=release.model, version=release.version, evidence=staged, key="staged")
        request = ReleaseRequest(release, settled.first, "scheduler", EVIDENCE)
        params = ModelReleaseParams(**{**PROBED.model_dump(), **changes})
        rollout = ReleaseEngine(world, "beginner").begin(request, Plan(params))
        answers.answers.append(Response("approver", datetime.now(UTC), True, EVIDENCE, "fine"))
        thread.start()
        return Scene(settled, world, world.aliases, rollout, [])

    yield begin
    stop.set()
    thread.join()
    left = [key for key in read_keys(api_keys_file(settings)).keys if key.name == PROBER and key.expires]
    assert not left, "a key is left behind"  # on a cluster it has one without an end


@contextmanager
def counting_clients(rig: TargetRig) -> Iterator[None]:
    """No request of a client is counted meanwhile by the service that is stable before and warm after."""
    before = rig.observe(Slot.STABLE)
    yield
    after = next(rig.observe(slot) for slot in Slot if rig.target.state().slots.get(slot) == rig.first)
    assert (after.requests, after.client_errors, after.labels) == (before.requests, before.client_errors, before.labels)
    assert after.probes.requests > before.probes.requests


def count_kept(rig: TargetRig, origin: str, version: str, since: datetime) -> int:
    with Predictions(open_predictions(rig.settings)) as predictions:
        chosen = Filter(version=version, origin=origin, since=since.replace(tzinfo=None))
        return len(predictions.latest(chosen, 10_000).rows)


def test_release__no_clients_at_all__is_promoted_on_probes_that_are_in_no_clients_numbers(begin: Begin) -> None:
    began = datetime.now(UTC)
    scene = begin()
    with counting_clients(scene.rig):
        state = scene.run_to(PROMOTED)
    assert state.step == PROMOTED, state.reason
    assert [passage.step for passage in state.passages] == ["pending", "shadow", "canary@30", "canary@100", "promoted"]
    assert all(passage.probes == passage.requests > 0 for passage in state.passages[2:])
    (shadow, *_) = [record for record in scene.world.ledger.entries() if '"step":"canary@30"' in record.evidence]
    assert '"probes":' in shadow.evidence
    assert scene.rig.observe(Slot.STABLE).requests == 0, "the new champion has answered probes alone"
    for version in ("1", "2"):
        assert count_kept(scene.rig, "probe", version, began) > 50
        assert count_kept(scene.rig, "client", version, began) == count_kept(scene.rig, "mirror", version, began) == 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"probe_requests_per_s": 0}, {"count_probes": False}], ids=["off", "not counted"])
def test_release__no_clients_and_no_probes_that_count__is_not_promoted(
    begin: Begin, changes: dict[str, object]
) -> None:
    scene = begin(max_step_s=7, **changes)
    state = scene.run_to(PROMOTED)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith("still too little data after")
    assert state.reading is not None
    assert state.reading.requests == state.reading.probes == 0
    assert (state.reading.uncounted_probes > 0) is ("count_probes" in changes)


@pytest.mark.slow
def test_release__canary_that_fails_no_client_for_there_is_none__is_caught_by_probes(
    begin: Begin,
    settled: TargetRig,
    staged_release: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty_code(ERRORS) as code:
        monkeypatch.setattr(release_target_behaviour, "find_service_code", lambda: code)
        faulty = make_release(settled.settings, staged_release, "3")
    scene = begin(faulty)
    state: RolloutState = scene.run_to(PROMOTED)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith("errors: ")
    assert scene.rig.target.state().routing == Routing()
