from pathlib import Path

import pytest

from pipelines.data.sources.folder import FolderSource
from pipelines.data.sources.stores import LocalStore
from pipelines.errors import Refusal


def touch(root: Path, *paths: str) -> FolderSource:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return FolderSource(LocalStore(root), "scans")


def listed(source: FolderSource) -> dict[str, tuple[str, str]]:
    return {item.key: (item.given_split, item.label) for item in source.list_items() if not item.fault}


def test_list_items__one_folder_per_class__labels_by_the_first(tmp_path):
    source = touch(tmp_path, "normal/a.png", "ill/deep/er/b.JPG")
    assert listed(source) == {"normal/a.png": ("", "normal"), "ill/deep/er/b.JPG": ("", "ill")}


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_list_items__split_folders__gives_splits_and_labels(tmp_path, val):
    source = touch(tmp_path, "train/normal/a.png", f"{val}/normal/b.png", "test/ill/p1/c.png")
    assert listed(source) == {
        "train/normal/a.png": ("train", "normal"),
        f"{val}/normal/b.png": ("val", "normal"),
        "test/ill/p1/c.png": ("test", "ill"),
    }


def test_list_items__class_called_train__is_a_class_beside_others(tmp_path):
    source = touch(tmp_path, "train/a.png", "car/b.png", "bus/c.png")
    assert {label for _, label in listed(source).values()} == {"train", "car", "bus"}


def test_list_items__other_folder_beside_splits__is_refused(tmp_path):
    source = touch(tmp_path, "train/n/a.png", "test/n/b.png", "holdout/n/c.png")
    with pytest.raises(Refusal, match="test, train beside holdout"):
        source.list_items()


def test_list_items__empty_class_folders__are_named(tmp_path):
    source = touch(tmp_path, "normal/a.png")
    (tmp_path / "ill").mkdir()
    (tmp_path / "odd" / "deeper").mkdir(parents=True)
    with pytest.raises(Refusal, match="without images: ill, odd"):
        source.list_items()


def test_list_items__empty_class_in_a_split__is_named(tmp_path):
    source = touch(tmp_path, "train/normal/a.png", "train/ill/b.png", "test/normal/c.png")
    (tmp_path / "test" / "ill").mkdir()
    with pytest.raises(Refusal, match="without images: test/ill"):
        source.list_items()


@pytest.mark.parametrize(
    ("files", "way_out"),
    [((), "put the images there"), (("a.png", "b.png"), "a sub-folder per class"), (("readme.txt",), "put the images")],
)
def test_list_items__no_class_folders__is_refused_with_a_way_out(tmp_path, files, way_out):
    with pytest.raises(Refusal, match="no sub-folders with images") as caught:
        touch(tmp_path, *files).list_items()
    assert way_out in caught.value.way_out
    assert ("2 pictures" in str(caught.value)) == ("a.png" in files)


def test_list_items__folder_unreadable_link_loop__ends(tmp_path):
    source = touch(tmp_path, "normal/a.png", "ill/b.png")
    (tmp_path / "normal" / "again").symlink_to(tmp_path / "normal")
    assert set(listed(source)) == {"normal/a.png", "ill/b.png"}


def test_list_items__class_folder_is_a_link__is_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    touch(elsewhere, "b.png")
    source = touch(tmp_path / "scans", "normal/a.png")
    (tmp_path / "scans" / "ill").symlink_to(elsewhere)
    assert set(listed(source)) == {"normal/a.png", "ill/b.png"}


def test_list_items__name_is_not_utf8__has_a_fault(tmp_path):
    source = touch(tmp_path, "normal/a.png", "ill/b.png")
    (tmp_path / "ill" / b"\xff.png".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    faults = [item.fault for item in source.list_items() if item.fault]
    assert faults == ["its name is not UTF-8"]


def test_list_items__file_changed__has_another_fingerprint(tmp_path):
    source = touch(tmp_path, "normal/a.png", "ill/b.png")
    before = {item.key: item.fingerprint for item in source.list_items()}
    (tmp_path / "ill" / "b.png").write_bytes(b"changed")
    after = {item.key: item.fingerprint for item in source.list_items()}
    assert [key for key in before if before[key] != after[key]] == ["ill/b.png"]


def test_read__larger_than_asked__stops_after_one_byte_more(tmp_path):
    source = touch(tmp_path, "normal/a.png")
    (tmp_path / "normal" / "a.png").write_bytes(bytes(1000))
    item = source.list_items()[0]
    assert len(source.read(item, 100)) == 101
    assert len(source.read(item, 5000)) == 1000
