"""Each caller gets its rate and its burst, from several real processes as from one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.callers import ANYBODY, Caller
from serving.problems import RATE_LIMITED, TOO_LARGE, Problem
from serving.rate_limits import FILE_NAME, RateLimiter

PROJECT = Path(__file__).parents[3]


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def _caller(name: str = "a", rate_per_s: float = 10.0, burst: int = 20) -> Caller:
    return Caller(name, frozenset(), rate_per_s, burst)


def _granted(limiter: RateLimiter, caller: Caller, tries: int, cost: float = 1.0) -> int:
    count = 0
    for _ in range(tries):
        try:
            limiter.take(caller, cost)
        except Problem as problem:
            if problem.kind is not RATE_LIMITED:
                raise
        else:
            count += 1
    return count


@pytest.fixture(params=["shared", "alone"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "shared" else None


def test_take__burst_then_rate__grants_exactly_that(folder: Path | None) -> None:
    clock = _Clock()
    limiter = RateLimiter(folder, clock)
    assert _granted(limiter, _caller(), 100) == 20
    clock.now += 0.5
    assert _granted(limiter, _caller(), 100) == 5
    clock.now += 3600
    assert _granted(limiter, _caller(), 100) == 20
    assert _granted(limiter, _caller("b"), 100) == 20


def test_take__costs__count_as_so_many(folder: Path | None) -> None:
    clock = _Clock()
    limiter = RateLimiter(folder, clock)
    assert _granted(limiter, _caller(), 10, cost=8) == 2
    assert _granted(limiter, _caller(), 10, cost=4) == 1
    clock.now += 0.8
    assert _granted(limiter, _caller(), 10, cost=8) == 1
    assert _granted(limiter, _caller(), 10, cost=0) == 10


def test_take__refused__names_the_moment_when_it_will_be_granted() -> None:
    clock = _Clock()
    limiter = RateLimiter(None, clock)
    limiter.take(_caller(), 20)
    with pytest.raises(Problem) as caught:
        limiter.take(_caller(), 15)
    assert caught.value.headers["Retry-After"] == "2"  # 1.5 s, rounded up
    assert caught.value.headers["RateLimit"] == '"caller";r=0;t=2'
    clock.now += 1.49
    assert _granted(limiter, _caller(), 1, cost=15) == 0
    clock.now += 0.01
    assert _granted(limiter, _caller(), 1, cost=15) == 1


def test_take__more_than_the_bucket_holds__is_too_large_and_costs_nothing() -> None:
    limiter = RateLimiter(None, _Clock())
    with pytest.raises(Problem, match="at most 20 images") as caught:
        limiter.take(_caller(), 21)
    assert caught.value.kind is TOO_LARGE
    assert _granted(limiter, _caller(), 100) == 20


def test_headers__after_a_grant__are_those_of_the_draft() -> None:
    standing = RateLimiter(None, _Clock()).take(_caller(rate_per_s=8.0), 3)
    assert standing.headers() == {"RateLimit-Policy": '"caller";q=20;w=3', "RateLimit": '"caller";r=17;t=1'}


def test_take__without_a_limit__is_granted_and_says_nothing() -> None:
    assert RateLimiter(None).take(ANYBODY, 1e9).headers() == {}


def test_take__two_keys_of_one_name__have_a_bucket_each() -> None:
    limiter = RateLimiter(None, _Clock())
    old, new = Caller("a", frozenset(), 1.0, 5, "old"), Caller("a", frozenset(), 1.0, 5, "new")
    assert (_granted(limiter, old, 9), _granted(limiter, new, 9)) == (5, 5)


@pytest.mark.parametrize(("now", "burst"), [(5.0, 1000), (1000.0, 20)], ids=["a reboot", "a lower burst"])
def test_take__a_bucket_from_another_clock_or_burst__is_begun_anew(now: float, burst: int, tmp_path: Path) -> None:
    clock = _Clock()
    assert _granted(RateLimiter(tmp_path, clock), _caller(burst=1000), 1001) == 1000
    clock.now = now
    assert _granted(RateLimiter(tmp_path, clock), _caller(burst=burst), 1001) == burst


def test_take__many_thousand_callers__forgets_none_whose_bucket_is_not_full() -> None:
    clock = _Clock()
    limiter = RateLimiter(None, clock)
    for number in range(5_000):  # each uses up its bucket, and is full again when the next thousands come
        assert _granted(limiter, _caller(f"early-{number}"), 1, cost=20) == 1
    clock.now += 2.0
    for number in range(5_000):
        assert _granted(limiter, _caller(f"late-{number}"), 1, cost=20) == 1
    again = sum(_granted(limiter, _caller(f"late-{number}"), 1) for number in range(5_000))
    assert again == 0


_WORKER = """
import sys, time
from pathlib import Path
from serving.callers import Caller
from serving.problems import Problem
from serving.rate_limits import RateLimiter
limiter = RateLimiter(Path(sys.argv[1]))
caller = Caller("a", frozenset(), 2000.0, 100)
print("ready", flush=True)
start = float(sys.stdin.readline())
time.sleep(max(0.0, start - time.monotonic()))
granted = tried = 0
while time.monotonic() < start + 1.0:
    tried += 1
    try:
        limiter.take(caller)
        granted += 1
    except Problem:
        pass
print(granted, tried, time.monotonic())
"""


def test_take__four_processes_at_once__grant_together_what_one_would(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start = time.monotonic() + 0.1
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{start}\n")
        worker.stdin.flush()
    done = [worker.communicate(timeout=60)[0].split() for worker in workers]
    grants = [int(granted) for granted, _, _ in done]
    tried, took_s = sum(int(tries) for _, tries, _ in done), max(float(end) for *_, end in done) - start
    assert min(grants) > 0, "one had its turn only when the others had ended"
    assert tried > 2 * sum(grants), "the processes asked too seldom to compete"
    # As many as there were units, but for those that came while the bucket was full because nobody could run.
    assert 500 < sum(grants) <= 100 + 2000 * took_s + 1


def test_take__a_process_killed_while_it_takes__holds_nobody_up(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdout.readline()
    worker.stdin.write(f"{time.monotonic()}\n".encode())
    worker.stdin.flush()
    time.sleep(0.2)  # it spends half of its time inside the lock
    worker.kill()
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    limiter = RateLimiter(tmp_path)
    assert _granted(limiter, Caller("a", frozenset(), 2000.0, 100), 10_000) >= 1
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
