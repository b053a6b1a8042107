"""The ways Perch says no, and the exit codes that carry them from a stage's process to whoever started it.

The codes are those of BSD's sysexits(3), so that a scheduler can tell "trying again is useless" from "try again".
"""

from __future__ import annotations

from collections.abc import Mapping

EXIT_OK = 0
EXIT_REFUSED = 65  # EX_DATAERR: the data, the model or a parameter was judged and found wanting
EXIT_TRY_LATER = 75  # EX_TEMPFAIL: something outside was not there, or another process is at it


class PerchError(Exception):
    """Base of the errors that a person is meant to read; the message alone says what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.reports: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.stage = ""


class Refusal(PerchError):
    """Something was judged and refused; doing the same again would be refused again.

    Args:
        thing: what was looked at, e.g. "the folder scans/".
        value: what was found, e.g. "holds one class (cells)".
        limit: what would have been accepted.
        way_out: what the reader can do.
        reports: title to a file relative to the workspace that shows the evidence, kept with the MLflow run.
    """

    exit_code = EXIT_REFUSED

    def __init__(
        self,
        thing: str,
        value: object,
        *,
        limit: str = "",
        way_out: str = "",
        reports: Mapping[str, str] | None = None,
    ) -> None:
        text = f"{thing}: {value}"
        if limit:
            text += f" (limit: {limit})"
        if way_out:
            text += f"\n  what to do: {way_out}"
        super().__init__(text)
        self.thing, self.value, self.limit, self.way_out = thing, str(value), limit, way_out
        self.reports = dict(reports or {})


class TryLater(PerchError):
    """Something Perch depends on was not reachable, or is busy; the same call may succeed later."""

    exit_code = EXIT_TRY_LATER
