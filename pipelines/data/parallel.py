"""Work in threads with results in order and a bounded number under way, so that memory does not follow the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def map_ordered(
    work: Callable[[Item], Outcome], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Outcome]:
    """Like `map`, in threads: yields in the order of `items`, with at most `ahead` of them taken but not yet yielded.

    An exception of `work` is raised where its result would have been; what had not begun by then is cancelled.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    under_way: deque[Future[Outcome]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
