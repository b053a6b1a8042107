"""Two processes train one network together on CPUs: the same bits each time, and neither outlives the other."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import pytorch_lightning as pl
import torch

from pipelines.core.free_ports import any_free_port
from pipelines.errors import EXIT_TRY_LATER, Refusal, TryLater
from pipelines.modeling import preconditions, ranks
from pipelines.modeling.data_module import BatchSampler
from pipelines.modeling.lit_module import Loss
from pipelines.modeling.training import Resumption, Training, train
from pipelines.modeling.training_data import LabelledImages, TrainingData
from pipelines.modeling.weights import hash_weights
from pipelines.params import ModelTrainingParams, SmallCNNParams
from tests.unit.modeling.test_training import run_killed

PARAMS = ModelTrainingParams(
    small_cnn=SmallCNNParams(widths=[8, 16], dropout=0.2),
    epochs=3,
    batch_size=32,
    learning_rate=0.02,
    weight_averaging=0.9,
    accelerator="cpu",
    devices=2,
)
WEIGHTS = torch.tensor([1.0, 4.0, 0.5])


class EndAfter(pl.Callback):
    """Raises at the end of an epoch (from 0), behind its checkpoint."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch > self._epoch:
            raise InterruptedError("as if killed")


class KillAnotherRank(pl.Callback):
    """Ends rank 1 with SIGKILL in the middle of the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            rank_processes()[0].kill()


def rank_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "pipelines.modeling.training_rank" in child.cmdline()]


class Trained(NamedTuple):
    """What is compared of a training."""

    records: list[dict[str, float]]
    best: dict[str, float]
    weights: str

    @classmethod
    def by(cls, training: Training) -> "Trained":
        return cls(training.history.records, training.history.best, hash_weights(training.network))


def apart(work: Callable[[], Any]) -> Any:
    """Call it in a forked process: the transport's threads outlive a training, and other tests fork, which may hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send((work(), ""))
        except BaseException:  # noqa: BLE001 - the process that waits raises it
            sender.send((None, traceback.format_exc()))

    process = context.Process(target=call)
    process.start()
    sender.close()
    value, failure = receiver.recv()
    process.join()
    assert not failure, failure
    return value


@pytest.fixture(scope="module")
def together(training_data) -> Trained:
    def work() -> Trained:
        trained = Trained.by(train(training_data, PARAMS, seed=7))
        assert rank_processes() == []
        assert not torch.distributed.is_initialized()
        return trained

    return apart(work)


def test_train__by_two_processes__learns_as_one_does(training_data, together):
    alone = Trained.by(train(training_data, PARAMS.model_copy(update={"devices": 1}), seed=7))
    assert together.best["val/accuracy"] > 0.9
    assert together.best["val/accuracy"] == pytest.approx(alone.best["val/accuracy"], abs=0.05)
    # Before the first step both see the same images with the same weights; what differs is how a batch is normalised.
    assert together.records[0]["train/loss"] == pytest.approx(alone.records[0]["train/loss"], rel=0.15)
    assert [record["lr"] for record in together.records] == [record["lr"] for record in alone.records]


def test_train__by_two_processes_ended_and_started_again__same_weights_bit_for_bit(training_data, together, tmp_path):
    resumption = Resumption(tmp_path / "training.ckpt", "same inputs")

    def work() -> Trained:
        with pytest.raises(InterruptedError):
            train(training_data, PARAMS, seed=7, resumption=resumption, observers=[EndAfter(0)])
        assert rank_processes() == []
        assert [file.name for file in tmp_path.iterdir()] == ["training.ckpt"]
        return Trained.by(train(training_data, PARAMS, seed=7, resumption=resumption))

    trained = apart(work)
    assert trained.records == together.records
    assert trained.weights == together.weights


def test_train__another_rank_killed__may_be_tried_later_and_does_not_hang(training_data):
    def work() -> None:
        with pytest.raises(TryLater, match=r"rank 1 of the training was ended .SIGKILL."):
            train(training_data, PARAMS, seed=7, observers=[KillAnotherRank()])
        assert signal.getsignal(signal.SIGTERM) != ranks._end
        assert not torch.distributed.is_initialized()

    started = time.monotonic()
    apart(work)
    assert time.monotonic() - started < 60


def test_train__another_rank_that_never_comes__ends_the_process(training_data, monkeypatch, capfd):
    def start(job: ranks.RankJob) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE)

    monkeypatch.setattr(ranks, "_start", start)
    monkeypatch.setattr(ranks, "_STUCK_AFTER_S", 1.0)
    assert run_killed(lambda: train(training_data, PARAMS, seed=7)) == EXIT_TRY_LATER
    assert "rank 1 of the training was ended (exit code 3)" in capfd.readouterr().err


def test_rank__parent_killed__ends(training_data, tmp_path):
    """Its pipe tells it, wherever it is."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "pipelines.modeling.training_rank"]
    process = subprocess.Popen(command, stdin=read, stderr=subprocess.DEVNULL)
    os.close(read)
    job = ranks.RankJob(training_data, PARAMS, 7, None, None, 1, ranks.Rank(1, 2, any_free_port()))
    with os.fdopen(write, "wb") as pipe:
        pickle.dump(job, pipe)
        pipe.flush()
        time.sleep(1)
        assert process.poll() is None
    assert process.wait(60) != 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"devices": 64}, "more processes than there are cores"),
        ({"batch_size": 3}, "batches of the training split hold 2 images"),
    ],
)
def test_train__more_processes_than_there_is_work_for__is_refused(training_data, changes, what, monkeypatch):
    with pytest.raises(Refusal, match=what):
        train(training_data, PARAMS.model_copy(update=changes), seed=7)


def test_preconditions__more_processes_than_cores__are_refused_when_the_run_opens(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Refusal, match=r"model_training.devices 64"):
        preconditions.check_training_preconditions(PARAMS.model_copy(update={"devices": 64}))


def test_loss__in_parts__adds_up_to_the_whole_batch_and_its_gradient():
    torch.manual_seed(1)
    loss, labels = Loss(WEIGHTS, label_smoothing=0.1), torch.randint(0, 3, (9,))
    whole = torch.randn(9, 3, requires_grad=True)
    loss.training(whole, labels).backward()
    parts = whole.detach().clone().requires_grad_(True)
    sums = [loss.training_sums(parts[rows], labels[rows]) for rows in (slice(0, 5), slice(5, 9))]
    shared = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    shared.backward()
    assert whole.grad is not None
    assert torch.allclose(parts.grad, whole.grad, atol=1e-7)


def test_batch_sampler__parts_of_three_ranks__are_the_batches_of_one():
    whole = list(BatchSampler(50, 8, seed=7))
    parts = [list(BatchSampler(50, 8, seed=7, rank=rank, world=3)) for rank in range(3)]
    assert [np.concatenate(batch).tolist() for batch in zip(*parts, strict=True)] == [rows.tolist() for rows in whole]


def test_training_data__mapped_images__travel_as_the_name_of_their_file(tmp_path):
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    np.save(tmp_path / "train.npy", images)
    mapped = LabelledImages(np.load(tmp_path / "train.npy", mmap_mode="r"), np.arange(3))
    other = pickle.loads(pickle.dumps(mapped))
    assert isinstance(other.images, np.memmap)
    assert np.array_equal(other.images, images)
    part = LabelledImages(mapped.images[1:], mapped.labels[1:])
    assert np.array_equal(pickle.loads(pickle.dumps(part)).images, images[1:])


def test_training_data__pickled__says_the_same(training_data: TrainingData):
    other = pickle.loads(pickle.dumps(training_data))
    assert np.array_equal(other.train.images, training_data.train.images)
    assert other.contract == training_data.contract


def test_ranks__on_sigterm__end_as_processes_do():
    with pytest.raises(SystemExit):
        ranks._end(signal.SIGTERM, None)
