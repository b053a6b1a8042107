"""How far a training is, on stderr: a bar on a terminal, and a line per epoch there and in a log."""

from __future__ import annotations

import time

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipelines.modeling.callbacks import EpochHistory
from pipelines.modeling.data_module import Batch

_SHOWN = ("train/loss", "val/loss", "val/accuracy")


class _ImagesPerSecond(ProgressColumn):
    """The rate since the training began or was resumed, validation included."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["resumed_at"]
        return Text(f"{done / task.elapsed:,.0f} images/s" if task.elapsed and done > 0 else "")


class TrainingProgress(pl.Callback):
    """Shows epochs, metrics and the rate.

    Args:
        history: where the epochs' metrics are.
        images: of one epoch.
        title: goes before each line, e.g. `trial 3 of 10`.
        console: where to show it; stderr by default.
    """

    def __init__(self, history: EpochHistory, images: int, title: str = "", console: Console | None = None) -> None:
        self._history, self._images, self._title = history, images, title
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            _ImagesPerSecond(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", resumed_at=0)
        self._epochs = 0
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Show the bar, and where a resumed training goes on."""
        done, self._epochs = len(self._history.records), trainer.max_epochs or 0
        if done:
            self._say(f"going on after epoch {done} of {self._epochs}")
        shown = done * self._images
        self._bar.update(self._task, total=self._epochs * self._images, completed=shown, resumed_at=shown)
        self._bar.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Name the epoch, and look at the clock."""
        self._began = time.monotonic()
        self._bar.update(self._task, description=f"{self._title}epoch {trainer.current_epoch + 1}/{self._epochs}")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: STEP_OUTPUT,  # noqa: ARG002
        batch: Batch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Count the batch, the other ranks' parts of it included."""
        self._bar.advance(self._task, len(batch[1]) * trainer.world_size)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Say how the epoch went."""
        epoch, metrics = len(self._history.records), self._history.latest
        values = "  ".join(f"{name} {metrics[name]:.3f}" for name in _SHOWN)
        best = "  best so far" if self._history.best_epoch == epoch else ""
        self._say(f"epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}  {values}  {self._seconds()}{best}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Take the bar away."""
        self._bar.stop()

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s"

    def _say(self, line: str) -> None:
        self._console.print(f"  {self._title}{line}", highlight=False, markup=False, soft_wrap=True)
