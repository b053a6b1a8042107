"""The Data Docs of a run: one page that answers whether the data is good, and Great Expectations' page per suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd

from pipelines.core.splitting import SPLITS
from pipelines.data.outcome_wording import describe_value
from pipelines.data.suites import SuiteOutcome
from pipelines.data.validation_tables import FACTS


def write_data_docs(
    folder: Path,
    *,
    dataset: str,
    suites_name: str,
    compared_with: str,
    outcomes: Sequence[SuiteOutcome],
    pages: Mapping[str, str],
    facts: Mapping[str, float | None],
    images: pd.DataFrame,
) -> None:
    """Write `index.html` and one page per suite; they need no network, and equal inputs give equal bytes.

    Args:
        folder: where to; it is made.
        dataset: its name.
        suites_name: the folder of the suites that were used.
        compared_with: the version that shift and growth were measured against, in words.
        outcomes: of every suite.
        pages: suite name to the page that Great Expectations renders of it.
        facts: fact to value, None where it is not known.
        images: with `label` and `split`.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("pipelines.data"), autoescape=True, trim_blocks=True)
    environment.filters["value"] = lambda value: "not known" if value is None else describe_value(value)
    everything = [outcome for suite in outcomes for outcome in suite.expectations]
    unmet = [outcome for outcome in everything if not outcome.success]
    classes = pd.crosstab(images["label"], images["split"]).reindex(columns=list(SPLITS), fill_value=0).sort_index()
    index = environment.get_template("data_docs.html").render(
        dataset=dataset,
        suites_name=suites_name,
        compared_with=compared_with,
        success=all(suite.success for suite in outcomes),
        met=len(everything) - len(unmet),
        total=len(everything),
        unmet=sorted(unmet, key=lambda outcome: outcome.severity != "critical"),
        suites=outcomes,
        facts=facts,
        meanings=FACTS,
        splits=SPLITS,
        classes={
            str(label): [int(count) for count in counts]
            for label, counts in zip(classes.index, classes.values, strict=True)
        },
    )
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(index, encoding="utf-8")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
