"""Hold the ingested images against the data set's Great Expectations suites; stop the run where one fails."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from pipelines.core.results import StageResult, write_json
from pipelines.core.workspace import Workspace
from pipelines.data.data_docs import write_data_docs
from pipelines.data.suites import SuiteOutcome, load_suites, validate
from pipelines.data.validation_tables import build_tables, read_reference
from pipelines.errors import Refusal
from pipelines.params import Params

DEFAULT_SUITES = "default"
DATA_DOCS = "data/validation/data_docs/index.html"

_logger = logging.getLogger(__name__)


class DataValidationResult(StageResult):
    """Expectations met, and the facts of the data set as metrics."""


def run(params: Params, workspace: Workspace) -> DataValidationResult:
    """Check the data; the evidence is complete before anything is refused.

    Raises:
        Refusal: an expectation of severity `critical` failed, each named with what was observed and its limit; or a
            suite is missing or cannot be read.
    """
    folder = workspace.expectations / params.dataset
    if not folder.is_dir():
        folder = workspace.expectations / DEFAULT_SUITES
        _logger.warning(
            "data set %s has no expectations of its own, so the lenient expectations/%s are used; "
            "`perch expectations init %s` drafts its own from its data",
            params.dataset,
            DEFAULT_SUITES,
            params.dataset,
        )
    suites = load_suites(folder, tables=("images", "dataset"))
    reference = read_reference(workspace.reference, params.dataset)
    tables = build_tables(params, workspace.raw, workspace.quarantine_file, reference)
    checked = {suite.name: validate(tables.by_name()[suite.name], suite) for suite in suites}
    outcomes = [outcome for outcome, _ in checked.values()]
    everything = [outcome for suite in outcomes for outcome in suite.expectations]
    met = sum(outcome.success for outcome in everything)

    shutil.rmtree(workspace.validation, ignore_errors=True)
    write_data_docs(
        workspace.validation / "data_docs",
        dataset=params.dataset,
        suites_name=f"expectations/{folder.name}",
        compared_with=reference.version if reference else "nothing, since no version of this data set came before",
        outcomes=outcomes,
        pages={name: page for name, (_, page) in checked.items()},
        facts=tables.facts,
        images=tables.images,
    )
    write_json(
        workspace.validation / "validation.json",
        {
            "suites": [{**suite.model_dump(), "success": suite.success} for suite in outcomes],
            "met": met,
            "total": len(everything),
        },
    )

    _refuse_failures(params.dataset, f"expectations/{folder.name}", outcomes, workspace.root / DATA_DOCS)
    warnings = [
        f"{outcome.column or suite.name}: observed {outcome.observed}, limit {outcome.limit}"
        for suite in outcomes
        for outcome in suite.expectations
        if not outcome.success
    ]
    for warning in warnings:
        _logger.warning("expectation not met, severity below critical: %s", warning)
    return DataValidationResult(
        summary=f"{met} of {len(everything)} expectations met",
        metrics={
            "data/expectations_met": met,
            "data/expectations_total": len(everything),
            **{f"data/{name}": float(value) for name, value in tables.facts.items() if value is not None},
        },
        reports={"Data Docs": DATA_DOCS},
    )


def _refuse_failures(dataset: str, suites_name: str, outcomes: list[SuiteOutcome], docs: Path) -> None:
    failures = [
        f"{suite.name}.json, {outcome.column or outcome.type}: observed {outcome.observed}; limit {outcome.limit}"
        for suite in outcomes
        for outcome in suite.expectations
        if outcome.severity == "critical" and not outcome.success
    ]
    if failures:
        total = sum(len(suite.expectations) for suite in outcomes)
        own = suites_name.endswith(f"/{dataset}")
        review = f"review {suites_name}" if own else f"draft suites of its own with `perch expectations init {dataset}`"
        raise Refusal(
            f"the data set {dataset}",
            f"fails {len(failures)} of {total} expectations\n    " + "\n    ".join(failures),
            way_out=f"look at {docs}; then mend the data, or {review}, and start a new run",
            reports={"Data Docs": DATA_DOCS},
        )
