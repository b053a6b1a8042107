"""A release on the cluster without a single client: the prober comes in through the gateway with its standing key."""

from __future__ import annotations

import time

import pytest

from pipelines.release.targets import Slot
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.integration.release_target_behaviour import wait_until
from tests.integration.test_prober import (  # noqa: F401 - the test is this target's too
    begin,
    test_release__no_clients_at_all__is_promoted_on_probes_that_are_in_no_clients_numbers,
)

pytestmark = [pytest.mark.cluster, pytest.mark.services]

_FORGOTTEN_AFTER_S = 6.0  # what a pod counted up to some seconds before a deployment counts as that deployment's


@pytest.fixture
def settled(rig: KubernetesRig) -> KubernetesRig:
    """Nothing of the second release runs, so that what clients asked it in other tests is not counted again."""
    rig.settle()
    process = rig.process_of(Slot.CANARY)
    rig.target.remove(Slot.CANARY)
    words = (f"--namespace={rig.settings.kubernetes_namespace}", f"--selector=perch/server={process[-1]}")
    wait_until(lambda: not rig.cluster.read("pods", *words)["items"])
    time.sleep(_FORGOTTEN_AFTER_S)
    return rig
