"""Where kept predictions lie: the folders and names that the service writes and the queries read.

```
predictions/model=<name>/version=<v>/day=YYYY-MM-DD/<first id>-<last id>-<journal id>.parquet
feedback/day=YYYY-MM-DD/<first id>-<last id>-<journal id>.parquet
```
A name says which ids a file can hold, so that one prediction is found among a million by opening one file or two.
It follows from the journal that the file was made from: shipped twice, a file replaces its equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from urllib.parse import quote, unquote

from pipelines.core.prediction_ids import ID_LENGTH

PREDICTIONS = "predictions"
FEEDBACK = "feedback"
SUFFIX = ".parquet"


@dataclass(frozen=True)
class PredictionFile:
    """One Parquet file of the tree.

    Attributes:
        path: relative to the tree's root, `/` between folders.
        day: of its rows' times, UTC.
        first_id: smallest prediction id in it.
        last_id: largest.
        model: name of the model; empty for feedback.
        version: its version; empty for feedback.
    """

    path: str
    day: date
    first_id: str
    last_id: str
    model: str = ""
    version: str = ""

    def may_hold(self, prediction_id: str) -> bool:
        """Whether the id lies between the first and the last."""
        return self.first_id <= prediction_id <= self.last_id


def predictions_folder(model: str, version: str) -> str:
    """Folder of one model version's days; what is no plain character of a name is percent-encoded."""
    return f"{PREDICTIONS}/model={quote(model, safe='')}/version={quote(version, safe='')}"


def predictions_path(model: str, version: str, day: date, first_id: str, last_id: str, journal_id: str) -> str:
    """Path of a file of predictions."""
    return f"{predictions_folder(model, version)}/day={day.isoformat()}/{first_id}-{last_id}-{journal_id}{SUFFIX}"


def feedback_path(day: date, first_id: str, last_id: str, journal_id: str) -> str:
    """Path of a file of feedback."""
    return f"{FEEDBACK}/day={day.isoformat()}/{first_id}-{last_id}-{journal_id}{SUFFIX}"


def parse_path(path: str) -> PredictionFile | None:
    """What a path below the tree's root says; None for anything that is no file of the tree."""
    *folders, name = path.split("/")
    ids = name.removesuffix(SUFFIX).split("-")
    if not name.endswith(SUFFIX) or len(ids) != 3 or len(ids[0]) != ID_LENGTH or len(ids[1]) != ID_LENGTH:
        return None
    values = dict(folder.split("=", 1) for folder in folders if "=" in folder)
    try:
        day = date.fromisoformat(values["day"])
    except (KeyError, ValueError):
        return None
    return PredictionFile(
        path, day, ids[0], ids[1], unquote(values.get("model", "")), unquote(values.get("version", ""))
    )
