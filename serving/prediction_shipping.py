"""Ships complete journals to the store as Parquet, in a thread of its own.

Any worker ships any complete journal of the spool, so a killed worker's predictions go out with the next one's.  A
journal is removed only after its files are stored; killed in between, the next shipper stores the same files again
under the same names.  While the store does not answer, journals wait in the spool, the oldest giving way when the
spool is full.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path

from serving.prediction_journal import DAMAGED_SUFFIX, SUFFIX, list_journals, read_journal, take_journal
from serving.prediction_stores import PredictionStore
from serving.prediction_tables import make_parquet_files, prepare

_LOOK_INTERVAL_S = 5.0  # for journals of killed workers, and at the size of the spool
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0

_log = logging.getLogger(__name__)


class Shipper:
    """Ships the complete journals of one spool folder.

    Args:
        spool: the folder.
        store: where the files go.
        max_bytes: most bytes that may wait in the spool.

    Attributes:
        shipped_rows: records stored by this process.
        dropped_rows: records given up by this process: unreadable, or the spool was full.
        failures: attempts to store a file that failed.
        spooled_bytes: size of the spool when last looked at, of all workers together.
        oldest_s: age of the oldest journal then, seconds.
    """

    def __init__(self, spool: Path, store: PredictionStore, max_bytes: int) -> None:
        self.shipped_rows = self.dropped_rows = self.failures = self.spooled_bytes = 0
        self.oldest_s = 0.0
        self._spool = spool
        self._store = store
        self._max_bytes = max_bytes
        self._retry_at = 0.0
        self._failures_in_a_row = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prediction-shipper", daemon=True)

    def start(self) -> None:
        """Begin, with what killed processes left behind."""
        prepare()
        try:
            self._store.prepare()
        except Exception as error:  # noqa: BLE001 - a store that may be mended later costs no answer now
            self._postpone(error)
        self._thread.start()

    def wake(self) -> None:
        """Say that a journal is complete."""
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Try once more to ship what is complete, then stop; what cannot be shipped stays in the spool."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            last = self._closing
            self._wake.clear()
            try:
                self.look(even_now=last)
            except Exception:  # noqa: BLE001 - the thread must outlive anything: nobody would start it again
                self.failures += 1
                _log.exception("the spool of predictions could not be read")
            if last:
                return
            if not self._closing:
                self._wake.wait(_LOOK_INTERVAL_S)

    def look(self, *, even_now: bool = False) -> None:
        """Ship every complete journal, oldest first, until the store fails; then make room in the spool.

        Args:
            even_now: whether to try although the last failure was only just now.
        """
        if even_now or time.monotonic() >= self._retry_at:
            for path in list_journals(self._spool):
                if not self._ship(path):
                    break
        self._make_room()

    def _ship(self, path: Path) -> bool:
        """Ship one journal, if it is complete; whether to go on with the next."""
        with take_journal(path) as data:
            if data is None:
                return True
            content = read_journal(data)
            if content.damaged:
                _log.warning("journal %s: %d stretches could not be read", path.name, content.damaged)
            try:
                files = list(make_parquet_files(path.name.removesuffix(SUFFIX), content))
            except Exception as error:  # noqa: BLE001 - of pyarrow, for whatever is in the file
                _log.error("journal %s cannot be shipped: %s", path.name, error)
                self.dropped_rows += content.rows
                path.rename(path.with_suffix(DAMAGED_SUFFIX))
                return True
            try:
                for file in files:
                    self._store.put(file.path, file.content)
            except Exception as error:  # noqa: BLE001 - each kind of storage fails in its own ways
                self._postpone(error)
                return False
            path.unlink()
        self._failures_in_a_row = 0
        shipped = sum(file.rows for file in files)
        self.shipped_rows += shipped
        self.dropped_rows += content.rows - shipped
        return True

    def _postpone(self, error: Exception) -> None:
        self.failures += 1
        self._failures_in_a_row += 1
        pause_s = min(_FIRST_RETRY_S * 2 ** (self._failures_in_a_row - 1), _LAST_RETRY_S)
        # Jitter: many workers must not come back at once to a store that has just recovered.
        self._retry_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        _log.warning("predictions cannot be stored, %s: %s", type(error).__name__, error)

    def _make_room(self) -> None:
        """Remove the oldest complete journals until the spool is within its limit, and measure it."""
        sizes: list[tuple[Path, int]] = []
        oldest = time.time()
        for path in sorted(self._spool.iterdir()):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            sizes.append((path, status.st_size))
            if path.suffix == SUFFIX:
                oldest = min(oldest, status.st_mtime)
        total = sum(size for _, size in sizes)
        for path, size in sizes:
            if total <= self._max_bytes:
                break
            if path.suffix == DAMAGED_SUFFIX:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX:
                with take_journal(path) as data:
                    if data is None:
                        continue
                    self.dropped_rows += read_journal(data).rows
                    path.unlink()
            else:
                continue
            total -= size
        self.spooled_bytes = total
        self.oldest_s = max(time.time() - oldest, 0.0)
