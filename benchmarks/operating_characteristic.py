"""The operating characteristic of the canary's gates, beside gates with fixed windows on the same streams.

Prints the tables of docs/reference/judgement.md and draws its figure: `python -m benchmarks.operating_characteristic`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pipelines.core.canary_observations import CanaryLimits
from pipelines.core.operating_characteristic import (
    Late,
    Outcomes,
    ThresholdGate,
    error_streams,
    of_agreement,
    of_judgement,
    of_latency_bound,
    of_sequential_test,
    of_threshold_gate,
)

FIGURE = Path(__file__).parents[1] / "docs/reference/judgement-promotion.png"
SEED = 20261121
LIMITS = CanaryLimits()
TEST = LIMITS.error_rate_test
RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
CURVE = tuple(10 ** (-4.3 + place * 0.1) for place in range(27))  # 0.005 % to 2 %
STREAM_REQUESTS = 20_000
GATES = {
    "ten windows of 120": ThresholdGate(120, 10),
    "ten windows of 600": ThresholdGate(600, 10),
    "ten windows of 600, two may fail": ThresholdGate(600, 10, 2),
}
LONG = ThresholdGate(6_000, 10)
LATE: dict[str, Late] = {
    "all of shadow": "nothing",
    "and since the best moment": "since the best moment",
    "and the last 200": 200,
}
LOOK_REQUESTS = 30  # 10 a second, of which there is something new to see every 3 s
STEP_LOOKS = 200  # 10 minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2_000, help="simulated canaries for each true error rate")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    promotion(arguments.streams)
    risks()
    bad_network(arguments.streams // 4)
    detection(arguments.streams // 10)
    latency(arguments.streams)
    agreement(arguments.streams // 4)
    late_fault(arguments.streams // 4)
    draw(arguments.figure)


def promotion(streams: int) -> None:
    """P(promote) and requests, all gates on the same streams."""
    _head(
        "Promoted, and canary requests until the verdict, by true error rate",
        ["true error rate", "sequential test", *GATES],
    )
    for rate in RATES:
        failed = error_streams(rate, streams, STREAM_REQUESTS, SEED)
        seen = [of_sequential_test(TEST, failed), *(of_threshold_gate(gate, failed) for gate in GATES.values())]
        _row([_percent(rate), *(f"{_percent(one.promoted)}, {one.requests:,.0f}" for one in seen)])


def risks() -> None:
    """What a narrower region and smaller risks (alpha and beta alike) cost; exact."""
    _head(
        "What smaller risks cost (exact): promoted, and requests on average",
        ["test", *(f"at {_percent(rate)}" for rate in (0.0002, 0.0005, 0.001, 0.002, 0.01))],
    )
    for alpha, share in ((0.1, 2.0), (0.05, 2.0), (0.01, 2.0), (0.05, 1.0)):
        test = CanaryLimits(alpha=alpha, beta=alpha, unacceptable_share=share, max_requests=50_000).error_rate_test
        courses = [test.course(rate) for rate in (0.0002, 0.0005, 0.001, 0.002, 0.01)]
        _row(
            [
                f"{_percent(test.acceptable)} against {_percent(test.unacceptable)}, risks {_percent(alpha)}",
                *(f"{_percent(course.promoted)}, {course.expected_requests:,.0f}" for course in courses),
            ]
        )


def bad_network(streams: int) -> None:
    """Both slots healthy for a while, then both as bad: how often is the canary blamed?"""
    _head(
        "A network that turns bad for both slots: rolled back",
        ["errors of both, canary's share", "with comparison", "sequential test alone", "ten windows of 600"],
    )
    for share in (0.1, 0.5):
        for bad in (0.005, 0.02, 0.1):
            rates = [0.0002] * 5 + [bad] * 25
            seen = [
                of_judgement(
                    LIMITS,
                    canary_error_rates=rates,
                    stable_error_rates=rates,
                    share=share,
                    look_requests=round(24 / share),
                    streams=streams,
                    seed=SEED,
                    compare=compare,
                )
                for compare in (True, False)
            ]
            window_fails = 1 - GATES["ten windows of 600"].promotion_probability(bad)
            _row(
                [
                    f"{_percent(bad)}, {_percent(share)}",
                    *(_percent(one.rolled_back) for one in seen),
                    _percent(window_fails),
                ]
            )


def detection(streams: int) -> None:
    """Requests to a roll-back of a bad canary beside a good stable slot."""
    _head(
        "A bad canary beside a good stable slot: canary requests until the roll-back",
        ["true error rate", "alone (100 %)", "at 50 %", "at 10 %", *GATES],
    )
    for rate in (0.005, 0.01, 0.05, 0.2):
        looks = math.ceil(60 / rate)
        seen = [
            of_judgement(
                LIMITS,
                canary_error_rates=[rate] * looks,
                stable_error_rates=[0.0002] * looks,
                share=share,
                look_requests=max(2, round(0.1 / rate / share)),
                streams=streams,
                seed=SEED,
            )
            for share in (1.0, 0.5, 0.1)
        ]
        failed = error_streams(rate, streams, STREAM_REQUESTS, SEED)
        seen += [of_threshold_gate(gate, failed) for gate in GATES.values()]
        _row([_percent(rate), *(_to_roll_back(one) for one in seen)])


def latency(streams: int) -> None:
    """The gate on p95."""
    _head(
        "p95, by the true share of slow answers (5 % allowed), at most 20,000 requests",
        ["true share of slow answers", "promoted", "rolled back", "requests"],
    )
    for share in (0.0, 0.01, 0.03, 0.04, 0.05, 0.06, 0.08, 0.2):
        one = of_latency_bound(LIMITS, share, requests=STREAM_REQUESTS, streams=streams // 4, seed=SEED)
        _row([_percent(share), _percent(one.promoted), _percent(one.rolled_back), f"{one.requests:,.0f}"])


def agreement(streams: int) -> None:
    """The gate on agreement, with each of the ways to see a late fault."""
    _head(
        "Agreement with the champion, at least 90 % asked; 6,000 mirrored requests at least, 20,000 at most",
        ["true agreement", *(f"{name}: promoted, rolled back, requests" for name in LATE)],
    )
    looks = STREAM_REQUESTS // LOOK_REQUESTS
    for share in (0.97, 0.95, 0.93, 0.92, 0.91, 0.9, 0.88):
        seen = [_of_agreement([1 - share] * looks, streams, late) for late in LATE.values()]
        cells = (f"{_percent(one.promoted)}, {_percent(one.rolled_back)}, {one.requests:,.0f}" for one in seen)
        _row([_percent(share), *cells])


def late_fault(streams: int) -> None:
    """A model that agrees in 97 % until a fault begins: how often does it reach the first clients?"""
    _head(
        "A fault that begins late in 6,000 mirrored requests: promoted, and requests until it is rolled back",
        ["same label then, in the last", *LATE],
    )
    looks = STEP_LOOKS + 100
    for share in (0.8, 0.6, 0.0):
        for last in (1_200, 600, 300, 60, 30):
            good = STEP_LOOKS - last // LOOK_REQUESTS
            rates = [0.03] * good + [1 - share] * (looks - good)
            seen = [_of_agreement(rates, streams, late) for late in LATE.values()]
            began = good * LOOK_REQUESTS
            _row(
                [
                    f"{_percent(share)}, {last:,}",
                    *(f"{_percent(one.promoted)}, {_after(one, began)}" for one in seen),
                ]
            )


def _of_agreement(disagreement: Sequence[float], streams: int, late: Late) -> Outcomes:
    return of_agreement(
        LIMITS,
        disagreement,
        look_requests=LOOK_REQUESTS,
        step_looks=STEP_LOOKS,
        streams=streams,
        seed=SEED,
        late=late,
    )


def _after(one: Outcomes, began: int) -> str:
    return f"{one.requests_to_roll_back - began:,.0f}" if one.rolled_back else "never"


def draw(figure_file: Path) -> None:
    """P(promote) against the true error rate; exact curves."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.0), dpi=90, layout="constrained")
    percents = [100 * rate for rate in CURVE]
    axes.axvspan(100 * TEST.acceptable, 100 * TEST.unacceptable, color="0.93", label="either verdict will do")
    for name, gate in {**GATES, "ten windows of 6,000": LONG}.items():
        curve = [100 * gate.promotion_probability(rate) for rate in CURVE]
        axes.plot(
            percents, curve, linestyle="--", linewidth=1.2, label=f"{name} requests" if "may" not in name else name
        )
    axes.plot(
        percents,
        [100 * TEST.course(rate).promoted for rate in CURVE],
        color="black",
        linewidth=2.2,
        label="sequential test, risks of 5 %",
    )
    axes.axvline(100 * LIMITS.max_error_rate, color="0.5", linewidth=0.8)
    axes.set(xscale="log", xlabel="true error rate, % (limit 0.1 %)", ylabel="promoted, %", ylim=(-2, 102))
    axes.set_xticks([0.005, 0.02, 0.1, 0.2, 1, 2], ["0.005", "0.02", "0.1", "0.2", "1", "2"])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(figure_file, metadata={"Software": None})


def _to_roll_back(outcomes: Outcomes) -> str:
    return f"{outcomes.requests_to_roll_back:,.0f}" if outcomes.rolled_back else "never"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-6 else "0 %"


def _head(title: str, columns: Sequence[str]) -> None:
    print(f"\n{title}\n")
    _row(columns)
    print("|" + "---|" * len(columns))


def _row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
