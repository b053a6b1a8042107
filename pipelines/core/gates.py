"""The gate's tests: each takes numbers and gives one `GateCheck`, and a `Verdict` is all of them together.

No test looks at an estimate alone.  Which limit of its interval it looks at depends on who has to prove what:

* *Proven*: accuracy is held against its floor by its lower limit (`at_least`), and against the reference the model
  must be shown not to be worse by more than a margin (`non_inferior`).
* *Beyond doubt*: classes, slices and side conditions are many and have few images each, so that chance would block good
  models.  They block when the limit nearer to the threshold lies beyond it (`no_clear_drop`, `no_clear_shortfall`,
  `no_clear_excess`).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pipelines.core.statistics import (
    BoolArray,
    Interval,
    mcnemar_exact,
    paired_difference_interval,
    pairs_to_show_non_inferiority,
)

_SMALLEST_PROVABLE_MARGIN = 0.001  # below it the number of images is astronomical and helps nobody


class GateCheck(BaseModel):
    """One question to the model, with the numbers that answered it.

    `passed` is true where `judged` is false: a check that cannot be made yet stands in nobody's way, and says why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    passed: bool
    judged: bool = True
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    detail: str = ""


class Verdict(BaseModel):
    """All checks, and whether every judged one passed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    checks: tuple[GateCheck, ...]

    @classmethod
    def of(cls, checks: list[GateCheck]) -> Verdict:
        """Collect checks into a verdict."""
        return cls(passed=all(check.passed for check in checks if check.judged), checks=tuple(checks))

    @property
    def failed(self) -> list[GateCheck]:
        """The checks that the model did not pass."""
        return [check for check in self.checks if check.judged and not check.passed]


def not_judged(name: str, reason: str, *, limit: float | None = None, interval: Interval | None = None) -> GateCheck:
    """A check that cannot be made, with the reason; it blocks nothing."""
    return _check(name, passed=True, judged=False, interval=interval, limit=limit, detail=reason)


def at_least(name: str, interval: Interval, limit: float, detail: str = "") -> GateCheck:
    """Pass where even the lower confidence limit reaches the floor."""
    return _check(name, passed=interval.low >= limit, interval=interval, limit=limit, detail=detail)


def no_clear_shortfall(name: str, interval: Interval, limit: float, detail: str = "") -> GateCheck:
    """Fail where even the upper confidence limit is below what was asked."""
    return _check(name, passed=interval.high >= limit, interval=interval, limit=limit, detail=detail)


def no_clear_excess(name: str, interval: Interval, limit: float, detail: str = "") -> GateCheck:
    """Fail where even the lower confidence limit is above what was allowed."""
    return _check(name, passed=interval.low <= limit, interval=interval, limit=limit, detail=detail)


def non_inferior(
    correct_new: BoolArray, correct_old: BoolArray, margin: float, confidence: float, name: str = "accuracy drop"
) -> GateCheck:
    """Pass where the new classifier is not worse than the old one by more than a margin.

    Args:
        correct_new: bool `(N,)`, whether the new classifier got each image right.
        correct_old: bool `(N,)`, the same images in the same order.
        margin: largest drop of accuracy that does not matter, e.g. 0.05.
        confidence: that each limit of the difference holds, e.g. 0.95 (a one-sided test at 5 %).
        name: of the check.

    Two ways to pass.  *Proven*: the lower limit of Tango's paired score interval of the difference (new minus old)
    lies above `-margin`.  *Not proven, but level*: the new classifier gets at least as many images right as the old;
    the check then says how many images a proof would need.  Without the second way a small test set blocks every
    retraining for ever: at a margin of 5 % fewer than 52 images prove nothing even in full agreement.

    How often a model passes, by images N and the share of them that only one of the two gets right (margin 5 %,
    confidence 0.95, exact enumeration; `tests/unit/core/test_gates.py` holds it to the second column):

    ======  ===========  ============  ================  =================
    N       discordance  equally good  worse by 2 points  worse by 5 points
    ======  ===========  ============  ================  =================
    60      6 %          61 %          36 %              7 %
    135     6 %          69 %          35 %              4 %
    180     3 %          94 %          58 %              -
    180     6 %          81 %          43 %              4 %
    270     3 %          99 %          77 %              -
    270     6 %          93 %          58 %              5 %
    624     12 %         97 %          68 %              5 %
    ======  ===========  ============  ================  =================
    """
    pairs = _count_pairs(correct_new, correct_old)
    if pairs == 0:
        return not_judged(name, "no images to compare on", limit=-margin)
    gained, lost = _discordant(correct_new, correct_old)
    interval = paired_difference_interval(gained, lost, pairs, 2 * confidence - 1)
    detail = f"{gained} gained, {lost} lost of {pairs:,} images, McNemar p {mcnemar_exact(gained, lost):.2g}"
    proven = interval.low > -margin
    if not proven and interval.high > -margin:
        detail += f"; too few to prove {margin:.1%}" + ("" if gained < lost else ", but none lost on balance")
        if margin >= _SMALLEST_PROVABLE_MARGIN:
            needed = pairs_to_show_non_inferiority(margin, (gained + lost) / pairs, confidence)
            detail += f"; about {needed:,} images would show it of an equally good model (4 times in 5)"
    return _check(name, passed=proven or gained >= lost, interval=interval, limit=-margin, detail=detail)


def no_clear_drop(
    correct_new: BoolArray, correct_old: BoolArray, margin: float, confidence: float, name: str
) -> GateCheck:
    """Fail where a group of images clearly lost more than a margin.

    Args:
        correct_new: bool `(N,)`, whether the new classifier got each image of the group right.
        correct_old: bool `(N,)`, the same images in the same order.
        margin: largest drop that does not matter, e.g. 0.10.
        confidence: that each limit of the difference holds, e.g. 0.95.
        name: of the check.

    It fails when even the upper limit of Tango's paired score interval lies below `-margin`.  The margin is the
    allowance for looking at many groups: with ten classes, a margin of 10 points and an equally good model, some
    class fails in 4 % of cases at 15 images per class and 20 % discordance, in under 1 % at 12 %.  A class that truly
    lost 40 points is caught in 7 of 10 cases at 15 images, in 9 of 10 at 27.
    """
    pairs = _count_pairs(correct_new, correct_old)
    if pairs == 0:
        return not_judged(name, "no images to compare on", limit=-margin)
    gained, lost = _discordant(correct_new, correct_old)
    interval = paired_difference_interval(gained, lost, pairs, 2 * confidence - 1)
    return _check(
        name,
        passed=interval.high >= -margin,
        interval=interval,
        limit=-margin,
        detail=f"{gained} gained, {lost} lost of {pairs:,} images",
    )


def _count_pairs(correct_new: BoolArray, correct_old: BoolArray) -> int:
    if correct_new.shape != correct_old.shape or correct_new.ndim != 1:
        raise ValueError(f"outcomes of shapes {correct_new.shape} and {correct_old.shape} are not pairs")
    return len(correct_new)


def _discordant(correct_new: BoolArray, correct_old: BoolArray) -> tuple[int, int]:
    return int((correct_new & ~correct_old).sum()), int((correct_old & ~correct_new).sum())


def _check(
    name: str, *, passed: bool, judged: bool = True, interval: Interval | None, limit: float | None, detail: str
) -> GateCheck:
    numbers = {} if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}
    return GateCheck(name=name, passed=passed, judged=judged, limit=limit, detail=detail, **numbers)
