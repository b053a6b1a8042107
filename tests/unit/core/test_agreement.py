import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.agreement import label_shift, total_and_agreed, worst_label

LABELS = [str(digit) for digit in range(10)]
tables = st.dictionaries(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), st.integers(0, 300), min_size=1)


def _mirrored(requests: int, swapped: dict[str, str], noise: float = 0.03, seed: int = 1) -> dict[tuple[str, str], int]:
    random, pairs = np.random.default_rng(seed), {}
    for label in random.choice(LABELS, requests):
        answer = random.choice(LABELS) if random.random() < noise else label
        pair = (str(label), swapped.get(str(answer), str(answer)))
        pairs[pair] = pairs.get(pair, 0) + 1
    return pairs


def test_worst_label__two_swapped_labels_of_ten__are_found_within_150_requests() -> None:
    for seed in range(20):
        worst = worst_label(_mirrored(150, {"8": "9", "9": "8"}, seed=seed), LABELS, 0.5, 0.05)
        assert worst is not None
        assert worst.log_evidence >= math.log(20)
        assert worst.label in "89"


def test_worst_label__the_same_model__is_hardly_ever_condemned() -> None:
    condemned = 0
    for seed in range(200):
        worst = worst_label(_mirrored(300, {}, noise=0.4, seed=seed), LABELS, 0.5, 0.05)
        condemned += worst is not None and worst.log_evidence >= math.log(20)
    assert condemned / 200 <= 0.05


def test_label_shift__a_model_that_always_says_the_same__is_shown_to_have_shifted() -> None:
    shift = label_shift(_mirrored(300, dict.fromkeys(LABELS, "3")), 0.05)
    assert shift is not None
    assert shift.value == pytest.approx(0.9, abs=0.1)
    assert 0.3 < shift.low < shift.value


@given(tables, st.sampled_from([0.01, 0.05, 0.2]))
def test_label_shift__any_table__lies_within_its_bounds_and_below_the_disagreement(
    pairs: dict[tuple[str, str], int], alpha: float
) -> None:
    shift = label_shift(pairs, alpha)
    total, agreed = total_and_agreed(pairs)
    if total == 0:
        assert shift is None
    else:
        assert shift is not None
        assert 0 <= shift.low <= shift.value <= shift.high <= 1
        assert shift.value <= 1 - agreed / total + 1e-12


def test_label_shift__swapped_labels_that_are_as_frequent__are_no_shift() -> None:
    """Why the shift alone is no gate: it cannot see what `worst_label` sees."""
    shift = label_shift({("a", "b"): 50, ("b", "a"): 50}, 0.05)
    assert shift is not None
    assert shift.value == 0


def test_worst_label_and_label_shift__without_requests__say_nothing() -> None:
    assert worst_label({}, LABELS, 0.5, 0.05) is None
    assert label_shift({}, 0.05) is None


@pytest.mark.parametrize("count", [math.nan, -1.0, math.inf])
def test_total_and_agreed__counts_that_cannot_be__are_refused(count: float) -> None:
    with pytest.raises(ValueError, match="no number"):
        total_and_agreed({("a", "a"): count})
