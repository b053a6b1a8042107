import shutil

import numpy as np
import pytest

from pipelines.core.contract import InputContract
from pipelines.core.image_decoding import read_model_input
from pipelines.data.shaped_images import ShapedImages
from pipelines.data.shards import ShardEntry, iterate_images

LIMITS = {"max_pixels": 10**6, "max_bytes": 10**6}
CONTRACTS = [
    InputContract(size_px=16, channels=1, resize="squash"),
    InputContract(size_px=30, channels=3, resize="pad"),
    InputContract(size_px=12, channels=3, resize="crop"),
]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.resize)
def test_shaped_images__kept_while_ingesting_or_made_from_shards__are_the_same(
    contract, make_folder, ingest_to, tmp_path
):
    manifest = ingest_to(make_folder(suffix=".jpg"), contract=contract).manifest
    raw = tmp_path / "run" / "raw"
    for shard in manifest.shards:
        kept = ShapedImages(tmp_path / "cache", contract).open(shard)
        assert kept is not None
        made = ShapedImages(tmp_path / "nothing-here", contract).open_or_make(shard, raw, threads=2, **LIMITS)
        served = [read_model_input(image, contract, **LIMITS) for image in iterate_images(raw / shard.name)]
        assert np.array_equal(kept, made)
        assert np.array_equal(kept, np.stack(served))


def test_shaped_images__shard_written_anew_around_known_images__are_complete(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    ingest_to(folder)
    make_folder(classes={"cat": 13, "dog": 12})
    manifest = ingest_to(folder).manifest
    shaped = ShapedImages(tmp_path / "cache", CONTRACTS[0])
    fresh = ShapedImages(tmp_path / "nothing-here", CONTRACTS[0])
    for shard in manifest.shards:
        kept = shaped.open(shard)
        assert kept is not None
        assert np.array_equal(kept, fresh.open_or_make(shard, tmp_path / "run" / "raw", threads=2, **LIMITS))


@pytest.fixture
def kept(tmp_path):
    """The shaped images of two shards of two images each, and the file of each."""
    shaped, pixels = ShapedImages(tmp_path, CONTRACTS[0]), np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    shards = [ShardEntry(name=f"{digit * 16}.parquet", rows=2, sha256=digit * 64) for digit in "ab"]
    for number, shard in enumerate(shards):
        with shaped.new_file() as file:
            file.add(pixels)
            file.add(pixels + number)
            file.keep(shard)
    return shards, sorted(tmp_path.glob("shaped/*/*"))


def test_open__kept__gives_back_the_pixels(kept, tmp_path):
    images = ShapedImages(tmp_path, CONTRACTS[0]).open(kept[0][1])
    assert images is not None
    assert images[1, 0, :3, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", [lambda b: b[:10] + b"x" + b[11:], lambda b: b[:-1], lambda _: b""])
def test_open__damaged__is_not_trusted(kept, tmp_path, damage):
    shards, files = kept
    files[0].write_bytes(damage(files[0].read_bytes()))
    shaped = ShapedImages(tmp_path, CONTRACTS[0])
    assert shaped.open(shards[0]) is None
    assert shaped.open(shards[1]) is not None


def test_open__file_of_another_shard__is_not_trusted(kept, tmp_path):
    shards, files = kept
    shutil.copyfile(files[0], files[1])
    assert ShapedImages(tmp_path, CONTRACTS[0]).open(shards[1]) is None


def test_new_file__an_image_is_missing__is_not_kept(tmp_path):
    shaped, shard = ShapedImages(tmp_path, CONTRACTS[0]), ShardEntry(name="a.parquet", rows=2, sha256="a" * 64)
    with shaped.new_file() as file:
        file.add(np.zeros((16, 16, 1), np.uint8))
        file.add(None)
        file.keep(shard)
    assert shaped.open(shard) is None
    assert not list((tmp_path / "temporary").iterdir())
