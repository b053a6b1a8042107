"""The course of a rollout: which steps there are, in which order, and how traffic is divided in each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pipelines.core.hash_chain import canonical_json, sha256_text
from pipelines.params import ModelReleaseParams
from pipelines.release.targets import Routing


class Phase(StrEnum):
    """The kinds of steps."""

    PENDING = "pending"  # waits for an approval
    SHADOW = "shadow"  # copies of requests, no answer of it reaches a client
    CANARY = "canary"  # a share of the requests
    PROMOTED = "promoted"  # it is the stable release
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        phase: its kind.
        percent: of clients' requests that the canary gets, where it is a canary.
    """

    phase: Phase
    percent: int = 0

    @property
    def name(self) -> str:
        """E.g. `canary@10`."""
        return f"{self.phase}@{self.percent}" if self.phase is Phase.CANARY else str(self.phase)

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.phase in (Phase.PROMOTED, Phase.ROLLED_BACK)

    @property
    def is_watched(self) -> bool:
        """Whether the canary gets requests that its gates judge."""
        return self.phase in (Phase.SHADOW, Phase.CANARY)

    @property
    def routing(self) -> Routing:
        """How traffic is divided in it.  After a promotion the release is in the stable slot."""
        return Routing(canary_percent=self.percent, mirror=self.phase is Phase.SHADOW)


PENDING = Step(Phase.PENDING)
SHADOW = Step(Phase.SHADOW)
PROMOTED = Step(Phase.PROMOTED)
ROLLED_BACK = Step(Phase.ROLLED_BACK)


@dataclass(frozen=True)
class Plan:
    """How a rollout goes, fixed when it begins.

    Attributes:
        params: the section `model_release` of params.yaml.
    """

    params: ModelReleaseParams

    def course(self, *, is_first: bool) -> tuple[Step, ...]:
        """The steps in their order; the first release of all has nobody to be compared with, and skips the canary."""
        if is_first:
            return (PENDING, PROMOTED)
        shadow = (SHADOW,) if self.params.shadow else ()
        return (PENDING, *shadow, *(Step(Phase.CANARY, percent) for percent in self.params.canary_percents), PROMOTED)

    @property
    def sha256(self) -> str:
        """Of all steps and limits; an approval holds for these alone."""
        return sha256_text(canonical_json(self.params.model_dump(mode="json")))

    def after(self, step: Step, *, is_first: bool) -> Step:
        """The step that follows.

        Raises:
            ValueError: none follows.
        """
        course = self.course(is_first=is_first)
        return course[course.index(step) + 1]
