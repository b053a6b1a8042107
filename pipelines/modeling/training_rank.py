"""A process that trains along: `python -m pipelines.modeling.training_rank`, started by rank 0 and told what to do."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading

import torch

from pipelines.errors import PerchError
from pipelines.modeling.ranks import RankJob
from pipelines.modeling.training import train_along


def main() -> None:
    """Train as the pickle on standard input says; end when whoever wrote it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to answer
    job: RankJob = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the pipe of our own parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(job.threads)
    try:
        train_along(job)
    except PerchError as error:
        sys.exit(error.exit_code)  # rank 0 met the same, and says so


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
