"""A small file whose content follows the disk, and never gets worse: a broken or missing one leaves the last good."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

CHECK_INTERVAL_S = 1.0

Content = TypeVar("Content")
_logger = logging.getLogger(__name__)


class WatchedFile(Generic[Content]):
    """Parses a file now, and again when it changed.

    Args:
        file: its path; a symbolic link is followed each time, as Kubernetes swaps the target of mounted secrets.
        parse: reads the path; raises OSError or ValueError when the content is not whole.
        interval_s: seconds between two looks at the disk.

    Raises:
        OSError: the file cannot be read now.
        ValueError: its content is wrong now.
    """

    def __init__(self, file: Path, parse: Callable[[Path], Content], *, interval_s: float = CHECK_INTERVAL_S) -> None:
        self._file, self._parse, self._interval_s = file, parse, interval_s
        self._state = self._look()
        self._content = parse(file)
        self._next_look = time.monotonic() + interval_s
        self._complaint = ""

    def current(self) -> Content:
        """The newest good content; never raises.  Costs a comparison of clocks, and a `stat` once per interval."""
        now = time.monotonic()
        if now < self._next_look:
            return self._content
        self._next_look = now + self._interval_s
        try:
            state = self._look()  # before reading: a file replaced meanwhile is read again at the next look
            if state != self._state or self._complaint:
                self._content = self._parse(self._file)
                _logger.info("read %s again", self._file)
                self._state, self._complaint = state, ""
        except (OSError, ValueError) as error:
            complaint = f"{type(error).__name__}: {error}"
            if complaint != self._complaint:  # once for each trouble, not once per second
                _logger.warning("cannot read %s, going on with what it held: %s", self._file, complaint)
            self._complaint = complaint
        return self._content

    def _look(self) -> tuple[int, int, int]:
        found = self._file.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
