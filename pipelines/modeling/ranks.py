"""Several processes that train one network together: each rank starts, ends and fails with the others.

The process that calls `train` is rank 0; it keeps the history, the checkpoint and everything after.  The others are
started here, as `torchrun` would, and have nothing to do but their share of each batch.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException

import pipelines
from pipelines.errors import EXIT_TRY_LATER, TryLater
from pipelines.modeling.training_data import TrainingData
from pipelines.params import ModelTrainingParams

_HOST = "127.0.0.1"
_LOST_WITHIN_S = 5.0  # of an error of the transport, the process whose end caused it is seen to have ended
_STUCK_AFTER_S = 20.0  # rank 0 should have met that error itself by then
_SHARED_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")  # Lightning sets them and leaves them


@dataclass(frozen=True)
class Rank:
    """Which of the processes this one is.

    Attributes:
        number: from 0.
        world: how many there are.
        port: where they meet, on this machine.
    """

    number: int
    world: int
    port: int


@dataclass(frozen=True)
class RankJob:
    """What another rank must know to train along; it travels as a pickle through a pipe of this process's own.

    Attributes:
        data: arrays that are memory maps travel as the names of their files.
        checkpoint: where all ranks go on from, or None.
        fingerprint: of the checkpoint that rank 0 keeps; None keeps none.
        threads: of each rank on the CPU.
        rank: whose job it is.
    """

    data: TrainingData
    params: ModelTrainingParams
    seed: int
    checkpoint: Path | None
    fingerprint: str | None
    threads: int
    rank: Rank


class LocalRanks(ClusterEnvironment):
    """Tells Lightning that the processes are there already."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning's own launcher would start the whole stage once more for each rank."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return _HOST

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return self._rank.port

    @staticmethod
    def detect() -> bool:
        """It is given, never guessed."""
        return False

    def world_size(self) -> int:
        """How many ranks there are."""
        return self._rank.world

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """This process's number."""
        return self._rank.number

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """The same: all of them are on this machine."""
        return self._rank.number

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


class EndAtOnce(pl.Callback):
    """Ends a rank on SIGTERM between two steps of Python, as any process.

    Lightning's own handler sends a message to the other ranks from wherever the signal was met, where they may be
    waiting for another one: both sides would then wait for ever.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Take Lightning's handler away, which it has set by now and takes back at the end."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)


def _end(_signum: int, _frame: object) -> None:
    raise SIGTERMException


@contextmanager
def other_ranks(job: RankJob) -> Iterator[None]:
    """Have ranks 1 and up train along for the block; they end with it, however it ends.

    Args:
        job: of this process, rank 0.

    Raises:
        TryLater: one of them was ended from outside.
    """
    threads = torch.get_num_threads()
    before = {name: os.environ.get(name) for name in _SHARED_VARIABLES}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Lightning does not give it back where its own end fails
    others = _Others([_start(replace(job, rank=replace(job.rank, number=n))) for n in range(1, job.rank.world)])
    torch.set_num_threads(job.threads)
    try:
        with others.watched():
            yield
    except RuntimeError as error:  # what the loss of a peer looks like
        if lost := others.lost():
            raise TryLater(lost) from error
        raise
    finally:
        others.end()
        torch.set_num_threads(threads)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Others:
    """The processes of ranks 1 and up."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this process, too, when one of the others has ended and this one waits for it unaware."""
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over,), name="ranks", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def lost(self) -> str:
        """What to say of a rank that has ended badly; empty where none has."""
        deadline = time.monotonic() + _LOST_WITHIN_S
        while True:
            for number, process in enumerate(self._processes, start=1):
                if process.poll():
                    return _describe_loss(number, process.returncode)
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)

    def end(self) -> None:
        """They have nothing to finish: what counts is rank 0's."""
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.2):
            if not any(process.poll() for process in self._processes):
                continue
            if over.wait(_STUCK_AFTER_S):
                return
            print(self.lost(), file=sys.stderr, flush=True)  # noqa: T201 - the process's last words
            self.end()
            os._exit(EXIT_TRY_LATER)


def _start(job: RankJob) -> subprocess.Popen[bytes]:
    """Start a rank on the same copy of the code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.modeling.training_rank"],
        cwd=Path(pipelines.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    if process.stdin is None:
        raise RuntimeError("a rank without a pipe")
    pickle.dump(job, process.stdin)
    process.stdin.flush()  # and not closed: the rank ends when this process does, and the pipe with it
    return process


def _describe_loss(number: int, code: int) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"model_training: rank {number} of the training was ended ({how})\n"
        "  what to do: try again; training goes on from its last checkpoint. Where it happens again, look for a lack "
        "of memory"
    )
