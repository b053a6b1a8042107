"""What is asked of an approver and what was answered, as recorded where the answer was given.

The engine asks for the recorded answers and weighs them by the policy itself; the colour of a task is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pipelines.core.hash_chain import canonical_json, sha256_text


@dataclass(frozen=True)
class ApprovalRequest:
    """What was asked.

    Attributes:
        rollout_id: names the rollout.
        model: name of the registered model.
        version: in the registry.
        evidence_sha256: of what is shown to the approver, as it is now.
        requested_by: who asked for the release.
        requested_at: when, with a zone.
    """

    rollout_id: str
    model: str
    version: str
    evidence_sha256: str
    requested_by: str
    requested_at: datetime


@dataclass(frozen=True)
class Response:
    """One recorded answer.

    Attributes:
        responder: who gave it, as the place that recorded it knows them.
        responded_at: when, with a zone.
        approves: True or False.
        evidence_sha256: of what they were shown.
        comment: in their words.
        source: where it is recorded, e.g. `airflow:model_release/scheduled__…/request_approval`.
    """

    responder: str
    responded_at: datetime
    approves: bool
    evidence_sha256: str
    comment: str = ""
    source: str = ""


class ApprovalSource(Protocol):
    """Where answers are recorded."""

    def responses(self, request: ApprovalRequest) -> Sequence[Response]:
        """The recorded answers to a request; none where nobody answered, whatever a task's colour.

        Raises:
            TryLater: the place does not answer.
        """


def evidence_hash(
    *, registration_sha256: str, model_card_sha256: str, verdict_sha256: str, release_sha256: str, plan_sha256: str
) -> str:
    """The hash of all that an approval rests on; any change of it voids the approval.

    Args:
        registration_sha256: of the evidence of the version's registration, in the ledger.
        model_card_sha256: of the model card as it is shown.
        verdict_sha256: of the gate's verdict.
        release_sha256: of the release unit.
        plan_sha256: of the steps and limits that the release is held to.
    """
    return sha256_text(
        canonical_json(
            {
                "model_card": model_card_sha256,
                "plan": plan_sha256,
                "registration": registration_sha256,
                "release": release_sha256,
                "verdict": verdict_sha256,
            }
        )
    )
