"""Great Expectations behind one door: suites as reviewed JSON in, outcomes and Data Docs pages out.

No other module imports Great Expectations.  Each call has a context of its own that lives in memory, and nothing of it
reaches the results: no times, no random ids, no paths of the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.data.outcome_wording import describe_limit, describe_observed
from pipelines.errors import Refusal

Severity = Literal["critical", "warning", "info"]

_RESULT_FORMAT = {
    "result_format": "SUMMARY",
    "partial_unexpected_count": 5,
    "unexpected_index_column_names": ["key"],
}


class Expectation(BaseModel):
    """One line of a suite: a type that Great Expectations knows, its limits, and why they are what they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    kwargs: dict[str, Any]
    severity: Severity = "critical"
    meta: dict[str, Any] = Field(default_factory=dict, description="`notes` says why, in a sentence.")

    @property
    def column(self) -> str:
        """The column it looks at; empty for the table as a whole."""
        return str(self.kwargs.get("column", ""))

    @property
    def notes(self) -> str:
        """Why it is expected."""
        return str(self.meta.get("notes", ""))


class Suite(BaseModel):
    """A file of expectations, in Great Expectations' own form; its name is the table that it is held against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    expectations: list[Expectation] = Field(min_length=1)


class Outcome(BaseModel):
    """What came of one expectation."""

    model_config = ConfigDict(frozen=True)

    type: str
    column: str
    success: bool
    severity: Severity
    observed: str
    limit: str
    description: str


class SuiteOutcome(BaseModel):
    """What came of a suite; only a critical failure fails it."""

    model_config = ConfigDict(frozen=True)

    name: str
    expectations: list[Outcome]

    @property
    def success(self) -> bool:
        """No critical expectation failed."""
        return not any(outcome.severity == "critical" and not outcome.success for outcome in self.expectations)


def load_suites(folder: Path, tables: Sequence[str]) -> list[Suite]:
    """Read `<table>.json` for each table, and refuse anything that would not be checked as its author meant.

    Raises:
        Refusal: a file is missing or one too many, is not JSON (with its line), or has an expectation with an unknown
            type, key or argument (with its place).
    """
    where = f"expectations/{folder.name}"
    unknown = sorted(file.name for file in folder.glob("*.json") if file.stem not in tables)
    if unknown:
        raise Refusal(
            f"{where}/{unknown[0]}",
            "is no suite that anything is held against",
            limit=" and ".join(f"{table}.json" for table in tables),
            way_out="rename the file, or move its expectations into one of these",
        )
    return [_load_suite(folder / f"{table}.json", f"{where}/{table}.json") for table in tables]


def validate(table: pd.DataFrame, suite: Suite) -> tuple[SuiteOutcome, str]:
    """Hold a table against a suite.

    Args:
        table: with a `key` column where rows are to be named in what was observed.
        suite: as `load_suites` returns it.

    Returns:
        The outcomes in the suite's order, and Great Expectations' own Data Docs page of them, which needs no network.
    """
    gx = _great_expectations()
    from great_expectations.data_context.types import base

    config = base.DataContextConfig(
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=base.ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    asset = context.data_sources.add_pandas("perch").add_dataframe_asset(suite.name)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": table})
    entries = {f"{number:03}": expectation for number, expectation in enumerate(suite.expectations)}
    result = batch.validate(
        gx.ExpectationSuite(
            name=suite.name,
            expectations=[{**entry.model_dump(exclude={"meta"}), "id": number} for number, entry in entries.items()],
        ),
        result_format=_RESULT_FORMAT if "key" in table else {**_RESULT_FORMAT, "unexpected_index_column_names": []},
    )
    result.results.sort(key=lambda each: each.expectation_config.id)  # failures to compute come first otherwise
    for each in result.results:
        each.result = json.loads(json.dumps(each.to_json_dict()["result"]))  # NumPy's numbers cannot be rendered
    outcomes = [_outcome(entries[each.expectation_config.id], each, table) for each in result.results]
    return SuiteOutcome(name=suite.name, expectations=outcomes), _render(result)


def _great_expectations() -> Any:
    os.environ["GX_ANALYTICS_ENABLED"] = "False"  # read when the package is imported
    import great_expectations

    return great_expectations


def _load_suite(file: Path, name: str) -> Suite:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(
            name, error.strerror, way_out="restore it, or draft it with `perch expectations init <data set>`"
        ) from None
    except ValueError as error:
        place = f"is not JSON in line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
        raise Refusal(name, place, way_out="mend that line") from None
    try:
        suite = Suite.model_validate(tree)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise Refusal(
            name, "; ".join(mistakes), way_out="docs/reference/expectations.md shows the form of a suite"
        ) from None
    if suite.name != file.stem:
        raise Refusal(name, f'has the name "{suite.name}"', limit=f'"{file.stem}"', way_out="rename the suite")
    for number, expectation in enumerate(suite.expectations):
        _refuse_bad_expectation(expectation, f"{name}, expectation {number + 1}")
    return suite


def _refuse_bad_expectation(expectation: Expectation, place: str) -> None:
    """Great Expectations itself drops an expectation that it cannot build, and then reports success without it."""
    _great_expectations()
    from great_expectations.compatibility.pydantic import ValidationError as BadArguments
    from great_expectations.exceptions import ExpectationNotFoundError, InvalidExpectationConfigurationError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    try:
        ExpectationConfiguration(type=expectation.type, kwargs=dict(expectation.kwargs)).to_domain_obj()
    except ExpectationNotFoundError:
        raise Refusal(
            place,
            f'has the unknown type "{expectation.type}"',
            limit="a type of Great Expectations",
            way_out="compare the types in expectations/default",
        ) from None
    except (BadArguments, InvalidExpectationConfigurationError) as error:
        raise Refusal(
            f"{place} ({expectation.type})",
            " ".join(str(error).split()),
            limit="the arguments that Great Expectations documents for this type",
            way_out="mend its kwargs",
        ) from None


def _outcome(expectation: Expectation, result: Any, table: pd.DataFrame) -> Outcome:
    error = _exception(result)
    return Outcome(
        type=expectation.type,
        column=expectation.column,
        success=bool(result.success),
        severity=expectation.severity,
        observed=f"could not be checked: {error}"
        if error
        else describe_observed(expectation.column, result.result, table),
        limit=describe_limit(expectation.type, expectation.kwargs),
        description=expectation.notes,
    )


def _exception(result: Any) -> str:
    """The first exception's message; its traceback would hold paths of the machine."""
    info = result.exception_info or {}
    for each in [info, *(each for each in info.values() if isinstance(each, dict))]:
        if each.get("raised_exception"):
            return str(each["exception_message"]).removeprefix("Error: ").strip()
    return ""


def _render(result: Any) -> str:
    """Great Expectations' page of a suite's results, in a frame that loads nothing and names no moment."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    result.meta = {"batch_spec": {"data_asset_name": result.suite_name}}
    for each in result.results:
        message = _exception(each)
        each.exception_info = {
            "raised_exception": bool(message),
            "exception_message": message or None,
            "exception_traceback": message or None,
        }
        # Labels and keys are the source's; not every part of the page escapes them.
        each.result = _without_markup(each.result)
        each.expectation_config.kwargs = _without_markup(each.expectation_config.kwargs)
    document = ValidationResultsPageRenderer().render(result)
    overview = document.sections[0]
    overview.content_blocks = [block for block in overview.content_blocks if block.content_block_type != "collapse"]
    view = DefaultJinjaPageView()
    numbers = itertools.count()
    view.env.filters["generate_html_element_uuid"] = lambda prefix="": f"{prefix}{next(numbers)}"
    view.env.loader = jinja2.ChoiceLoader([jinja2.PackageLoader("pipelines.data"), view.env.loader])
    html = view.render(document, template="suite_page.j2")
    html = re.sub(r'\s(?:href|src)="(?:https?:|\.\./)[^"]*"', "", html)
    return re.sub(r"\n\s*\n+", "\n", html)


def _without_markup(tree: Any) -> Any:
    """The same JSON tree with look-alikes of the angle brackets in its texts."""
    if isinstance(tree, str):
        return tree.replace("<", "\u2039").replace(">", "\u203a")
    if isinstance(tree, dict):
        return {name: _without_markup(each) for name, each in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without_markup(each) for each in tree]
    return tree
