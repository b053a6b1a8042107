"""Unpacking touches nothing but its own new folder, whatever the archive says; folders of ended servers go."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines.errors import Refusal
from serving.unpacking import unpack_release

GOOD = {
    "bento.yaml": b"service: x",
    "src/serving/service.py": b"",
    "src/release/model.onnx": b"model",
    "README.md": b"",
}


def pack(file: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w:xz") as archive:
        for name, content in GOOD.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in extra:
            archive.addfile(entry, io.BytesIO(b""))
    return file


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".served"}


def test_unpack_release__as_packaged__holds_what_a_server_needs(tmp_path: Path) -> None:
    folder = unpack_release(pack(tmp_path / "release"), tmp_path / "cache", name="abc")
    assert files_in(folder) == {"bento.yaml", "src/serving/service.py", "src/release/model.onnx"}
    assert (folder / "src/release/model.onnx").read_bytes() == b"model"
    assert folder.name.startswith("abc-")


@pytest.mark.parametrize(
    "bad",
    [
        entry("/etc/perch"),
        entry("src/../../escape"),
        entry("..\\escape"),
        entry("src/link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("src/hard", tarfile.LNKTYPE, "../../secret"),
        entry("src/device", tarfile.CHRTYPE),
        entry("src/pipe", tarfile.FIFOTYPE),
        entry("elsewhere/link", tarfile.SYMTYPE, "/etc/passwd"),
    ],
    ids=lambda bad: f"{bad.type.decode()} {bad.name}",
)
def test_unpack_release__entry_that_leads_out__is_refused(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    with pytest.raises(Refusal, match="is no plain file or folder inside it"):
        unpack_release(pack(tmp_path / "release", bad), tmp_path / "cache", name="abc")
    assert not (tmp_path / "escape").exists()


def test_unpack_release__same_entry_twice__is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        unpack_release(pack(tmp_path / "release", entry("bento.yaml")), tmp_path / "cache", name="abc")


def test_unpack_release__twice__gives_two_folders(tmp_path: Path) -> None:
    """Two servers of one release, as stable and canary before the first rollout."""
    release = pack(tmp_path / "release")
    first, second = (unpack_release(release, tmp_path / "cache", name="abc") for _ in range(2))
    assert first != second
    assert files_in(first) == files_in(second)


def test_unpack_release__server_that_has_ended__leaves_no_folder(tmp_path: Path) -> None:
    """The lock outlives `exec`, which is how the server starts, and ends with the process however it ends."""
    release = pack(tmp_path / "release")
    code = f"""
import os, sys
from pathlib import Path
from serving.unpacking import unpack_release
folder = unpack_release(Path({str(release)!r}), Path({str(tmp_path / "cache")!r}), name="abc")
print(folder, flush=True)
os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.read()"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ,
    ) as server:
        assert server.stdout is not None
        served = Path(server.stdout.readline().strip())
        unpack_release(release, tmp_path / "cache", name="abc")
        assert served.is_dir()
        server.kill()
    unpack_release(release, tmp_path / "cache", name="abc")
    assert not served.exists()
