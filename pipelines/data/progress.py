"""How far a pass over images is, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_EVERY_S = 10.0


class _ImagesPerSecond(ProgressColumn):
    """The rate since the pass began."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed:,.0f} images/s" if task.elapsed else "")


class ImageProgress:
    """Counts images; use it as a context.

    Args:
        title: what is being done, e.g. `reading`.
        total: how many images there are.
        console: where to show it; stderr by default.
    """

    def __init__(self, title: str, total: int, console: Console | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _ImagesPerSecond(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total)
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> ImageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            self._say()

    def advance(self, images: int = 1) -> None:
        """Count images as done."""
        self._done += images
        if self._bar:
            self._bar.advance(self._task, images)
        elif time.monotonic() - self._spoke >= _LINE_EVERY_S:
            self._say()

    def _say(self) -> None:
        self._spoke = time.monotonic()
        rate = self._done / max(self._spoke - self._began, 1e-9)
        line = f"  {self._title} {self._done:,} of {self._total:,} images · {rate:,.0f} images/s"
        self._console.print(line, highlight=False, soft_wrap=True)
