"""Wald's sequential probability ratio test on an error rate: as many requests as the evidence takes, and no more.

The question is which of two rates explains the requests better: an acceptable one or an unacceptable one.  Each
request moves the log likelihood ratio, and the boundary that it crosses is the answer.  Between the boundaries, and
without requests, the answer is "need more data".

Source: A. Wald, Annals of Mathematical Statistics 16 (1945) 117-186, and Sequential Analysis (1947).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["promote", "roll back", "need more data"]
PROMOTE: Verdict = "promote"
ROLL_BACK: Verdict = "roll back"
NEED_MORE_DATA: Verdict = "need more data"

_NEGLIGIBLE = 1e-9  # probability below which no course is followed further
_LIKELY = 0.9


@dataclass(frozen=True)
class Course:
    """How a test ends at a given true error rate.

    Attributes:
        promoted: probability of "promote".
        rolled_back: probability of "roll back".
        undecided: probability that the test is exhausted without a verdict.
        expected_requests: mean number of requests until the test ends.
        likely_requests: the number by which nine of ten courses have ended, at most `max_requests`.
    """

    promoted: float
    rolled_back: float
    undecided: float
    expected_requests: float
    likely_requests: int


@dataclass(frozen=True)
class ErrorRateTest:
    """A test of an acceptable error rate against an unacceptable one.

    The boundaries are `log(1 / alpha)` and `log(beta)`: a likelihood ratio exceeds 1/alpha at any time at all with
    probability at most alpha (J. Ville, Étude critique de la notion de collectif, 1939).  So alpha and beta hold
    however often one looks, in whatever batches the counts arrive, and after a boundary was crossed and left again.
    Wald's own, `log((1 - beta) / alpha)` and `log(beta / (1 - alpha))`, are approximations: at 0.02 % against 0.2 %
    with 5 % each they promote an unacceptable canary with probability 5.14 %.  The difference costs 2 % more requests.

    Attributes:
        acceptable: error rate that should be promoted, e.g. 0.0002.
        unacceptable: error rate that should be rolled back, e.g. 0.002.
        alpha: largest probability to roll back at the acceptable rate or a lower one.
        beta: largest probability to promote at the unacceptable rate or a higher one.
        max_requests: the test is exhausted after so many; see `exhausted`.

    Raises:
        ValueError: `0 < acceptable < unacceptable < 1` does not hold, or alpha or beta is not between 0 and 0.5, or
            `max_requests` is too small for even an error-free canary to be promoted.
    """

    acceptable: float
    unacceptable: float
    alpha: float = 0.05
    beta: float = 0.05
    max_requests: int = 20_000

    def __post_init__(self) -> None:
        if not 0 < self.acceptable < self.unacceptable < 1:
            raise ValueError(f"0 < acceptable {self.acceptable} < unacceptable {self.unacceptable} < 1 does not hold")
        if not (0 < self.alpha < 0.5 and 0 < self.beta < 0.5):
            raise ValueError(f"alpha {self.alpha} and beta {self.beta} must lie between 0 and 0.5")
        if self.max_requests < self.shortest_promotion:
            raise ValueError(
                f"max_requests {self.max_requests} is below {self.shortest_promotion}, what an error-free canary needs"
            )

    @classmethod
    def around(
        cls,
        limit: float,
        *,
        acceptable_share: float = 0.2,
        unacceptable_share: float = 2.0,
        alpha: float = 0.05,
        beta: float = 0.05,
        max_requests: int = 20_000,
    ) -> ErrorRateTest:
        """The test for "the error rate is below `limit`", e.g. 0.02 % against 0.2 % for a limit of 0.1 %.

        No number of requests tells 0.0999 % from 0.1001 %: a test needs a region in which either verdict will do.
        It reaches from `acceptable_share * limit` to `unacceptable_share * limit`.  At the limit itself the default
        promotes 37 of 100 canaries.  `unacceptable_share=1` holds beta there, and costs three times the requests.
        """
        return cls(acceptable_share * limit, unacceptable_share * limit, alpha, beta, max_requests)

    @property
    def roll_back_at(self) -> float:
        """Log likelihood ratio at or above which the canary is rolled back."""
        return -math.log(self.alpha)

    @property
    def promote_at(self) -> float:
        """Log likelihood ratio at or below which the canary is promoted."""
        return math.log(self.beta)

    @property
    def late_roll_back_at(self) -> float:
        """Rise of the log likelihood ratio from its lowest point at which a canary that was well has turned bad.

        A long healthy window would otherwise be a credit that a failing canary may spend.  The rise is Page's CUSUM
        (Biometrika 41 (1954) 100-115).  It exceeds `log(max_requests / alpha)` within `max_requests` requests with
        probability at most alpha at the acceptable rate: it is below the Shiryaev-Roberts sum of the likelihood ratios
        from every start, whose mean after n requests is n (M. Pollak, Annals of Statistics 13 (1985) 206-227).
        """
        return math.log(self.max_requests / self.alpha)

    @property
    def per_error(self) -> float:
        """What a failed request adds to the log likelihood ratio; positive."""
        return math.log(self.unacceptable / self.acceptable)

    @property
    def per_success(self) -> float:
        """What an answered request adds to the log likelihood ratio; negative."""
        return math.log1p(-self.unacceptable) - math.log1p(-self.acceptable)

    @property
    def shortest_promotion(self) -> int:
        """Requests without an error after which a canary is promoted."""
        return math.ceil(self.promote_at / self.per_success)

    def log_likelihood_ratio(self, requests: float, errors: float) -> float:
        """Evidence for the unacceptable rate, in nats; 0 without requests.

        Args:
            requests: number of requests, failed ones included; a fraction is taken as it is.
            errors: how many of them failed.

        Raises:
            ValueError: a count is negative or not finite, or there are more errors than requests.
        """
        if not (math.isfinite(requests) and 0 <= errors <= requests):
            raise ValueError(f"{errors} errors of {requests} requests")
        return errors * self.per_error + (requests - errors) * self.per_success

    def verdict(self, requests: float, errors: float) -> Verdict:
        """The verdict on so many requests and errors; "need more data" when the test is exhausted, too."""
        ratio = self.log_likelihood_ratio(requests, errors)
        if ratio >= self.roll_back_at:
            return ROLL_BACK
        return PROMOTE if ratio <= self.promote_at else NEED_MORE_DATA

    def exhausted(self, requests: float, errors: float) -> bool:
        """Whether `max_requests` passed without a verdict.

        Exhausted is not promoted: the error rate lies between acceptable and unacceptable, and more requests will
        hardly tell.  A person decides.
        """
        return requests >= self.max_requests and self.verdict(requests, errors) == NEED_MORE_DATA

    def evidence(self, requests: float, errors: float) -> tuple[float, float]:
        """How far the evidence has come to "promote" and to "roll back", each from 0 to 1; one of them is 0."""
        ratio = self.log_likelihood_ratio(requests, errors)
        return min(1.0, max(0.0, ratio / self.promote_at)), min(1.0, max(0.0, ratio / self.roll_back_at))

    def requests_left(self, requests: float, errors: float, error_rate: float) -> float:
        """Expected further requests to the verdict if the true error rate is `error_rate`; 0 when there is one.

        The distance to the boundary that the ratio drifts to, over the drift per request (Wald 1945), and never fewer
        than the whole errors that a roll-back still takes.  At most what is left of `max_requests`.
        """
        ratio = self.log_likelihood_ratio(requests, errors)
        to_roll_back, to_promote = self.roll_back_at - ratio, ratio - self.promote_at
        if to_roll_back <= 0 or to_promote <= 0:
            return 0.0
        left = max(0.0, self.max_requests - requests)
        drift = error_rate * self.per_error + (1 - error_rate) * self.per_success
        if drift > 0:
            return min(left, max(to_roll_back / drift, math.ceil(to_roll_back / self.per_error) / error_rate))
        return min(left, to_promote / -drift) if drift < 0 else left

    def course(self, error_rate: float) -> Course:
        """The exact distribution of outcomes at a true error rate, by following every course of the test.

        Looked at after each request.  Between the boundaries only a few error counts are possible at a time, so that
        all courses together are a handful of numbers.
        """
        going = {0: 1.0}  # number of errors -> probability to be there without a verdict
        promoted = rolled_back = expected = 0.0
        likely = 0
        for requests in range(1, self.max_requests + 1):
            left = sum(going.values())
            if left < _NEGLIGIBLE:
                break
            expected += left
            after: dict[int, float] = {}
            for errors, probability in going.items():
                after[errors] = after.get(errors, 0.0) + probability * (1 - error_rate)
                after[errors + 1] = after.get(errors + 1, 0.0) + probability * error_rate
            going = {}
            for errors, probability in after.items():
                ratio = errors * self.per_error + (requests - errors) * self.per_success
                if ratio >= self.roll_back_at:
                    rolled_back += probability
                elif ratio <= self.promote_at:
                    promoted += probability
                else:
                    going[errors] = probability
            if not likely and promoted + rolled_back >= _LIKELY:
                likely = requests
        return Course(promoted, rolled_back, sum(going.values()), expected, likely or self.max_requests)
