"""What the judgement of a canary is given: counts of one window, any of which may be missing, and the limits.

A number that could not be measured is None or NaN, and is passed on as such: whoever judges says that it is missing.
Nothing here has a default that stands for a good measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.core.agreement import LabelPairs
from pipelines.core.sequential_test import ErrorRateTest

Measured = float | None
"""A number, or None or NaN where it could not be measured."""


@dataclass(frozen=True)
class SlotWindow:
    """What one slot counted since the window began.

    Attributes:
        requests: that were due an answer, failed ones included.
        errors: of these, those that failed.
        latency_buckets: upper edge in seconds to cumulative count, the last edge infinite.
        crashes: processes that ended unasked.
        age_s: seconds since these numbers were read from the slot; counters that stand still look like health.
    """

    requests: Measured
    errors: Measured
    latency_buckets: Mapping[float, float] | None
    crashes: Measured
    age_s: Measured


@dataclass(frozen=True)
class MirrorWindow:
    """What both models answered to the same requests.

    Attributes:
        labels: that the models know.
        pairs: (champion's label, new model's label) to count.
        score_difference: sum, over these requests, of half the sum over labels of the absolute difference of the two
            probabilities: from 0 (same probabilities) to 1 for each request.
    """

    labels: Sequence[str]
    pairs: LabelPairs | None
    score_difference: Measured


@dataclass(frozen=True)
class Counts:
    """Bad and all requests of both slots; the stable slot's are None where it cannot be compared with."""

    bad: float = 0.0
    total: float = 0.0
    stable_bad: float | None = None
    stable_total: float | None = None

    def since(self, earlier: Counts) -> Counts | None:
        """What was added after `earlier`; None where that is no former state of these counts."""
        bad, total = self.bad - earlier.bad, self.total - earlier.total
        if not 0 <= bad <= total:
            return None
        if self.stable_bad is None or self.stable_total is None:
            return Counts(bad, total)
        stable_bad, stable_total = (
            self.stable_bad - (earlier.stable_bad or 0),
            self.stable_total - (earlier.stable_total or 0),
        )
        if not 0 <= stable_bad <= stable_total:  # the stable slot was started anew
            return Counts(bad, total, self.stable_bad, self.stable_total)
        return Counts(bad, total, stable_bad, stable_total)


@dataclass(frozen=True)
class CanaryWindow:
    """All that was observed of a step so far.

    Attributes:
        canary: None when it cannot be asked.
        stable: None when it cannot be asked, or does not exist.
        canary_share: the canary's configured share of the requests, 0 to 1: 0.5 where each request goes to both
            (mirrored), 1 where the stable slot gets none and is not compared with.
        mirror: None where nothing is mirrored.
        turning_points: what the last judgement of the same window returned under this name; empty at the first one.
            With it, a canary that turns bad after a long healthy time is caught as fast as one that was never well.
    """

    canary: SlotWindow | None
    stable: SlotWindow | None
    canary_share: Measured
    mirror: MirrorWindow | None = None
    turning_points: Mapping[str, Counts] = field(default_factory=dict)


class CanaryLimits(BaseModel):
    """What is asked of a canary, and how sure the verdict has to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_error_rate: float = Field(0.001, gt=0, le=0.4, description="Share of requests that may fail.")
    acceptable_share: float = Field(0.2, gt=0, lt=1, description="Of the limit: surely promoted at this error rate.")
    unacceptable_share: float = Field(2.0, gt=0, description="Of the limit: surely rolled back at this error rate.")
    quantile: float = Field(0.95, gt=0, lt=1, description="Of latency that is limited.")
    max_latency_s: float = Field(0.5, gt=0, description="Seconds that this quantile must not exceed.")
    max_crashes: int = Field(0, ge=0, description="Processes that may end unasked.")
    min_agreement: float = Field(0.9, gt=0, lt=1, description="Share of mirrored requests with the champion's label.")
    min_label_agreement: float = Field(0.5, gt=0, lt=1, description="The same, among each of the champion's labels.")
    max_label_shift: float = Field(0.1, gt=0, lt=1, description="Share of predictions that moved between labels.")
    max_score_difference: float | None = Field(
        0.2, gt=0, lt=1, description="Mean total variation between both models' probabilities; None: not judged."
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Largest probability of a wrong roll-back, for each gate.")
    beta: float = Field(0.05, gt=0, lt=0.5, description="Largest probability of a wrong promotion, for each gate.")
    max_requests: int = Field(20_000, ge=1, description="Requests without a verdict after which a gate is exhausted.")
    max_age_s: float = Field(15.0, gt=0, description="Seconds after which numbers are too old to promote on.")

    @property
    def error_rate_test(self) -> ErrorRateTest:
        """The test of the error rate that these limits ask for."""
        return ErrorRateTest.around(
            self.max_error_rate,
            acceptable_share=self.acceptable_share,
            unacceptable_share=self.unacceptable_share,
            alpha=self.alpha,
            beta=self.beta,
            max_requests=self.max_requests,
        )

    @model_validator(mode="after")
    def _errors_can_be_judged(self) -> CanaryLimits:
        _ = self.error_rate_test  # refuses what it cannot judge, and says why
        return self


def measured(value: Measured) -> float | None:
    """The number, or None where it is none: missing, NaN, infinite or negative."""
    return float(value) if value is not None and math.isfinite(value) and value >= 0 else None
