"""What the engine, the rollback and the watchdog act upon: interfaces, so that each can be another on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.core.rollout_rows import RolloutRow
from pipelines.release.approvals import ApprovalSource
from pipelines.release.policy import PromotionPolicy
from pipelines.release.rollout_state import RolloutState, StepReading
from pipelines.release.steps import Plan
from pipelines.release.targets import ReleaseRef, ReleaseTarget
from pipelines.release.windows import Window


class RolloutStore(Protocol):
    """Keeps rollouts; `pipelines.registry.rollout_table` says what each method promises."""

    def create(self, rollout_id: str, model: str, document: Mapping[str, Any], *, now: float) -> RolloutRow:
        """Begin a rollout."""

    def take_lease(self, rollout_id: str, owner: str, *, lease_s: float, now: float) -> RolloutRow:
        """Take or renew the right to move it."""

    def release_lease(self, rollout_id: str, token: int) -> None:
        """Give the right back."""

    def save(self, row: RolloutRow, document: Mapping[str, Any], *, is_open: bool, force: bool = False) -> RolloutRow:
        """Compare and set."""

    def read(self, rollout_id: str) -> RolloutRow | None:
        """One rollout."""

    def list_rollouts(self, model: str = "") -> list[RolloutRow]:
        """All of them, oldest first."""

    def list_current(self) -> list[RolloutRow]:
        """Of each model the unfinished one and the last one."""


class LedgerWriter(Protocol):
    """Records an event once; see `pipelines.registry.ledger`."""

    def append(self, event: Any, *, model: str, version: str, evidence: dict[str, Any], key: str) -> object:
        """Record an event."""


class Aliases(Protocol):
    """The registry's aliases."""

    def move(self, model: str, aliases: Mapping[str, str | None]) -> None:
        """Point each alias at a version, or remove it where that is None; moving it twice changes nothing.

        Raises:
            TryLater: the registry does not answer.
        """


class Judge(Protocol):
    """The gates of a step."""

    def __call__(self, state: RolloutState, window: Window) -> StepReading:
        """What they say of what happened in the step so far."""


@dataclass(frozen=True)
class World:
    """All of it.

    Attributes:
        target: where releases run.
        rollouts: keeps their state, and waits for a database that is away.
        glance: the same, but does not wait: for whoever has traffic to take away.
        ledger: records events.
        aliases: of the registry.
        approvals: where answers are recorded.
        policy: whose answers count.
        evidence: hash of all that an approval of a release by a plan rests on, as it is now.
        judge: the gates.
        clock: seconds since the epoch.
        pause: waits for some seconds.
    """

    target: ReleaseTarget
    rollouts: RolloutStore
    glance: RolloutStore
    ledger: LedgerWriter
    aliases: Aliases
    approvals: ApprovalSource
    policy: PromotionPolicy
    evidence: Callable[[ReleaseRef, Plan], str]
    judge: Judge
    clock: Callable[[], float] = field(default=time.time)
    pause: Callable[[float], None] = field(default=time.sleep)
