import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.contract import ModelContract
from pipelines.core.image_decoding import read_model_input
from pipelines.data.preprocessing import assign_and_leave_out, find_outliers, write_splits
from pipelines.data.shards import read_images, read_metadata
from pipelines.errors import Refusal
from pipelines.params import DataIngestionParams, DataPreprocessingParams

SMALL = DataPreprocessingParams(size_px=16, min_images_per_class=1)


def preprocess(tmp_path, name: str = "run", cache: str = "cache", params: DataPreprocessingParams = SMALL):
    raw, splits = tmp_path / name / "raw", tmp_path / name / "splits"
    counts = write_splits(raw, splits, DataIngestionParams(), params, cache_dir=tmp_path / cache, threads=2)
    return splits, counts


def rows(*images: dict[str, Any]) -> pa.Table:
    plain = {"label": "cat", "given_split": "", "group": "", "mean": 100.0, "std": 20.0}
    filled = [plain | {"key": f"{n:03d}", "sha256": f"{n:064x}"} | image for n, image in enumerate(images)]
    return pa.Table.from_pylist(filled).cast(
        pa.schema([(name, pa.float32() if name in ("mean", "std") else pa.string()) for name in filled[0]])
    )


def given_rows(**counts: int) -> list[dict[str, Any]]:
    return [{"given_split": split} for split, count in counts.items() for _ in range(count)]


def test_write_splits__folder__writes_what_the_contract_between_stages_names(make_folder, ingest_to, tmp_path):
    folder = make_folder(classes={"dog": 40, "cat": 40})
    ingest_to(folder)
    splits, counts = preprocess(tmp_path)
    table = pq.read_table(splits / "images.parquet")
    raw = read_metadata(tmp_path / "run" / "raw")
    assert table.select(raw.schema.names).equals(raw)
    assert table.schema.names[-4:] == ["used_split", "row", "left_out", "label_index"]
    contract = ModelContract.model_validate_json((splits / "contract.json").read_bytes())
    assert contract.labels == ("cat", "dog")
    images = read_images(tmp_path / "run" / "raw", raw["key"].to_pylist())
    for split in ("train", "val", "test"):
        array = np.load(splits / f"{split}.npy", mmap_mode="r")
        assert array.shape == (counts[split], 16, 16, 1)
        assert array.dtype == np.uint8
        used = [row for row in table.to_pylist() if row["used_split"] == split]
        assert [row["row"] for row in used] == list(range(counts[split]))
        for row in used:
            expected = read_model_input(images[row["key"]], contract.input, max_pixels=10**6, max_bytes=10**6)
            assert np.array_equal(array[row["row"]], expected)
            assert contract.labels[row["label_index"]] == row["label"]


def test_write_splits__with_and_without_the_cache__gives_the_same_bytes(make_folder, ingest_to, tmp_path, file_bytes):
    ingest_to(make_folder(classes={"dog": 40, "cat": 40}, suffix=".jpg"), shard_images=16)
    splits, _ = preprocess(tmp_path)
    with_cache = file_bytes(splits)
    preprocess(tmp_path, cache="nothing-here")
    assert file_bytes(splits) == with_cache
    shutil.rmtree(tmp_path / "cache")
    preprocess(tmp_path)
    assert file_bytes(splits) == with_cache


@pytest.mark.parametrize("size_px", [16, 600])
def test_write_splits__shape_other_than_ingested__is_made_from_the_shards(make_folder, ingest_to, tmp_path, size_px):
    ingest_to(make_folder(classes={"dog": 30, "cat": 30}))
    params = DataPreprocessingParams(size_px=size_px, channels=3, resize="pad", min_images_per_class=1)
    splits, counts = preprocess(tmp_path, params=params)
    assert np.load(splits / "train.npy", mmap_mode="r").shape == (counts["train"], size_px, size_px, 3)


def test_write_splits__data_added__no_image_changes_its_split(make_folder, ingest_to, tmp_path):
    def splits_by_content(name: str) -> dict[str, str]:
        splits, _ = preprocess(tmp_path, name)
        table = pq.read_table(splits / "images.parquet").to_pylist()
        return {row["sha256"]: row["used_split"] for row in table if row["used_split"]}

    folder = make_folder(classes={"dog": 40, "cat": 40})
    ingest_to(folder, "before")
    before = splits_by_content("before")
    make_folder(classes={"dog": 55, "cat": 45})
    ingest_to(folder, "after")
    after = splits_by_content("after")
    assert len(after) == 100
    assert {content: after[content] for content in before} == before


def test_write_splits__class_too_small__is_refused_with_counts_and_way_out(make_folder, ingest_to, tmp_path):
    ingest_to(make_folder(classes={"dog": 60, "cat": 3}))
    with pytest.raises(Refusal) as caught:
        preprocess(tmp_path, params=DataPreprocessingParams(size_px=16, min_images_per_class=2))
    message = str(caught.value)
    assert "cat: " in message
    assert "dog: " not in message
    assert "data_preprocessing.min_images_per_class" in message
    assert "add images" in caught.value.way_out


def test_assign_and_leave_out__same_bytes_twice__keeps_the_first_key():
    copies = [{"sha256": "a" * 64}, {"sha256": "a" * 64}]
    splits, left_out = assign_and_leave_out(rows(*given_rows(val=1, test=1), *copies, *given_rows(train=40)), SMALL)
    assert left_out[2:4] == ["", "duplicate"]
    assert splits[2] == splits[3]


def test_assign_and_leave_out__same_bytes_in_training_and_test__keeps_them_in_test():
    table = rows(
        {"given_split": "train", "sha256": "a" * 64},
        {"given_split": "test", "sha256": "a" * 64},
        *given_rows(train=3, val=3, test=3),
    )
    assert assign_and_leave_out(table, SMALL)[1][:2] == ["duplicate", ""]


def test_assign_and_leave_out__copies_within_a_given_test_split__all_stay():
    table = rows(*[{"given_split": "test", "sha256": "a" * 64}] * 3, *given_rows(train=3, val=3))
    assert assign_and_leave_out(table, SMALL)[1] == [""] * 9


def test_assign_and_leave_out__same_bytes_under_two_labels__keeps_both():
    twins = [{"sha256": "a" * 64, "label": "cat"}, {"sha256": "a" * 64, "label": "dog"}]
    dogs = [{"label": "dog", **row} for row in given_rows(train=2, val=2, test=2)]
    _, left_out = assign_and_leave_out(rows(*twins, *given_rows(train=2, val=2, test=2), *dogs), SMALL)
    assert left_out == [""] * 14


def test_assign_and_leave_out__far_image__is_left_out_of_training_only():
    far = [{"mean": 250.0, "given_split": split} for split in ("train", "val", "test")]
    ordinary = [{"mean": 90.0 + n % 20, **row} for n, row in enumerate(given_rows(train=60, val=10, test=10))]
    assert assign_and_leave_out(rows(*far, *ordinary), SMALL)[1][:4] == ["outlier", "", "", ""]


def test_find_outliers__constant_property__small_deviations_are_ordinary():
    means = np.array([[100.0] * 50 + [103.0, 160.0]], np.float32)
    assert np.flatnonzero(find_outliers(["cat"] * 52, means, 8.0)).tolist() == [51]


def test_find_outliers__a_second_kind_of_image__is_not_outliers():
    means = np.array([[20.0] * 60 + [220.0] * 20], np.float32)
    assert not find_outliers(["cat"] * 80, means, 8.0).any()


def test_find_outliers__each_class__is_judged_by_itself():
    means = np.array([[20.0] * 40 + [220.0] * 40 + [20.0]], np.float32)
    assert np.flatnonzero(find_outliers(["dark"] * 40 + ["bright"] * 41, means, 8.0)).tolist() == [80]


@settings(deadline=None)
@given(st.lists(st.floats(0, 255, width=32), min_size=1, max_size=60), st.floats(1, 20))
def test_find_outliers__any_values__leaves_most_of_a_class(values, outlier_z):
    outliers = find_outliers(["cat"] * len(values), np.array([values], np.float32), outlier_z)
    assert outliers.sum() <= max(1, 0.05 * len(values))


def test_write_splits__group__stays_in_one_split(make_folder, ingest_to, tmp_path):
    ingest_to(make_folder(classes={"dog": 60, "cat": 60}), group_pattern=r"/(\d\d)\d\.png")
    splits, _ = preprocess(tmp_path)
    seen: dict[str, set[str]] = {}
    for row in pq.read_table(splits / "images.parquet").to_pylist():
        if row["used_split"]:
            seen.setdefault(row["group"], set()).add(row["used_split"])
    assert len(seen) == 6
    assert all(len(of) == 1 for of in seen.values())
