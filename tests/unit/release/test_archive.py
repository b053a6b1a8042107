"""The archive: equal files give equal bytes, and everybody's xz and tar can read them."""

import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.release.archive import pack_folder

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def fill(folder: Path, *, mode: int, time: float, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
        path.chmod(mode)
        os.utime(path, (time, time))
    (folder / "empty").mkdir()
    return folder


def test_pack_folder__same_files_at_other_times_and_places__gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["b/two.txt", "a.txt", "b/one.txt", "b-c/three.txt", "é.txt", "d/" * 40 + "deep.txt"]
    first = fill(tmp_path / "first", mode=0o600, time=1.0, names=names)
    second = fill(tmp_path / "elsewhere" / "second", mode=0o755, time=2e9, names=names[::-1])
    pack_folder(first, tmp_path / "first.tar.xz", modified=NOON)
    pack_folder(second, tmp_path / "second.tar.xz", modified=NOON)
    assert (tmp_path / "first.tar.xz").read_bytes() == (tmp_path / "second.tar.xz").read_bytes()


def test_pack_folder__known_files__gives_the_bytes_it_always_gave(tmp_path: Path) -> None:
    """A release that was packaged years ago is packaged again under the same name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a\n")
    (folder / "large.bin").write_bytes(bytes(range(256)) * 1024)
    pack_folder(folder, tmp_path / "packed", modified=NOON)
    digest = hashlib.sha256((tmp_path / "packed").read_bytes()).hexdigest()
    assert digest == "5e53fdd3c5da07a102a86341032970b9170974559bf64e88c780ab3c8e35e7cc"


def test_pack_folder__entries__hold_no_trace_of_the_machine(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", mode=0o640, time=1.0, names=["a.txt", "b/c.txt"])
    pack_folder(folder, tmp_path / "packed", modified=NOON)
    with tarfile.open(tmp_path / "packed", "r:xz") as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == ["a.txt", "b", "b/c.txt", "empty"]
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, "", "")}
    assert {entry.mtime for entry in entries} == {NOON.timestamp()}
    assert {(entry.isdir(), entry.mode) for entry in entries} == {(True, 0o755), (False, 0o644)}


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_pack_folder__sizes_around_a_chunk__unpack_to_what_they_were(tmp_path: Path, size: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    content = os.urandom(size)
    (folder / "file").write_bytes(content)
    pack_folder(folder, tmp_path / "packed.tar.xz", modified=NOON)
    with tarfile.open(tmp_path / "packed.tar.xz", "r:xz") as archive:
        member = archive.extractfile("file")
        assert member is not None
        assert member.read() == content
    if xz := shutil.which("xz"):  # the standard library's reader is the same code; this is its own program
        subprocess.run([xz, "--test", tmp_path / "packed.tar.xz"], check=True)


def test_pack_folder__a_bit_flipped_in_the_data__is_seen_by_the_check(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", mode=0o640, time=1.0, names=["a.txt"])
    pack_folder(folder, tmp_path / "packed", modified=NOON)
    packed = bytearray((tmp_path / "packed").read_bytes())
    packed[len(packed) // 2] ^= 1
    with pytest.raises(lzma.LZMAError):
        lzma.decompress(bytes(packed))


def test_pack_folder__a_link__is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        pack_folder(tmp_path / "folder", tmp_path / "packed", modified=NOON)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 200_000), max_size=4))
def test_pack_folder__any_sizes__are_one_valid_stream(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    root = tmp_path_factory.mktemp("sizes")
    (root / "folder").mkdir()
    for number, size in enumerate(sizes):
        (root / "folder" / str(number)).write_bytes(b"x" * size)
    pack_folder(root / "folder", root / "packed", modified=NOON)
    with tarfile.open(root / "packed", "r:xz") as archive:
        assert [entry.size for entry in archive.getmembers()] == sizes
