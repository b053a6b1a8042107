"""Looks again and again whether ledger and aliases still agree, and tells people when they do not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from pipelines.errors import PerchError

INTERVAL_S = 20.0
_log = logging.getLogger(__name__)


class Audit:
    """Alerts once when a contradiction appears, and once when it is gone.

    A contradiction counts at the second look that finds it: between the ledger's row of a promotion and the aliases
    that follow it there is a moment in which they disagree rightly.

    Args:
        find: names every contradiction in a sentence.
        alert: sends a title and a text to people; what it says False to is told again at the next look.
        looks: that have to find a contradiction before it counts; 1 where there is no such moment.
    """

    def __init__(self, find: Callable[[], Sequence[str]], alert: Callable[[str, str], object], looks: int = 2) -> None:
        self._find, self._alert, self._looks = find, alert, looks
        self._seen: dict[str, int] = {}
        self._told: frozenset[str] = frozenset()

    def run(self, stop: threading.Event, interval_s: float = INTERVAL_S) -> None:
        """Look once per interval until told to stop; what cannot be asked is asked again."""
        while not stop.wait(interval_s):
            try:
                self.check()
            except PerchError as error:
                _log.warning("ledger and aliases could not be compared: %s", error)
            except Exception:  # noqa: BLE001 - one failed look must not end the watch
                _log.exception("ledger and aliases could not be compared")

    def check(self) -> frozenset[str]:
        """Look once; returns the contradictions that people have been told of."""
        found = self._find()
        self._seen = {problem: self._seen.get(problem, 0) + 1 for problem in found}
        lasting = {problem for problem, looks in self._seen.items() if looks >= self._looks}
        new, gone = lasting - self._told, self._told - self._seen.keys()
        if new:
            text = "\n".join([*sorted(new), "what to do: docs/runbooks/on-call.md, “Ledger and aliases disagree”"])
            if self._alert("The ledger or an alias was changed by hand", text) is not False:
                self._told |= new
        if gone and self._alert("Ledger and aliases agree again", "\n".join(sorted(gone))) is not False:
            self._told -= gone
        return self._told
