import io
import re

import pytest
from rich.console import Console

from pipelines.modeling.callbacks import EpochHistory
from pipelines.modeling.progress import TrainingProgress
from pipelines.modeling.training import Resumption, train
from pipelines.params import ModelTrainingParams, SmallCNNParams

PARAMS = ModelTrainingParams(small_cnn=SmallCNNParams(widths=[8]), epochs=2, batch_size=64, learning_rate=0.01)


def shown(data, *, terminal: bool, resumption: Resumption | None = None, title: str = "") -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    history = EpochHistory(5)
    progress = TrainingProgress(history, len(data.train), title, console)
    train(data, PARAMS, seed=7, observers=[progress], history=history, resumption=resumption)
    return console.file.getvalue()


def test_training_progress__log__one_plain_line_per_epoch(training_data):
    lines = shown(training_data, terminal=False, title="trial 1 of 3  ").splitlines()
    number = r"\d+\.\d{3}"
    line = rf"  trial 1 of 3  epoch \d/2  train/loss {number}  val/loss {number}  val/accuracy {number}  \d+\.\d s.*"
    assert len(lines) == 2
    assert all(re.fullmatch(line, text) for text in lines)


def test_training_progress__terminal__shows_a_rate_and_takes_the_bar_away(training_data):
    output = shown(training_data, terminal=True)
    assert "images/s" in output or "epoch 1/2" in output
    assert output.endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or "\x1b[2K" in output


def test_training_progress__resumed__says_where_it_goes_on(training_data, tmp_path):
    resumption = Resumption(tmp_path / "x.ckpt", "x")

    class StopAfterOne(TrainingProgress):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterruptLike

    class KeyboardInterruptLike(Exception):
        pass

    history = EpochHistory(5)
    stopping = StopAfterOne(history, 1, console=Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterruptLike):
        train(training_data, PARAMS, seed=7, observers=[stopping], history=history, resumption=resumption)
    assert shown(training_data, terminal=False, resumption=resumption).startswith("  going on after epoch 1 of 2\n")
