import threading
import time

import pytest

from pipelines.data.parallel import map_ordered


def test_map_ordered__uneven_work__keeps_the_order():
    def work(number: int) -> int:
        time.sleep(0.002 if number % 3 else 0.01)
        return number * number

    assert list(map_ordered(work, range(30), threads=4, ahead=8)) == [number * number for number in range(30)]


def test_map_ordered__slow_consumer__takes_no_more_than_asked_ahead():
    taken = 0

    def items():
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    for done, _ in enumerate(map_ordered(lambda number: number, items(), threads=2, ahead=5), start=1):
        assert taken <= done + 5


def test_map_ordered__work_fails__raises_in_its_turn_and_stops():
    started = []

    def work(number: int) -> int:
        started.append(number)
        if number == 5:
            raise ValueError("five")
        return number

    results: list[int] = []
    with pytest.raises(ValueError, match="five"):
        results.extend(map_ordered(work, range(1000), threads=2, ahead=4))
    assert results == [0, 1, 2, 3, 4]
    assert len(started) < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
