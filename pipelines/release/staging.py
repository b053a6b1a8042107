"""Puts a release into the staging slot, asks it the smoke tests, and takes it away again; what was found is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from pipelines.core.api_keys import editing, new_key
from pipelines.core.scopes import Scope
from pipelines.errors import Refusal, TryLater
from pipelines.release.smoke_tests import Expected, SmokeTest, run_smoke_tests
from pipelines.release.targets import ReleaseRef, ReleaseTarget, Slot, SlotCounters

CALLER = "staging"  # name of the key, by which its predictions are known among the kept ones
KEY_LIFE = timedelta(minutes=30)
_LOOK_AGAIN_S = 1.0
_SEEN_LIMIT_S = 60.0  # Prometheus' discovery of a new pod takes up to half a minute


class StagingPlace(Protocol):
    """The part of a `ReleaseTarget` that staging needs."""

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Put the release into a slot."""

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until it takes requests."""

    def observe(self, slot: Slot) -> SlotCounters | None:
        """What it has counted."""

    def remove(self, slot: Slot) -> None:
        """End it."""

    def slot_url(self, slot: Slot) -> str:
        """Its own address."""


class PodTarget(ReleaseTarget, Protocol):
    """A target whose services are pods, which others may end: a drain, the scheduler, a person."""

    def pod_uids(self, slot: Slot) -> frozenset[str]:
        """The pods that are in a slot with its release and have not been told to end."""


class SharedSlot:
    """The staging slot of a target that other machines use too; what is in it says whose turn it is.

    No lock spans the machines.  Another run's release is waited for.  One that stays for longer than any run takes was
    left by a run that was killed, and is replaced.  Should two runs take each other's for that, the first to notice
    tries again: it never removes the other's.

    Args:
        target: holds the slot.
        limit_s: seconds that another run's release is given.
    """

    def __init__(self, target: PodTarget, limit_s: float) -> None:
        self._target, self._limit_s = target, limit_s
        self._own: ReleaseRef | None = None
        self._is_there = False  # its own, unless another run has taken it away
        self._pods: frozenset[str] = frozenset()  # that were ready

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Put the release into the slot, once no other is in it."""
        deadline = time.monotonic() + self._limit_s
        while self._held(slot) not in {None, release} and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_S)
        self._own = release
        self._target.deploy(slot, release)
        self._is_there = True

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until it takes requests, and until it is known what it counts.

        Raises:
            TryLater: not in time; that nobody looks at a release says nothing against it.
        """
        self._target.wait_ready(slot, timeout_s)
        self._pods = self._target.pod_uids(slot)
        deadline = time.monotonic() + _SEEN_LIMIT_S
        while self._target.observe(slot) is None:
            if time.monotonic() > deadline:
                raise TryLater(
                    f"the service in the slot {slot}: ready, but {_SEEN_LIMIT_S:g} s later nobody knows its counters\n"
                    "  what to do: see that Prometheus is up, finds the pod, and is named by PERCH_PROMETHEUS_URL"
                )
            time.sleep(_LOOK_AGAIN_S)

    def require_same_pods(self, slot: Slot) -> None:
        """Before a failed test counts: a pod that is being ended gives no answer, or a 503, whatever it serves.

        A container that ended by itself is started again in its pod, and a pod that its node has put out stays listed:
        those are the release's own failures.

        Raises:
            TryLater: a pod that was ready has been told to end, so that what was found says nothing.
        """
        if gone := self._pods - self._target.pod_uids(slot):
            raise TryLater(
                f"the service in the slot {slot}: {len(gone)} of {len(self._pods)} pods were ended while it was asked\n"
                "  what to do: try again; a drain, the scheduler or a person ends pods, and Kubernetes makes others"
            )

    def observe(self, slot: Slot) -> SlotCounters | None:
        """What it has counted."""
        return self._target.observe(slot)

    def remove(self, slot: Slot) -> None:
        """End it.

        Raises:
            TryLater: another run has put its own release there, and may have removed it since, so that what was found
                says nothing.
        """
        held = self._held(slot)
        if held not in {None, self._own} or (held is None and self._is_there):
            what = f"put {held.model} v{held.version} there" if held else "emptied it"
            raise TryLater(f"the slot {slot}: another run has {what} meanwhile\n  what to do: try again")
        self._target.remove(slot)
        self._is_there = False

    def slot_url(self, slot: Slot) -> str:
        """Its own address."""
        return self._target.slot_url(slot)

    def _held(self, slot: Slot) -> ReleaseRef | None:
        return self._target.state().slots.get(slot)


@dataclass(frozen=True)
class StagingReport:
    """What staging found.

    Attributes:
        release: that was asked.
        tests: the smoke tests; one alone, `start`, where the service did not start.
    """

    release: ReleaseRef
    tests: Sequence[SmokeTest]

    @property
    def failed(self) -> list[SmokeTest]:
        """Those that did not pass."""
        return [test for test in self.tests if not test.passed]

    def as_tree(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.release.model,
            "version": self.release.version,
            "release_sha256": self.release.digest,
            "passed": not self.failed,
            "smoke_tests": [test.as_tree() for test in self.tests],
        }


def stage_release(
    place: StagingPlace,
    release: ReleaseRef,
    expected: Expected,
    *,
    open_key: Callable[[], AbstractContextManager[str]],
    ready_timeout_s: float,
) -> StagingReport:
    """Deploy, ask, remove.

    Nothing is left running afterwards: an approval may take days, and the canary is started from the same file.

    Args:
        place: where to run it.
        release: what to run.
        expected: what is held against it.
        open_key: an API key with the scopes `predict` and `model` that the service takes, valid for the context.
        ready_timeout_s: seconds that the service has to become ready.

    Raises:
        TryLater: the place does not answer, the service was not ready in time, or its pod was ended while it was asked.
    """
    with open_key() as key:
        try:
            place.deploy(Slot.STAGING, release)
            place.wait_ready(Slot.STAGING, ready_timeout_s)
            tests = run_smoke_tests(place.slot_url(Slot.STAGING), key, expected, lambda: place.observe(Slot.STAGING))
            if isinstance(place, SharedSlot) and not all(test.passed for test in tests):
                place.require_same_pods(Slot.STAGING)
        except Refusal as refusal:
            tests = [SmokeTest("start", passed=False, value=refusal.value, limit="a service that takes requests")]
        finally:
            place.remove(Slot.STAGING)
    return StagingReport(release, tests)


@contextmanager
def temporary_key(
    file: Path, name: str = CALLER, scopes: tuple[Scope, ...] = (Scope.PREDICT, Scope.MODEL)
) -> Iterator[str]:
    """An API key that is valid for the block, and, should nobody take it away, for half an hour."""
    key, record = new_key(name, scopes, rate_per_s=1e6, burst=1_000_000, expires=datetime.now(UTC) + KEY_LIFE)
    with editing(file) as keys:
        # Keys that a killed run has left behind.
        keys[:] = [known for known in keys if known.name != name or not known.expired(datetime.now(UTC))]
        keys.append(record)
    try:
        yield key
    finally:
        with editing(file) as keys:
            keys[:] = [known for known in keys if known.id != record.id]
