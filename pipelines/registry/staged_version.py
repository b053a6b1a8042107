"""What an approval of a version rests on, as it is now; and the ledger's row of how its release did in staging."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from pipelines.core.file_hash import hash_file
from pipelines.core.hash_chain import Record
from pipelines.errors import Refusal
from pipelines.registry.candidate import move_candidate
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Event, Ledger
from pipelines.registry.models import EVIDENCE_FOLDER, RegisteredVersion, download, get_version
from pipelines.registry.released_version import packaged_digests
from pipelines.settings import Settings

_OUTCOMES = ("staged", "staging_failed")
CARD_FILE, VERDICT_FILE = "model_card.html", "verdict.json"


class Evidence(TypedDict):
    """SHA-256 of each thing that an approval rests on beside the plan; arguments of `approvals.evidence_hash`."""

    registration_sha256: str
    model_card_sha256: str
    verdict_sha256: str
    release_sha256: str


def read_evidence(settings: Settings, model: str, version: str, release_sha256: str) -> Evidence:
    """Hash the card and the verdict as they lie in MLflow now, beside what the ledger says of the registration.

    Raises:
        Refusal: there is no such version, the ledger has not registered it, or a file is gone.
        TryLater: MLflow or the ledger's database did not answer.
    """
    found = get_version(settings, model, int(version))
    registration = _find(_entries(settings, model), "registered", model, version)
    with tempfile.TemporaryDirectory() as temporary:
        files = fetch_evidence_files(settings, found, (CARD_FILE, VERDICT_FILE), Path(temporary))
        card, verdict = (hash_file(files[name]) for name in (CARD_FILE, VERDICT_FILE))
    return Evidence(
        registration_sha256=registration.evidence_sha256,
        model_card_sha256=card,
        verdict_sha256=verdict,
        release_sha256=release_sha256,
    )


def fetch_evidence_files(
    settings: Settings, version: RegisteredVersion, names: tuple[str, ...], into: Path
) -> dict[str, Path]:
    """Copy files of a version's evidence from MLflow.

    Raises:
        Refusal: one is gone.
        TryLater: MLflow did not answer.
    """

    def fetch(mlflow: Mlflow) -> dict[str, Path]:
        return {name: download(mlflow, version.mlflow_run_id, f"{EVIDENCE_FOLDER}/{name}", into) for name in names}

    return with_mlflow(settings, fetch)


def record_staging(
    settings: Settings,
    model: str,
    version: str,
    digest: str,
    *,
    run_id: str,
    smoke_tests: int,
    golden_images: int,
    failed: Sequence[str],
    candidate_alias: str,
    probes_sha256: str = "",
) -> Record:
    """Write into the ledger how a release did in staging, and move the candidate's alias to who may be released next.

    The same outcome again adds no row; another one does.

    Args:
        settings: where things are.
        model: name of the registered model.
        version: in the registry.
        digest: SHA-256 of the release.
        run_id: of the run that trained it.
        smoke_tests: how many were asked.
        golden_images: of these, images whose answers were compared.
        failed: names of the smoke tests that failed; none: it passed.
        candidate_alias: the alias to move.
        probes_sha256: of the prober's images; empty where none are kept.

    Raises:
        TryLater: MLflow or the ledger's database did not answer.
    """
    ledger = Ledger(settings.ledger_url)
    event: Event = "staging_failed" if failed else "staged"
    evidence: dict[str, Any] = {
        "run_id": run_id,
        "release_sha256": digest,
        "smoke_tests": smoke_tests,
        "golden_images": golden_images,
    }
    if probes_sha256:
        evidence["probes_sha256"] = probes_sha256
    if failed:
        evidence["failed"] = list(failed)
    try:
        outcomes = [row for row in ledger.entries(model) if row.version == version and row.event in _OUTCOMES]
        last = outcomes[-1] if outcomes else None
        if last is not None and last.event == event and json.loads(last.evidence) == evidence:
            record = last
        else:
            record = ledger.append(
                event,
                model=model,
                version=version,
                evidence=evidence,
                key=f"{event}:{model}:{version}:{digest}:{len(outcomes) + 1}",
            )
        move_candidate(settings, ledger, model, candidate_alias)
        return record
    finally:
        ledger.close()


def staged_digest(settings: Settings, model: str, version: str) -> str:
    """SHA-256 of the version's release, which has passed in staging.

    Raises:
        Refusal: it is not packaged, or has not passed in staging.
        TryLater: the ledger's database did not answer.
    """
    digest = packaged_digests(settings, model).get(int(version))
    if digest is None:
        raise Refusal(f"{model} v{version}", "is not packaged", way_out=f"perch package {version}")
    outcomes = [
        record.event
        for record in _entries(settings, model)
        if record.event in _OUTCOMES
        and record.version == version
        and json.loads(record.evidence)["release_sha256"] == digest
    ]
    if outcomes and outcomes[-1] == "staged":
        return digest
    raise Refusal(
        f"the release {digest[:12]} of {model} v{version}",
        "did not pass in staging" if outcomes else "has not been in staging",
        limit="its smoke tests, all of them",
        way_out="`perch deploy_to_staging --run RUN` asks them; `perch models` names the run",
    )


def last_staged_version(settings: Settings, model: str) -> int:
    """The highest version whose release passed when it was last in staging.

    Raises:
        Refusal: there is none.
        TryLater: the ledger's database did not answer.
    """
    outcomes = {int(record.version): record.event for record in _entries(settings, model) if record.event in _OUTCOMES}
    staged = [version for version, outcome in outcomes.items() if outcome == "staged"]
    if not staged:
        raise Refusal(f"the model {model}", "has no version that passed in staging", way_out="`perch run` makes one")
    return max(staged)


def staged_probes(settings: Settings, model: str, version: str, release_sha256: str) -> str:
    """SHA-256 of the prober's images for a release, by its last row `staged`; empty where none are kept.

    Raises:
        TryLater: the ledger's database did not answer.
    """
    for record in reversed(_entries(settings, model)):
        if record.event == "staged" and record.version == version:
            evidence = json.loads(record.evidence)
            if evidence["release_sha256"] == release_sha256:
                return str(evidence.get("probes_sha256", ""))
    return ""


def _entries(settings: Settings, model: str) -> list[Record]:
    ledger = Ledger(settings.ledger_url)
    try:
        return ledger.entries(model)
    finally:
        ledger.close()


def _find(entries: list[Record], event: str, model: str, version: str) -> Record:
    for record in entries:
        if record.event == event and record.version == version:
            return record
    raise Refusal(f"{model} v{version}", f"has no row {event} in the ledger", way_out="`perch ledger verify`")
