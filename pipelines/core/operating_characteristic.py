"""How often a gate promotes, against the true error rate: the sequential test beside a gate with fixed windows.

All gates see the same simulated streams.  Abscissa and ordinate are those of the operating characteristic of acceptance
sampling (H. F. Dodge and H. G. Romig, Bell System Technical Journal 8 (1929) 613-631).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.core.canary_judgement import judge
from pipelines.core.canary_observations import CanaryLimits, CanaryWindow, Counts, SlotWindow
from pipelines.core.late_change import clearly_bad_share, late_boundary
from pipelines.core.sequential_test import PROMOTE, ROLL_BACK, ErrorRateTest

_CHUNK = 100  # streams in memory at a time

Late = Literal["nothing", "since the best moment"] | int
"""What of the last requests is held to a limit as well: nothing, all since the best moment, or so many of them."""


@dataclass(frozen=True)
class Outcomes:
    """What became of simulated canaries.

    Attributes:
        promoted: share of them.
        rolled_back: share of them; the rest ended without a verdict.
        requests: mean number of canary requests until the end.
        requests_to_roll_back: mean number until a roll-back; NaN without one.
    """

    promoted: float
    rolled_back: float
    requests: float
    requests_to_roll_back: float


@dataclass(frozen=True)
class ThresholdGate:
    """A gate as Argo Rollouts and Flagger have it: the error rate of each window against a threshold.

    Argo Rollouts' analysis fails when more than `failureLimit` measurements fail (default 0) and succeeds after
    `count` measurements; Flagger rolls back when `threshold` checks have failed and promotes after as many good checks
    as it takes to raise the weight.  Without traffic neither has a verdict of its own; here there is always traffic.

    Attributes:
        window_requests: canary requests in each window.
        windows: so many are measured.
        failures_allowed: windows that may be above the limit.
        limit: on the error rate of a window.
    """

    window_requests: int
    windows: int
    failures_allowed: int = 0
    limit: float = 0.001

    def promotion_probability(self, error_rate: float) -> float:
        """Exact, by the binomial distribution of errors in a window and of failed windows."""
        from scipy.stats import binom

        window_fails = binom.sf(math.floor(self.limit * self.window_requests + 1e-9), self.window_requests, error_rate)
        return float(binom.cdf(self.failures_allowed, self.windows, window_fails))


def error_streams(error_rate: float, streams: int, requests: int, seed: int) -> NDArray[np.bool_]:
    """Simulated requests, bool `(streams, requests)`, true where one failed."""
    return np.random.default_rng(seed).random((streams, requests), dtype=np.float32) < error_rate


def of_sequential_test(test: ErrorRateTest, failed: NDArray[np.bool_]) -> Outcomes:
    """Run the sequential test over streams, looking after each request.

    Args:
        test: the test.
        failed: bool `(streams, requests)`.
    """
    ends, promoted, rolled_back = [], [], []
    sent = np.arange(1, failed.shape[1] + 1)
    for start in range(0, len(failed), _CHUNK):
        errors = failed[start : start + _CHUNK].cumsum(axis=1)
        ratio = errors * test.per_error + (sent - errors) * test.per_success
        over = (ratio >= test.roll_back_at) | (ratio <= test.promote_at)
        end = np.where(over.any(axis=1), over.argmax(axis=1), failed.shape[1] - 1)
        last = ratio[np.arange(len(end)), end]
        ends.append(end + 1)
        promoted.append(last <= test.promote_at)
        rolled_back.append(last >= test.roll_back_at)
    return _outcomes(np.concatenate(ends), np.concatenate(promoted), np.concatenate(rolled_back))


def of_threshold_gate(gate: ThresholdGate, failed: NDArray[np.bool_]) -> Outcomes:
    """Run a gate with fixed windows over the same streams.

    Args:
        gate: the gate.
        failed: bool `(streams, requests)`, at least as many requests as the gate's windows hold.
    """
    used = gate.windows * gate.window_requests
    if failed.shape[1] < used:
        raise ValueError(f"{failed.shape[1]} requests in a stream, the gate takes {used}")
    errors = failed[:, :used].reshape(len(failed), gate.windows, gate.window_requests).sum(axis=2)
    breaches = (errors > gate.limit * gate.window_requests + 1e-9).cumsum(axis=1)
    over = breaches > gate.failures_allowed
    rolled_back = over.any(axis=1)
    windows = np.where(rolled_back, over.argmax(axis=1) + 1, gate.windows)
    return _outcomes(windows * gate.window_requests, ~rolled_back, rolled_back)


def of_judgement(
    limits: CanaryLimits,
    *,
    canary_error_rates: Sequence[float],
    stable_error_rates: Sequence[float],
    share: float,
    look_requests: int,
    streams: int,
    seed: int,
    compare: bool = True,
) -> Outcomes:
    """Run the whole judgement over simulated rollouts of two slots whose error rates may change from look to look.

    Args:
        limits: of the gates.
        canary_error_rates: the canary's rate between each two looks; its length is the number of looks.
        stable_error_rates: the stable slot's, likewise.
        share: of all requests that the canary gets.
        look_requests: requests of both slots together between two looks.
        streams: rollouts to simulate.
        seed: of the simulation.
        compare: false hides the stable slot from the judgement.
    """
    random = np.random.default_rng(seed)
    ends, promoted, rolled_back = [], [], []
    for _ in range(streams):
        canary, stable = np.zeros(2), np.zeros(2)
        turning: dict[str, Counts] = {}
        verdict = ""
        for canary_rate, stable_rate in zip(canary_error_rates, stable_error_rates, strict=True):
            sent = int(random.binomial(look_requests, share))
            canary += [sent, random.binomial(sent, canary_rate)]
            stable += [look_requests - sent, random.binomial(look_requests - sent, stable_rate)]
            window = CanaryWindow(
                _slot(*canary.tolist()), _slot(*stable.tolist()), share if compare else 1.0, turning_points=turning
            )
            judgement = judge(window, limits, phase="canary")
            verdict, turning = judgement.verdict, dict(judgement.turning_points)
            if verdict in (PROMOTE, ROLL_BACK):
                break
        ends.append(canary[0])
        promoted.append(verdict == PROMOTE)
        rolled_back.append(verdict == ROLL_BACK)
    return _outcomes(np.array(ends), np.array(promoted), np.array(rolled_back))


def of_latency_bound(limits: CanaryLimits, slow_share: float, *, requests: int, streams: int, seed: int) -> Outcomes:
    """Run the gate on latency over streams of slow and fast requests, looking after every tenth.

    Args:
        limits: of the gate.
        slow_share: true share of requests above the limit.
        requests: in a stream.
        streams: to simulate.
        seed: of the simulation.
    """
    allowed = 1 - limits.quantile
    slow = error_streams(slow_share, streams, requests, seed).cumsum(axis=1)[:, 9::10].astype(np.float64)
    sent = np.arange(10, 10 * slow.shape[1] + 1, 10, dtype=np.float64)
    promotes = _log_evidence_above(sent - slow, sent, 1 - allowed) >= -math.log(limits.beta)
    rolls_back = _log_evidence_above(slow, sent, allowed) >= -math.log(limits.alpha)
    over = promotes | rolls_back
    end = np.where(over.any(axis=1), over.argmax(axis=1), over.shape[1] - 1)
    rows = np.arange(streams)
    return _outcomes(sent[end], promotes[rows, end], rolls_back[rows, end])


def of_agreement(
    limits: CanaryLimits,
    disagreement: Sequence[float],
    *,
    look_requests: int,
    step_looks: int,
    streams: int,
    seed: int,
    late: Late = "since the best moment",
) -> Outcomes:
    """Run the gate on agreement over streams of mirrored requests whose agreement may change from look to look.

    Args:
        limits: of the gate.
        disagreement: true share of other labels between each two looks; its length is the number of looks.
        look_requests: mirrored requests between two looks.
        step_looks: looks before which nothing is promoted, as `min_step_s` has it.
        streams: to simulate.
        seed: of the simulation.
        late: what else is held to the limit, beside all requests together.
    """
    allowed, looks = 1 - limits.min_agreement, len(disagreement)
    random = np.random.default_rng(seed)
    other = random.binomial(look_requests, disagreement, (streams, looks)).cumsum(axis=1).astype(np.float64)
    sent = np.broadcast_to(look_requests * np.arange(1.0, looks + 1), other.shape)
    promotes = _log_evidence_above(sent - other, sent, 1 - allowed) >= -math.log(limits.beta)
    promotes[:, : step_looks - 1] = False
    if late == "nothing":
        rolls_back = _log_evidence_above(other, sent, allowed) >= -math.log(limits.alpha)
    else:
        rolls_back = _log_evidence_above(other, sent, allowed) >= -math.log(limits.alpha / 2)
        boundary = late_boundary(limits.max_requests, limits.alpha / 2)
        if late == "since the best moment":
            last_other, last_sent = _since_best_moments(other, sent, allowed)
            evidence = _log_evidence_above(last_other, last_sent, allowed)
            promotes &= evidence < -math.log(limits.beta)
        else:
            before = late // look_requests
            last_other = other - np.pad(other, ((0, 0), (before, 0)))[:, :looks]
            last_sent = sent - np.pad(sent, ((0, 0), (before, 0)))[:, :looks]
            evidence = _log_evidence_above(last_other, last_sent, allowed)
            last_holds = _log_evidence_above(last_sent - last_other, last_sent, 1 - allowed) >= -math.log(limits.beta)
            promotes &= last_holds
        rolls_back |= evidence >= boundary
    promotes &= ~rolls_back
    over = promotes | rolls_back
    end = np.where(over.any(axis=1), over.argmax(axis=1), looks - 1)
    rows = np.arange(streams)
    return _outcomes(sent[rows, end], promotes[rows, end], rolls_back[rows, end])


def _since_best_moments(
    bad: NDArray[np.float64], sent: NDArray[np.float64], allowed: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`late_stretch` at each look of each stream, `(streams, looks)`: bad and all requests since the best moment."""
    worse = clearly_bad_share(allowed)
    ratio = bad * math.log(worse / allowed) + (sent - bad) * math.log((1 - worse) / (1 - allowed))
    lowest = np.minimum(np.minimum.accumulate(ratio, axis=1), 0.0)
    is_best = ratio <= lowest
    last_bad, last_sent = np.zeros_like(bad), np.zeros_like(bad)
    best_bad, best_sent = np.zeros(len(bad)), np.zeros(len(bad))
    for look in range(bad.shape[1]):
        best_bad = np.where(is_best[:, look], bad[:, look], best_bad)
        best_sent = np.where(is_best[:, look], sent[:, look], best_sent)
        last_bad[:, look] = bad[:, look] - best_bad
        last_sent[:, look] = sent[:, look] - best_sent
    return last_bad, last_sent


def _log_evidence_above(total: NDArray[np.float64], trials: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """`share_bounds.log_evidence_above`, for arrays."""
    from scipy.special import betaincc, betaln

    with np.errstate(divide="ignore"):
        beyond = np.log(betaincc(total + 1, trials - total + 1, share))
    likelihood = total * np.log(share) + (trials - total) * np.log1p(-share)
    return np.asarray(betaln(total + 1, trials - total + 1) + beyond - np.log1p(-share) - likelihood)


def _slot(requests: float, errors: float) -> SlotWindow:
    return SlotWindow(requests, errors, {0.5: requests, math.inf: requests}, 0, 0.0)


def _outcomes(ends: NDArray[np.float64], promoted: NDArray[np.bool_], rolled_back: NDArray[np.bool_]) -> Outcomes:
    return Outcomes(
        float(promoted.mean()),
        float(rolled_back.mean()),
        float(ends.mean()),
        float(ends[rolled_back].mean()) if rolled_back.any() else math.nan,
    )
