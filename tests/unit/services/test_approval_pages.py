"""Who may approve and until when, as an approver reads it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipelines.release.approvals import ApprovalRequest
from pipelines.release.policy import EVERY_MODEL, ModelRule, PromotionPolicy
from pipelines.services.approval_pages import describe_rule

DEADLINE = datetime(2026, 11, 24, 9, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("rule", "asked", "sentence"),
    [
        (ModelRule(), ["approver", "scientist"], "approver or scientist may approve; no answer"),
        (ModelRule(approvers=("anna",)), ["approver"], "anna may approve; no answer"),
        (ModelRule(), ["approver", "bert"], "approver may approve, but not bert, who asked for it; no answer"),
        (ModelRule(requester_may_approve=True), ["bert"], "bert may approve; no answer"),
        (ModelRule(approvers=("bert",)), ["approver"], "nobody, as it stands, may approve, but not bert, who asked"),
        (
            ModelRule(approvers=("anna", "carl", "dora"), min_approvals=2),
            [],
            "2 different people of anna, carl, dora may approve; no answer",
        ),
    ],
)
def test_describe_rule__any_policy__names_those_who_could(rule: ModelRule, asked: list[str], sentence: str) -> None:
    request = ApprovalRequest(
        model="shapes-classification",
        version="2",
        rollout_id="shapes-classification:2:9b1e:3",
        evidence_sha256="5d0f" * 16,
        requested_by="bert",
        requested_at=datetime(2026, 11, 21, 9, 0, tzinfo=UTC),
    )
    shown = describe_rule(PromotionPolicy(models={EVERY_MODEL: rule}), request, DEADLINE, asked)
    assert shown.startswith(f"Until 2026-11-24 09:00 UTC, {sentence}")
    assert shown.endswith("; no answer by then is a no.")
