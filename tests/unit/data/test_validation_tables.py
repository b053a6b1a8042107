"""The tables that suites are held against: what other images tell about one, and facts of the whole."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.shards import METADATA_SCHEMA
from pipelines.data.validation_tables import (
    FACTS,
    Reference,
    ValidationTables,
    describe_images,
    measure_data_set,
    read_measurements,
    read_reference,
)
from pipelines.errors import Refusal


def measurements(**columns: list[Any]) -> pd.DataFrame:
    """A few images, alike but for the columns given."""
    count = len(next(iter(columns.values())))
    generator = np.random.default_rng(1)
    table: dict[str, Any] = {
        "key": [f"{n}.png" for n in range(count)],
        "label": ["cat"] * count,
        "given_split": [""] * count,
        "group": [""] * count,
        "arrived": [None] * count,
        "sha256": [f"{n:064x}" for n in range(count)],
        "format": ["PNG"] * count,
        "mode": ["L"] * count,
        "width_px": [8] * count,
        "height_px": [8] * count,
        "n_bytes": [100] * count,
        "mean": np.linspace(50, 100, count),
        "std": np.linspace(20, 30, count),
        "p01": [0.0] * count,
        "p99": [255.0] * count,
        "phash": generator.integers(-(2**63), 2**63, count),
    }
    return pd.DataFrame(table | columns)


def flags(images: pd.DataFrame, column: str) -> list[int]:
    return [int(n) for n in np.flatnonzero(images[column])]


def test_describe_images__same_bytes__are_duplicates_leaks_and_conflicts_where_they_are() -> None:
    images = describe_images(
        measurements(
            sha256=["a", "b", "a", "c", "c", "d", "d"],
            label=["cat", "cat", "cat", "cat", "dog", "cat", "cat"],
            phash=[1 << 10, 7 << 20, 1 << 10, 15 << 30, 15 << 30, 31 << 40, 31 << 40],
        ),
        ["train", "train", "val", "train", "train", "train", "test"],
        2,
    )
    assert flags(images, "is_duplicate") == [2, 4, 6]
    assert flags(images, "label_conflict") == [3, 4]
    assert flags(images, "leaks") == [0, 2, 5, 6]
    assert flags(images, "leaks_into_test") == [5, 6]
    assert flags(images, "near_leaks") == []


def test_describe_images__hashes_two_bits_apart_in_two_splits__are_near_leaks() -> None:
    images = describe_images(measurements(phash=[0, 0b11, 0b111 << 20, 1]), ["train", "val", "train", "train"], 2)
    assert flags(images, "near_leaks") == [0, 1, 3]


def test_measure_data_set__without_reference_or_dates__leaves_what_cannot_be_known_open() -> None:
    images = describe_images(measurements(label=["cat"] * 6 + ["dog"] * 2), ["train"] * 8, 2)
    facts = measure_data_set(images, quarantined=2, as_of=date(2026, 11, 1), reference=None)
    assert list(facts) == list(FACTS)
    assert {name: value for name, value in facts.items() if value is not None} == {
        "rows": 8,
        "labels": 2,
        "quarantined_share": 0.2,
        "smallest_class_images": 2,
        "smallest_class_share": 0.25,
        "smallest_to_largest_class": pytest.approx(1 / 3),
        "groups_across_splits": 0,
    }


def test_measure_data_set__dates_and_groups__give_freshness_and_groups_across_splits() -> None:
    arrived = [date(2026, 10, 1), None, date(2026, 10, 25), date(2026, 10, 2)]
    images = describe_images(
        measurements(arrived=arrived, group=["p1", "p1", "p2", ""]), ["train", "test", "train", "test"], 2
    )
    facts = measure_data_set(images, quarantined=0, as_of=date(2026, 11, 1), reference=None)
    assert facts["freshness_days"] == 7
    assert facts["groups_across_splits"] == 1


def test_measure_data_set__brighter_new_images__show_most_in_the_new_images_alone() -> None:
    old = measurements(mean=list(np.linspace(50, 100, 400)))
    new = measurements(mean=list(np.linspace(80, 130, 100)), sha256=[f"new {n}" for n in range(100)])
    reference = Reference("champion v1", len(old), frozenset(old["sha256"]), old)
    images = describe_images(pd.concat([old, new], ignore_index=True), ["train"] * 500, 0)
    facts = measure_data_set(images, quarantined=0, as_of=None, reference=reference)
    assert facts["rows_vs_previous"] == 1.25
    assert facts["new_images_share"] == 0.2
    assert facts["psi_width_px"] == pytest.approx(0, abs=1e-3)
    assert facts["psi_mean"] is not None
    assert facts["new_psi_mean"] is not None
    assert facts["new_psi_mean"] > 4 * facts["psi_mean"] > 0
    assert facts["js_label"] == 0


def test_validation_tables__unknown_fact__is_null_in_the_table() -> None:
    table = ValidationTables(pd.DataFrame(), {"rows": 3, "psi_mean": None}).by_name()["dataset"]
    assert table["rows"].tolist() == [3.0]
    assert table["psi_mean"].isna().all()
    assert table["psi_mean"].dtype == np.float64


def write_raw(folder: Path, table: pa.Table, dataset: str = "cats") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "0.parquet")
    manifest = {
        "schema": 1, "dataset": dataset, "source": "cats/", "as_of": None, "labels": {},
        "rows": len(table), "quarantined": 0,
        "shards": [{"name": "0.parquet", "rows": len(table), "sha256": ""}], "data_sha256": "",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_read_measurements__shard_with_images__leaves_them_out_and_keeps_types(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(measurements(width_px=[8, 9]), schema=METADATA_SCHEMA, preserve_index=False)
    read = read_measurements(write_raw(tmp_path / "raw", table.append_column("image", pa.array([b"1", b"2"]))))
    assert read.columns.tolist() == METADATA_SCHEMA.names
    assert read["width_px"].dtype == np.int32
    assert read["mean"].dtype == np.float32


def test_read_measurements__missing_column__is_refused_with_its_name(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(measurements(width_px=[8, 9])).drop_columns(["phash"])
    with pytest.raises(Refusal, match=r"0\.parquet.*lacks the columns phash"):
        read_measurements(write_raw(tmp_path / "raw", table))


def test_read_measurements__no_image__is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(measurements(width_px=[8]), schema=METADATA_SCHEMA, preserve_index=False).slice(1)
    with pytest.raises(Refusal, match="holds no image"):
        read_measurements(write_raw(tmp_path / "raw", table))


def test_read_reference__of_another_data_set_or_none__is_nothing_to_compare_with(tmp_path: Path) -> None:
    images = measurements(used_split=["train", "test", ""])
    write_raw(tmp_path, pa.table({"key": ["0"]}))
    images.to_parquet(tmp_path / "images.parquet")
    (tmp_path / "reference.json").write_text(json.dumps({"kind": "champion", "version": "3"}))

    reference = read_reference(tmp_path, "cats")
    assert reference is not None
    assert (reference.version, reference.rows) == ("champion v3", 1)
    assert reference.sha256 == frozenset(images["sha256"])
    assert reference.training["key"].tolist() == ["0.png"]
    assert read_reference(tmp_path, "dogs") is None

    (tmp_path / "reference.json").write_text(json.dumps({"kind": "none", "version": None}))
    assert read_reference(tmp_path, "cats") is None
