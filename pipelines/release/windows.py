"""What happened in a step: the difference between a slot's counters now and when the step began."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.release.rollout_state import Baseline
from pipelines.release.targets import ReleaseTarget, Slot, SlotCounters


@dataclass(frozen=True)
class Window:
    """Both slots in the same time.

    Attributes:
        canary: what the canary counted; None when it cannot be asked.
        stable: what the stable slot counted; None when it cannot be asked.
    """

    canary: SlotCounters | None
    stable: SlotCounters | None


def observe_window(target: ReleaseTarget, baseline: Baseline) -> Window:
    """Ask both slots for what they counted since a step began."""
    canary, stable = target.observe(Slot.CANARY), target.observe(Slot.STABLE)
    return Window(
        difference(canary, baseline.canary, restart_is_crash=True) if canary else None,
        difference(stable, baseline.stable, restart_is_crash=False) if stable else None,
    )


def observe_baseline(target: ReleaseTarget, *, canary_runs: bool) -> Baseline:
    """The counters as they are now.

    Args:
        target: to ask.
        canary_runs: whether the canary's service is already the one to watch.
    """
    return Baseline(target.observe(Slot.CANARY) if canary_runs else None, target.observe(Slot.STABLE))


def difference(now: SlotCounters, then: SlotCounters | None, *, restart_is_crash: bool) -> SlotCounters:
    """What was counted in between.

    A service that was started anew counts from zero again: all that it has counted belongs to the window, and, where
    nobody asked for the restart, that it ended at all counts as a crash.

    Args:
        now: the later counters.
        then: the earlier ones; None where the service was started for the window.
        restart_is_crash: whether nobody had a reason to start it anew.
    """
    if then is None:
        return now
    if now.started_at != then.started_at or now.requests < then.requests:
        crashes = max(now.crashes - then.crashes, 1 if restart_is_crash else 0)
        return replace(now, crashes=crashes)
    return replace(
        now,
        requests=now.requests - then.requests,
        errors=max(0, now.errors - then.errors),
        crashes=max(0, now.crashes - then.crashes),
        latency_buckets={
            bound: max(0, count - then.latency_buckets.get(bound, 0)) for bound, count in now.latency_buckets.items()
        },
        labels={label: max(0, count - then.labels.get(label, 0)) for label, count in now.labels.items()},
        client_errors=max(0, now.client_errors - then.client_errors),
    )


def zero_of(counters: SlotCounters) -> SlotCounters:
    """The same service with nothing counted yet."""
    return replace(
        counters,
        requests=0,
        errors=0,
        crashes=0,
        latency_buckets=dict.fromkeys(counters.latency_buckets, 0),
        labels={},
        client_errors=0,
    )
