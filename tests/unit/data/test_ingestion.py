import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.core.contract import InputContract
from pipelines.core.image_decoding import read_model_input
from pipelines.data.shards import SCHEMA, iterate_images, read_manifest, read_metadata
from pipelines.data.sources.base import SourceItem
from pipelines.data.sources.folder import FolderSource
from pipelines.data.sources.stores import LocalStore
from pipelines.errors import Refusal, TryLater


def quarantine(tmp_path: Path, run: str = "run") -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in pq.read_table(tmp_path / run / "quarantine.parquet").to_pylist()}


def test_ingest__folder__writes_what_the_contract_between_stages_names(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    manifest = ingest_to(folder).manifest
    raw = tmp_path / "run" / "raw"
    tree = json.loads((raw / "manifest.json").read_text())
    assert set(tree) == {
        "schema", "dataset", "source", "as_of", "labels", "rows", "quarantined", "shards", "data_sha256",
    }  # fmt: skip
    assert (tree["schema"], tree["dataset"], tree["labels"]) == (1, "pets", {"cat": 12, "dog": 12})
    assert read_manifest(raw) == manifest
    for shard in manifest.shards:
        assert shard.name == shard.sha256[:16] + ".parquet"
        assert pq.read_schema(raw / shard.name).equals(SCHEMA)
    metadata = read_metadata(raw)
    assert metadata["key"].to_pylist() == sorted(metadata["key"].to_pylist())
    images = [image for shard in manifest.shards for image in iterate_images(raw / shard.name)]
    assert images == [(folder / key).read_bytes() for key in metadata["key"].to_pylist()]


def test_ingest__same_input_elsewhere__gives_the_same_bytes(make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder()
    ingest_to(folder, "first")
    ingest_to(folder, "second", cache="other-cache", threads=1)
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


def test_ingest__nothing_changed__reads_nothing_and_gives_the_same_bytes(make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder()
    first = ingest_to(folder, "first", shard_images=16)
    second = ingest_to(folder, "second", shard_images=16)
    assert (first.images_read, second.images_read) == (24, 0)
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


def test_ingest__images_added_and_changed__reads_those_only(make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder(classes={"cat": 60, "dog": 60})
    ingest_to(folder, "first", shard_images=16)
    make_folder(classes={"cat": 62, "dog": 60})
    (folder / "dog" / "007.png").write_bytes((folder / "dog" / "008.png").read_bytes())
    for file in sorted(folder.rglob("*.png")):
        if file.name not in ("060.png", "061.png", "007.png"):
            os.utime(file, ns=(1, 1))
    ingest_to(folder, "aged", shard_images=16)
    (folder / "cat" / "0000.png").write_bytes((folder / "cat" / "059.png").read_bytes())
    grown = ingest_to(folder, "grown", shard_images=16)
    assert grown.images_read == 1
    ingest_to(folder, "fresh", cache="empty-cache", shard_images=16)
    assert file_bytes(tmp_path / "grown") == file_bytes(tmp_path / "fresh")


def test_ingest__one_image_added__most_shards_keep_their_names(make_folder, ingest_to):
    folder = make_folder(classes={"cat": 150, "dog": 150})
    before = {shard.name for shard in ingest_to(folder, "before", shard_images=16).manifest.shards}
    make_folder(classes={"cat": 151})
    after = {shard.name for shard in ingest_to(folder, "after", shard_images=16).manifest.shards}
    assert len(before) > 8
    assert len(after - before) <= 3


def test_ingest__label_changed_in_place__is_taken_from_the_listing(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    listed = FolderSource(LocalStore(folder), "images")
    ingest_to(folder, "first", opened=listed)

    class Relabelled(FolderSource):
        def list_items(self) -> list[SourceItem]:
            items = super().list_items()
            return [SourceItem(i.key, i.label.upper(), i.location, i.n_bytes, i.fingerprint) for i in items]

    second = ingest_to(folder, "second", opened=Relabelled(LocalStore(folder), "images"))
    assert second.images_read == 0
    assert second.manifest.labels == {"CAT": 12, "DOG": 12}
    assert set(read_metadata(tmp_path / "second" / "raw")["label"].to_pylist()) == {"CAT", "DOG"}


@pytest.mark.parametrize("damage", ["shard", "index", "shaped", "missing"])
def test_ingest__cache_damaged__is_made_anew(damage, make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder()
    ingest_to(folder, "first")
    shards = list((tmp_path / "cache" / "shards").iterdir())
    if damage == "missing":
        for shard in shards:
            shard.unlink()
    else:
        place = {"shard": "shards/*", "index": "index/*/*", "shaped": "shaped/*/*"}[damage]
        files = list((tmp_path / "cache").glob(place))
        assert files
        for file in files:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.unlink()  # a shard is the same file as the first run's
            file.write_bytes(content)
    ingest_to(folder, "second")
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


def test_ingest__broken_files__go_to_quarantine_with_reasons(make_folder, ingest_to, tmp_path):
    folder = make_folder(classes={"cat": 30, "dog": 30})
    whole = (folder / "cat" / "000.png").read_bytes()
    (folder / "cat" / "a-empty.png").write_bytes(b"")
    (folder / "cat" / "b-truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "c-notes.txt").write_text("hello")
    (folder / "dog" / "d-large.png").write_bytes(whole + bytes(5000))
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "dog" / "e-corrupt.png").write_bytes(damaged)
    (folder / "dog" / "f-gone.png").symlink_to(folder / "nowhere.png")
    (folder / "stray.png").write_bytes(whole)
    (folder / "README.md").write_text("about these images")
    (folder / "dog" / "Thumbs.db").write_bytes(b"x")
    (folder / "dog" / ".hidden.png").write_bytes(b"x")
    result = ingest_to(folder, max_quarantined_share=0.2, max_image_bytes=5000)
    rows = quarantine(tmp_path)
    assert {key: row["reason"] for key, row in rows.items()} == {
        "cat/a-empty.png": "empty",
        "cat/b-truncated.png": "truncated",
        "cat/c-notes.txt": "not_an_image",
        "dog/d-large.png": "too_many_bytes",
        "dog/e-corrupt.png": "corrupt",
        "dog/f-gone.png": "unreadable",
        "stray.png": "unreadable",
    }
    assert all(row["detail"] for row in rows.values())
    assert rows["dog/d-large.png"]["sha256"] == ""
    assert len(rows["dog/e-corrupt.png"]["sha256"]) == 64
    assert (result.manifest.rows, result.manifest.quarantined) == (60, 7)


def test_ingest__broken_files_unchanged__are_not_read_again(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    (folder / "cat" / "notes.txt").write_text("hello")
    reads = []

    class Counting(FolderSource):
        def read(self, item: SourceItem, max_bytes: int) -> bytes:
            reads.append(item.key)
            return super().read(item, max_bytes)

    for run in ("first", "second"):
        ingest_to(folder, run, opened=Counting(LocalStore(folder), "images"), max_quarantined_share=0.5)
    assert len(reads) == 25
    assert quarantine(tmp_path, "first") == quarantine(tmp_path, "second")


def test_ingest__too_many_pixels__goes_to_quarantine(make_folder, ingest_to, tmp_path):
    ingest_to(make_folder(), max_image_pixels=480, max_quarantined_share=0.5)
    with pytest.raises(Refusal, match="24 of 24"):
        ingest_to(tmp_path / "images", "second", max_image_pixels=479, max_quarantined_share=0.5)
    assert {row["reason"] for row in quarantine(tmp_path, "second").values()} == {"too_many_pixels"}


def test_ingest__too_many_broken__is_refused_with_count_share_limit_and_reasons(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    for number in range(3):
        (folder / "cat" / f"note{number}.txt").write_text("hello")
    with pytest.raises(Refusal) as caught:
        ingest_to(folder, max_quarantined_share=0.1)
    message = str(caught.value)
    for part in (
        "3 of 27",
        "11.1%",
        "10.0%",
        "3 not_an_image",
        "cat/note0.txt",
        "data_ingestion.max_quarantined_share",
        f"from {tmp_path / 'run' / 'quarantine.parquet'}",
    ):
        assert part in message
    assert len(quarantine(tmp_path)) == 3


def test_ingest__whole_class_broken__is_refused_by_name(make_folder, ingest_to):
    folder = make_folder(classes={"cat": 30, "dog": 30})
    (folder / "eel").mkdir()
    (folder / "eel" / "note.txt").write_text("hello")
    with pytest.raises(Refusal, match=r"eel \(1 files\)"):
        ingest_to(folder)


def test_ingest__one_class__is_refused(make_folder, ingest_to):
    with pytest.raises(Refusal, match="one class only: cat"):
        ingest_to(make_folder(classes={"cat": 3}))


def test_ingest__same_bytes_under_two_labels__keeps_both(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    (folder / "dog" / "twin.png").write_bytes((folder / "cat" / "000.png").read_bytes())
    ingest_to(folder)
    table = read_metadata(tmp_path / "run" / "raw")
    labels = dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert (labels["cat/000.png"], labels["dog/twin.png"]) == ("cat", "dog")


def test_ingest__group_pattern__names_what_must_stay_together(make_folder, ingest_to, tmp_path):
    ingest_to(make_folder(), group_pattern=r"/(\d\d)\d\.png$")
    table = read_metadata(tmp_path / "run" / "raw")
    groups = dict(zip(table["key"].to_pylist(), table["group"].to_pylist(), strict=True))
    assert groups["cat/003.png"] == groups["dog/009.png"] == "00"
    assert groups["cat/011.png"] == "01"


def test_ingest__as_of__takes_what_had_arrived_and_the_weeks_share_shards(ingest_to):
    weeks = [ingest_to("digits", f"week{day}", as_of=date(2026, 11, day)) for day in (1, 8)]
    assert [week.manifest.rows for week in weeks] == [897, 1197]
    assert [week.images_read for week in weeks] == [897, 300]
    assert weeks[0].manifest.as_of == "2026-11-01"
    assert weeks[0].manifest.shards[0] == weeks[1].manifest.shards[0]


def test_ingest__as_of_before_everything__is_refused_with_the_first_date(ingest_to):
    with pytest.raises(Refusal, match=r"2026-10-31[\s\S]*2026-11-01"):
        ingest_to("digits", as_of=date(2026, 10, 31))


def test_ingest__contract_changes__outputs_do_not(make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder()
    ingest_to(folder, "small")
    wide = InputContract(size_px=700, channels=3, resize="pad")
    ingest_to(folder, "large", cache="other-cache", contract=wide)
    assert file_bytes(tmp_path / "small") == file_bytes(tmp_path / "large")


def test_ingest__source_goes_away__what_was_read_is_not_read_again(make_folder, ingest_to):
    folder = make_folder(classes={"cat": 60, "dog": 60})

    class Failing(FolderSource):
        def read(self, item: SourceItem, max_bytes: int) -> bytes:
            if item.key == "dog/050.png":
                raise TryLater("the source does not answer")
            return super().read(item, max_bytes)

    with pytest.raises(TryLater):
        ingest_to(folder, opened=Failing(LocalStore(folder), "images"), shard_images=16)
    assert ingest_to(folder, shard_images=16).images_read < 60


def test_ingest__killed_at_any_moment__gives_the_same_bytes_when_run_again(
    make_folder, ingest_to, tmp_path, file_bytes
):
    folder = make_folder(classes={"cat": 120, "dog": 120})
    script = (
        "import os, signal, sys, threading\n"
        "from pathlib import Path\n"
        "from pipelines.core.contract import InputContract\n"
        "from pipelines.data import ingestion\n"
        "from pipelines.data.sources.folder import FolderSource\n"
        "from pipelines.data.sources.stores import LocalStore\n"
        "from pipelines.params import DataIngestionParams\n"
        "root, deadly = Path(sys.argv[1]), int(sys.argv[2])\n"
        "class Deadly(FolderSource):\n"
        "    reads = 0\n"
        "    def read(self, item, max_bytes):\n"
        "        Deadly.reads += 1\n"
        "        if Deadly.reads == deadly:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().read(item, max_bytes)\n"
        "(root / 'run').mkdir(exist_ok=True)\n"
        "ingestion.ingest(Deadly(LocalStore(root / 'images'), 'images'),\n"
        "    DataIngestionParams(source=str(root / 'images'), shard_images=16),\n"
        "    InputContract(size_px=16, channels=1, resize='squash'), dataset='pets', raw=root / 'run' / 'raw',\n"
        "    quarantine_file=root / 'run' / 'quarantine.parquet', cache_dir=root / 'cache', threads=2)\n"
    )
    for deadly in (1, 90, 60):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(deadly)], check=False)
        assert done.returncode == -signal.SIGKILL
    resumed = ingest_to(folder, "run", shard_images=16)
    assert resumed.images_read < 150
    ingest_to(folder, "fresh", cache="empty-cache", shard_images=16)
    assert file_bytes(tmp_path / "run") == file_bytes(tmp_path / "fresh")


def test_ingest__two_at_once_over_one_cache__both_give_the_same_bytes(make_folder, ingest_to, tmp_path, file_bytes):
    folder = make_folder(classes={"cat": 80, "dog": 80})
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(ingest_to, folder, f"run{n}", shard_images=16) for n in range(3)]
        assert {run.result().manifest.data_sha256 for run in runs}
    contents = [file_bytes(tmp_path / f"run{n}") for n in range(3)]
    assert contents[0] == contents[1] == contents[2]


def test_ingest__sound_image__records_what_the_file_is(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    ingest_to(folder)
    row = read_metadata(tmp_path / "run" / "raw").to_pylist()[0]
    assert (row["key"], row["label"], row["given_split"], row["arrived"]) == ("cat/000.png", "cat", "", None)
    assert (row["format"], row["mode"], row["width_px"], row["height_px"]) == ("PNG", "L", 24, 20)
    assert row["n_bytes"] == (folder / "cat" / "000.png").stat().st_size
    contract = InputContract(size_px=24, channels=1, resize="squash")
    pixels = read_model_input((folder / row["key"]).read_bytes(), contract, max_pixels=10**6, max_bytes=10**6)
    assert row["mean"] == pytest.approx(pixels.mean(), abs=3)
