import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources.npz import NpzSource
from pipelines.errors import Refusal

RNG = np.random.default_rng(5)


def images(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *(shape or (8, 9))), dtype=np.uint8)


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)[:, None]


def source(tmp_path: Path, *, sha256: str | None = None, **arrays: np.ndarray) -> NpzSource:
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    return NpzSource(tmp_path / "data.npz", sha256, tmp_path / "cache", name="data.npz")


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
def test_read__any_shape__gives_a_png_of_exactly_the_pixels(tmp_path, shape):
    train, test = images(3, *shape), images(2, *shape)
    opened = source(
        tmp_path, train_images=train, train_labels=labels(0, 1, 0), test_images=test, test_labels=labels(1, 1)
    )
    items = opened.list_items()
    assert [(i.key, i.label, i.given_split) for i in items[::3]] == [
        ("train/000000.png", "0", "train"),
        ("test/000000.png", "1", "test"),
    ]
    for item, pixels in zip(items, [*train, *test], strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(opened.read(item, 10_000)))), pixels.squeeze())


def test_list_items__label_names__name_the_classes(tmp_path):
    opened = source(
        tmp_path, train_images=images(2), train_labels=labels(1, 0), label_names=np.array(["normal", "ill"])
    )
    assert [item.label for item in opened.list_items()] == ["ill", "normal"]


def test_init__digest__must_match(tmp_path):
    source(tmp_path, train_images=images(2), train_labels=labels(1, 0))
    digest = hashlib.sha256((tmp_path / "data.npz").read_bytes()).hexdigest()
    NpzSource(tmp_path / "data.npz", digest, tmp_path, name="data.npz")
    with pytest.raises(Refusal, match=digest):
        NpzSource(tmp_path / "data.npz", "0" * 64, tmp_path, name="data.npz")


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": images(2)}, "holds x"),
        ({"train_images": images(2)}, "without train_labels"),
        ({"train_images": images(2), "train_labels": labels(0)}, "2 train_images and 1 train_labels"),
        ({"train_images": images(2).astype(np.float32), "train_labels": labels(0, 1)}, "float32"),
        ({"train_images": images(2, 8, 9, 4), "train_labels": labels(0, 1)}, r"\(2, 8, 9, 4\)"),
        ({"train_images": np.asfortranarray(images(2)), "train_labels": labels(0, 1)}, "Fortran"),
        ({"train_images": images(2), "train_labels": np.ones((2, 3), np.uint8)}, "one class per image"),
        ({"train_images": images(1), "train_labels": labels(4), "label_names": np.array(["a"])}, "from 4 to 4"),
        ({"train_images": np.array([{}], dtype=object), "train_labels": labels(0)}, "object"),
        ({"train_images": images(1), "train_labels": np.array([{}], dtype=object)}, "holds Python objects"),
    ],
)
def test_list_items__another_arrangement__is_refused_with_what_was_found(tmp_path, arrays, complaint):
    with pytest.raises(Refusal, match=complaint):
        source(tmp_path, **arrays).list_items()


@pytest.mark.parametrize("content", [b"", b"not a zip at all", b"PK\x03\x04" + bytes(50)])
def test_list_items__no_archive__is_refused_without_numpys_words(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(Refusal, match=r"is no \.npz archive|was cut off") as caught:
        NpzSource(tmp_path / "data.npz", None, tmp_path, name="data.npz").list_items()
    assert "pickle" not in str(caught.value)
    assert "numpy.savez" in caught.value.way_out


def test_list_items__archive_cut_in_its_middle__is_refused_as_damaged(tmp_path):
    source(tmp_path, train_images=images(8), train_labels=labels(*[0, 1] * 4))
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[:60] + bytes(100) + whole[160:])
    with pytest.raises(Refusal, match=r"is damaged|cannot be read"):
        NpzSource(tmp_path / "data.npz", None, tmp_path, name="data.npz").list_items()


def test_ingest__npz__keeps_its_splits_and_leaves_no_copy_behind(tmp_path, ingest_to):
    source(
        tmp_path,
        train_images=images(8),
        train_labels=labels(0, 1, 0, 1, 0, 1, 0, 1),
        test_images=images(2),
        test_labels=labels(0, 1),
    )
    manifest = ingest_to("data.npz").manifest
    assert manifest.labels == {"0": 5, "1": 5}
    assert not list((tmp_path / "home").rglob("*.npy"))
