"""Drafts a data set's suites from its data: limits with a margin around what was seen, for a person to review."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.data.outcome_wording import describe_value
from pipelines.data.shards import METADATA_COLUMNS
from pipelines.data.suites import Expectation, Severity, Suite
from pipelines.data.validation_tables import ValidationTables

_DERIVED_COLUMNS = ("split", "is_duplicate", "label_conflict", "leaks", "leaks_into_test", "near_leaks")
_FLAGS = {
    "is_duplicate": "have the bytes of an earlier one; repeated images weigh more than others in training.",
    "label_conflict": "stand under two labels with the same bytes, so one label is wrong.",
    "near_leaks": "have a look-alike in another split, e.g. a frame of the same film, which flatters the test.",
}


def draft_suites(tables: ValidationTables) -> list[Suite]:
    """Draft both suites.

    A leak is expected not to be there even where it is seen: data that breaks a draft is for its reviewer to judge.

    Args:
        tables: of the data as it is now.

    Returns:
        `images` and `dataset`; each expectation's note says what was seen.
    """
    return [
        Suite(name="images", expectations=_draft_images(tables.images)),
        Suite(name="dataset", expectations=_draft_dataset(tables)),
    ]


def write_suites(folder: Path, suites: list[Suite]) -> list[Path]:
    """Write each suite as `<name>.json`, as a reviewer wants to read and Git to compare it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suite in suites:
        file = folder / f"{suite.name}.json"
        file.write_text(json.dumps(suite.model_dump(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files.append(file)
    return files


def _draft_images(images: pd.DataFrame) -> list[Expectation]:
    drafted = [
        _expect(
            "expect_table_columns_to_match_set",
            f"Seen {len(METADATA_COLUMNS)} measured columns and {len(_DERIVED_COLUMNS)} derived ones; "
            "later stages read them by name.",
            column_set=[*METADATA_COLUMNS, *_DERIVED_COLUMNS],
            exact_match=True,
        ),
        _expect("expect_column_values_to_be_unique", "Seen no key twice.", column="key"),
    ]
    labels = sorted(images["label"].unique())
    drafted += [
        _expect(
            "expect_column_distinct_values_to_contain_set",
            f"Seen {len(labels)} classes; one without images means that part of the delivery is missing.",
            column="label",
            value_set=labels,
        ),
        _expect(
            "expect_column_values_to_be_in_set",
            f"Seen {len(labels)} classes; another is a labelling error, or a decision that belongs in this file.",
            column="label",
            value_set=labels,
        ),
    ]
    for column in ("mode", "format"):
        counts = images[column].value_counts()
        seen = ", ".join(f"{value} ({counts[value]})" for value in sorted(counts.index))
        drafted.append(
            _expect("expect_column_values_to_be_in_set", f"Seen {seen}.", column=column, value_set=sorted(counts.index))
        )
    for column in ("width_px", "height_px"):
        smallest, largest = int(images[column].min()), int(images[column].max())
        limits = (smallest, largest) if smallest == largest else (max(1, smallest // 2), largest * 2)
        drafted.append(_between(column, *limits, f"Seen {_span(smallest, largest)}."))
    for column, ceiling in (("mean", 255.0), ("std", 127.5), ("p01", 255.0), ("p99", 255.0)):
        low, high = float(images[column].min()), float(images[column].max())
        margin = max((high - low) / 4, 5.0)
        drafted.append(
            _between(
                column,
                max(0.0, float(math.floor(low - margin))),
                min(ceiling, float(math.ceil(high + margin))),
                f"Seen {_span(low, high)}, of 0 to {describe_value(ceiling)}.",
            )
        )
    for column, meaning in _FLAGS.items():
        drafted.append(_rarely(images, column, meaning))
    for column, where in (("leaks", "another split"), ("leaks_into_test", "the test split and another")):
        leaked = int(images[column].sum())
        drafted.append(
            _expect(
                "expect_column_values_to_be_in_set",
                f"Seen {leaked} images whose bytes lie in {where}; there should be none.",
                column=column,
                value_set=[False],
            )
        )
    return drafted


def _draft_dataset(tables: ValidationTables) -> list[Expectation]:
    facts = tables.facts
    images = tables.images
    rows = len(images)
    quarantined = facts["quarantined_share"] or 0.0
    rarest = facts["smallest_class_share"] or 0.0
    drafted = [
        _at_least("rows", rows // 2, f"Seen {rows}; fewer than half is half a delivery."),
        _at_least("labels", 2, f"Seen {images['label'].nunique()}; a classifier needs two to tell apart."),
        _at_most(
            "quarantined_share",
            _round_up(max(2 * quarantined, 0.01)),
            f"Seen {describe_value(quarantined)}; twice as many, or one in a hundred, means a damaged copy.  "
            "(Above data_ingestion.max_quarantined_share a run stops before it comes here.)",
        ),
        _at_least(
            "smallest_class_share", _round_down(rarest / 2), f"Seen {describe_value(rarest)}; half of it is rare."
        ),
        _at_most(
            "groups_across_splits",
            0,
            f"Seen {describe_value(facts['groups_across_splits'])}; images of one group must share a split.",
        ),
        *_draft_freshness(images["arrived"]),
        _at_least("rows_vs_previous", 1, "Data usually grows; fewer images than before deserve a look.", "warning"),
        _at_least("rows_vs_previous", 0.8, "A fifth of the previous version's images is gone."),
    ]
    noise = 9 * 2 / rows  # ten bins, two samples of this size: see pipelines.core.shift
    for column in ("mean", "std", "p99", "width_px", "height_px"):
        shift = f"psi_{column}"
        note = f"Not seen yet; two samples of {rows} images differ by {noise:.2g} by chance, and by custom"
        drafted += [
            _at_most(shift, _round_up(max(0.1, 2 * noise)), f"{note} a shift begins at 0.1.", "warning"),
            _at_most(shift, _round_up(max(0.25, 3 * noise)), f"{note} 0.25 is a large one."),
        ]
    drafted += [
        _at_most("js_label", 0.1, "Not seen yet: class shares that change alter what accuracy means.", "warning"),
        _at_most("js_label", 0.3, "Not seen yet: class shares like these are another task."),
        _at_most("new_psi_mean", 0.5, "Not seen yet: new images show a shift before the old ones hide it.", "warning"),
        _at_most("new_psi_std", 0.5, "Not seen yet: new images show a shift before the old ones hide it.", "warning"),
    ]
    return drafted


def _draft_freshness(arrived: pd.Series[Any]) -> list[Expectation]:
    """From the longest pause between two arrivals, at least a week; nothing where the source knows no dates."""
    days = sorted(set(arrived.dropna()))
    if not days:
        return []
    pause = max([7, *((later - earlier).days for earlier, later in itertools.pairwise(days))])
    seen = f"Seen arrivals on {len(days)} days, at most {pause} days apart (taken as a week at least)"
    return [
        _at_most("freshness_days", 2 * pause, f"{seen}; two such pauses deserve a look.", "warning"),
        _at_most("freshness_days", 8 * pause, f"{seen}; after eight the delivery has stopped."),
    ]


def _rarely(images: pd.DataFrame, column: str, meaning: str) -> Expectation:
    seen = int(images[column].sum())
    arguments: dict[str, Any] = {"column": column, "value_set": [False]}
    if seen or column != "label_conflict":
        arguments["mostly"] = _round_down(1 - max(2 * seen / len(images), 0.01))
    return _expect("expect_column_values_to_be_in_set", f"Seen {seen} images that {meaning}", **arguments)


def _between(column: str, low: float, high: float, note: str) -> Expectation:
    return _expect("expect_column_values_to_be_between", note, column=column, min_value=low, max_value=high)


def _at_least(column: str, low: float, note: str, severity: Severity = "critical") -> Expectation:
    return _expect("expect_column_values_to_be_between", note, severity, column=column, min_value=low)


def _at_most(column: str, high: float, note: str, severity: Severity = "critical") -> Expectation:
    return _expect("expect_column_values_to_be_between", note, severity, column=column, max_value=high)


def _expect(type_: str, note: str, severity: Severity = "critical", **kwargs: Any) -> Expectation:
    return Expectation(type=type_, kwargs=kwargs, severity=severity, meta={"notes": note})


def _span(low: float, high: float) -> str:
    return describe_value(low) if low == high else f"{describe_value(low)} to {describe_value(high)}"


def _round_down(share: float) -> float:
    """To three decimals, not below 0."""
    return max(0.0, math.floor(share * 1000) / 1000)


def _round_up(share: float) -> float:
    return math.ceil(share * 1000) / 1000
