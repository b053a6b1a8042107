import os
import time

from pipelines.data.ingest_cache import link_or_copy, remove_unused, temporary_file

DAY_S = 24 * 3600


def age(folder, days: float) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (time.time() - days * DAY_S,) * 2)


def test_remove_unused__not_used_for_months__goes_with_its_shards(make_folder, ingest_to, tmp_path):
    old, new = make_folder("old-images"), make_folder("new-images", {"eel": 12, "fox": 12})
    ingest_to(old)
    age(tmp_path / "cache", 100)
    for _ in range(2):  # what is old goes at the beginning
        ingest_to(new)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1
    assert len(list((tmp_path / "cache").glob("shaped/*/*"))) == 1
    assert ingest_to(new).images_read == 0
    assert ingest_to(old).images_read == 24


def test_remove_unused__used_now_and_then__stays(make_folder, ingest_to, tmp_path):
    folder = make_folder()
    ingest_to(folder)
    age(tmp_path / "cache", 80)
    ingest_to(folder)
    index = list((tmp_path / "cache" / "index").glob("*/*.parquet"))
    assert max(file.stat().st_mtime for file in index) > time.time() - DAY_S
    age(tmp_path / "cache", 80)
    assert ingest_to(folder).images_read == 0


def test_remove_unused__left_by_a_killed_process__goes_after_a_day(tmp_path):
    (tmp_path / "temporary").mkdir()
    for name, days in (("new", 0), ("old", 2)):
        file = tmp_path / "temporary" / name
        file.write_bytes(b"x")
        os.utime(file, (time.time() - days * DAY_S,) * 2)
    remove_unused(tmp_path)
    assert [file.name for file in (tmp_path / "temporary").iterdir()] == ["new"]


def test_temporary_file__not_moved_away__is_removed(tmp_path):
    with temporary_file(tmp_path) as first, temporary_file(tmp_path) as second:
        assert first != second
        first.write_bytes(b"x")
    assert not first.exists()


def test_link_or_copy__something_is_there__is_replaced_not_overwritten(tmp_path):
    source, target, other = (tmp_path / name for name in ("source", "target", "other"))
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    os.link(target, other)
    link_or_copy(source, target)
    assert (target.read_bytes(), other.read_bytes()) == (b"new", b"old")
