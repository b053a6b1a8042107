"""What a batch prediction writes, and that no kill, change or second process makes it write anything else."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.batch_prediction.prediction import Predicted
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.image_decoding import read_model_input
from pipelines.core.image_limits import ImageLimits
from pipelines.core.locking import hold
from pipelines.data.sources.base import Source, SourceItem
from pipelines.errors import Refusal, TryLater
from pipelines.modeling.inference import OnnxPredictor

Predict = Callable[..., Predicted]
MakeFolder = Callable[..., Path]
PROJECT = Path(__file__).parents[3]
IMAGES = 5000  # three parts


class Interrupted:
    """A source that fails after a number of reads, as one behind a network does."""

    def __init__(self, source: Source, reads: int, error: Exception) -> None:
        self._source, self.left, self._error, self.reads = source, reads, error, 0
        self.identity, self.concurrent_reads = source.identity, source.concurrent_reads

    def list_items(self) -> list[SourceItem]:
        return self._source.list_items()

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        self.reads += 1
        self.left -= 1
        if self.left < 0:
            raise self._error
        return self._source.read(item, max_bytes)


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def test_predict__nested_folder__gives_what_the_model_says_of_each_image(
    predict: Predict, make_folder: MakeFolder, model_file: Path, tmp_path: Path
) -> None:
    folder = make_folder(300)
    predicted = predict(folder)
    assert (predicted.images, predicted.errors, predicted.summary) == (300, {}, "300 predicted, 0 unreadable")
    table = pq.read_table(tmp_path / "predictions.parquet")
    files = sorted(folder.rglob("*.png"))
    assert table["key"].to_pylist() == [file.relative_to(folder).as_posix() for file in files]
    predictor = OnnxPredictor(model_file)
    contract = predictor.contract.input
    images = [read_model_input(file.read_bytes(), contract, max_pixels=10**6, max_bytes=10**6) for file in files]
    expected = predictor.predict(np.stack(images))
    np.testing.assert_array_equal(np.stack([table["p_circle"], table["p_square"]], axis=1), expected)
    np.testing.assert_array_equal(table["confidence"], expected.max(axis=1))
    assert table["label"].to_pylist() == [("circle", "square")[index] for index in expected.argmax(axis=1)]
    assert {len(set(table[name].to_pylist())) for name in ("model", "model_version", "onnx_sha256")} == {1}
    assert table["error"].null_count == 300
    assert not parts_of(tmp_path / "predictions.parquet").exists()


def test_predict__images_that_cannot_be_used__are_rows_with_the_reason(predict: Predict, tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.fromarray(np.full((12, 12), 7, np.uint8)).save(good, "PNG")
    large = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(large, "PNG")
    folder = tmp_path / "scans"
    folder.mkdir()
    files = {
        "a-empty.png": b"",
        "b-large.png": large.getvalue(),
        "c-good.without-a-known-ending": good.getvalue(),
        "d-heavy.png": good.getvalue() + b"x" * 5000,
        "e-notes.txt": b"no image",
        "f-truncated.png": good.getvalue()[:50],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "g-dangling.png").symlink_to(folder / "gone.png")
    (folder / ".hidden.png").write_bytes(b"passed over")
    predicted = predict(folder, limits=ImageLimits(max_pixels=1000, max_body_bytes=4000))
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["key"] for row in rows] == [*files, "g-dangling.png"]
    assert [row["error"] for row in rows] == [
        *("empty", "too_many_pixels", None, "too_many_bytes", "not_an_image", "truncated", "unreadable")
    ]
    assert predicted.summary.startswith("1 predicted, 6 unreadable: 1 ")
    for row in rows:
        answers = [row[name] for name in ("label", "confidence", "p_circle", "p_square")]
        assert (None in answers) == (answers == [None] * 4) == (row["error"] is not None)
        assert (row["error_detail"] is None) == (row["error"] is None)


def test_predict__nothing_readable__is_refused_and_leaves_nothing(predict: Predict, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    with pytest.raises(Refusal, match="holds no file"):
        predict(folder)
    (folder / "notes.txt").write_bytes(b"no image")
    with pytest.raises(Refusal, match="no readable image: 1 not_an_image"):
        predict(folder)
    assert not list(tmp_path.glob("predictions*"))


def test_predict__source_lost_in_the_middle__goes_on_from_there_to_the_same_bytes(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(IMAGES)
    predict(folder, tmp_path / "undisturbed.parquet")
    out = tmp_path / "predictions.parquet"
    with pytest.raises(TryLater, match="network"):
        predict(folder, wrap=lambda source: Interrupted(source, 3000, TryLater("the network is away")))
    assert len(list(parts_of(out).glob("part-*.parquet"))) == 1
    assert not out.exists()
    said: list[str] = []
    predicted = predict(folder, say=said.append)
    assert (predicted.images, predicted.resumed) == (IMAGES, 2048)
    assert said == ["going on: 2,048 of 5,000 images were done before"]
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert not parts_of(out).exists()


_CHILD = """
import sys
from pathlib import Path
from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import predict_source
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.image_limits import ImageLimits
from pipelines.settings import Settings
folder, model, out = sys.argv[1:]
source = open_location(folder, Settings(), path_column="path", out=Path(out))
identity = ModelIdentity("shapes", "1", "0" * 64)
predict_source(source, Path(model), identity, Path(out), limits=ImageLimits(), threads=1, name="scans")
"""


def test_predict__killed_again_and_again__ends_with_the_same_bytes(
    predict: Predict, make_folder: MakeFolder, model_file: Path, tmp_path: Path
) -> None:
    folder = make_folder(3 * 2048 + 100)
    identity = ModelIdentity("shapes", "1", "0" * 64)
    predict(folder, tmp_path / "undisturbed.parquet", identity=identity)
    out = tmp_path / "predictions.parquet"
    command = [sys.executable, "-c", _CHILD, str(folder), str(model_file), str(out)]
    kills = 0
    for part in range(2):
        process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (parts_of(out) / f"part-{part:06d}.parquet").exists():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += not out.exists()
    assert kills == 2
    (parts_of(out) / ".part.1").write_bytes(b"what a kill leaves half written")
    predicted = predict(folder, identity=identity)
    assert predicted.resumed >= 2 * 2048
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert not parts_of(out).exists()


@pytest.mark.parametrize("change", ["an image", "the model", "the limits"])
def test_predict__something_else_than_before__says_so_and_starts_over(
    change: str, predict: Predict, make_folder: MakeFolder, model_file: Path, tmp_path: Path
) -> None:
    folder = make_folder(3000)
    with pytest.raises(TryLater):
        predict(folder, wrap=lambda source: Interrupted(source, 2500, TryLater("the network is away")))
    changes: dict[str, Any] = {}
    if change == "an image":
        image = folder / "day-0" / "00000.png"
        image.unlink()
        image.write_bytes(b"now broken")
    elif change == "the model":
        changes["identity"] = ModelIdentity("shapes-classification", "2", "ab" * 32)
    else:
        changes["limits"] = ImageLimits(max_pixels=1000)
    said: list[str] = []
    predicted = predict(folder, say=said.append, **changes)
    name = "the source" if change == "an image" else change
    assert said == [f"{name} changed since predictions.parquet was begun: starting over"]
    assert predicted.resumed == 0
    first = pq.read_table(tmp_path / "predictions.parquet").to_pylist()[0]
    assert first["error"] == ("not_an_image" if change == "an image" else None)
    assert first["model_version"] == ("2" if change == "the model" else "1")


def test_predict__a_part_damaged_on_disk__is_made_again(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(IMAGES)
    predict(folder, tmp_path / "undisturbed.parquet")
    out = tmp_path / "predictions.parquet"
    with pytest.raises(TryLater):
        predict(folder, wrap=lambda source: Interrupted(source, 4700, TryLater("the network is away")))
    part = parts_of(out) / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    content[2000] ^= 1
    part.write_bytes(content)
    assert predict(folder).resumed == 2048
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()


def test_predict__an_image_that_could_not_be_read_then__is_read_again_when_resumed(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    class Unlucky(Interrupted):
        """The first image cannot be opened, and the network goes away later."""

        def read(self, item: SourceItem, max_bytes: int) -> bytes:
            if item.key == "day-0/00000.png":
                raise PermissionError(13, "Permission denied")
            return super().read(item, max_bytes)

    folder = make_folder(3000)
    with pytest.raises(TryLater):
        predict(folder, wrap=lambda source: Unlucky(source, 2500, TryLater("the network is away")))
    predicted = predict(folder)
    assert (predicted.resumed, predicted.errors) == (0, {})


def test_predict__another_process_at_the_same_output__may_be_tried_later(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder, out = make_folder(10), tmp_path / "predictions.parquet"
    with hold(parts_of(out) / "lock", wait_s=0), pytest.raises(TryLater, match="one at a time"):
        predict(folder)
    assert not out.exists()
    assert predict(folder).images == 10


def test_predict__output_that_is_something_else__is_refused_and_untouched(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder, out = make_folder(10), tmp_path / "predictions.parquet"
    out.write_bytes(b"my notes")
    with pytest.raises(Refusal, match="holds no predictions of Perch"):
        predict(folder)
    assert out.read_bytes() == b"my notes"
    out.unlink()
    parts_of(out).mkdir()
    (parts_of(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(Refusal, match=r"holds thesis\.tex"):
        predict(folder)
    assert (parts_of(out) / "thesis.tex").read_text() == "years of work"
    with pytest.raises(Refusal, match="there is no"):
        predict(folder, tmp_path / "nowhere" / "predictions.parquet")


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.json"])
def test_predict__output_named_like_another_format__is_refused_with_a_name_that_fits(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path, name: str
) -> None:
    with pytest.raises(Refusal, match=r"what to do: --out \S+/predictions\.parquet; for a CSV file"):
        predict(make_folder(10), tmp_path / name)
    assert not list(tmp_path.glob("predictions*"))


def test_predict__given_again_after_the_end__writes_the_same_bytes_over_it(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder, out = make_folder(200), tmp_path / "predictions.parquet"
    predict(folder)
    before = out.read_bytes()
    predict(folder)
    assert out.read_bytes() == before


def test_predict__any_number_of_threads__writes_the_same_bytes(
    predict: Predict, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(1000)
    predict(folder, tmp_path / "one.parquet", threads=1)
    predict(folder, tmp_path / "five.parquet", threads=5)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "five.parquet").read_bytes()
