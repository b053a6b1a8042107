"""Archives are unpacked below a folder and nowhere else, by a Python with filters and by one without."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipelines.core.tar_archives import extract


@pytest.fixture(params=["filters", "none"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `none`, as Debian 12's Python 3.11.2, which the images hold."""
    if request.param == "none":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)

        def extractall(*_: object, **words: object) -> None:
            raise TypeError(f"got an unexpected keyword argument: {words}")

        monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> tarfile.TarFile:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    content.seek(0)
    return tarfile.open(fileobj=content)


def file(name: str, **fields: bytes | int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.usefixtures("python")
def test_extract__files_and_folders__are_there_with_their_content(tmp_path: Path) -> None:
    folder = file("results", type=tarfile.DIRTYPE)
    script = file("run.sh", mode=0o4755)
    with archive((folder, b""), (file("results/a.json", mode=0o600), b"{}"), (script, b"#!/bin/sh")) as tar:
        extract(tar, tmp_path / "into")
    assert (tmp_path / "into/results/a.json").read_bytes() == b"{}"
    assert (tmp_path / "into/run.sh").stat().st_mode & 0o7777 == 0o755  # no set-user-id


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize(
    "member", [file("../outside"), file("pipe", type=tarfile.FIFOTYPE), file("device", type=tarfile.CHRTYPE)]
)
def test_extract__member_that_is_none_below_the_folder__is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with archive((member, b"")) as tar, pytest.raises(tarfile.TarError):
        extract(tar, tmp_path / "into")
    assert not (tmp_path / "outside").exists()
