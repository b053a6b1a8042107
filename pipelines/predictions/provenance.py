"""From a prediction to what stands behind it: model, training, checks, approval, release, and the ledger's rows.

The ledger is the authority.  The run's folder adds what the ledger leaves out, as far as it is still there and its
files are the ones whose digests the ledger holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

from pipelines.core.gates import Verdict
from pipelines.core.hash_chain import Record, find_breaks
from pipelines.core.moments import format_minute
from pipelines.core.workspace import Workspace
from pipelines.predictions.release_events import describe_approvals, describe_steps

_COMPARISON = "accuracy drop"  # the gate's check against the model before it
_RELEASE_EVENTS = ("traffic", "promoted", "rolled_back")


@dataclass(frozen=True)
class RunFacts:
    """What the run's folder says; None and empty where the folder, or a file of it, is gone.

    Attributes:
        quarantined: images that could not be read.
        seed: of all random numbers.
        comparison: how the gate compared it with the model before it, in words.
        changed: files that are not the ones the ledger knows; nothing was taken from them.
    """

    quarantined: int | None = None
    seed: int | None = None
    comparison: str = ""
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """The chain behind one prediction.

    Attributes:
        prediction: its columns.
        feedback: what was told about it, oldest first.
        registered: the evidence of the version's registration; None where the ledger has no such row.
        packaged: the evidence of the release that was the latest when the prediction was made, with `occurred_at`.
        approved: evidence of approvals, with `occurred_at`.
        released: evidence of traffic steps, promotions and rollbacks, with `event` and `occurred_at`.
        run: what the run's folder adds.
        rows: numbers of the ledger's rows about the version.
        problems: what does not fit, one sentence each; empty when everything does.
    """

    prediction: Mapping[str, Any]
    feedback: Sequence[Mapping[str, Any]]
    registered: Mapping[str, Any] | None
    packaged: Mapping[str, Any] | None
    approved: Sequence[Mapping[str, Any]]
    released: Sequence[Mapping[str, Any]]
    run: RunFacts
    rows: Sequence[int]
    problems: Sequence[str] = field(default_factory=tuple)


def explain(
    prediction: Mapping[str, Any], feedback: Sequence[Mapping[str, Any]], records: Sequence[Record], run: RunFacts
) -> Provenance:
    """Put the chain together and look for what does not fit.

    Args:
        prediction: its columns; `time` is UTC, with or without a zone.
        feedback: what was told about it.
        records: the whole ledger.
        run: of `read_run_facts`.
    """
    model, version = prediction["model"], str(prediction["model_version"])
    own = [record for record in records if record.model == model and record.version == version]
    registered = next((_evidence(record) for record in own if record.event == "registered"), None)
    packaged = [_evidence(record) for record in own if record.event == "packaged"]
    made = _as_utc(prediction["time"])
    before = [entry for entry in packaged if datetime.fromisoformat(entry["occurred_at"]) <= made]
    problems = find_breaks(records)
    if registered is None:
        problems.append(f"the ledger has never registered {model} v{version}")
    elif registered.get("model", {}).get("onnx_sha256") != prediction["onnx_sha256"]:
        problems.append(
            f"the prediction was made with the model file {prediction['onnx_sha256'][:12]}, "
            f"but {str(registered.get('model', {}).get('onnx_sha256'))[:12]} was registered as {model} v{version}"
        )
    if packaged and not before:
        problems.append(f"{model} v{version} was packaged only after this prediction was made")
    problems += [f"{file} in the run's folder is not the file that the ledger knows" for file in run.changed]
    return Provenance(
        prediction=prediction,
        feedback=feedback,
        registered=registered,
        packaged=next(reversed(before or packaged), None),
        approved=[_evidence(record) for record in own if record.event == "approved"],
        released=[_evidence(record) for record in own if record.event in _RELEASE_EVENTS],
        run=run,
        rows=[record.sequence for record in own],
        problems=problems,
    )


def find_registration(prediction: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any] | None:
    """The evidence of the registration of a prediction's model version."""
    for record in records:
        same = record.model == prediction["model"] and record.version == str(prediction["model_version"])
        if same and record.event == "registered":
            return _evidence(record)
    return None


def read_run_facts(workspace: Workspace, registered: Mapping[str, Any]) -> RunFacts:
    """What the folder of the run adds to the evidence of its registration.

    Args:
        workspace: of the run; may be gone.
        registered: evidence with the digests of the run's files.
    """
    changed: list[str] = []

    def read(name: str) -> str | None:
        try:
            text = (workspace.root / name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(text).hexdigest() != registered.get("files", {}).get(name):
            changed.append(name)
            return None
        return text.decode("utf-8")

    manifest, verdict = read("data/raw/manifest.json"), read("evaluation/verdict.json")
    quarantined = json.loads(manifest).get("quarantined") if manifest else None
    comparison = _describe_comparison(Verdict.model_validate_json(verdict)) if verdict else ""
    return RunFacts(quarantined, _read_seed(workspace), comparison, tuple(changed))


def describe(provenance: Provenance) -> list[tuple[str, list[str]]]:
    """The chain as text: a title and its facts, in the order in which an auditor asks."""
    return [
        ("prediction", _describe_prediction(provenance)),
        ("model", _describe_model(provenance)),
        ("trained", _describe_training(provenance)),
        ("checked", _describe_checks(provenance)),
        ("approved", describe_approvals(provenance.approved) or ["nobody was asked: the ledger has no approval"]),
        ("released", describe_steps(provenance.released) or ["the ledger has no traffic step"]),
        ("ledger", _describe_ledger(provenance)),
    ]


def _describe_prediction(provenance: Provenance) -> list[str]:
    row = provenance.prediction
    facts = [
        f"{row['label']} {row['confidence']:.2f}",
        f"{_as_utc(row['time']):%Y-%m-%d %H:%M:%S} UTC",
        f"request {row['request_id']}",
        f"asked by {row['caller']}" if row["caller"] else "",
        f"{row['format']} {row['mode']} {row['width_px']} x {row['height_px']} px, {row['n_bytes']:,} bytes",
        f"image sha256 {row['image_sha256'][:12]}",
    ]
    if provenance.feedback:
        told = provenance.feedback[-1]
        verdict = "right" if told["true_label"] == row["label"] else "wrong"
        facts.append(f"later told {told['true_label']}: it was {verdict}")
    return [fact for fact in facts if fact]


def _describe_model(provenance: Provenance) -> list[str]:
    row, packaged, registered = provenance.prediction, provenance.packaged, provenance.registered
    facts = [f"{row['model']} v{row['model_version']}", f"onnx sha256 {row['onnx_sha256'][:12]}"]
    if registered is not None:
        same = registered.get("model", {}).get("onnx_sha256") == row["onnx_sha256"]
        facts[-1] += ", as registered" if same else ", NOT the registered file"
    if packaged is None:
        return [*facts, "the ledger has no release of it"]
    return [
        *facts,
        f"release sha256 {str(packaged.get('release_sha256', '?'))[:12]}",
        f"signed with key {packaged.get('key_id', '?')}",
        f"packaged {format_minute(datetime.fromisoformat(packaged['occurred_at']))}",
    ]


def _describe_training(provenance: Provenance) -> list[str]:
    registered, run = provenance.registered, provenance.run
    if registered is None:
        return ["unknown: the ledger has not registered this version"]
    data = registered.get("data", {})
    images = f"{data.get('rows', 0):,} images"
    if run.quarantined is not None:
        images += f", {run.quarantined:,} quarantined"
    clean = "" if registered.get("git_clean") else ", with uncommitted changes"
    return [
        f"run {registered.get('run_id', '?')}",
        f"code {str(registered.get('git_sha', '?'))[:7]}{clean}",
        f"data sha256 {str(data.get('sha256', '?'))[:12]}, md5 {str(data.get('md5', '?'))[:12]} ({images})",
        *([f"seed {run.seed}"] if run.seed is not None else []),
    ]


def _describe_checks(provenance: Provenance) -> list[str]:
    registered = provenance.registered
    if registered is None:
        return ["unknown"]
    validation, verdict = registered.get("validation", {}), registered.get("verdict", {})
    accuracy = registered.get("test_accuracy", {})
    facts = [
        f"{validation.get('met', '?')} of {validation.get('total', '?')} expectations",
        f"accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" if accuracy else "",
        f"{verdict.get('passed', '?')} of {verdict.get('judged', '?')} checks of the gate",
        provenance.run.comparison,
        f"evidence {str(registered.get('evidence_sha256', '?'))[:12]}",
    ]
    return [fact for fact in facts if fact]


def _describe_comparison(verdict: Verdict) -> str:
    check = next((check for check in verdict.checks if check.name == _COMPARISON), None)
    if check is None or not check.judged or check.value is None or check.low is None or check.high is None:
        return check.detail if check else ""
    return f"{check.name} {check.value:+.3f} [{check.low:+.3f}, {check.high:+.3f}], {check.detail}"


def _describe_ledger(provenance: Provenance) -> list[str]:
    rows = ", ".join(map(str, provenance.rows))
    if not provenance.rows:
        return ["no row about this version"]
    word = "row" if len(provenance.rows) == 1 else "rows"
    return [f"{word} {rows}", *(["chain intact"] if not provenance.problems else [])]


def _evidence(record: Record) -> dict[str, Any]:
    evidence: dict[str, Any] = json.loads(record.evidence)
    return {**evidence, "event": record.event, "occurred_at": record.occurred_at}


def _read_seed(workspace: Workspace) -> int | None:
    try:
        tree = yaml.safe_load(workspace.params_file.read_text(encoding="utf-8"))
        return int(tree["seed"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _as_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
