"""A place for one release where no services are up: the service as a child process on free ports, for a short time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipelines.core.free_ports import any_free_port
from pipelines.errors import EXIT_TRY_LATER, Refusal, TryLater
from pipelines.release.http_exchange import fetch
from pipelines.release.slot_metrics import fetch_metrics, read_counts
from pipelines.release.targets import ReleaseRef, Slot, SlotCounters

_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOG_LINES = 15
_END_S = 30.0


class OwnProcess:
    """Serves one release with one worker; the part of a `ReleaseTarget` that staging needs.

    Args:
        folder: for its log and spool; where it runs, so that it imports the installed code and no copy of it.
        environment: `PERCH_SERVING_*` that every service of this home has.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._release: ReleaseRef | None = None
        self._port, self._metrics_port, self._started_at = 0, 0, 0.0

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Start the service; it verifies the release before it loads anything of it."""
        self.remove(slot)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port, self._metrics_port = any_free_port(), any_free_port()
        own = {
            "RELEASE_DIGEST": release.digest,
            "HOST": _HOST,
            "PORT": self._port,
            "METRICS_HOST": _HOST,
            "METRICS_PORT": self._metrics_port,
            "WORKERS": 1,
            "SPOOL_DIR": self._folder / "spool",
        }
        environment = {**os.environ, **self._environment}
        environment |= {f"PERCH_SERVING_{name}": str(value) for name, value in own.items()}
        environment.pop("PERCH_SERVING_PREDICTIONS_URL", None)  # these answers are nobody's
        self._release, self._started_at = release, time.time()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving", release.address],
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until it takes requests.

        Raises:
            Refusal: it ended instead; the message holds its last lines.
            TryLater: it was not ready in time, or its store does not answer.
        """
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            code = self._process.poll() if self._process else None
            if code == EXIT_TRY_LATER:
                raise TryLater(
                    f"the service in the slot {slot} cannot fetch or unpack its release:\n{self._log_tail()}\n"
                    "  what to do: mend what it says, then try again; it says nothing against the release"
                )
            if code is not None:
                raise Refusal(
                    f"the service in the slot {slot}",
                    f"ended while starting, with exit code {code}; the last lines of its log:\n{self._log_tail()}",
                    way_out="mend that, then try again",
                )
            if time.monotonic() > deadline:
                raise TryLater(
                    f"the service in the slot {slot}: not ready after {timeout_s:g} s\n{self._log_tail()}\n"
                    "  what to do: try again; model_release.ready_timeout_s is the limit"
                )
            time.sleep(0.05)

    def observe(self, slot: Slot) -> SlotCounters | None:  # noqa: ARG002
        """What it has counted; None when it cannot be asked or serves another release."""
        if self._release is None:
            return None
        try:
            counts = read_counts(fetch_metrics(self._metrics_port))
        except (OSError, ValueError):
            return None
        if counts.release != self._release.digest:
            return None
        return SlotCounters(
            taken_at=time.time(),
            started_at=self._started_at,
            requests=counts.requests,
            errors=counts.errors,
            crashes=max(0, counts.worker_starts - 1),
            latency_buckets=counts.latency_buckets,
            labels=counts.labels,
            client_errors=counts.client_errors,
        )

    def remove(self, slot: Slot) -> None:  # noqa: ARG002
        """End it, and whatever it left."""
        process, self._process, self._release = self._process, None, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def slot_url(self, slot: Slot) -> str:  # noqa: ARG002
        """Its address."""
        return f"http://{_HOST}:{self._port}"

    @property
    def _log(self) -> Path:
        return self._folder / "staging.log"

    def _is_ready(self) -> bool:
        try:
            fetch(f"http://{_HOST}:{self._port}/readyz", 3.0)
        except OSError:
            return False
        return True

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])


def _end_with_parent() -> None:
    """Have the kernel end the service when this process is killed; SIGTERM, so that it ends its workers, too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
