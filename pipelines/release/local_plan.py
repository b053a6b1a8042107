"""What the local target should be doing: which process is which slot, and how traffic is divided; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.errors import Refusal
from pipelines.release.targets import ReleaseRef, Routing, Slot

PRODUCTION_PROCESSES = ("serving-a", "serving-b")  # take turns at being stable and canary
STAGING_PROCESS = "serving-staging"
PROCESSES = (*PRODUCTION_PROCESSES, STAGING_PROCESS)


@dataclass(frozen=True)
class Deployment:
    """A release in a process.

    Attributes:
        release: that it serves.
        process: one of `PROCESSES`.
        workers: worker processes of the service.
    """

    release: ReleaseRef
    process: str
    workers: int


@dataclass(frozen=True)
class Plan:
    """Slots and routes; it is written whole or not at all, so that no kill leaves half of a change.

    Attributes:
        slots: what is in each slot; a slot without a release is left out.
        routing: how traffic is divided.
        live: whether clients get to the slots at all; false before the first release.
        succeeded: the canary is what was stable before it was succeeded, and has had no traffic since.
    """

    slots: Mapping[Slot, Deployment] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)
    live: bool = False
    succeeded: bool = False

    def has_traffic(self, slot: Slot) -> bool:
        """Whether clients' requests, or copies of them, go there."""
        if not self.live or slot is Slot.STAGING:
            return False
        if slot is Slot.STABLE:
            return self.routing.canary_percent < 100
        return self.routing.canary_percent > 0 or self.routing.mirror

    def process_for(self, slot: Slot) -> str:
        """The process that is the slot, or would be."""
        if slot is Slot.STAGING:
            return STAGING_PROCESS
        if slot in self.slots:
            return self.slots[slot].process
        taken = {deployment.process for deployment in self.slots.values()}
        return next(process for process in PRODUCTION_PROCESSES if process not in taken)

    def deployed(self, slot: Slot, release: ReleaseRef, workers: int) -> Plan:
        """With a release in a slot.

        Raises:
            Refusal: the slot has traffic.
        """
        self._refuse_traffic(slot, "deploy into it")
        deployment = Deployment(release, self.process_for(slot), workers)
        succeeded = self.succeeded and slot is not Slot.CANARY
        return replace(self, slots={**self.slots, slot: deployment}, succeeded=succeeded)

    def removed(self, slot: Slot) -> Plan:
        """With nothing in a slot.

        Raises:
            Refusal: the slot has traffic.
        """
        self._refuse_traffic(slot, "remove it")
        slots = {other: deployment for other, deployment in self.slots.items() if other is not slot}
        return replace(self, slots=slots, succeeded=self.succeeded and slot is not Slot.CANARY)

    def routed(self, routing: Routing) -> Plan:
        """With traffic divided otherwise.

        Raises:
            Refusal: the share is no percentage, or nothing is in a slot that would get traffic.
        """
        if not 0 <= routing.canary_percent <= 100:
            raise Refusal(
                "the canary's share", f"{routing.canary_percent} %", limit="0 to 100 %", way_out="name a percentage"
            )
        changed = replace(self, routing=routing, live=True, succeeded=self.succeeded and routing.canary_percent == 0)
        for slot in (Slot.STABLE, Slot.CANARY):
            if changed.has_traffic(slot) and slot not in self.slots:
                raise Refusal(f"the slot {slot}", "holds no release", way_out="deploy one, then divide traffic")
        return changed

    def promoted(self) -> Plan:
        """With the canary as the stable slot and all traffic on it; itself where that was done already.

        Raises:
            Refusal: there is no canary.
        """
        alone = Slot.CANARY not in self.slots and Slot.STABLE in self.slots and self.live
        if (self.succeeded or alone) and self.routing.canary_percent == 0:
            return self
        if Slot.CANARY not in self.slots:
            raise Refusal(f"the slot {Slot.CANARY}", "holds no release", way_out="deploy one, then promote it")
        slots = dict(self.slots)
        former = slots.pop(Slot.STABLE, None)
        slots[Slot.STABLE] = slots.pop(Slot.CANARY)
        if former is not None:
            slots[Slot.CANARY] = former
        return replace(self, slots=slots, routing=Routing(), live=True, succeeded=former is not None)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "slots": {slot.value: asdict(deployment) for slot, deployment in sorted(self.slots.items())},
            "routing": asdict(self.routing),
            "live": self.live,
            "succeeded": self.succeeded,
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Plan:
        """As `as_json` wrote it; whole numbers may have become fractions on their way through Envoy."""
        return cls(
            slots={
                Slot(slot): Deployment(
                    ReleaseRef(**deployment["release"]), deployment["process"], int(deployment["workers"])
                )
                for slot, deployment in tree["slots"].items()
            },
            routing=Routing(int(tree["routing"]["canary_percent"]), bool(tree["routing"]["mirror"])),
            live=bool(tree["live"]),
            succeeded=bool(tree["succeeded"]),
        )

    def _refuse_traffic(self, slot: Slot, intent: str) -> None:
        if self.has_traffic(slot):
            raise Refusal(
                f"the slot {slot}",
                f"has traffic ({self.routing.canary_percent} % to the canary"
                f"{', and copies of the rest' if self.routing.mirror else ''})",
                limit="a slot without traffic",
                way_out=f"divide traffic otherwise first, then {intent}",
            )
