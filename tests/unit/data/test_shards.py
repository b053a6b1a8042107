import datetime
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.shards import (
    SCHEMA,
    Manifest,
    ShardCutter,
    ShardImages,
    ShardWriter,
    is_intact,
    iterate_images,
    read_images,
    read_metadata,
)

ZERO = datetime.date(2026, 11, 1)


def record(key: str, image: bytes) -> dict[str, object]:
    return {
        "key": key,
        "label": "cat",
        "given_split": "",
        "group": "",
        "arrived": ZERO,
        "sha256": hashlib.sha256(image).hexdigest(),
        "format": "PNG",
        "mode": "L",
        "width_px": 3,
        "height_px": 4,
        "n_bytes": len(image),
        "mean": 1.5,
        "std": 0.5,
        "p01": 0.0,
        "p99": 255.0,
        "phash": -7,
    }


def write(folder, name, images):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder / name)
    for number, image in enumerate(images):
        writer.add(record(f"{number:05d}", image), image)
    return writer.close()


def cut(contents: list[bytes], shard_images: int = 16, target_bytes: int = 10**9) -> list[list[bytes]]:
    cutter, shards, present = ShardCutter(shard_images, target_bytes), [], []
    for content in contents:
        if cutter.overflows(len(content)):
            shards.append(present)
            present = []
            cutter.start_shard()
        present.append(content)
        if cutter.add(hashlib.sha256(content).hexdigest(), len(content)):
            shards.append(present)
            present = []
            cutter.start_shard()
    return [*shards, present] if present else shards


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=200), st.integers(16, 40), st.integers(50, 400))
def test_shard_cutter__any_images__keeps_all_within_its_bounds(contents, shard_images, target_bytes):
    shards = cut(contents, shard_images, target_bytes)
    assert [content for shard in shards for content in shard] == contents
    for shard in shards:
        assert 0 < len(shard) <= 2 * shard_images
        assert sum(map(len, shard)) <= max(2 * target_bytes, len(shard[0]))


def test_shard_cutter__many_images__shards_are_of_the_average_asked_for():
    shards = cut([str(number).encode() for number in range(20_000)], shard_images=100)
    assert 60 <= 20_000 / len(shards) <= 140


def test_shard_cutter__image_inserted__changes_only_the_shards_beside_it():
    contents = [str(number).encode() for number in range(3000)]
    before = {tuple(shard) for shard in cut(contents)}
    after = {tuple(shard) for shard in cut([*contents[:1500], b"new", *contents[1500:]])}
    assert len(after - before) <= 4


def test_shard_writer__same_rows__gives_the_same_bytes(tmp_path):
    images = [bytes([number]) * 3000 for number in range(200)]
    first, second = (write(tmp_path / folder, "shard", images) for folder in ("a", "b"))
    assert first == second
    assert (tmp_path / "a" / "shard").read_bytes() == (tmp_path / "b" / "shard").read_bytes()
    assert first.name == f"{first.sha256[:16]}.parquet"


def test_shard_writer__one_thing_changed__has_another_name(tmp_path):
    images = [bytes([number]) * 300 for number in range(200)]
    other_image = write(tmp_path, "b", [*images[:-1], b"other"])
    assert len({write(tmp_path, "a", images).name, other_image.name, write(tmp_path, "c", images[:-1]).name}) == 3


def test_is_intact__any_bit_that_is_read_turned__is_seen(tmp_path):
    images = [np.random.default_rng(number).bytes(500) for number in range(20)]
    entry, file = write(tmp_path, "shard", images), tmp_path / "shard"
    assert is_intact(file, entry)
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    unseen = []
    for place in rng.choice(len(whole), 150, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        if is_intact(file, entry):
            unseen.append(place)
            assert list(iterate_images(file)) == images
    assert len(unseen) < 5  # bits of page headers that no reader looks at
    for broken in (b"", whole[:-1], whole[: len(whole) // 2], b"PAR1"):
        file.write_bytes(broken)
        assert not is_intact(file, entry)
    file.unlink()
    assert not is_intact(file, entry)


@pytest.mark.parametrize("sizes", [[10] * 300, [5_000_000] * 5, [9_000_000, 1, 9_000_000], [1]])
def test_shard_writer__small_and_large_images__reads_back_in_order(tmp_path, sizes):
    images = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    entry = write(tmp_path, "shard", images)
    assert entry.rows == len(images)
    assert list(iterate_images(tmp_path / "shard")) == images
    by_row = ShardImages(tmp_path / "shard")
    for row in (len(images) - 1, 0, len(images) // 2):
        assert by_row[row] == images[row]


def test_read_images__some_keys__finds_those_that_are_there(tmp_path):
    images = [bytes([number]) * 40 for number in range(250)]
    entry = write(tmp_path, "shard", images)
    (tmp_path / "shard").rename(tmp_path / entry.name)
    manifest = Manifest(
        dataset="pets",
        source="pets",
        as_of=None,
        labels={"cat": 250},
        rows=250,
        quarantined=0,
        shards=[entry],
        data_sha256="0" * 64,
    )
    manifest.write(tmp_path)
    assert read_images(tmp_path, ["00003", "00200", "nothing"]) == {"00003": images[3], "00200": images[200]}
    table = read_metadata(tmp_path)
    assert table.num_rows == 250
    assert table.schema.names == [name for name in SCHEMA.names if name != "image"]
    assert table["arrived"][0].as_py() == ZERO
