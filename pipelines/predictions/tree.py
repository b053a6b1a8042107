"""Which files of the tree can hold what is asked for, by their folders and names alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from urllib.parse import unquote

from pipelines.core.prediction_ids import first_id_at, time_of
from pipelines.core.prediction_layout import FEEDBACK, PREDICTIONS, PredictionFile, parse_path
from pipelines.predictions.stores import Store

_APART = timedelta(minutes=5)


@dataclass(frozen=True)
class Selection:
    """A part of the predictions that whole folders can be left out for.

    Attributes:
        model: name of the model; empty takes all.
        version: its version; empty takes all.
        since: first day, UTC; None takes all.
        begin: leaves out files whose last prediction was made before this moment, with a zone; None takes all.
    """

    model: str = ""
    version: str = ""
    since: date | None = None
    begin: datetime | None = None


def list_days(store: Store, selection: Selection) -> dict[date, list[str]]:
    """The folders of each day, newest day first: one per model version."""
    found: dict[date, list[str]] = {}
    for model_folder in store.list_folder(PREDICTIONS)[0]:
        if selection.model and unquote(model_folder) != f"model={selection.model}":
            continue
        for version_folder in store.list_folder(f"{PREDICTIONS}/{model_folder}")[0]:
            if selection.version and unquote(version_folder) != f"version={selection.version}":
                continue
            folder = f"{PREDICTIONS}/{model_folder}/{version_folder}"
            for day_folder in store.list_folder(folder)[0]:
                day = _parse_day(day_folder)
                if day is not None and (selection.since is None or day >= selection.since):
                    found.setdefault(day, []).append(f"{folder}/{day_folder}")
    return dict(sorted(found.items(), reverse=True))


def list_files(store: Store, folders: list[str]) -> list[PredictionFile]:
    """The files of some folders, those with the newest predictions first."""
    files = [
        file
        for folder in folders
        for name in store.list_folder(folder)[1]
        if (file := parse_path(f"{folder}/{name}")) is not None
    ]
    return sorted(files, key=lambda file: file.last_id, reverse=True)


def newest_first(store: Store, selection: Selection) -> Iterator[PredictionFile]:
    """All files of a selection; days are listed as they are reached."""
    first = first_id_at(selection.begin) if selection.begin else ""
    for folders in list_days(store, selection).values():
        yield from (file for file in list_files(store, folders) if file.last_id >= first)


def files_that_may_hold(store: Store, prediction_id: str) -> list[PredictionFile]:
    """The files between whose first and last id a prediction lies.

    The id is made a moment before or after its prediction's time is taken, so a day may end in between.
    """
    made = time_of(prediction_id)
    days = sorted({(made + apart).date() for apart in (-_APART, _APART)})
    folders = [
        f"{PREDICTIONS}/{model_folder}/{version_folder}/day={day}"
        for model_folder in store.list_folder(PREDICTIONS)[0]
        for version_folder in store.list_folder(f"{PREDICTIONS}/{model_folder}")[0]
        for day in days
    ]
    return [file for file in list_files(store, folders) if file.may_hold(prediction_id)]


def feedback_files(store: Store, since: date | None = None) -> list[PredictionFile]:
    """The files of feedback that was told since a day."""
    files = []
    for folder in store.list_folder(FEEDBACK)[0]:
        day = _parse_day(folder)
        if day is not None and (since is None or day >= since):
            files += list_files(store, [f"{FEEDBACK}/{folder}"])
    return files


def _parse_day(folder: str) -> date | None:
    try:
        return date.fromisoformat(folder.removeprefix("day="))
    except ValueError:
        return None
