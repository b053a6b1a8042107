import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.canary_judgement import Judgement, Phase, judge
from pipelines.core.canary_observations import CanaryLimits, CanaryWindow, Counts, MirrorWindow, SlotWindow
from pipelines.core.sequential_test import NEED_MORE_DATA, PROMOTE, ROLL_BACK

LIMITS = CanaryLimits()
LABELS = ("cell", "debris", "stain")
ORDER = {ROLL_BACK: 0, NEED_MORE_DATA: 1, PROMOTE: 2}


def _slot(
    requests: float, errors: float = 0, slow: float = 0, crashes: float = 0, age_s: float | None = 1.0
) -> SlotWindow:
    fast = requests - slow
    return SlotWindow(requests, errors, {0.1: fast, 0.5: fast, 1.0: requests, math.inf: requests}, crashes, age_s)


def _mirror(pairs: dict[tuple[str, str], float], difference: float | None = None) -> MirrorWindow:
    return MirrorWindow(LABELS, pairs, 0.03 * sum(pairs.values()) if difference is None else difference)


SAME = _mirror({("cell", "cell"): 250, ("debris", "debris"): 150, ("cell", "debris"): 6})
HEALTHY = CanaryWindow(_slot(1_700), _slot(15_300, 2), 0.1)
SHADOW = CanaryWindow(_slot(406), _slot(406), 0.5, SAME)


def _judge(window: CanaryWindow, phase: Phase = "canary") -> Judgement:
    return judge(window, LIMITS, phase=phase)


def test_judge__a_healthy_canary__is_promoted() -> None:
    judgement = _judge(HEALTHY)
    assert judgement.verdict == PROMOTE
    assert judgement.missing == ()
    assert [gate.name for gate in judgement.gates] == ["errors", "latency", "crashes"]
    assert all(gate.to_promote == 1 for gate in judgement.gates)


@pytest.mark.parametrize(
    ("canary", "gate"),
    [(_slot(300, errors=4), "errors"), (_slot(300, slow=60), "latency"), (_slot(300, crashes=1), "crashes")],
    ids=["errors", "latency", "crashes"],
)
@pytest.mark.parametrize("phase", ["canary", "shadow"])
def test_judge__a_bad_canary_beside_a_good_stable_slot__is_rolled_back_by_its_gate(
    canary: SlotWindow, gate: str, phase: Phase
) -> None:
    judgement = _judge(CanaryWindow(canary, _slot(2_700), 0.1, SAME), phase)
    assert judgement.verdict == ROLL_BACK
    assert [one.name for one in judgement.gates if one.verdict == ROLL_BACK] == [gate]
    assert gate in judgement.sentence


@pytest.mark.parametrize(
    ("pairs", "gate"),
    [
        ({("cell", "debris"): 20.0, ("debris", "cell"): 20.0}, "agreement"),
        ({("cell", "cell"): 900.0, ("debris", "stain"): 15.0, ("stain", "debris"): 15.0}, "labels"),
    ],
    ids=["two frequent labels swapped", "two rare labels swapped"],
)
def test_judge__swapped_labels_with_perfect_latency__are_rolled_back_in_shadow(
    pairs: dict[tuple[str, str], float], gate: str
) -> None:
    judgement = _judge(replace(SHADOW, mirror=_mirror(pairs)), "shadow")
    assert judgement.verdict == ROLL_BACK
    assert judgement.gate(gate).verdict == ROLL_BACK
    assert {one.verdict for one in judgement.gates if one.name in ("latency", "crashes")} == {PROMOTE}


def test_judge__labels_all_the_same_but_other_probabilities__are_rolled_back_by_the_scores() -> None:
    judgement = _judge(replace(SHADOW, mirror=_mirror({("cell", "cell"): 400}, difference=160.0)), "shadow")
    assert judgement.gate("agreement").verdict == PROMOTE
    assert judgement.gate("scores").verdict == ROLL_BACK


def test_judge__labels_that_moved_one_way__are_rolled_back_by_the_shift() -> None:
    pairs = {("cell", "cell"): 600.0, ("cell", "debris"): 400.0}
    assert _judge(replace(SHADOW, mirror=_mirror(pairs)), "shadow").gate("label shift").verdict == ROLL_BACK


def test_judge__a_good_shadow__is_promoted_before_the_errors_are_proven() -> None:
    judgement = _judge(SHADOW, "shadow")
    assert judgement.gate("errors").verdict == NEED_MORE_DATA
    assert not judgement.gate("errors").required
    assert judgement.verdict == PROMOTE


@pytest.mark.parametrize(
    ("canary", "stable", "gate"),
    [
        (_slot(800, errors=16), _slot(7_200, errors=144), "errors"),
        (_slot(800, slow=200), _slot(7_200, slow=1_800), "latency"),
    ],
    ids=["errors", "latency"],
)
def test_judge__a_network_that_is_bad_for_both__blames_and_promotes_nobody(
    canary: SlotWindow, stable: SlotWindow, gate: str
) -> None:
    judgement = _judge(CanaryWindow(canary, stable, 0.1))
    assert judgement.verdict == NEED_MORE_DATA
    assert judgement.shared_trouble
    assert judgement.gate(gate).shared_trouble
    assert "nobody is blamed" in judgement.sentence
    alone = _judge(CanaryWindow(canary, None, 1.0))
    assert alone.verdict == ROLL_BACK


# What must be there; each is taken away, in each of the ways in which a number can be away.
_AWAY: dict[str, tuple[dict[str, Any], str]] = {
    "canary": ({"canary": None}, "canary: gives no metrics"),
    "stable": ({"stable": None}, "stable: gives no metrics"),
    "share": ({"canary_share": None}, "share of the requests"),
    "share that is none": ({"canary_share": math.nan}, "share of the requests"),
    "canary's age": ({"canary": _slot(1_700, age_s=None)}, "canary: metrics of unknown age"),
    "canary's present": ({"canary": _slot(1_700, age_s=16)}, "canary: metrics 16 s old"),
    "canary's age, a NaN": ({"canary": _slot(1_700, age_s=math.nan)}, "canary: metrics of unknown age"),
    "a clock set back": ({"canary": _slot(1_700, age_s=-300)}, "canary: metrics -300 s old"),
    "stable's present": ({"stable": _slot(15_300, age_s=90)}, "stable: metrics 90 s old"),
}
for _name, _value in (("None", None), ("NaN", math.nan), ("infinite", math.inf), ("negative", -1.0)):
    for _what in ("requests", "errors", "crashes"):
        _AWAY[f"canary's {_what}, {_name}"] = (
            {"canary": replace(_slot(1_700), **{_what: _value})},
            f"canary: {_what}",
        )
for _name, _buckets in (("None", None), ("empty", {}), ("NaN", {0.5: math.nan, math.inf: 1_700.0})):
    _AWAY[f"canary's latency, {_name}"] = (
        {"canary": replace(_slot(1_700), latency_buckets=_buckets)},
        "canary: latency",
    )


@pytest.mark.parametrize(("away", "named"), _AWAY.values(), ids=_AWAY)
def test_judge__something_cannot_be_measured__is_named_and_nothing_promoted(away: dict[str, Any], named: str) -> None:
    judgement = _judge(replace(HEALTHY, **away))
    assert judgement.verdict == NEED_MORE_DATA
    assert any(named in what for what in judgement.missing)
    assert named in judgement.sentence


@pytest.mark.parametrize(
    "mirror",
    [
        None,
        MirrorWindow(LABELS, None, 1.0),
        MirrorWindow(LABELS, {}, 0.0),
        MirrorWindow(LABELS, {("cell", "cell"): math.nan}, 1.0),
        MirrorWindow(LABELS, {("cell", "cell"): 400.0}, None),
        MirrorWindow(LABELS, {("cell", "cell"): 400.0}, math.nan),
        MirrorWindow(LABELS, {("cell", "cell"): 400.0}, 500.0),
    ],
    ids=["none", "no pairs", "empty", "NaN pairs", "no scores", "NaN scores", "impossible scores"],
)
def test_judge__no_mirrored_requests_to_compare__is_named_and_nothing_promoted(mirror: MirrorWindow | None) -> None:
    judgement = _judge(replace(SHADOW, mirror=mirror), "shadow")
    assert judgement.verdict == NEED_MORE_DATA
    assert judgement.missing


@pytest.mark.parametrize("phase", ["canary", "shadow"])
def test_judge__no_requests_at_all__needs_more_data(phase: Phase) -> None:
    judgement = _judge(CanaryWindow(_slot(0), _slot(0), 0.1, _mirror({})), phase)
    assert judgement.verdict == NEED_MORE_DATA
    assert 1_663 <= (judgement.gate("errors").requests_left or 0) <= 2_300
    assert judgement.gate("latency").requests_left == 88


def test_judge__a_breach_while_other_sources_are_down__is_rolled_back_all_the_same() -> None:
    canary = replace(_slot(300, errors=6, age_s=None), latency_buckets=None, crashes=None)
    assert _judge(CanaryWindow(canary, None, None)).verdict == ROLL_BACK


def test_judge__errors_read_a_moment_after_the_requests__still_count() -> None:
    judgement = _judge(CanaryWindow(replace(_slot(3), errors=5), _slot(100), 0.1))
    assert judgement.verdict == ROLL_BACK
    assert "more errors than requests" in " ".join(judgement.missing)


def test_judge__a_canary_that_turns_bad_after_a_long_time__is_caught_by_its_turning_point() -> None:
    """100,000 healthy requests are no credit: 25 failures suffice, where they would be 0.04 % of all."""
    healthy = _judge(CanaryWindow(_slot(100_000, 20), _slot(100_000, 20), 0.5))
    assert healthy.verdict == PROMOTE
    turned = CanaryWindow(_slot(100_500, 45), _slot(100_500, 20), 0.5, turning_points=healthy.turning_points)
    assert _judge(turned).verdict == ROLL_BACK
    assert _judge(replace(turned, turning_points={})).verdict == PROMOTE


def test_judge__a_canary_that_turns_slow_after_a_long_time__is_caught_by_its_turning_point() -> None:
    healthy = _judge(CanaryWindow(_slot(100_000), None, 1.0))
    turned = CanaryWindow(_slot(100_060, slow=50), None, 1.0, turning_points=healthy.turning_points)
    assert _judge(turned).gate("latency").verdict == ROLL_BACK


LATE_FAULTS = {
    # Pairs of the last requests, their mean difference of probabilities, and the gate that has to see them.
    "two frequent labels swapped": ({("cell", "debris"): 20.0, ("debris", "cell"): 20.0}, 0.9, "agreement"),
    "two rare labels swapped": ({("cell", "cell"): 1000.0, ("debris", "stain"): 30.0}, 0.03, "labels"),
    "other probabilities": ({("cell", "cell"): 120.0}, 0.5, "scores"),
}


@pytest.mark.parametrize(("pairs", "difference", "gate"), LATE_FAULTS.values(), ids=LATE_FAULTS)
def test_judge__mirrored_requests_turn_bad_after_a_long_time__are_caught_by_their_turning_points(
    pairs: dict[tuple[str, str], float], difference: float, gate: str
) -> None:
    """4,000 good copies are no credit: over all of them the fault is diluted to nothing."""
    good = {("cell", "cell"): 3_000.0, ("debris", "debris"): 900.0, ("cell", "debris"): 100.0}
    before = _judge(replace(SHADOW, mirror=_mirror(good)), "shadow")
    assert before.verdict == PROMOTE
    both = {pair: good.get(pair, 0.0) + pairs.get(pair, 0.0) for pair in {**good, **pairs}}
    late = replace(SHADOW, mirror=_mirror(both, 120.0 + difference * sum(pairs.values())))
    assert _judge(late, "shadow").verdict == PROMOTE
    judgement = _judge(replace(late, turning_points=before.turning_points), "shadow")
    assert judgement.verdict == ROLL_BACK
    assert judgement.gate(gate).verdict == ROLL_BACK
    assert " alone" in judgement.gate(gate).sentence


@pytest.mark.parametrize(
    ("pairs", "difference", "gate"),
    [
        ({("cell", "cell"): 6.0, ("cell", "debris"): 6.0}, 0.03, "agreement"),
        ({("cell", "cell"): 90.0, ("debris", "stain"): 9.0}, 0.03, "labels"),
        ({("cell", "cell"): 12.0}, 0.9, "scores"),
    ],
    ids=["agreement", "labels", "scores"],
)
def test_judge__a_few_last_copies_speak_against_it__hold_up_the_promotion_and_roll_nothing_back(
    pairs: dict[tuple[str, str], float], difference: float, gate: str
) -> None:
    good = {("cell", "cell"): 3_000.0, ("debris", "debris"): 900.0, ("cell", "debris"): 100.0}
    before = _judge(replace(SHADOW, mirror=_mirror(good)), "shadow")
    both = {pair: good.get(pair, 0.0) + pairs.get(pair, 0.0) for pair in {**good, **pairs}}
    mirror = _mirror(both, 120.0 + difference * sum(pairs.values()))
    late = replace(SHADOW, mirror=mirror)
    held = _judge(replace(late, turning_points=before.turning_points), "shadow")
    assert held.verdict == NEED_MORE_DATA
    assert [one.name for one in held.gates if one.required and one.verdict == NEED_MORE_DATA] == [gate]
    assert " alone" in held.sentence
    assert held.gate(gate).requests_left is None
    recovered = {**both, ("cell", "cell"): both[("cell", "cell")] + 60, ("debris", "debris"): 940.0}
    mirror = _mirror(recovered, 123.0 + difference * sum(pairs.values()))
    later = replace(late, mirror=mirror, turning_points=held.turning_points)
    assert _judge(later, "shadow").verdict == PROMOTE


def test_judge__no_mirrored_requests_for_a_look__keeps_their_turning_points() -> None:
    before = _judge(SHADOW, "shadow").turning_points
    away = _judge(replace(SHADOW, mirror=None, turning_points=before), "shadow")
    assert {name for name in before if name not in ("errors", "latency")} == {
        "agreement",
        "labels:cell",
        "labels:debris",
        "scores",
    }
    assert away.turning_points == before


def test_judge__both_slots_turn_bad_after_a_long_time__holds() -> None:
    healthy = _judge(CanaryWindow(_slot(100_000, 20), _slot(100_000, 20), 0.5))
    both = CanaryWindow(_slot(100_300, 50), _slot(100_300, 50), 0.5, turning_points=healthy.turning_points)
    judgement = _judge(both)
    assert judgement.verdict == NEED_MORE_DATA
    assert judgement.shared_trouble


def test_judge__a_window_that_began_anew__forgets_the_old_turning_point() -> None:
    stale = {"errors": Counts(5.0, 9_000.0), "latency": Counts(0.0, 9_000.0)}
    judgement = _judge(replace(HEALTHY, turning_points=stale))
    assert judgement.verdict == PROMOTE
    assert judgement.turning_points["errors"] == Counts(0.0, 1_700.0, 2.0, 15_300.0)


def test_judge__no_verdict_after_all_requests__is_exhausted_and_no_promotion() -> None:
    judgement = _judge(CanaryWindow(_slot(20_000, 15), _slot(20_000, 15), 0.5))
    assert judgement.verdict == NEED_MORE_DATA
    assert judgement.exhausted
    assert "a person decides" in judgement.sentence


def test_judgement__as_json__comes_back_the_same() -> None:
    for window in (HEALTHY, SHADOW, CanaryWindow(None, None, None)):
        judgement = _judge(window, "shadow")
        text = judgement.model_dump_json()
        assert Judgement.model_validate_json(text) == judgement
        assert json.loads(text)["verdict"] == judgement.verdict


anything = st.one_of(st.none(), st.floats(), st.integers(0, 3_000).map(float))
slots = st.none() | st.builds(
    SlotWindow,
    anything,
    anything,
    st.none() | st.dictionaries(st.sampled_from([0.1, 0.5, 1.0, math.inf, math.nan]), st.floats() | st.integers(0, 9)),
    anything,
    anything,
)
pairs = st.dictionaries(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), st.floats() | st.integers(0, 500))
mirrors = st.none() | st.builds(MirrorWindow, st.just(LABELS), st.none() | pairs, anything)


@given(st.builds(CanaryWindow, slots, slots, anything, mirrors), st.sampled_from(["canary", "shadow"]))
@settings(deadline=None)
def test_judge__any_rubbish__gives_a_verdict_and_promotes_only_what_is_complete(
    window: CanaryWindow, phase: Phase
) -> None:
    judgement = _judge(window, phase)
    if judgement.verdict == PROMOTE:
        assert not judgement.missing
        assert window.canary is not None
        assert window.canary.requests is not None
        assert window.canary.crashes == 0
    if window.canary is None and window.mirror is None:
        assert judgement.verdict == NEED_MORE_DATA


healthy_counts = st.tuples(st.integers(0, 4_000), st.integers(0, 12), st.integers(0, 200), st.integers(0, 40))


@given(healthy_counts, st.sampled_from([0.1, 0.5]))
@settings(deadline=None)
def test_judge__one_more_failure_of_the_canary__never_moves_towards_promotion(
    count: tuple[int, int, int, int], share: float
) -> None:
    requests, errors, slow, stable_errors = count
    requests, errors, slow = requests + 1, min(errors, requests), min(slow, requests)
    stable = _slot(4_000, stable_errors)

    def verdict(canary: SlotWindow) -> int:
        return ORDER[_judge(CanaryWindow(canary, stable, share)).verdict]

    before = verdict(_slot(requests, errors, slow))
    assert verdict(_slot(requests, errors + 1, slow)) <= before
    assert verdict(_slot(requests, errors, slow + 1)) <= before
    assert verdict(_slot(requests + 1, errors + 1, slow + 1)) <= before
    assert verdict(_slot(requests, errors, slow, crashes=1)) == ORDER[ROLL_BACK]


@given(st.dictionaries(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), st.integers(0, 300), min_size=1))
@settings(deadline=None)
def test_judge__one_more_disagreement__never_moves_agreement_towards_promotion(pairs: dict[Any, int]) -> None:
    def verdict(table: dict[Any, int]) -> int:
        return ORDER[_judge(replace(SHADOW, mirror=_mirror(table)), "shadow").gate("agreement").verdict]

    assert verdict({**pairs, ("cell", "stain"): pairs.get(("cell", "stain"), 0) + 1}) <= verdict(pairs)


@pytest.mark.parametrize(("share", "streams"), [(0.1, 60), (0.5, 60)])
def test_judge__healthy_canaries_watched_to_the_end__are_seldom_rolled_back(share: float, streams: int) -> None:
    """All gates, all looks, turning points handed on, at the acceptable error rate and 1 % slow answers."""
    random = np.random.default_rng(4)
    rolled_back = 0
    for _ in range(streams):
        counts, turning = np.zeros(6), {}
        for _ in range(60):
            sent = random.multinomial(400, [share, 1 - share])
            counts += [*sent, *random.binomial(sent, 0.0002), *random.binomial(sent, 0.01)]
            canary, stable = (_slot(*counts[[slot, slot + 2, slot + 4]].tolist()) for slot in (0, 1))
            judgement = _judge(CanaryWindow(canary, stable, share, turning_points=turning))
            turning = judgement.turning_points
            if judgement.verdict == ROLL_BACK:
                rolled_back += 1
                break
    assert rolled_back / streams <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / streams)


@pytest.mark.parametrize(
    "wrong",
    [{"max_error_rate": 0.0}, {"max_error_rate": 0.3, "unacceptable_share": 4.0}, {"max_requests": 100}],
    ids=str,
)
def test_canary_limits__what_cannot_be_judged__is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        CanaryLimits(**wrong)
