"""Gathers what an approver reads from the registry, the ledger and the policy."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pipelines.core.file_hash import hash_file
from pipelines.core.hash_chain import Record
from pipelines.core.moments import format_minute
from pipelines.errors import Refusal
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import EVIDENCE_FOLDER, get_version
from pipelines.registry.staged_version import CARD_FILE, fetch_evidence_files
from pipelines.registry.tracking import artifact_url, run_url
from pipelines.release.approval_page import PageFacts, render_page, render_subject
from pipelines.release.approvals import ApprovalRequest
from pipelines.release.policy import PromotionPolicy
from pipelines.settings import Settings

_FILES = (CARD_FILE, "model_card.md", "metrics.json", "verdict.json")


@dataclass(frozen=True)
class ApprovalPage:
    """What Airflow shows.

    Attributes:
        subject: the headline.
        body: the page, Markdown.
        deadline: when the answer is no, with a zone.
        approvals: how many different people must approve.
    """

    subject: str
    body: str
    deadline: datetime
    approvals: int


def write_page(
    settings: Settings,
    policy: PromotionPolicy,
    request: ApprovalRequest,
    *,
    champion: str,
    forecast: list[str],
) -> ApprovalPage:
    """Write the page of a request.

    Args:
        settings: name the registry and the ledger.
        policy: says who may answer, until when.
        request: what is asked; its hash is that of the evidence as it is now.
        champion: version that would be replaced; empty for the first release of all.
        forecast: one sentence for each step of the rollout.

    Raises:
        Refusal: a file of the evidence is gone, or is not the registered one: nobody can be asked to rely on it.
        TryLater: MLflow or the ledger's database did not answer.
    """
    found = get_version(settings, request.model, int(request.version))
    rows = _rows(settings, request)
    registered = next(json.loads(row.evidence) for row in rows if row.event == "registered")
    with tempfile.TemporaryDirectory() as temporary:
        files = fetch_evidence_files(settings, found, _FILES, Path(temporary))
        for name, file in files.items():
            _refuse_other(request, name, file, registered["files"])
        card = files["model_card.md"].read_text(encoding="utf-8")
        metrics, verdict = (json.loads(files[name].read_text("utf-8")) for name in ("metrics.json", "verdict.json"))
    rule = policy.rule_for(request.model)
    deadline = request.requested_at + timedelta(hours=rule.deadline_h)
    facts = PageFacts(
        model=request.model,
        version=request.version,
        champion=champion,
        rollout_id=request.rollout_id,
        evidence_sha256=request.evidence_sha256,
        requested_by=request.requested_by,
        rule=describe_rule(policy, request, deadline, settings.approvers.split()),
        verdict=verdict,
        metrics=metrics,
        staging=_describe_staging(rows),
        forecast=forecast,
        links=_links(settings, found.mlflow_run_id),
        card=card,
    )
    return ApprovalPage(render_subject(facts), render_page(facts), deadline, rule.min_approvals)


def describe_rule(policy: PromotionPolicy, request: ApprovalRequest, deadline: datetime, asked: Sequence[str]) -> str:
    """Who may approve, and until when, as sentences.

    Args:
        policy: names those whose approval counts, or leaves it to whom Airflow asks.
        request: what is asked.
        deadline: when the answer is no, with a zone.
        asked: Airflow's users who are asked.
    """
    rule = policy.rule_for(request.model)
    own = "" if rule.requester_may_approve else request.requested_by
    names = [name for name in rule.approvers or asked if name != own]
    who = " or ".join(names) or "nobody, as it stands,"
    if rule.min_approvals > 1:
        who = f"{rule.min_approvals} different people of {', '.join(names) or 'nobody'}"
    other = f", but not {own}, who asked for it" if own in (rule.approvers or asked) else ""
    return f"Until {format_minute(deadline)}, {who} may approve{other}; no answer by then is a no."


def _describe_staging(rows: list[Record]) -> str:
    staged = [json.loads(row.evidence) for row in rows if row.event == "staged"]
    if not staged:
        return "It was never in staging."
    last = staged[-1]
    return (
        f"In staging it passed {last['smoke_tests']} of {last['smoke_tests']} smoke tests, and answered "
        f"{last['golden_images']} test images as evaluated."
    )


def _links(settings: Settings, mlflow_run_id: str) -> dict[str, str]:
    links: Mapping[str, str | None] = {
        "Model card with pictures": artifact_url(settings, mlflow_run_id, f"{EVIDENCE_FOLDER}/{CARD_FILE}"),
        "Smoke tests": artifact_url(settings, mlflow_run_id, "deploy_to_staging/smoke_tests.json"),
        "MLflow run": run_url(settings, mlflow_run_id),
    }
    return {title: address for title, address in links.items() if address}


def _rows(settings: Settings, request: ApprovalRequest) -> list[Record]:
    ledger = Ledger(settings.ledger_url)
    try:
        rows = [row for row in ledger.entries(request.model) if row.version == request.version]
    finally:
        ledger.close()
    if not any(row.event == "registered" for row in rows):
        raise Refusal(f"{request.model} v{request.version}", "was never registered", way_out="`perch ledger verify`")
    return rows


def _refuse_other(request: ApprovalRequest, name: str, file: Path, registered: Mapping[str, Any]) -> None:
    expected, actual = registered[f"evaluation/{name}"], hash_file(file)
    if actual != expected:
        raise Refusal(
            f"{name} of {request.model} v{request.version} in MLflow",
            f"has SHA-256 {actual[:16]}…",
            limit=f"{expected[:16]}…, by the ledger",
            way_out="somebody changed the evidence; restore it, or register the run again",
        )
