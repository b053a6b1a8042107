"""Keeps predictions: the request path appends to memory, threads bring them to disk and to the store.

A record goes through three places: this process's memory (0.2 s), a journal in the spool folder (which a killed process
leaves behind), and a Parquet file in the store.  Each place has a limit, and what is given up is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from itertools import count
from pathlib import Path

from pipelines.core.prediction_layout import FEEDBACK, PREDICTIONS
from pipelines.core.release_unit import ReleaseManifest
from serving.prediction_journal import Journal, encode_records
from serving.prediction_records import FeedbackRecord, JournalHeader, PredictionRecord
from serving.prediction_shipping import Shipper
from serving.prediction_stores import open_store
from serving.settings import ServingSettings

__all__ = ["FeedbackRecord", "PredictionLog", "PredictionRecord"]

_WRITE_INTERVAL_S = 0.2  # what a SIGKILL may lose
_MAX_ROWS_IN_MEMORY = 20_000  # some 20 MB, while the spool's disk does not take them
_MAX_JOURNAL_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 250  # half a millisecond of the interpreter's lock

_log = logging.getLogger(__name__)


class PredictionLog:
    """The log of one worker process, for one model version.

    Args:
        settings: where to, and the limits; an empty `predictions_url` keeps nothing.
        manifest: of the release that is served.
    """

    def __init__(self, settings: ServingSettings, manifest: ReleaseManifest) -> None:
        self._enabled = bool(settings.predictions_url)
        self._spool = settings.spool_dir.absolute()
        shared = (manifest.model, manifest.version, manifest.onnx_sha256, manifest.labels)
        self._predictions, self._feedback = self._lanes = tuple(
            _Lane(self._spool, JournalHeader(kind, *shared), settings.flush_rows, settings.flush_interval_s)
            for kind in (PREDICTIONS, FEEDBACK)
        )
        self._shipper = Shipper(
            self._spool,
            open_store(settings.predictions_url, settings.s3_endpoint_url),
            settings.spool_max_bytes,
        )
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._run, name="prediction-journal", daemon=True)

    def start(self) -> None:
        """Start the threads; the first thing shipped is what killed processes left in the spool.

        Raises:
            OSError: the spool folder cannot be made: better to say so at the start than at the first crash.
        """
        if self._enabled:
            self._spool.mkdir(parents=True, exist_ok=True)
            self._shipper.start()
            self._writer.start()

    def append(self, record: PredictionRecord) -> None:
        """Keep a prediction: costs less than a microsecond, never waits, never raises."""
        if self._enabled:
            self._predictions.append(record)

    def append_feedback(self, record: FeedbackRecord) -> None:
        """Keep a feedback, likewise."""
        if self._enabled:
            self._feedback.append(record)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is in memory, ship what can be shipped; the rest stays in the spool for the next process.

        Args:
            timeout_s: most seconds to wait.
        """
        if not self._writer.is_alive():
            return
        deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._writer.join(timeout_s)
        self._shipper.close(max(deadline - time.monotonic(), 0.1))

    @property
    def backlog_rows(self) -> int:
        """Records in this process's memory, not yet in the spool."""
        return sum(lane.rows_in_memory for lane in self._lanes)

    @property
    def dropped_rows(self) -> int:
        """Records that this process gave up: memory or spool full, or unreadable."""
        return sum(lane.dropped for lane in self._lanes) + self._shipper.dropped_rows

    @property
    def shipped_rows(self) -> int:
        """Records that this process stored, those of killed processes among them."""
        return self._shipper.shipped_rows

    @property
    def spooled_bytes(self) -> int:
        """Bytes that wait in the spool, of all workers together: equal in each, not to be summed."""
        return self._shipper.spooled_bytes

    @property
    def oldest_spooled_s(self) -> float:
        """Seconds since the oldest journal of the spool was last written to, of all workers together."""
        return self._shipper.oldest_s

    @property
    def shipping_failures(self) -> int:
        """Attempts of this process to store a file that failed."""
        return self._shipper.failures

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(_WRITE_INTERVAL_S)
            for lane in self._lanes:
                try:
                    if lane.write(last=last):
                        self._shipper.wake()
                except Exception:  # noqa: BLE001 - the thread must outlive anything: nobody would start it again
                    _log.exception("a journal of %s could not be written", lane.kind)


class _Lane:
    """The way of one kind of records from memory into journals.  All but `append` is the writing thread's."""

    def __init__(self, spool: Path, header: JournalHeader, flush_rows: int, flush_interval_s: float) -> None:
        self.kind = header.kind
        self._spool = spool
        self._header = header
        self._flush_rows = flush_rows
        self._flush_interval_s = flush_interval_s
        self._waiting: deque[object] = deque()
        self._overflows = count()
        self._dropped = self._unwritable = 0
        self._journal: Journal | None = None
        self._opened_at = 0.0
        self._failing = False

    @property
    def rows_in_memory(self) -> int:
        """Records not yet in a journal."""
        return len(self._waiting)

    @property
    def dropped(self) -> int:
        """Records that did not get into a journal and never will."""
        return self._dropped + self._unwritable

    def append(self, record: object) -> None:
        """Keep a record in memory, or count it as dropped."""
        if len(self._waiting) < _MAX_ROWS_IN_MEMORY:
            self._waiting.append(record)
        else:
            self._dropped = next(self._overflows) + 1  # `next` is one step, whichever threads do it at once

    def write(self, *, last: bool) -> bool:
        """Bring what is in memory into the journal; what the disk does not take stays in memory.

        Args:
            last: whether the process ends.

        Returns:
            Whether a journal was completed.
        """
        sealed = False
        while self._waiting:
            try:
                self._write_some()
            except OSError as error:
                self._say_failure(error)
                break
            self._failing = False
            sealed |= self._seal_if(last=False)
        return self._seal_if(last=last) or sealed

    def _write_some(self) -> None:
        if self._journal is None:
            self._journal = Journal(self._spool, self._header)
            self._opened_at = time.monotonic()
        n_rows = max(1, min(len(self._waiting), _ROWS_AT_ONCE, self._flush_rows - self._journal.rows))
        records = [self._waiting.popleft() for _ in range(n_rows)]
        lines = encode_records(records)
        try:
            self._journal.append(lines)
        except OSError:
            self._waiting.extendleft(reversed(records))
            raise
        self._unwritable += len(records) - len(lines)

    def _seal_if(self, *, last: bool) -> bool:
        journal = self._journal
        if journal is None or not (
            last
            or journal.rows >= self._flush_rows
            or journal.n_bytes >= _MAX_JOURNAL_BYTES
            or time.monotonic() - self._opened_at >= self._flush_interval_s
        ):
            return False
        self._journal = None
        journal.close()
        return True

    def _say_failure(self, error: OSError) -> None:
        if not self._failing:  # once, not five times a second
            _log.error("%s cannot be written to the spool: %s", self.kind, error)
        self._failing = True
