"""How often each caller may ask: a token bucket per caller, exact across the worker processes of one machine.

The bucket is kept as one number, the theoretical arrival time of the Generic Cell Rate Algorithm (ITU-T I.371; with
costs as in Brandur Leach's throttled): a request of cost c is granted when `max(TAT, now) + c / rate` lies at most
`burst / rate` after now, and that sum is the new TAT.  A TAT in the past means a full bucket, so that forgetting it
loses nothing: the table needs no clearing and no list of who is in it.

Why not the library `limits`: it counts in the memory of one process, or in Redis and its kin, a server more to run.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from serving.callers import Caller
from serving.problems import RATE_LIMITED, TOO_LARGE, Problem
from serving.settings import ServingSettings

FILE_NAME = "rate-limits.bin"
POLICY = '"caller"'

# The table is set-associative: a caller's hash chooses a row, where any of its places will do.
_ROWS = 4096
_PLACES = 8
_ROW = struct.Struct(f"={_PLACES}Q{_PLACES}d")  # the callers' 64-bit hashes (0: free), then their TATs in seconds
_HASH = struct.Struct("=Q")
_TAT = struct.Struct("=d")
_BYTES = _ROWS * _ROW.size  # 512 KiB


class Standing(NamedTuple):
    """What a caller has left after a request was granted.

    Attributes:
        burst: most units at once.
        window_s: seconds in which an empty bucket fills.
        remaining: units that could be taken now.
        reset_s: seconds until the bucket is full again.
    """

    burst: int
    window_s: float
    remaining: float
    reset_s: float

    def headers(self) -> dict[str, str]:
        """`RateLimit-Policy` and `RateLimit`, as in draft-ietf-httpapi-ratelimit-headers-11 (May 2026)."""
        if math.isinf(self.remaining):
            return {}
        return {
            "RateLimit-Policy": f"{POLICY};q={self.burst};w={max(1, math.ceil(self.window_s))}",
            "RateLimit": f"{POLICY};r={int(self.remaining)};t={math.ceil(self.reset_s)}",
        }


_UNLIMITED = Standing(0, 0.0, math.inf, 0.0)


class RateLimiter:
    """Takes units out of callers' buckets.

    Args:
        folder: local folder that the workers share; None counts in this process alone, so that N workers together
            grant N times the rate.  Its file may be removed while no worker runs.
        clock: seconds; the system-wide monotonic clock, which all processes of a machine read alike.
    """

    def __init__(self, folder: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._threads = threading.Lock()  # the kernel's lock below tells processes apart, not threads
        self._handle = -1
        if folder is None:
            self._table = mmap.mmap(-1, _BYTES)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._handle).st_size < _BYTES:
            os.ftruncate(self._handle, _BYTES)  # grows with zeros; by two workers at once, too
        self._table = mmap.mmap(self._handle, _BYTES)

    @classmethod
    def from_settings(cls, settings: ServingSettings) -> RateLimiter:
        """Shares the rates in the folder of the settings, else in the one that BentoML makes for all its workers."""
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        return cls(settings.rate_limits_dir or (Path(shared) if shared else None))

    def take(self, caller: Caller, cost: float = 1.0, *, taken: float = 0.0) -> Standing:
        """Take `cost` units, or say when they will be there.

        Args:
            caller: whose bucket.
            cost: units; a batch costs its number of items.
            taken: that the same request has cost already.

        Raises:
            Problem: RATE_LIMITED with `Retry-After`; TOO_LARGE when the bucket could never hold so much.
        """
        rate, burst = caller.rate_per_s, caller.burst
        if math.isinf(rate):
            return _UNLIMITED
        if cost + taken > burst:
            raise Problem(
                TOO_LARGE,
                f"This request counts as {cost + taken:g} and this credential may use {burst} at once: send at most "
                f"{burst} images in one request, or have the credential's burst raised.",
            )
        window_s = burst / rate
        caller_hash = _hash(caller.bucket or caller.name)
        offset = caller_hash % _ROWS * _ROW.size
        with self._threads:
            shared = self._handle >= 0
            if shared:
                # One row is locked, for two or three microseconds; a worker that dies lets go by dying.
                fcntl.lockf(self._handle, fcntl.LOCK_EX, _ROW.size, offset)
            try:
                row = _ROW.unpack_from(self._table, offset)
                place = _place_of(caller_hash, row)
                now = self._clock()
                tat = row[_PLACES + place]
                # Further ahead than an empty bucket: written before a reboot set the clock back, or for a larger burst.
                if row[place] != caller_hash or tat > now + window_s + 1e-6:
                    tat = now
                ahead_s = max(tat - now, 0.0) + cost / rate
                granted = ahead_s <= window_s + 1e-9
                if granted:
                    _HASH.pack_into(self._table, offset + 8 * place, caller_hash)
                    _TAT.pack_into(self._table, offset + 8 * (_PLACES + place), now + ahead_s)
            finally:
                if shared:
                    fcntl.lockf(self._handle, fcntl.LOCK_UN, _ROW.size, offset)
        if granted:
            return Standing(burst, window_s, max(0.0, (window_s - ahead_s) * rate), ahead_s)
        raise _refusal(caller, cost + taken, ahead_s - window_s, ahead_s - cost / rate)

    def close(self) -> None:
        """Let go of the file."""
        self._table.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@lru_cache(maxsize=65_536)
def _hash(bucket: str) -> int:
    """64 bits, never 0, which marks a free place; the same in every process, unlike Python's own hash."""
    return int.from_bytes(blake2b(bucket.encode(), digest_size=8).digest(), "big") or 1


def _place_of(caller_hash: int, row: tuple[float, ...]) -> int:
    """The caller's place in its row, else the place whose bucket has been full for longest, a free one first."""
    for place in range(_PLACES):
        if row[place] == caller_hash:
            return place
    return min(range(_PLACES), key=lambda place: row[_PLACES + place])


def _refusal(caller: Caller, cost: float, wait_s: float, used_s: float) -> Problem:
    retry_after_s = max(1, math.ceil(wait_s))
    standing = Standing(
        caller.burst,
        caller.burst / caller.rate_per_s,
        max(0.0, caller.burst - used_s * caller.rate_per_s),
        retry_after_s,  # the draft asks that it names the same moment as Retry-After
    )
    return Problem(
        RATE_LIMITED,
        f"This credential may ask {caller.rate_per_s:g} times per second and {caller.burst} times at once, and this "
        f"request counts as {cost:g}: try again in {retry_after_s} s.",
        headers={"Retry-After": str(retry_after_s), **standing.headers()},
    )
