"""What happened in a step: the difference between a slot's counters now and when the step began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pipelines.release.rollout_state import Baseline
from pipelines.release.targets import ProbeCounters, ReleaseTarget, Slot, SlotCounters

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Window:
    """Both slots in the same time.

    Attributes:
        canary: what the canary counted; None when it cannot be asked.
        stable: what the stable slot counted; None when it cannot be asked.
    """

    canary: SlotCounters | None
    stable: SlotCounters | None


def observe_window(target: ReleaseTarget, baseline: Baseline) -> tuple[Window, Baseline]:
    """Ask both slots for what they counted since a step began.

    The window of both begins anew where what a slot counted before the step cannot be told from what it counted in it:
    stable could not be asked when the step began; or its counts, or the canary's, fall without a new start, which is a
    memory that ends: on a cluster, the counts of a pod that ended hours ago are forgotten.

    Returns:
        The window, and the baseline for the next look.
    """
    canary, stable = target.observe(Slot.CANARY), target.observe(Slot.STABLE)
    if canary and (
        _has_forgotten(canary, baseline.canary)
        or (stable and (baseline.stable is None or _has_forgotten(stable, baseline.stable)))
    ):
        baseline = Baseline(_anew(canary, baseline.canary), stable)
    window = Window(
        difference(canary, baseline.canary, restart_is_crash=True) if canary else None,
        difference(stable, baseline.stable, restart_is_crash=False) if stable else None,
    )
    return window, baseline


def _has_forgotten(now: SlotCounters, then: SlotCounters | None) -> bool:
    if then is None or now.started_at != then.started_at:
        return False
    return now.requests < then.requests or now.probes.requests < then.probes.requests


def _anew(now: SlotCounters, then: SlotCounters | None) -> SlotCounters:
    """The canary's baseline from now on, by which none of its crashes is forgotten."""
    if then is None:
        return replace(now, crashes=0)
    return replace(now, crashes=min(now.crashes, then.crashes)) if now.started_at == then.started_at else then


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
    if now.started_at != then.started_at:
        crashes = max(now.crashes - then.crashes, 1 if restart_is_crash else 0)
        return replace(now, crashes=crashes)
    return replace(
        now,
        requests=now.requests - then.requests,
        errors=max(0, now.errors - then.errors),
        crashes=max(0, now.crashes - then.crashes),
        latency_buckets=_less(now.latency_buckets, then.latency_buckets),
        labels=_less(now.labels, then.labels),
        client_errors=max(0, now.client_errors - then.client_errors),
        probes=ProbeCounters(
            requests=now.probes.requests - then.probes.requests,
            errors=max(0, now.probes.errors - then.probes.errors),
            client_errors=max(0, now.probes.client_errors - then.probes.client_errors),
            latency_buckets=_less(now.probes.latency_buckets, then.probes.latency_buckets),
        ),
    )


def _less(now: Mapping[_Key, int], then: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: max(0, count - then.get(key, 0)) for key, count in now.items()}


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
        probes=ProbeCounters(),
    )
