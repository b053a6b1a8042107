"""Whether the canary is worse than the stable slot in the same window, so that a bad network blames nobody.

The balancer sends each request to the canary with probability w.  If both slots are equally good at every moment,
however bad that is, then a failed request is the canary's with probability w, whatever the error rate is and however
it changes in the window.  So the failures alone, given how many there are, are tosses of a coin that shows "canary"
with probability w, and evidence that it shows it more often is evidence against the canary.  Slow answers alike.

Sources: M. Lindon and A. Malek, Anytime-valid inference for multinomial count data, NeurIPS 2022, for comparing rates
that change in time; M. Lindon, C. Sanden and V. Shirikian, Rapid regression detection in software deployments through
sequential testing, KDD 2022, for canaries; the evidence is that of `pipelines.core.share_bounds`.
"""

from __future__ import annotations

from pipelines.core.share_bounds import log_evidence_above

LARGEST_COMPARABLE_SHARE = 0.8
"""Above this share of the traffic the stable slot sees too little to speak for or against the canary: even without a
failure on its side, proof takes 20 failures of the canary at 0.8, 7 at 0.5 and 2 at 0.1."""


def comparable_share(canary_total: float, stable_total: float, weight: float) -> float | None:
    """The share of failures that the canary may have, or `None` where the slots cannot be compared.

    The larger one of the configured and the observed share, so that a weight that changed within the window blames
    nobody.

    Args:
        canary_total: requests to the canary.
        stable_total: requests to the stable slot in the same window.
        weight: the canary's configured share of the traffic; 0.5 where every request goes to both (mirrored).
    """
    if stable_total <= 0 or canary_total <= 0:
        return None
    share = max(weight, canary_total / (canary_total + stable_total))
    return share if 0 < share <= LARGEST_COMPARABLE_SHARE else None


def log_evidence_canary_is_worse(canary_failures: float, stable_failures: float, share: float) -> float:
    """Evidence, in nats, that the canary fails more often; `log(20)` errs with 5 %, at all looks together.

    Args:
        canary_failures: failed or slow requests of the canary.
        stable_failures: those of the stable slot.
        share: the canary's share of all requests, as by `comparable_share`.
    """
    return log_evidence_above(canary_failures, canary_failures + stable_failures, share)
