"""The files in which worker processes share their metrics, and what becomes of a dead worker's.

prometheus_client keeps one file per process and kind of metric (`counter_71.db`, `gauge_livesum_71.db`).  A dead
worker's counters must go on counting, or the sums would fall and Prometheus would take that for a restart; its live
gauges must not, or its requests in flight would stay for ever.  BentoML's supervisor starts a new worker for a dead
one and leaves the files.  So each new worker adds the dead ones' counters up in one file, which keeps a service whose
worker dies every few seconds from filling the disk.

Who lives holds a lock on `<pid>.alive`.  The kernel takes it away at the moment of death; a process id stays until
the supervisor has looked (every 10 s, with BentoML's) and may be somebody else's afterwards.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_KINDS = ("counter", "histogram", "summary")
_OF_THE_DEAD = "dead"


def live_metrics(directory: str) -> Iterable[Metric]:
    """All workers' metrics, added up; gauges of living workers only."""
    with _locked(directory, fcntl.LOCK_SH):
        living = [str(file) for file in _files(directory) if not file.name.startswith("gauge_live") or _is_alive(file)]
        return list(MultiProcessCollector.merge(living, accumulate=True))


def join(directory: str) -> TextIO:
    """Counts this process among the living, after a tidying: dead workers' live gauges go, their counters are added up.

    Returns:
        The file whose lock says that this process lives; it must stay open.
    """
    with _locked(directory, fcntl.LOCK_EX):
        sign_of_life = _sign_of_life(directory, str(os.getpid())).open("a")
        fcntl.flock(sign_of_life, fcntl.LOCK_EX)
        _tidy(directory)
    return sign_of_life


def _tidy(directory: str) -> None:
    dead = [file for file in _files(directory) if not _is_alive(file)]
    for pid in {_owner(file) for file in dead} - {_OF_THE_DEAD}:
        mark_process_dead(int(pid), directory)
        _sign_of_life(directory, pid).unlink(missing_ok=True)
    for kind in _KINDS:
        files = [file for file in dead if file.name.startswith(f"{kind}_")]
        if len(files) > 1 or (files and _owner(files[0]) != _OF_THE_DEAD):
            _fold(files, Path(directory) / f"{kind}_{_OF_THE_DEAD}.db")


def _fold(files: list[Path], target: Path) -> None:
    """Replaces the files by one.

    A kill between the last two steps counts the dead ones twice, once: a few microseconds in a worker's life.
    """
    new = target.with_suffix(".new")
    new.unlink(missing_ok=True)
    sums = MmapedDict(str(new))
    for metric in MultiProcessCollector.merge([str(file) for file in files], accumulate=False):
        for sample in metric.samples:
            names, values = list(sample.labels), list(sample.labels.values())
            key = mmap_key(metric.name, sample.name, names, values, metric.documentation)
            sums.write_value(key, sample.value, 0.0)
    sums.close()
    new.rename(target)
    for file in files:
        if file != target:
            file.unlink()


def _files(directory: str) -> list[Path]:
    """The files that hold anything: one that a worker is just making is empty for a moment, and cannot be read."""
    return sorted(file for file in Path(directory).glob("*.db") if file.stat().st_size)


def _owner(file: Path) -> str:
    return file.stem.rpartition("_")[2]


def _sign_of_life(directory: str | Path, pid: str) -> Path:
    return Path(directory) / f"{pid}.alive"


def _is_alive(file: Path) -> bool:
    try:
        with _sign_of_life(file.parent, _owner(file)).open() as sign:
            fcntl.flock(sign, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _locked(directory: str, how: int) -> Iterator[None]:
    """Keeps a reader from seeing half of a tidying; the kernel frees the lock of a killed process."""
    with (Path(directory) / "tidying.lock").open("a") as lock:
        fcntl.flock(lock, how)
        yield
