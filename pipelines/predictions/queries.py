"""Questions to kept predictions, answered by DuckDB over the Parquet files.

Times are shown as UTC without a zone, so that `time >= '2026-11-20'` in a query means UTC on every machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.prediction_columns import FEEDBACK_COLUMNS, PREDICTION_COLUMNS
from pipelines.core.prediction_ids import time_of
from pipelines.core.prediction_layout import FEEDBACK, PREDICTIONS, PredictionFile
from pipelines.core.request_origins import CLIENT
from pipelines.errors import Refusal, TryLater
from pipelines.predictions.stores import Store
from pipelines.predictions.tree import Selection, feedback_files, files_that_may_hold, newest_first

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_FIRST_LOOK = 64  # files; doubled each time that they do not hold enough

COUNTED_BY = {
    "label": "label",
    "day": "time::date",
    "model": "model || ' v' || model_version",
    "caller": "caller",
    "endpoint": "endpoint",
}
_LATEST_FEEDBACK = "select prediction_id, arg_max(true_label, time) as truth from feedback group by prediction_id"


@dataclass(frozen=True)
class Filter:
    """Which predictions are wanted; what is empty or None takes all.

    Attributes:
        model: name of the model.
        version: its version.
        label: what was predicted.
        caller: name of the key or subject of the token.
        since: earliest time, UTC, without a zone.
        max_confidence: largest probability of the predicted label.
        origin: whose the request was, by default a client's: nobody reads the answers to copies and probes.
    """

    model: str = ""
    version: str = ""
    label: str = ""
    caller: str = ""
    since: datetime | None = None
    max_confidence: float | None = None
    origin: str = CLIENT

    @property
    def selection(self) -> Selection:
        """The folders it leaves."""
        return Selection(self.model, self.version, self.since.date() if self.since else None)

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL, and its values."""
        conditions = {
            "model = ?": self.model or None,
            "model_version = ?": self.version or None,
            "label = ?": self.label or None,
            "caller = ?": self.caller or None,
            "time >= ?": self.since,
            "confidence <= ?::float": self.max_confidence,
            "origin = ?": self.origin or None,
        }
        given = {condition: value for condition, value in conditions.items() if value is not None}
        return " and ".join(given) or "true", list(given.values())


@dataclass
class Answer:
    """A table.

    Attributes:
        columns: their names.
        rows: one tuple each.
    """

    columns: list[str]
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Predictions:
    """The kept predictions of one store; a context manager, which removes copies of remote files at its end.

    Args:
        store: where they lie.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._temporary = tempfile.TemporaryDirectory(prefix="perch-predictions-")

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def find(self, prediction_id: str) -> dict[str, Any] | None:
        """One prediction by its id: every column, `probabilities` by label; None where it is not kept.

        Raises:
            ValueError: it is no prediction id.
            TryLater: the store does not answer.
        """
        files = files_that_may_hold(self._store, prediction_id)
        with self._over(files) as connection:
            found = _ask(connection, "select * from predictions where prediction_id = ? limit 1", [prediction_id])
        return found.records()[0] if found.rows else None

    def feedback(self, prediction_id: str) -> list[dict[str, Any]]:
        """What was told about one prediction, oldest first."""
        files = [
            file for file in feedback_files(self._store, time_of(prediction_id).date()) if file.may_hold(prediction_id)
        ]
        with self._over([], files) as connection:
            query = "select * from feedback where prediction_id = ? order by time"
            return _ask(connection, query, [prediction_id]).records()

    def latest(self, wanted: Filter, n_rows: int) -> Answer:
        """The newest predictions, newest first: only as many files are read as hold them."""
        where, values = wanted.where()
        query = f"select * from predictions where {where} order by prediction_id desc limit {n_rows}"  # noqa: S608
        files = newest_first(self._store, wanted.selection)
        answer = Answer(list(PREDICTION_COLUMNS))
        upcoming, look = next(files, None), _FIRST_LOOK
        while upcoming is not None:
            batch = [upcoming, *islice(files, look - 1)]
            upcoming, look = next(files, None), 2 * look
            with self._over(batch) as connection:
                found = _ask(connection, query, values)
            answer.rows = sorted([*answer.rows, *found.rows], key=lambda row: str(row[0]), reverse=True)[:n_rows]
            # A file further on holds nothing newer than its last id.
            if len(answer.rows) == n_rows and upcoming is not None and upcoming.last_id < answer.rows[-1][0]:
                break
        return answer

    def count(self, wanted: Filter, by: str) -> Answer:
        """How many predictions there are of each kind, and how sure they were.

        Args:
            wanted: which ones.
            by: a key of `COUNTED_BY`.
        """
        where, values = wanted.where()
        order = "1" if by == "day" else "predictions desc, 1"
        return self._over_all(
            wanted.selection,
            f"select {COUNTED_BY[by]} as {by}, count(*) as predictions, "  # noqa: S608
            "round(avg(confidence), 3) as mean_confidence, round(min(confidence)::double, 3) as least_confidence "
            f"from predictions where {where} group by all order by {order}",
            values,
        )

    def accuracy(self, wanted: Filter) -> Answer:
        """How often predictions were right, by their latest feedback, for each model version and true label."""
        where, values = wanted.where()
        return self._over_all(
            wanted.selection,
            f"with truths as ({_LATEST_FEEDBACK}), judged as ("  # noqa: S608
            f"select * from predictions join truths using (prediction_id) where {where}) "
            "select model, model_version, if(grouping(truth) = 1, 'all', truth) as true_label, "
            "count(*) as told, count(*) filter (where label = truth) as correct, "
            "round(count(*) filter (where label = truth) / count(*), 3) as accuracy from judged "
            "group by grouping sets ((model, model_version), (model, model_version, truth)) "
            "order by model, length(model_version), model_version, grouping(truth) desc, truth",
            values,
            with_feedback=True,
        )

    def ask(self, sql: str, selection: Selection, *, with_feedback: bool = True) -> Answer:
        """The answer to a query over `predictions` and `feedback`.

        Args:
            sql: the query.
            selection: of the predictions' files.
            with_feedback: whether `feedback` is filled, for which its files are read.

        Raises:
            Refusal: DuckDB does not take the query.
        """
        return self._over_all(selection, sql, [], with_feedback=with_feedback)

    def _over_all(self, selection: Selection, sql: str, values: list[Any], *, with_feedback: bool = False) -> Answer:
        files = list(newest_first(self._store, selection))
        feedback = feedback_files(self._store, selection.since) if with_feedback else []
        with self._over(files, feedback) as connection:
            return _ask(connection, sql, values)

    @contextmanager
    def _over(
        self, predictions: Sequence[PredictionFile], feedback: Sequence[PredictionFile] = ()
    ) -> Iterator[DuckDBPyConnection]:
        import duckdb

        with duckdb.connect() as connection:
            connection.execute("set timezone = 'UTC'")
            for name, files, columns in (
                (PREDICTIONS, predictions, PREDICTION_COLUMNS),
                (FEEDBACK, feedback, FEEDBACK_COLUMNS),
            ):
                paths = self._store.fetch([file.path for file in files], Path(self._temporary.name))
                with _explained():
                    connection.execute(_view(name, paths, columns))
            yield connection


def _view(name: str, paths: Iterable[Path], columns: Mapping[str, str]) -> str:
    listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    source = "select " + ", ".join(f"null::{kind} as {column}" for column, kind in columns.items()) + " where false"
    if listed:
        # Files of an earlier version have fewer columns.
        files = f"read_parquet([{listed}], hive_partitioning = false, union_by_name = true)"
        source += f" union all by name select * from {files}"  # noqa: S608
    replaced = "time at time zone 'UTC' as time"
    if "origin" in columns:
        replaced += f", coalesce(origin, '{CLIENT}') as origin"
    return f"create view {name} as select * replace ({replaced}) from ({source})"  # noqa: S608


def _ask(connection: DuckDBPyConnection, sql: str, values: list[Any]) -> Answer:
    with _explained():
        result = connection.execute(sql, values) if values else connection.execute(sql)
        columns = [entry[0] for entry in result.description or []]
        return Answer(columns, [tuple(row) for row in result.fetchall()])


@contextmanager
def _explained() -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        raise TryLater(
            f"the kept predictions cannot be read: {error}\n  what to do: see that the folder is there, then try again"
        ) from error
    except duckdb.InvalidInputException as error:
        raise Refusal("the kept predictions", str(error), way_out="move the damaged file away") from error
    except duckdb.Error as error:
        raise Refusal(
            "the query",
            str(error),
            way_out="it is DuckDB's SQL over the tables predictions and feedback: docs/reference/predictions.md",
        ) from error


def parse_since(text: str, now: datetime) -> datetime:
    """A time from `2026-11-20`, `2026-11-20T14:00`, or `90m`, `12h`, `7d` before now.

    Args:
        text: what was written.
        now: UTC, without a zone.

    Raises:
        Refusal: it is none of these.
    """
    unit = {"m": "minutes", "h": "hours", "d": "days"}.get(text[-1:])
    try:
        if unit and text[:-1].isdecimal():
            return now - timedelta(**{unit: int(text[:-1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise Refusal(
            "--since", repr(text), limit="a date, a time, or how long ago", way_out="e.g. 2026-11-20, 12h or 7d"
        ) from None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def as_json(value: Any) -> Any:
    """A value of a row as JSON has it."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds") + ("Z" if value.tzinfo is None else "")
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str | int | float | dict | list | None) else str(value)


def dump_json(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON, one per line in an array."""
    lines = [json.dumps({key: as_json(value) for key, value in record.items()}) for record in records]
    return "[" + ",\n ".join(lines) + "]"
