"""Trains a tiny network on real digits, again and again, with kills in between."""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from pipelines.errors import Refusal, TryLater
from pipelines.modeling.callbacks import EpochHistory
from pipelines.modeling.training import Resumption, Training, train
from pipelines.modeling.training_data import LabelledImages
from pipelines.modeling.weights import hash_weights
from pipelines.params import ModelTrainingParams, SmallCNNParams

PARAMS = ModelTrainingParams(
    small_cnn=SmallCNNParams(widths=[8, 16], dropout=0.2),
    epochs=4,
    batch_size=32,
    learning_rate=0.02,
    weight_averaging=0.9,
)


def with_params(**changes: object) -> ModelTrainingParams:
    return PARAMS.model_copy(update=changes)


class KillAt(pl.Callback):
    """Ends the process with SIGKILL at one place of one epoch (from 0)."""

    def __init__(self, place: str, epoch: int) -> None:
        self._place, self._epoch = place, epoch

    def _kill(self, place: str, epoch: int) -> None:
        if (place, epoch) == (self._place, self._epoch):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_start(self, trainer, pl_module):
        self._kill("epoch start", trainer.current_epoch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self._kill("batch", trainer.current_epoch)

    def on_validation_end(self, trainer, pl_module):
        self._kill("validation", trainer.current_epoch)

    def on_train_epoch_end(self, trainer, pl_module):
        self._kill("before checkpoint", trainer.current_epoch)

    def on_train_end(self, trainer, pl_module):
        self._kill("end", trainer.current_epoch - 1)


def run_killed(target: Callable[[], object]) -> int:
    """Call it in a forked process and return the exit code."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(training_data) -> Training:
    return train(training_data, PARAMS, seed=7)


def test_train__digits__are_learnt(uninterrupted):
    assert uninterrupted.history.best["val/accuracy"] > 0.9
    assert uninterrupted.history.records[0]["train/loss"] > uninterrupted.history.best["train/loss"]


def test_train__again__same_weights_bit_for_bit(training_data, uninterrupted):
    assert hash_weights(train(training_data, PARAMS, seed=7).network) == hash_weights(uninterrupted.network)


def test_train__other_seed__other_weights(training_data, uninterrupted):
    assert hash_weights(train(training_data, PARAMS, seed=8).network) != hash_weights(uninterrupted.network)


@pytest.mark.parametrize(
    "kills",
    [
        [("batch", 0)],
        [("batch", 2)],
        [("epoch start", 1)],
        [("validation", 1)],
        [("before checkpoint", 1)],
        [("before checkpoint", 0), ("batch", 2), ("epoch start", 3)],
        [("end", 3)],
    ],
    ids=str,
)
def test_train__killed_and_started_again__same_weights_bit_for_bit(training_data, uninterrupted, tmp_path, kills):
    resumption = Resumption(tmp_path / "training.ckpt", "same inputs")
    for kill in kills:
        code = run_killed(
            lambda kill=kill: train(training_data, PARAMS, seed=7, resumption=resumption, observers=[KillAt(*kill)])
        )
        assert code == -signal.SIGKILL
    training = train(training_data, PARAMS, seed=7, resumption=resumption)
    assert training.history.records == uninterrupted.history.records
    assert hash_weights(training.network) == hash_weights(uninterrupted.network)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_train__killed_on_another_schedule__same_weights(training_data, tmp_path, schedule):
    params = with_params(schedule=schedule, weight_averaging=0.0, epochs=3)
    resumption = Resumption(tmp_path / "training.ckpt", "same inputs")
    killed = KillAt("batch", 2)
    run_killed(lambda: train(training_data, params, seed=7, resumption=resumption, observers=[killed]))
    assert resumption.path.is_file()
    resumed = train(training_data, params, seed=7, resumption=resumption)
    assert hash_weights(resumed.network) == hash_weights(train(training_data, params, seed=7).network)


def test_train__resumed__goes_on_where_it_was(training_data, tmp_path):
    resumption = Resumption(tmp_path / "training.ckpt", "same inputs")
    run_killed(
        lambda: train(training_data, PARAMS, seed=7, resumption=resumption, observers=[KillAt("epoch start", 2)])
    )
    epochs = EpochsSeen()
    train(training_data, PARAMS, seed=7, resumption=resumption, observers=[epochs])
    assert epochs.seen == [2, 3]


def test_train__checkpoint_of_other_inputs__starts_over(training_data, tmp_path):
    path = tmp_path / "training.ckpt"
    train(training_data, PARAMS, seed=8, resumption=Resumption(path, "other inputs"))
    epochs = EpochsSeen()
    train(training_data, PARAMS, seed=7, resumption=Resumption(path, "these inputs"), observers=[epochs])
    assert epochs.seen == [0, 1, 2, 3]


class EpochsSeen(pl.Callback):
    """Epochs that were trained in this process."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.current_epoch)


def test_train__no_improvement__stops_early_with_the_best_weights(training_data, tmp_path):
    params = with_params(
        learning_rate=1.0, schedule="constant", weight_averaging=0.0, patience_epochs=2, epochs=30, batch_size=8
    )
    resumption = Resumption(tmp_path / "training.ckpt", "x")
    training = train(training_data, params, seed=7, resumption=resumption)
    losses = [record["val/loss"] for record in training.history.records]
    assert training.stopped_early
    assert len(losses) - training.history.best_epoch == 2
    assert losses.index(min(losses)) + 1 == training.history.best_epoch
    with torch.inference_mode():
        right = training.network(torch.from_numpy(training_data.val.images)).argmax(dim=1).numpy()
    assert (right == training_data.val.labels).mean() == pytest.approx(training.history.best["val/accuracy"])
    again = train(training_data, params, seed=7, resumption=resumption)
    assert again.history.records == training.history.records  # killed before its export, it does not train further
    assert hash_weights(again.network) == hash_weights(training.network)


def test_train__few_images__does_not_stop_before_it_measures_what_it_has_learned(training_data):
    few = LabelledImages(training_data.train.images[:60], training_data.train.labels[:60])
    data = type(training_data)(**{**training_data.__dict__, "train": few})
    params = with_params(batch_size=64, weight_averaging=0.99, patience_epochs=2, epochs=80)
    training = train(data, params, seed=7)
    losses = [record["val/loss"] for record in training.history.records]
    assert any(min(losses[:n]) <= min(losses[n : n + 2]) for n in range(1, 40))  # patience would have run out
    assert len(losses) > 50  # one step an epoch
    assert training.history.best["val/accuracy"] > 0.9


def test_train__loss_not_finite__names_epoch_and_learning_rate(training_data):
    broken = LabelledImages(training_data.train.images, training_data.train.labels)
    data = type(training_data)(**{**training_data.__dict__, "train": broken, "std": (1e-38,)})
    with pytest.raises(Refusal, match=r"loss of epoch 1: nan .*learning rate") as caught:
        train(data, with_params(epochs=1), seed=7)
    assert "learning_rate" in caught.value.way_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_train__gpu_asked_for_where_there_is_none__is_refused(training_data):
    with pytest.raises(Refusal, match="accelerator gpu"):
        train(training_data, with_params(accelerator="gpu"), seed=7)


def test_train__checkpoint_cannot_be_written__asks_for_another_try(training_data, tmp_path):
    in_the_way = tmp_path / "a file"
    in_the_way.touch()
    with pytest.raises(TryLater, match="checkpoint"):
        train(training_data, with_params(epochs=1), seed=7, resumption=Resumption(in_the_way / "x.ckpt", "x"))


def test_train__one_image_more_than_a_batch__trains(training_data):
    few = LabelledImages(training_data.train.images[:33], training_data.train.labels[:33])
    data = type(training_data)(**{**training_data.__dict__, "train": few})
    assert math.isfinite(train(data, with_params(epochs=1), seed=7).history.best["train/loss"])


def test_train__class_weights__raise_the_weighted_classes_share(training_data):
    weights = np.array([0.01, 0.01, 3.0], dtype=np.float32)
    data = type(training_data)(**{**training_data.__dict__, "class_weights": weights})
    shares = {}
    for weighted in (True, False):
        network = train(data, with_params(epochs=1, class_weights=weighted), seed=7).network
        with torch.inference_mode():
            predicted = network(torch.from_numpy(data.val.images)).argmax(dim=1)
        shares[weighted] = (predicted == 2).float().mean()
    assert shares[True] > shares[False]


class SignalAt(pl.Callback):
    """Sends a signal to this process in the second epoch."""

    def __init__(self, signum: signal.Signals) -> None:
        self._signum = signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), self._signum)


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """A process that a shell has started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("signum", "ending"), [(signal.SIGTERM, SystemExit(128 + signal.SIGTERM)), (signal.SIGINT, KeyboardInterrupt())]
)
def test_train__ended_from_outside__says_so_and_can_be_resumed(
    training_data, uninterrupted, tmp_path, signum, ending, heeds_sigint
):
    resumption = Resumption(tmp_path / "training.ckpt", "same inputs")
    handler = signal.getsignal(signum)
    with pytest.raises(type(ending)) as caught:
        train(training_data, PARAMS, seed=7, resumption=resumption, observers=[SignalAt(signum)])
    assert caught.value.args == ending.args
    assert signal.getsignal(signum) == handler
    resumed = train(training_data, PARAMS, seed=7, resumption=resumption)
    assert hash_weights(resumed.network) == hash_weights(uninterrupted.network)


def test_train__ends__leaves_pytorch_s_settings_as_they_were(training_data):
    assert not torch.are_deterministic_algorithms_enabled()
    train(training_data, with_params(epochs=1), seed=7, history=EpochHistory(1))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
