"""A bad model on the cluster: what answers otherwise than the champion is taken back before a client has met it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.release.steps import ROLLED_BACK
from pipelines.release.targets import Routing, Slot
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.integration.conftest import stage_random_network
from tests.integration.release_target_behaviour import make_release
from tests.integration.test_rollout import Scene, scene  # noqa: F401 - a fixture

pytestmark = [pytest.mark.cluster, pytest.mark.services]


@pytest.fixture
def settled(rig: KubernetesRig, tmp_path: Path) -> KubernetesRig:
    """The rollout to come is that of a network with other weights under the second version."""
    bad = make_release(rig.settings, stage_random_network(tmp_path, seed=2), rig.second.version)
    assert bad.digest != rig.second.digest
    rig.settle()
    return replace(rig, second=bad)


def test_rollout__model_that_answers_otherwise__is_taken_back_in_shadow_and_no_client_meets_it(
    scene: Scene,  # noqa: F811 - the fixture
) -> None:
    with scene.rig.traffic() as traffic:
        state = scene.run_to(ROLLED_BACK)
        traffic.wait_for(20)
    assert state.step == ROLLED_BACK
    assert "agree" in state.reason
    assert traffic.failed == []
    assert {exchange.version for exchange in traffic.since(0)} == {"1"}
    after = scene.rig.target.state()
    assert (after.routing, after.slots) == (Routing(), {Slot.STABLE: scene.rig.first})
    print(f"taken back: {state.reason}")
