import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.image_features import FEATURES, compute_features
from pipelines.data.feature_table import weigh_classes, write_features
from pipelines.errors import Refusal

RNG = np.random.default_rng(9)


@pytest.fixture
def splits_dir(tmp_path):
    def write(channels: int = 1, *, flat: bool = False):
        folder = tmp_path / "splits"
        folder.mkdir()
        table = []
        for split, count in (("train", 30), ("val", 5), ("test", 6)):
            images = RNG.integers(0, 256, (count, 12, 12, channels), dtype=np.uint8)
            np.save(folder / f"{split}.npy", np.full_like(images, 7) if flat else images)
            table += [
                {
                    "sha256": f"{split}{row}",
                    "used_split": split,
                    "row": row,
                    "label": "rare" if row % 10 == 0 else "common",
                    "width_px": 40,
                    "height_px": 50,
                }
                for row in range(count)
            ]
        table.append(table[0] | {"used_split": "", "row": -1, "sha256": "left out"})
        pq.write_table(pa.Table.from_pylist(table[::-1]), folder / "images.parquet")
        return folder

    return write


@pytest.mark.parametrize("channels", [1, 3])
def test_write_features__any_channels__statistics_are_those_of_training_alone(splits_dir, tmp_path, channels):
    folder = splits_dir(channels)
    statistics = write_features(folder, ["common", "rare"], tmp_path / "features", 3.0)
    train = np.load(folder / "train.npy").astype(np.float64)
    assert statistics.mean == pytest.approx(train.mean(axis=(0, 1, 2)))
    assert statistics.std == pytest.approx(train.std(axis=(0, 1, 2)))
    assert statistics.train_images == 30
    assert statistics.class_weights == {"common": pytest.approx(30 / (2 * 27)), "rare": 3.0}


def test_write_features__every_used_image__has_its_own_row(splits_dir, tmp_path):
    folder = splits_dir()
    write_features(folder, ["common", "rare"], tmp_path / "features", 3.0)
    table = pq.read_table(tmp_path / "features" / "features.parquet")
    assert table.schema.names == ["sha256", "used_split", "label", "width_px", "height_px", *FEATURES]
    assert table.num_rows == 41
    expected = compute_features(np.load(folder / "val.npy"))
    val = [row for row in table.to_pylist() if row["used_split"] == "val"]
    assert [row["sha256"] for row in val] == [f"val{n}" for n in range(5)]
    for name in FEATURES:
        assert [row[name] for row in val] == pytest.approx(expected[name].tolist())


def test_write_features__flat_training_images__are_refused(splits_dir, tmp_path):
    with pytest.raises(Refusal, match="same grey"):
        write_features(splits_dir(flat=True), ["common", "rare"], tmp_path / "features", 3.0)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 10_000), min_size=2, max_size=8))
def test_weigh_classes__uncapped__an_average_image_counts_one(counts):
    weights = weigh_classes(counts, max_weight=1e9)
    total = sum(counts.values())
    assert sum(weights[label] * count for label, count in counts.items()) == pytest.approx(total)


def test_weigh_classes__rare_class__is_capped():
    assert weigh_classes({"a": 10_000, "b": 1}, 10.0)["b"] == 10.0
