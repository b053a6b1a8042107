"""A watched file follows the disk and never gets worse."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from serving.watched_file import WatchedFile


def _number(file: Path) -> int:
    return int(file.read_text())


def test_current__file_replaced__is_the_new_content(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    watched = WatchedFile(file, _number, interval_s=0.0)
    assert watched.current() == 1
    new = tmp_path / "new"
    new.write_text("2")
    stat = file.stat()
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time and size: the inode tells
    new.replace(file)
    assert watched.current() == 2


def test_current__within_the_interval__does_not_look(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    watched = WatchedFile(file, _number, interval_s=60.0)
    file.write_text("22")
    assert watched.current() == 1


def test_current__broken_then_gone_then_good__keeps_the_last_good_and_complains_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    watched = WatchedFile(file, _number, interval_s=0.0)
    with caplog.at_level(logging.WARNING):
        file.write_text("half wri")
        assert [watched.current() for _ in range(3)] == [1, 1, 1]
        assert len(caplog.records) == 1
        file.unlink()
        assert [watched.current() for _ in range(3)] == [1, 1, 1]
        assert len(caplog.records) == 2
        file.write_text("333")
        assert watched.current() == 333


def test_current__touched_back_to_its_old_state_after_trouble__is_read(tmp_path: Path) -> None:
    file, away = tmp_path / "number", tmp_path / "away"
    file.write_text("1")
    watched = WatchedFile(file, _number, interval_s=0.0)
    file.rename(away)
    assert watched.current() == 1
    away.rename(file)
    assert watched.current() == 1
    file.write_text("4444")
    assert watched.current() == 4444


def test_watched_file__broken_at_the_start__says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WatchedFile(tmp_path / "none", _number)
