"""Great Expectations behind its one door: what is refused when loading, and how outcomes read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.data.suites import Suite, load_suites, validate
from pipelines.errors import Refusal

BETWEEN = "expect_column_values_to_be_between"
IN_SET = "expect_column_values_to_be_in_set"


def expectation(type_: str, severity: str = "critical", **kwargs: Any) -> dict[str, Any]:
    return {"type": type_, "kwargs": kwargs, "severity": severity, "meta": {"notes": "Because."}}


def suite(*expectations: dict[str, Any], name: str = "images") -> Suite:
    return Suite.model_validate({"name": name, "expectations": list(expectations)})


def write(folder: Path, tree: object, name: str = "images") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return folder


GOOD = {"name": "images", "expectations": [expectation(BETWEEN, column="mean", min_value=1)]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ('{\n  "name": "images",\n  "expectations": [}\n', r"cats/images\.json: is not JSON in line 3"),
        ({"name": "images", "expectations": []}, "expectations: .*at least 1 item"),
        (GOOD | {"expectation": []}, "expectation: Extra inputs are not permitted"),
        (GOOD | {"name": "pictures"}, 'has the name "pictures"'),
        (
            {
                "name": "images",
                "expectations": [*GOOD["expectations"], expectation("expect_no_surprises", column="mean")],
            },  # type: ignore[misc]
            r'images\.json, expectation 2: has the unknown type "expect_no_surprises"',
        ),
        (
            {"name": "images", "expectations": [expectation(BETWEEN, column="mean", max=3)]},
            rf"expectation 1 \({BETWEEN}\): .*max.*extra fields not permitted",
        ),
        (
            {"name": "images", "expectations": [expectation(BETWEEN, "fatal", column="mean", max_value=3)]},
            r"expectations\.0\.severity: Input should be 'critical', 'warning' or 'info'",
        ),
    ],
)
def test_load_suites__mistake__is_refused_with_its_place(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        load_suites(write(tmp_path / "cats", tree), ["images"])


def test_load_suites__missing_file__is_refused_with_the_way_to_draft_it(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"cats/dataset\.json(.|\n)*perch expectations init"):
        load_suites(write(tmp_path / "cats", GOOD), ["images", "dataset"])


def test_load_suites__file_that_nothing_is_held_against__is_refused(tmp_path: Path) -> None:
    folder = write(write(tmp_path / "cats", GOOD), GOOD, name="imagse")
    with pytest.raises(Refusal, match=r"imagse\.json: is no suite"):
        load_suites(folder, ["images"])


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "key": [f"{n}.png" for n in range(50)],
            "label": [f"<script>{n % 3}" for n in range(50)],
            "mean": np.arange(50, dtype=np.float32),
            "leaks": [n == 7 for n in range(50)],
        }
    )


def test_validate__expectations_of_every_kind__are_told_in_the_suites_order(table: pd.DataFrame) -> None:
    outcome, _ = validate(
        table,
        suite(
            expectation(BETWEEN, column="absent", min_value=1),
            expectation(BETWEEN, column="mean", min_value=0, max_value=47),
            expectation(BETWEEN, column="mean", min_value=0, max_value=47, mostly=0.9),
            expectation(IN_SET, column="leaks", value_set=[False]),
            expectation("expect_column_distinct_values_to_contain_set", column="label", value_set=["z", "a"]),
            expectation("expect_column_values_to_be_unique", column="key"),
            expectation("expect_table_columns_to_match_set", column_set=["key", "label", "mean", "split"]),
            expectation("expect_column_mean_to_be_between", column="mean", max_value=24),
        ),
    )
    assert [(each.success, each.observed, each.limit) for each in outcome.expectations] == [
        (False, 'could not be checked: The column "absent" in BatchData does not exist.', "at least 1"),
        (False, "2 of 50 rows: 48, 49 (e.g. 48.png, 49.png)", "0 to 47"),
        (True, "2 of 50 rows: 48, 49 (e.g. 48.png, 49.png)", "0 to 47, for at least 90 % of the rows"),
        (False, "1 of 50 rows: true (e.g. 7.png)", "only false"),
        (False, "missing a, z", "all of z, a"),
        (True, "50 different values", "be unique"),
        (False, "missing split; unexpected leaks", "exactly key, label, mean, split"),
        (False, "24.5", "at most 24"),
    ]
    assert {each.description for each in outcome.expectations} == {"Because."}


def test_validate__unknown_fact__is_met_and_says_so() -> None:
    facts = pd.DataFrame({"rows": [897.0], "psi_mean": [np.nan]})
    outcome, _ = validate(
        facts,
        suite(
            expectation(BETWEEN, column="psi_mean", max_value=0.25),
            expectation(BETWEEN, column="rows", min_value=1000),
            name="dataset",
        ),
    )
    assert [(each.success, each.observed) for each in outcome.expectations] == [(True, "not known"), (False, "897")]


@pytest.mark.parametrize(("severity", "success"), [("critical", False), ("warning", True), ("info", True)])
def test_validate__unmet_expectation__fails_the_suite_only_where_it_is_critical(
    table: pd.DataFrame, severity: str, success: bool
) -> None:
    outcome, _ = validate(table, suite(expectation(BETWEEN, severity, column="mean", max_value=1)))
    assert [each.success for each in outcome.expectations] == [False]
    assert outcome.success is success


def test_validate__page__loads_nothing_runs_nothing_and_tells_no_time_or_path(table: pd.DataFrame) -> None:
    checks = suite(
        expectation(IN_SET, column="label", value_set=["a"]), expectation(BETWEEN, column="absent", min_value=1)
    )
    _, page = validate(table, checks)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "site-packages" not in page
    assert "\u2039script\u203a0" in page
    assert page == validate(table, checks)[1]
