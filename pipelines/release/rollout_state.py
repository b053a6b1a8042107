"""What is remembered of a rollout between two calls of the engine, as values that travel through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pipelines.release.approvals import Response
from pipelines.release.steps import PENDING, Plan, Step
from pipelines.release.targets import ReleaseRef, SlotCounters


@dataclass(frozen=True)
class Baseline:
    """The counters when a step began; what happened in the step is the difference to them."""

    canary: SlotCounters | None = None
    stable: SlotCounters | None = None


@dataclass(frozen=True)
class GateReading:
    """What one gate says now.

    Attributes:
        name: e.g. `errors`.
        verdict: promote, roll back, or need more data.
        text: value, limit and what they rest on, for a person.
        remaining_requests: canary requests that it needs yet, as far as it can tell.
        evidence: 0 to 1 of the way to rolling back, as far as it can tell.
    """

    name: str
    verdict: str
    text: str
    remaining_requests: int | None = None
    evidence: float | None = None


@dataclass(frozen=True)
class StepReading:
    """What all gates of a step say now.

    Attributes:
        verdict: promote, roll back, or need more data.
        gates: each gate's.
        reason: of the verdict, in one clause.
        requests: of the canary in this step.
        stable_requests: of the stable slot in the same time.
        memory: what the next judgement of the same step is to be given, as a JSON tree.
        probes: of `requests` the prober's.
        uncounted_probes: the prober's, where they are no evidence and not in `requests`.
    """

    verdict: str
    gates: tuple[GateReading, ...]
    reason: str
    requests: int = 0
    stable_requests: int = 0
    memory: Mapping[str, Any] = field(default_factory=dict)
    probes: int = 0
    uncounted_probes: int = 0

    @property
    def probe_evidence(self) -> dict[str, int]:
        """What the ledger is told of the prober; nothing where there is none."""
        known = {"probes": self.probes, "uncounted_probes": self.uncounted_probes}
        return {name: count for name, count in known.items() if count}


@dataclass(frozen=True)
class Passage:
    """A step that was reached, and when; why, and after how many requests and probes of the one before."""

    step: str
    at: float
    reason: str = ""
    requests: int = 0
    probes: int = 0


@dataclass(frozen=True)
class RolloutState:
    """A rollout.

    Attributes:
        rollout_id: names it.
        release: what is released.
        champion: what it replaces; None for the first release of all.
        plan: steps, times and limits, as they were when it began.
        requested_by: who asked for the release.
        requested_at: seconds since the epoch.
        evidence_sha256: of what the approvers are shown.
        run_id: of the run that trained it.
        step: where it is.
        settled: whether the step's effects are all there; an engine that was killed goes on from here where not.
        step_evidence: what the step's row in the ledger holds, fixed before anything takes effect.
        entered_at: when the step began.
        elapsed_s: how long the step was watched; a clock that jumps does not lengthen it.
        blind_s: how long its canary could not be asked, in one piece.
        seen_at: when it was last watched.
        baseline: counters when the step began.
        reading: what the gates said last.
        approvals: the answers that released it.
        waiting_for: what an approval lacks, for a person.
        needs_answer: whether it waits for a person, rather than for a freeze to end.
        reason: why it was rolled back.
        passages: the steps so far.
        forecast: what the gates were expected to need, when it began.
    """

    rollout_id: str
    release: ReleaseRef
    champion: ReleaseRef | None
    plan: Plan
    requested_by: str
    requested_at: float
    evidence_sha256: str
    run_id: str = ""
    step: Step = PENDING
    settled: bool = True
    step_evidence: Mapping[str, Any] = field(default_factory=dict)
    entered_at: float = 0.0
    elapsed_s: float = 0.0
    blind_s: float = 0.0
    seen_at: float = 0.0
    baseline: Baseline = Baseline()
    reading: StepReading | None = None
    approvals: tuple[Response, ...] = ()
    waiting_for: str = ""
    needs_answer: bool = True
    reason: str = ""
    passages: tuple[Passage, ...] = ()
    forecast: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether there is nothing yet that it would replace."""
        return self.champion is None

    @property
    def is_finished(self) -> bool:
        """Whether it will never take another step by itself."""
        return self.settled and self.step.is_last

    def to_document(self) -> dict[str, Any]:
        """As a JSON tree."""
        document: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return document


def from_document(document: Mapping[str, Any]) -> RolloutState:
    """The state in a JSON tree of `to_document`."""
    return _ADAPTER.validate_python(document)


_ADAPTER = TypeAdapter(RolloutState)
