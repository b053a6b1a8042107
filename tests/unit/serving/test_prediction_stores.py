from pathlib import Path

import pytest

from serving.prediction_stores import FolderPredictionStore, S3PredictionStore, open_store


def test_folder_store__a_file_twice__is_there_once_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "kept"))
    store.put("a/day=1/x.parquet", b"one")
    store.put("a/day=1/x.parquet", b"two")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"two"]


def test_folder_store__a_file_stands_in_the_way__fails_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a" / "x.parquet").mkdir(parents=True)
    with pytest.raises(OSError, match=r"x\.parquet"):
        FolderPredictionStore(tmp_path).put("a/x.parquet", b"one")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.parquet"]


def test_open_store__s3__asks_nothing_yet() -> None:
    assert isinstance(open_store("s3://bucket/some/prefix/"), S3PredictionStore)
