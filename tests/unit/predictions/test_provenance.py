from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.core.hash_chain import Record, link
from pipelines.core.workspace import Workspace
from pipelines.predictions.provenance import RunFacts, describe, explain, read_run_facts
from pipelines.registry.registration import collect_evidence

PREDICTION: dict[str, Any] = {
    "prediction_id": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "time": datetime(2026, 11, 20, 14, 1, 7),  # noqa: DTZ001 - as the queries give it
    "request_id": "7f3c",
    "model": "shapes-classification",
    "model_version": "1",
    "onnx_sha256": "ab" * 32,
    "label": "circle",
    "confidence": 0.92,
    "caller": "demo",
    "format": "PNG",
    "mode": "L",
    "width_px": 8,
    "height_px": 8,
    "n_bytes": 1300,
    "image_sha256": "cd" * 32,
}


def chain(*events: tuple[str, str, str, dict[str, Any]]) -> list[Record]:
    """Ledger rows: event, version, day of November, evidence."""
    records: list[Record] = []
    for number, (event, version, day, evidence) in enumerate(events):
        records.append(
            link(
                records[-1] if records else None,
                occurred_at=datetime(2026, 11, int(day), 9, 12, tzinfo=UTC).isoformat(timespec="microseconds"),
                key=str(number),
                model="shapes-classification",
                version=version,
                event=event,
                evidence=evidence,
            )
        )
    return records


def registered(onnx_sha256: str = "ab" * 32, day: str = "15") -> tuple[str, str, str, dict[str, Any]]:
    return "registered", "1", day, {"run_id": "run-1", "model": {"onnx_sha256": onnx_sha256}, "git_sha": "3e9d1c2f"}


def packaged(digest: str, day: str) -> tuple[str, str, str, dict[str, Any]]:
    return "packaged", "1", day, {"release_sha256": digest * 32, "key_id": "2026-a"}


def text(provenance: Any) -> dict[str, str]:
    return {title: " · ".join(facts) for title, facts in describe(provenance)}


def test_explain__everything_fits__has_no_problem_and_names_each_step() -> None:
    records = chain(
        registered(),
        ("registered", "2", "15", {"run_id": "run-2"}),
        packaged("9b", "16"),
        ("approved", "1", "16", {"by": "m.approver", "comment": "reviewed", "evidence_sha256": "5d0f" * 16}),
        ("traffic", "1", "16", {"weight_percent": 10, "requests": 2311}),
        ("promoted", "1", "17", {}),
    )
    feedback = [{"true_label": "square"}, {"true_label": "circle"}]
    provenance = explain(PREDICTION, feedback, records, RunFacts(2, 7, "no champion yet"))
    assert provenance.problems == []
    assert list(provenance.rows) == [1, 3, 4, 5, 6]
    lines = text(provenance)
    assert list(lines) == ["prediction", "model", "trained", "checked", "approved", "released", "ledger"]
    assert "circle 0.92 · 2026-11-20 14:01:07 UTC · request 7f3c" in lines["prediction"]
    assert "later told circle: it was right" in lines["prediction"]
    assert "as registered · release sha256 9b9b9b9b9b9b · signed with key 2026-a" in lines["model"]
    assert "run run-1 · code 3e9d1c2" in lines["trained"]
    assert lines["approved"] == "m.approver 2026-11-16 09:12 · “reviewed” · evidence 5d0f5d0f5d0f"
    assert lines["released"] == "10 % 2026-11-16 09:12: 2,311 requests · promoted 2026-11-17 09:12"
    assert lines["ledger"] == "rows 1, 3, 4, 5, 6 · chain intact"


def test_explain__packaged_anew_after_the_prediction__names_the_release_that_was_there() -> None:
    provenance = explain(PREDICTION, [], chain(registered(), packaged("9b", "16"), packaged("7c", "21")), RunFacts())
    assert provenance.packaged is not None
    assert provenance.packaged["release_sha256"] == "9b" * 32
    assert provenance.problems == []


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        (chain(), "never registered shapes-classification v1"),
        (chain(registered("ef" * 32)), "made with the model file abababababab, but efefefefefef was registered"),
        (chain(registered(), packaged("9b", "21")), "packaged only after"),
        (chain(registered(), packaged("9b", "16"))[1:], "row 1 missing"),
    ],
)
def test_explain__something_does_not_fit__is_a_problem(records: list[Record], problem: str) -> None:
    provenance = explain(PREDICTION, [], records, RunFacts())
    assert any(problem in entry for entry in provenance.problems)
    assert "intact" not in text(provenance)["ledger"]


def test_read_run_facts__the_runs_folder__adds_what_the_ledger_leaves_out(make_run) -> None:
    workspace = make_run()
    workspace.params_file.write_text("seed: 7\n")
    facts = read_run_facts(workspace, collect_evidence(workspace))
    assert facts == RunFacts(quarantined=2, seed=7, comparison="no champion yet")


def test_read_run_facts__a_file_was_changed__takes_nothing_from_it_and_says_so(make_run) -> None:
    workspace = make_run()
    evidence = collect_evidence(workspace)
    manifest = workspace.raw / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"quarantined": 2', '"quarantined": 0'))
    facts = read_run_facts(workspace, evidence)
    assert (facts.quarantined, facts.changed) == (None, ("data/raw/manifest.json",))


def test_read_run_facts__the_folder_is_gone__adds_nothing(tmp_path) -> None:
    assert read_run_facts(Workspace(tmp_path / "gone"), {"files": {}}) == RunFacts()
