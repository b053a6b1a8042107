"""A target with a clock and traffic of its own, and everything else of a release as it really is.

Slots and routes are those of the local target (`local_plan`), without its processes.  Database, ledger, policy and
engine are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.core.champions import champions_by_ledger
from pipelines.errors import Refusal, TryLater
from pipelines.params import ModelReleaseParams
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.approvals import ApprovalRequest, Response
from pipelines.release.engine import NEED_MORE_DATA, PROMOTE, ROLL_BACK, ReleaseEngine, ReleaseRequest
from pipelines.release.local_plan import Plan as Slots
from pipelines.release.policy import PromotionPolicy
from pipelines.release.rollout_state import GateReading, RolloutState, StepReading
from pipelines.release.steps import Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot, SlotCounters, TargetState
from pipelines.release.windows import Window
from pipelines.release.world import World

MODEL = "digits-classification"
QUICK = ModelReleaseParams(min_step_s=3, max_step_s=60, lease_s=5, abandoned_after_s=20, max_blind_s=4)
EPOCH = 1_800_000_000.0


def release(version: int) -> ReleaseRef:
    return ReleaseRef(MODEL, str(version), f"{version:x}" * 64, f"/releases/{version}.bento")


@dataclass
class Behaviour:
    """What a release does with requests.

    Attributes:
        error_rate: share that fails, evenly spread.
        starts: whether it becomes ready.
        crashes: whether its process ends with the next request.
        is_silent: whether its metrics cannot be read.
    """

    error_rate: float = 0.0
    starts: bool = True
    crashes: bool = False
    is_silent: bool = False


@dataclass
class Clock:
    now: float = EPOCH

    def __call__(self) -> float:
        return self.now


class SimulatedTarget:
    """A `ReleaseTarget` in memory; `serve` sends clients' requests through it."""

    def __init__(self, clock: Clock) -> None:
        self.slots = Slots()
        self.behaviour: dict[str, Behaviour] = {}
        self.failed = 0
        self.is_away = False
        self.evictions = 0  # pods told to end, in whose place there is another now
        self.history: list[tuple[float, Routing]] = []
        self._clock = clock
        self._counters: dict[str, SlotCounters] = {}

    def behave(self, version: int, **changes: Any) -> None:
        self.behaviour[release(version).digest] = replace(self.of(release(version)), **changes)

    def of(self, ref: ReleaseRef) -> Behaviour:
        return self.behaviour.get(ref.digest, Behaviour())

    def serve(self, requests: int) -> None:
        """Clients' requests, divided as the routes say; requests to a slot without a service fail."""
        if not self.slots.live:
            return
        to_canary = requests * self.slots.routing.canary_percent // 100
        for slot, share in ((Slot.CANARY, to_canary), (Slot.STABLE, requests - to_canary)):
            self._answer(slot, share, clients=True)
        if self.slots.routing.mirror:
            self._answer(Slot.CANARY, requests, clients=False)

    def _answer(self, slot: Slot, requests: int, *, clients: bool) -> None:
        deployment = self.slots.slots.get(slot)
        if requests == 0:
            return
        if deployment is None:
            self.failed += requests if clients else 0
            return
        behaviour, counters = self.of(deployment.release), self._counters[deployment.process]
        if behaviour.crashes:
            self._counters[deployment.process] = replace(counters, crashes=counters.crashes + 1)
            return
        total = counters.requests + requests
        errors = math.floor(total * behaviour.error_rate)
        self.failed += errors - counters.errors if clients else 0
        self._counters[deployment.process] = replace(
            counters, requests=total, errors=errors, latency_buckets={0.5: total, math.inf: total}
        )

    # ReleaseTarget

    def state(self) -> TargetState:
        self._require()
        deployed = {slot: deployment.release for slot, deployment in self.slots.slots.items()}
        ready = frozenset(slot for slot, ref in deployed.items() if self.of(ref).starts)
        return TargetState(deployed, ready, self.slots.routing)

    def deploy(self, slot: Slot, ref: ReleaseRef) -> None:
        self._require()
        there = self.slots.slots.get(slot)
        if there is None or there.release != ref:
            self.slots = self.slots.deployed(slot, ref, 1)
            self._counters[self.slots.slots[slot].process] = SlotCounters(
                self._clock(), self._clock(), 0, 0, 0, {0.5: 0, math.inf: 0}, {}
            )

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        self._require()
        if not self.of(self.slots.slots[slot].release).starts:
            raise Refusal(f"the slot {slot}", "ended while starting")

    def route(self, routing: Routing) -> None:
        self._require()
        self.slots = self.slots.routed(routing)
        self.history.append((self._clock(), routing))

    def promote(self) -> None:
        self._require()
        self.slots = self.slots.promoted()

    def observe(self, slot: Slot) -> SlotCounters | None:
        deployment = self.slots.slots.get(slot)
        if deployment is None or self.of(deployment.release).is_silent:
            return None
        return replace(self._counters[deployment.process], taken_at=self._clock())

    def remove(self, slot: Slot) -> None:
        self._require()
        self.slots = self.slots.removed(slot)

    def pod_uids(self, slot: Slot) -> frozenset[str]:
        self._require()
        return frozenset({f"{slot}-{self.evictions}"}) if slot in self.slots.slots else frozenset()

    def client_url(self) -> str:
        return "http://simulated"

    def slot_url(self, slot: Slot) -> str:
        return f"http://simulated/{slot}"

    def _require(self) -> None:
        if self.is_away:
            raise TryLater("the target does not answer")


class SimulatedAliases:
    """MLflow's aliases in memory."""

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        self.is_away = False

    def move(self, model: str, aliases: Mapping[str, str | None]) -> None:
        if self.is_away:
            raise TryLater("MLflow does not answer")
        for alias, version in aliases.items():
            if version is None:
                self.aliases.pop(alias, None)
            else:
                self.aliases[alias] = version


class RecordedAnswers:
    """An `ApprovalSource`: what people answered."""

    def __init__(self) -> None:
        self.answers: list[Response] = []

    def responses(self, request: ApprovalRequest) -> Sequence[Response]:
        return self.answers


def count_errors(state: RolloutState, window: Window) -> StepReading:
    """Plain gates with the form of the real ones: three errors are too many, a hundred requests suffice."""
    canary = window.canary
    assert canary is not None
    if canary.crashes > 0:
        verdict, reason = ROLL_BACK, f"{canary.crashes} crashes"
    elif canary.errors >= 3:
        verdict, reason = ROLL_BACK, f"{canary.errors} errors"
    elif canary.requests >= 100:
        verdict, reason = PROMOTE, "few errors"
    else:
        verdict, reason = NEED_MORE_DATA, "few requests"
    gate = GateReading("errors", verdict, f"{canary.errors} of {canary.requests}")
    stable = window.stable.requests if window.stable else 0
    return StepReading(verdict, (gate,), reason, canary.requests, stable)


class Killed(BaseException):
    """The process is gone; nothing of it runs any more."""


@dataclass
class Fuse:
    """Kills a process just before its n-th write.

    Attributes:
        at: number of the write; 0 never kills.
        burnt: how many writes there were.
        names: of the writes.
    """

    at: int = 0
    burnt: int = 0
    is_dead: bool = False
    names: list[str] = field(default_factory=list)

    def wrap(self, thing: Any, *writes: str) -> Any:
        return _Fused(self, thing, writes)

    def call(self, name: str, operation: Callable[[], Any]) -> Any:
        if self.is_dead:
            raise Killed
        self.burnt += 1
        self.names.append(name)
        if self.burnt == self.at:
            self.is_dead = True
            raise Killed
        return operation()


class _Fused:
    def __init__(self, fuse: Fuse, thing: Any, writes: tuple[str, ...]) -> None:
        self._fuse, self._thing, self._writes = fuse, thing, writes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        if not callable(found):
            return found
        if name in self._writes:
            return lambda *args, **kwargs: self._fuse.call(name, lambda: found(*args, **kwargs))

        def plain(*args: Any, **kwargs: Any) -> Any:
            if self._fuse.is_dead:
                raise Killed
            return found(*args, **kwargs)

        return plain


class Simulation:
    """A machine with v1 as the champion, unless it is empty, and v2 to release."""

    def __init__(self, folder: Path, *, url: str = "", params: ModelReleaseParams = QUICK, empty: bool = False) -> None:
        self.url = url or f"sqlite:///{folder / 'ledger.db'}"
        self.clock, self.params = Clock(), params
        self.target, self.aliases, self.answers = SimulatedTarget(self.clock), SimulatedAliases(), RecordedAnswers()
        self.ledger = Ledger(self.url)
        self.rollouts, self.glance = RolloutTable(self.url), RolloutTable(self.url, patient=False)
        self.policy = PromotionPolicy()
        self.evidence = {release(n): f"{n}" * 64 for n in range(1, 6)}
        self.engines = 0
        if not empty:
            self.target.deploy(Slot.CANARY, release(1))
            self.target.promote()
            self.aliases.aliases["champion"] = "1"
            self.ledger.append("promoted", model=MODEL, version="1", evidence={}, key="promoted:1")

    def world(self, fuse: Fuse | None = None) -> World:
        fuse = fuse or Fuse()
        return World(
            target=fuse.wrap(self.target, "deploy", "route", "promote", "remove"),
            rollouts=fuse.wrap(self.rollouts, "save", "create"),
            glance=fuse.wrap(self.glance),
            ledger=fuse.wrap(self.ledger, "append"),
            aliases=fuse.wrap(self.aliases, "move"),
            approvals=self.answers,
            policy=self.policy,
            evidence=self.evidence_of,
            judge=count_errors,
            clock=self.clock,
            pause=lambda seconds: None,
        )

    def evidence_of(self, ref: ReleaseRef, plan: Plan) -> str:
        """What is known of a release, unless it is held to another plan than this simulation's."""
        return self.evidence[ref] if plan.params == self.params else plan.sha256

    def engine(self, fuse: Fuse | None = None) -> ReleaseEngine:
        self.engines += 1
        return ReleaseEngine(self.world(fuse), f"engine-{self.engines}")

    def begin(self, version: int = 2) -> RolloutState:
        champion = self.target.state().slots.get(Slot.STABLE)
        request = ReleaseRequest(release(version), champion, "scheduler", self.evidence[release(version)], "run-2")
        return self.engine().begin(request, Plan(self.params))

    def answer(self, who: str = "approver", *, approves: bool = True, version: int = 2, comment: str = "fine") -> None:
        moment = datetime.fromtimestamp(self.clock(), UTC)
        self.answers.answers.append(Response(who, moment, approves, self.evidence[release(version)], comment))

    def tick(self, seconds: float = 1.0, requests: int = 600) -> None:
        self.clock.now += seconds
        self.target.serve(requests)

    def state(self, rollout_id: str) -> RolloutState:
        from pipelines.release.rollout_state import from_document

        row = self.rollouts.read(rollout_id)
        assert row is not None
        return from_document(row.document)

    def run(self, rollout_id: str, engine: ReleaseEngine | None = None, ticks: int = 80) -> RolloutState:
        """Advance once a second until it is over."""
        engine = engine or self.engine()
        for _ in range(ticks):
            self.tick()
            state = engine.advance(rollout_id)
            if state.is_finished:
                return state
        return self.state(rollout_id)

    def events(self) -> list[str]:
        return [f"{record.event} v{record.version}" for record in self.ledger.entries(MODEL)]

    def check_promoted(self, version: int, previous: int | None) -> None:
        actual = self.target.state()
        assert actual.slots[Slot.STABLE] == release(version)
        assert actual.routing == Routing()
        self._check_agreement(version, previous)

    def check_back_on(self, version: int, *, previous: int | None = None) -> None:
        actual = self.target.state()
        assert actual.slots.get(Slot.STABLE) == release(version)
        assert actual.routing == Routing()
        self._check_agreement(version, previous)

    def _check_agreement(self, champion: int, previous: int | None) -> None:
        expected = {"champion": str(champion)} | ({"previous": str(previous)} if previous else {})
        assert self.aliases.aliases == expected
        by_ledger = champions_by_ledger(self.ledger.entries(), MODEL)
        assert {name: value for name, value in by_ledger.as_aliases().items() if value} == expected
        assert self.ledger.verify() == []
