"""Pairs of answers to the same requests, from trees that the service's own code wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.predictions.mirrored import compare_answers
from pipelines.predictions.stores import FolderStore

Keep = Callable[..., list[str]]
START = datetime(2026, 11, 20, 23, 59, 58, tzinfo=UTC)  # the copies run into the next day
MODEL = "shapes-classification"


def keep_each(keep: Keep, version: str, answers: list[tuple[str, str, float]], start: datetime = START) -> None:
    for number, (request, label, confidence) in enumerate(answers):
        moment = start + timedelta(seconds=number)
        changes: dict[str, Any] = {"version": version, "confidence": confidence, "request_id": request}
        keep(moment, [label], **changes)


def test_compare_answers__requests_and_copies__are_paired_by_their_id(keep: Keep, root: Path) -> None:
    keep_each(keep, "1", [("a", "circle", 0.9), ("b", "circle", 0.9), ("c", "square", 0.8), ("x", "circle", 0.9)])
    keep_each(keep, "2", [("a", "circle", 0.7), ("b", "square", 0.9), ("c", "square", 0.8), ("y", "circle", 0.9)])
    found = compare_answers(FolderStore(root), MODEL, "1", "2", START - timedelta(seconds=1))
    assert found.pairs == {("circle", "circle"): 1, ("circle", "square"): 1, ("square", "square"): 1}
    assert found.score_difference == pytest.approx(0.2, abs=1e-6)
    assert set(found.labels) >= {"circle", "square"}


def test_compare_answers__before_the_copies_began__is_left_out(keep: Keep, root: Path) -> None:
    keep_each(keep, "1", [("a", "circle", 0.9)], START - timedelta(hours=1))
    keep_each(keep, "2", [("a", "circle", 0.9)], START - timedelta(hours=1))
    assert compare_answers(FolderStore(root), MODEL, "1", "2", START).pairs == {}


def test_compare_answers__nothing_kept_yet__is_no_pair_at_all(root: Path) -> None:
    found = compare_answers(FolderStore(root), MODEL, "1", "2", START)
    assert (found.pairs, found.score_difference) == ({}, 0)


def test_compare_answers__probes__count_once_for_each_image_or_not_at_all(keep: Keep, root: Path) -> None:
    keep_each(keep, "1", [("a", "circle", 0.9), ("b", "circle", 0.9)])
    keep_each(keep, "2", [("a", "circle", 0.9), ("b", "circle", 0.9)])
    for number, image in enumerate(("01", "02", "01", "02", "01")):
        moment = START + timedelta(seconds=10 + number)
        for version, label in (("1", "circle"), ("2", "square")):
            changes = {"request_id": f"probe-{number}", "image_sha256": image * 32, "origin": "probe"}
            keep(moment, [label], version=version, **changes)
    since = START - timedelta(seconds=1)
    counted = compare_answers(FolderStore(root), MODEL, "1", "2", since)
    assert counted.pairs == {("circle", "circle"): 2, ("circle", "square"): 2}
    ignored = compare_answers(FolderStore(root), MODEL, "1", "2", since, count_probes=False)
    assert ignored.pairs == {("circle", "circle"): 2}


class NotedStore(FolderStore):
    """Notes which files are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def fetch(self, paths: Sequence[str], into: Path) -> list[Path]:
        self.read += paths
        return super().fetch(paths, into)


def test_compare_answers__files_of_the_same_day_from_before_and_feedback__are_not_read(
    keep: Keep, tell: Callable[[str, str, datetime], None], root: Path
) -> None:
    morning = START.replace(hour=8)
    for version in ("1", "2"):
        (old,) = keep(morning, ["circle"], version=version, request_id="old")
        keep_each(keep, version, [("a", "circle", 0.9)])
        tell(old, "circle", START)
    store = NotedStore(root)
    assert compare_answers(store, MODEL, "1", "2", START).pairs == {("circle", "circle"): 1}
    assert sorted(path.split("/")[2] for path in store.read) == ["version=1", "version=2"]
