"""Drafted suites: met by their data, not by other data, and each limit says what was seen."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.data.expectation_drafts import draft_suites, write_suites
from pipelines.data.suites import load_suites, validate
from pipelines.data.validation_tables import ValidationTables, describe_images, measure_data_set

TODAY = date(2026, 11, 1)


def tables_of(images: pd.DataFrame, as_of: date = TODAY) -> ValidationTables:
    described = describe_images(images, images["given_split"].tolist(), 2)
    return ValidationTables(described, measure_data_set(described, quarantined=3, as_of=as_of, reference=None))


@pytest.fixture
def images() -> pd.DataFrame:
    generator = np.random.default_rng(1)
    count = 300
    return pd.DataFrame(
        {
            "key": [f"{n}.jpg" for n in range(count)],
            "label": generator.choice(["cat", "dog", "eel"], count, p=[0.7, 0.2, 0.1]),
            "given_split": generator.choice(["train", "val", "test"], count),
            "group": "",
            "arrived": [TODAY - timedelta(days=int(10 * (n % 4))) for n in range(count)],
            "sha256": [f"{n:064x}" for n in range(count)],
            "format": generator.choice(["JPEG", "PNG"], count),
            "mode": generator.choice(["RGB", "L"], count),
            "width_px": generator.integers(100, 400, count),
            "height_px": 240,
            "n_bytes": generator.integers(1000, 9000, count),
            "mean": generator.uniform(40, 200, count),
            "std": generator.uniform(20, 70, count),
            "p01": generator.uniform(0, 20, count),
            "p99": generator.uniform(200, 255, count),
            "phash": generator.integers(-(2**63), 2**63, count),
        }
    )


def failed_columns(tables: ValidationTables, folder: Path) -> set[str]:
    """Columns of the unmet expectations, once the suites were written and read again."""
    suites = load_suites(folder, ["images", "dataset"])
    outcomes = [validate(tables.by_name()[suite.name], suite)[0] for suite in suites]
    return {each.column for outcome in outcomes for each in outcome.expectations if not each.success}


def test_draft_suites__its_own_data__meets_every_expectation(images: pd.DataFrame, tmp_path: Path) -> None:
    tables = tables_of(images)
    files = write_suites(tmp_path / "animals", draft_suites(tables))
    assert [file.name for file in files] == ["images.json", "dataset.json"]
    assert failed_columns(tables, tmp_path / "animals") == set()


def test_draft_suites__every_expectation__says_what_was_seen(images: pd.DataFrame) -> None:
    notes = {
        (expectation.column, expectation.severity): expectation.notes
        for suite in draft_suites(tables_of(images))
        for expectation in suite.expectations
    }
    assert all(notes.values())
    widths = images["width_px"]
    assert notes["width_px", "critical"] == f"Seen {widths.min()} to {widths.max()}."
    assert notes["freshness_days", "warning"].startswith("Seen arrivals on 4 days, at most 10 days apart")


def test_draft_suites__other_data__fails_where_it_differs(images: pd.DataFrame, tmp_path: Path) -> None:
    write_suites(tmp_path / "animals", draft_suites(tables_of(images)))
    changed = images.copy()
    changed.loc[:60, "label"] = "fox"
    changed.loc[0, ["mode", "width_px"]] = ["CMYK", 4000]
    changed["std"] /= 10
    later = TODAY + timedelta(days=30)
    assert failed_columns(tables_of(changed, later), tmp_path / "animals") == {
        "label", "mode", "width_px", "std", "freshness_days",
    }  # fmt: skip


def test_draft_suites__leak_in_the_data__is_not_drafted_away(images: pd.DataFrame, tmp_path: Path) -> None:
    leaked = images.copy()
    leaked.loc[:1, ["sha256", "phash", "label"]] = ["a" * 64, 1, "cat"]
    leaked.loc[:1, "given_split"] = ["train", "test"]
    write_suites(tmp_path / "animals", draft_suites(tables_of(leaked)))
    assert failed_columns(tables_of(leaked), tmp_path / "animals") == {"leaks", "leaks_into_test"}


def test_draft_suites__source_without_dates__expects_no_freshness(images: pd.DataFrame) -> None:
    dataset = draft_suites(tables_of(images.assign(arrived=None)))[1]
    assert "freshness_days" not in {expectation.column for expectation in dataset.expectations}


def test_write_suites__twice__gives_the_same_bytes(images: pd.DataFrame, tmp_path: Path) -> None:
    suites = draft_suites(tables_of(images))
    first = [file.read_bytes() for file in write_suites(tmp_path / "a", suites)]
    assert first == [file.read_bytes() for file in write_suites(tmp_path / "b", draft_suites(tables_of(images)))]
