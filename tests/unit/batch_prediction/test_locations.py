"""What can be named to predict."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.batch_prediction.prediction import Predicted
from pipelines.errors import Refusal

Predict = Callable[..., Predicted]
MakeFolder = Callable[..., Path]


def keys(out: Path) -> list[str]:
    return pq.read_table(out)["key"].to_pylist()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_table__paths_without_classes__are_predicted_in_its_order(
    ending: str, predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(6)
    paths = ["day-2/00002.png", "day-0/00000.png", str(folder / "day-1/00001.png"), "gone.png", "day-0/00000.png"]
    table = folder / f"list.{ending}"
    if ending == "csv":
        table.write_text("\n".join(["scan,age", *(f"{path},50" for path in paths)]))
    else:
        pq.write_table(pa.table({"age": [50] * 5, "scan": paths}), table)
    predicted = predict(table, path_column="scan")
    assert predicted.errors == {"unreadable": 1}
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["key"] for row in rows] == [
        *("day-2/00002.png", "day-0/00000.png", "day-1/00001.png", "gone.png", "day-0/00000.png")
    ]
    assert [row["error"] for row in rows] == [None, None, None, "unreadable", None]
    assert rows[1]["p_circle"] == rows[4]["p_circle"]


def test_table__no_column_of_that_name__is_refused_with_those_it_has(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file\na.png\n")
    with pytest.raises(Refusal, match=r"(?s)no column path; it has file.*--path-column"):
        predict(tmp_path / "list.csv")


def test_folder__holding_its_own_output__predicts_only_the_rest(predict: Predict, make_folder: MakeFolder) -> None:
    folder = make_folder(5)
    out = folder / "day-0" / "p"
    (folder / "day-0" / "p1.png").write_bytes((folder / "day-0" / "00000.png").read_bytes())
    for _ in range(2):
        assert predict(folder, out).images == 6
    assert "day-0/p1.png" in keys(out)


def test_image__named_alone__is_predicted(predict: Predict, make_folder: MakeFolder, tmp_path: Path) -> None:
    predict(make_folder(5) / "day-1" / "00004.png")
    assert keys(tmp_path / "predictions.parquet") == ["00004.png"]


def test_npz__of_medmnist__is_predicted(predict: Predict, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 6, 6), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", test_images=pixels, test_labels=np.zeros((4, 1), np.uint8))
    predict(tmp_path / "a.npz")
    assert keys(tmp_path / "predictions.parquet") == [f"test/{index:06d}.png" for index in range(4)]


def test_digits__as_a_name__are_predicted(predict: Predict, tmp_path: Path) -> None:
    assert predict("digits").summary == "1,797 predicted, 0 unreadable"


@pytest.mark.parametrize("location", ["nowhere", "https://user:secret@example.org/images"])
def test_location__nothing_there__is_refused(location: str, predict: Predict) -> None:
    with pytest.raises(Refusal, match="there is no") as refused:
        predict(location)
    assert "secret" not in str(refused.value)
