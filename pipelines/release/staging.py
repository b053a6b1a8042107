"""Puts a release into the staging slot, asks it the smoke tests, and takes it away again; what was found is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from pipelines.core.api_keys import editing, new_key
from pipelines.core.scopes import Scope
from pipelines.errors import Refusal
from pipelines.release.smoke_tests import Expected, SmokeTest, run_smoke_tests
from pipelines.release.targets import ReleaseRef, Slot, SlotCounters

CALLER = "staging"  # name of the key, by which its predictions are known among the kept ones
KEY_LIFE = timedelta(minutes=30)


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
    place: StagingPlace, release: ReleaseRef, expected: Expected, *, keys_file: Path, ready_timeout_s: float
) -> StagingReport:
    """Deploy, ask, remove.

    Nothing is left running afterwards: an approval may take days, and the canary is started from the same file.

    Args:
        place: where to run it.
        release: what to run.
        expected: what is held against it.
        keys_file: of the API keys that the service takes; it gets a key for the time of the tests.
        ready_timeout_s: seconds that the service has to become ready.

    Raises:
        TryLater: the place does not answer, or the service was not ready in time.
    """
    with temporary_key(keys_file) as key:
        try:
            place.deploy(Slot.STAGING, release)
            place.wait_ready(Slot.STAGING, ready_timeout_s)
            tests = run_smoke_tests(place.slot_url(Slot.STAGING), key, expected, lambda: place.observe(Slot.STAGING))
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
