"""Where releases run and traffic is divided: what the release engine asks of a laptop and of a cluster alike.

A target holds three slots.  Which release is in a slot, and how traffic is divided, can be asked at any time, so that
an engine that was killed finds out what it had done.  Every method is idempotent: called again, it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol


class Slot(StrEnum):
    """A place for one release."""

    STAGING = "staging"  # gets no client's traffic
    STABLE = "stable"
    CANARY = "canary"


@dataclass(frozen=True)
class ReleaseRef:
    """A release unit in the artifact store.

    Attributes:
        model: name of the registered model.
        version: in the registry.
        digest: SHA-256 of the release unit.
        address: file or s3:// address.
    """

    model: str
    version: str
    digest: str
    address: str


@dataclass(frozen=True)
class Routing:
    """How clients' requests are divided.

    Attributes:
        canary_percent: 0 to 100 of the requests go to the canary, the rest to stable.
        mirror: whether a copy of each request also goes to the canary, its answer thrown away; with `canary_percent`
            above 0 also a second one of those that the canary answers.
    """

    canary_percent: int = 0
    mirror: bool = False


@dataclass(frozen=True)
class ProbeCounters:
    """What a slot's service has counted of the prober's requests; members as in `SlotCounters`."""

    requests: int = 0
    errors: int = 0
    client_errors: int = 0
    latency_buckets: Mapping[float, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SlotCounters:
    """What a slot's service has counted since it started; a window is the difference of two.

    Attributes:
        taken_at: seconds since the epoch.
        started_at: of the service; another value means that it was started anew.
        requests: to the prediction endpoints that a prediction was due to: answered with one, or with an error.
        errors: of these, answered with 5xx other than a refusal for want of room or rate.
        crashes: processes of the service, workers among them, that ended without being asked to since the deployment.
        latency_buckets: upper bound in seconds to cumulative count, as in a Prometheus histogram; the last is infinite.
        labels: predicted label to count.
        client_errors: answered with 4xx, in none of the others: a release may wrongly turn good images away.
        probes: the prober's requests, in none of the others but `crashes`.
    """

    taken_at: float
    started_at: float
    requests: int
    errors: int
    crashes: int
    latency_buckets: Mapping[float, int]
    labels: Mapping[str, int]
    client_errors: int = 0
    probes: ProbeCounters = ProbeCounters()

    def with_probes(self) -> SlotCounters:
        """The same with the prober's requests as if they were clients'; `labels` stay those of clients."""
        probes, bounds = self.probes, sorted({*self.latency_buckets, *self.probes.latency_buckets})
        return replace(
            self,
            requests=self.requests + probes.requests,
            errors=self.errors + probes.errors,
            client_errors=self.client_errors + probes.client_errors,
            latency_buckets={
                bound: self.latency_buckets.get(bound, 0) + probes.latency_buckets.get(bound, 0) for bound in bounds
            },
        )


@dataclass(frozen=True)
class TargetState:
    """What runs and how traffic is divided, as the target itself says.

    Attributes:
        slots: what is in each slot; a slot without a release is left out.
        ready: slots whose service takes requests.
        routing: in force.
    """

    slots: Mapping[Slot, ReleaseRef]
    ready: frozenset[Slot]
    routing: Routing


class ReleaseTarget(Protocol):
    """A laptop, or a cluster."""

    def state(self) -> TargetState:
        """What is so now.

        Raises:
            TryLater: the target does not answer.
        """

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Put a release into a slot, in place of what is there; a slot with traffic is refused.

        Raises:
            Refusal: the slot has traffic.
            TryLater: the target does not answer.
        """

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until the slot's service takes requests.

        Raises:
            Refusal: it ended instead, as it does when the release cannot be verified; the message holds its last lines.
            TryLater: it was not ready in time.
        """

    def route(self, routing: Routing) -> None:
        """Divide traffic from now on; no request fails by it.  Returns when it is in force.

        Before the first call, or the first `promote`, clients get to no slot at all: they are told that no model has
        been released.

        Raises:
            Refusal: a slot that has no traffic yet and would get some is not ready.
            TryLater: the target does not answer.
        """

    def promote(self) -> None:
        """The canary's service becomes the stable one and gets all traffic; the old one stays warm as the canary.

        Killed in between and called again, it ends the same: what was stable before is left in the canary's slot until
        it gets traffic (`route`, to go back to it) or is replaced.  Without a stable one the canary simply becomes it.

        Raises:
            Refusal: there is no canary, or it had no traffic and is not ready.
            TryLater: the target does not answer.
        """

    def observe(self, slot: Slot) -> SlotCounters | None:
        """What a slot's service has counted; None when it cannot be asked."""

    def remove(self, slot: Slot) -> None:
        """End what is in a slot; one with traffic is refused.

        Raises:
            Refusal: the slot has traffic.
        """

    def client_url(self) -> str:
        """Where clients send their requests."""

    def slot_url(self, slot: Slot) -> str:
        """Where one slot's service can be asked directly, past the division of traffic."""
