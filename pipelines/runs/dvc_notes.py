"""DVC's own notes in a run's folder, kept whole when DVC is killed: it writes them in place."""

from __future__ import annotations

from pathlib import Path

from pipelines.core.workspace import Workspace


class DvcNotes:
    """What DVC writes down while it works on a run; only who holds the run's lock may use this.

    DVC writes `dvc.lock` in place, so one killed there leaves it empty or cut off, and no stage starts again.  A copy
    from before DVC began stands beside it while DVC works; where one is found, DVC did not end, and the copy is taken
    back.  That forgets at most one finished stage, which the run cache still knows.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._lock = workspace.root / "dvc.lock"
        self._before = workspace.root / ".dvc" / "tmp" / "dvc.lock.before"
        self._at_work = workspace.root / ".dvc" / "tmp" / "rwlock"

    def begin(self) -> None:
        """Call before DVC starts: undo what a killed DVC left half-written, and keep a copy of what is there now."""
        # The note of who is at work.  Only who holds the run's lock is; a DVC that was killed leaves it half-written,
        # or with a process id that is a zombie's or another's by now.
        self._at_work.unlink(missing_ok=True)
        if self._before.is_file():
            _write_or_remove(self._lock, self._before.read_bytes())
        else:
            self._before.parent.mkdir(parents=True, exist_ok=True)
            partial = self._before.with_suffix(".partial")
            partial.write_bytes(self._lock.read_bytes() if self._lock.is_file() else b"")
            partial.replace(self._before)

    def end(self) -> None:
        """Call once DVC ended by itself, well or not: what it wrote is whole."""
        self._before.unlink(missing_ok=True)


def _write_or_remove(file: Path, content: bytes) -> None:
    """An empty `dvc.lock` is an error to DVC, none is not.  Killed in here, the copy is still there for the next."""
    if content:
        file.write_bytes(content)
    else:
        file.unlink(missing_ok=True)
