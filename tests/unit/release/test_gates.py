"""The gates over windows of slots: the real judgement, from a rollout's state and back into it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipelines.core.canary_observations import MirrorWindow
from pipelines.params import ModelReleaseParams
from pipelines.release.gates import Gates, forecast, limits_of
from pipelines.release.rollout_state import Baseline, RolloutState, StepReading, from_document
from pipelines.release.steps import SHADOW, Phase, Plan, Step
from pipelines.release.targets import ProbeCounters, Slot, SlotCounters
from pipelines.release.windows import Window, difference, observe_window
from tests.unit.release.simulated_release import EPOCH, release

PLAN = Plan(ModelReleaseParams())
STATE = RolloutState(
    "m:2:d:1", release(2), release(1), PLAN, "scheduler", EPOCH, "5d" * 32, step=Step(Phase.CANARY, 10)
)


def counters(requests: int, errors: int = 0, slow: int = 0, crashes: int = 0, started_at: float = 1.0) -> SlotCounters:
    buckets = {0.25: requests - slow, 0.5: requests - slow, math.inf: requests}
    return SlotCounters(EPOCH, started_at, requests, errors, crashes, buckets, {})


def judge(canary: SlotCounters, stable: SlotCounters | None = None, state: RolloutState = STATE) -> tuple[str, str]:
    reading = Gates(lambda _: None, lambda: EPOCH)(state, Window(canary, stable or counters(9 * canary.requests)))
    return reading.verdict, reading.reason


def test_gates__enough_good_requests__promote() -> None:
    assert judge(counters(4000))[0] == "promote"


@pytest.mark.parametrize(
    ("canary", "gate"),
    [(counters(300, errors=10), "errors"), (counters(400, slow=80), "latency"), (counters(10, crashes=1), "crashes")],
)
def test_gates__bad_canary_beside_a_good_stable_slot__is_rolled_back_by_its_gate(
    canary: SlotCounters, gate: str
) -> None:
    verdict, reason = judge(canary)
    assert verdict == "roll back"
    assert reason.startswith(gate)


def test_gates__both_slots_as_bad__blame_nobody() -> None:
    assert judge(counters(300, errors=10), counters(2700, errors=90))[0] == "need more data"


def test_gates__no_requests__need_more_data() -> None:
    assert judge(counters(0))[0] == "need more data"


def test_gates__stable_slot_gives_no_numbers__never_promote() -> None:
    reading = Gates(None, lambda: EPOCH)(STATE, Window(counters(4000), None))
    assert reading.verdict == "need more data"
    assert "stable" in reading.reason


def test_gates__old_numbers__never_promote() -> None:
    reading = Gates(None, lambda: EPOCH + 60)(STATE, Window(counters(4000), counters(36_000)))
    assert reading.verdict == "need more data"


def test_gates__everything_on_the_canary__needs_no_stable_slot() -> None:
    state = replace(STATE, step=Step(Phase.CANARY, 100))
    assert Gates(None, lambda: EPOCH)(state, Window(counters(4000), None)).verdict == "promote"


def test_gates__shadow_with_swapped_labels__is_rolled_back_whatever_its_latency() -> None:
    pairs = {("7", "1"): 60, ("1", "7"): 60, ("3", "3"): 80}
    mirror = MirrorWindow(["1", "3", "7"], pairs, 110.0)
    reading = Gates(lambda _: mirror, lambda: EPOCH)(replace(STATE, step=SHADOW), Window(counters(200), counters(200)))
    assert reading.verdict == "roll back"
    assert "agreement" in reading.reason


def test_gates__shadow_that_turns_bad_at_its_end__is_rolled_back_by_what_was_remembered() -> None:
    seen = [MirrorWindow(["1", "3"], {("3", "3"): 4_000, ("1", "1"): 900, ("1", "3"): 90}, 150.0)]
    seen.append(MirrorWindow(["1", "3"], {**seen[0].pairs, ("3", "3"): 4_030, ("3", "1"): 30}, 180.0))
    window, shadow = Window(counters(5_000), counters(5_000)), replace(STATE, step=SHADOW)

    def look(mirror: MirrorWindow, state: RolloutState) -> StepReading:
        return Gates(lambda _: mirror, lambda: EPOCH)(state, window)

    first = look(seen[0], shadow)
    assert first.verdict == "promote"
    state = from_document(replace(shadow, reading=first).to_document())
    assert look(seen[1], state).verdict == "roll back"
    assert look(seen[1], shadow).verdict == "promote", "on the whole it agrees"


def test_gates__shadow_without_a_source_of_copies__never_promotes() -> None:
    reading = Gates(None, lambda: EPOCH)(replace(STATE, step=SHADOW), Window(counters(4000), counters(4000)))
    assert reading.verdict == "need more data"


def test_gates__what_a_judgement_remembers__comes_back_through_the_database() -> None:
    window = Window(counters(15_000), counters(135_000))
    reading = Gates(None, lambda: EPOCH)(STATE, window)
    state = from_document(replace(STATE, reading=reading).to_document())
    assert state.reading == reading
    late = Window(counters(15_200, errors=10), counters(136_800))
    assert Gates(None, lambda: EPOCH)(state, late).verdict == "roll back", "bad after a long healthy time"
    assert Gates(None, lambda: EPOCH)(STATE, late).verdict != "roll back", "not bad on the whole"


def test_limits__of_the_defaults__are_what_the_user_wrote() -> None:
    limits = limits_of(ModelReleaseParams())
    assert (limits.max_error_rate, limits.max_latency_s, limits.max_crashes) == (0.001, 0.5, 0)
    assert ModelReleaseParams().min_step_s == 600


def test_forecast__without_traffic__names_the_requests_and_no_minutes() -> None:
    steps = forecast(PLAN, requests_per_s=0.0, is_first=False)
    assert [step.step for step in steps] == ["shadow", "canary@10", "canary@50", "canary@100"]
    assert all(step.requests and step.minutes is None for step in steps)
    assert forecast(PLAN, requests_per_s=0.0, is_first=True) == ()


# Windows


def test_difference__same_service__is_what_came_in_between() -> None:
    found = difference(counters(500, errors=7, slow=9), counters(200, errors=3, slow=4), restart_is_crash=True)
    assert (found.requests, found.errors, found.crashes) == (300, 4, 0)
    assert found.latency_buckets == {0.25: 295, 0.5: 295, math.inf: 300}


@pytest.mark.parametrize(("is_canary", "crashes"), [(True, 1), (False, 0)])
def test_difference__service_was_started_anew__counts_from_zero_and_as_a_crash_of_a_canary(
    is_canary: bool, crashes: int
) -> None:
    now, then = counters(30, started_at=9.0), counters(200)
    found = difference(now, then, restart_is_crash=is_canary)
    assert (found.requests, found.crashes) == (30, crashes)


def test_window__pod_that_ended_long_ago_is_forgotten__begins_anew_for_both_and_is_no_crash() -> None:
    began = Baseline(counters(100), counters(90_500, errors=905))
    window, baseline = observe_window(Observed(counters(150), counters(90_000, errors=900)), began)  # type: ignore[arg-type]
    assert baseline == Baseline(counters(150), counters(90_000, errors=900))
    assert (window.canary.requests, window.canary.crashes, window.stable.requests) == (0, 0, 0)
    later = Observed(counters(160), counters(90_100, errors=901))
    window, baseline = observe_window(later, baseline)  # type: ignore[arg-type]
    assert (window.canary.requests, window.stable.requests, window.stable.errors) == (10, 100, 1)
    window, baseline = observe_window(Observed(counters(80, crashes=1), later.observe(Slot.STABLE)), baseline)  # type: ignore[arg-type]
    assert baseline == Baseline(counters(80), later.observe(Slot.STABLE))
    assert (window.canary.requests, window.canary.crashes) == (0, 1)


def test_window__stable_slot_that_could_not_be_asked_when_the_step_began__counts_for_both_from_its_first_answer() -> (
    None
):
    window, baseline = observe_window(Observed(counters(150, crashes=1), counters(90_000)), Baseline(None))  # type: ignore[arg-type]
    assert (window.canary.requests, window.canary.crashes, window.stable.requests) == (0, 1, 0)
    window, _ = observe_window(Observed(counters(160, crashes=1), counters(90_080)), baseline)  # type: ignore[arg-type]
    assert (window.canary.requests, window.canary.crashes, window.stable.requests) == (10, 1, 80)


def test_window__canary_starts_anew_as_stable_is_first_asked__is_a_crash_all_the_same() -> None:
    target = Observed(counters(5, started_at=9.0), counters(90_000))
    window, baseline = observe_window(target, Baseline(counters(100)))  # type: ignore[arg-type]
    assert (window.canary.requests, window.canary.crashes) == (5, 1)
    window, _ = observe_window(target, baseline)  # type: ignore[arg-type]
    assert window.canary.crashes == 1


class Observed:
    """A target that only counts."""

    def __init__(self, canary: SlotCounters, stable: SlotCounters) -> None:
        self._counters = {Slot.CANARY: canary, Slot.STABLE: stable}

    def observe(self, slot: Slot) -> SlotCounters:
        return self._counters[slot]


# The prober's requests


def probed(slot: SlotCounters, requests: int, errors: int = 0) -> SlotCounters:
    buckets = dict.fromkeys((0.25, 0.5, math.inf), requests)
    return replace(slot, probes=ProbeCounters(requests, errors, 0, buckets))


def held_to(**changes: object) -> RolloutState:
    return replace(STATE, plan=Plan(ModelReleaseParams(**changes)))


def test_gates__probes_alone__promote_only_where_they_count() -> None:
    window = Window(probed(counters(0), 4_000), probed(counters(0), 36_000))
    counted = Gates(None, lambda: EPOCH)(STATE, window)
    assert counted.verdict == "promote"
    assert (counted.requests, counted.stable_requests, counted.probes) == (4_000, 36_000, 4_000)
    ignored = Gates(None, lambda: EPOCH)(held_to(count_probes=False), window)
    assert (ignored.verdict, ignored.requests, ignored.probes) == ("need more data", 0, 0)
    assert ignored.uncounted_probes == 4_000
    assert (counted.probe_evidence, ignored.probe_evidence) == ({"probes": 4_000}, {"uncounted_probes": 4_000})


def test_gates__errors_that_only_the_prober_met__roll_back_where_they_count() -> None:
    window = Window(probed(counters(100), 300, errors=10), probed(counters(900), 2_700))
    assert Gates(None, lambda: EPOCH)(STATE, window).verdict == "roll back"
    assert Gates(None, lambda: EPOCH)(held_to(count_probes=False), window).verdict == "need more data"


def test_forecast__with_a_prober__names_minutes_without_traffic_too() -> None:
    plan = Plan(ModelReleaseParams(probe_requests_per_s=50))
    shadow, tenth, *_ = forecast(plan, requests_per_s=0.0, is_first=False)
    assert (shadow.minutes, tenth.minutes) == (10, 10)
    assert "0.33 probes/s" in shadow.sentence
    uncounted = Plan(ModelReleaseParams(probe_requests_per_s=50, count_probes=False))
    assert forecast(uncounted, requests_per_s=0.0, is_first=False)[1].minutes is None


def test_difference__probes__are_what_came_in_between() -> None:
    now, then = probed(counters(5), 300, errors=4), probed(counters(5), 100, errors=1)
    found = difference(now, then, restart_is_crash=True)
    assert (found.requests, found.probes.requests, found.probes.errors, found.crashes) == (0, 200, 3, 0)
    assert found.probes.latency_buckets == {0.25: 200, 0.5: 200, math.inf: 200}


def test_with_probes__both_histograms__are_added_by_their_edges() -> None:
    probes = ProbeCounters(5, 0, 0, {0.25: 3, 0.5: 4, math.inf: 5})
    both = replace(counters(10, slow=2), probes=probes).with_probes()
    assert (both.requests, both.latency_buckets) == (15, {0.25: 11, 0.5: 12, math.inf: 15})
