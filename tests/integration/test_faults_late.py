"""A release that is good for most of its shadow and then answers otherwise, with real parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.release.steps import ROLLED_BACK, SHADOW
from pipelines.services.faulty_releases import Fault, faulty_code
from tests.integration.local_rig import Rig
from tests.integration.release_target_behaviour import make_release
from tests.integration.test_rollout import PARAMS, open_scene

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]

SOUND_COPIES = 1_200
# Quick, polite, and as sure of itself as ever: it only calls things by another name from some image on.
RELABELS = Fault(
    "relabels",
    f"gives the next label's name from the {SOUND_COPIES}-th image on",
    "agreement",
    code=f"""from dataclasses import replace
            if answered > {SOUND_COPIES}:
                found = await sound(self, data)
                return replace(found, label_index=(found.label_index + 1) % len(found.probabilities))""",
)


def test_rollout__labels_go_wrong_late_in_shadow__is_taken_back_before_any_client_gets_one(
    settled: Rig,
    staged_release: Path,
) -> None:
    with faulty_code(RELABELS) as code:
        faulty = make_release(settled.settings, staged_release, "5", code)
    params = PARAMS.model_copy(
        update={"min_step_s": 300, "max_step_s": 600, "min_agreement": 0.6, "max_label_shift": 0.9}
    )
    with open_scene(settled, faulty, params) as scene, settled.traffic() as traffic:
        state = scene.run_to(SHADOW)
        assert state.step == SHADOW, state.reason
        final = scene.run_to(ROLLED_BACK)
        traffic.wait_for(50)
    assert final.step == ROLLED_BACK
    found = re.match(r"agreement: .* in ([\d,]+) of ([\d,]+) mirrored .* the same in [\d,]+ of the last ", final.reason)
    assert found, final.reason
    agreed, total = (int(number.replace(",", "")) for number in found.groups())
    assert agreed / total > params.min_agreement, "all copies together would still have passed"
    assert traffic.failed == []
    assert {exchange.version for exchange in traffic.since(0.0)} == {"1"}
    print(f"other labels after {SOUND_COPIES} copies: taken back after {total - agreed} of them ({final.reason})")
