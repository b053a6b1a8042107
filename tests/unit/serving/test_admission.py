import pytest

from serving.admission import Admission, bound_requests
from serving.problems import OVERLOADED, Problem


@pytest.mark.parametrize(
    ("model_s", "threads", "bound"),
    [
        (0.0003, 1, 256),  # 8,333 in 2.5 s: what the settings allow is the bound
        (0.1, 1, 25),
        (0.1, 2, 50),
        (5.0, 1, 8),
    ],
)
def test_bound_requests__a_slow_model__holds_what_it_answers_in_time(model_s: float, threads: int, bound: int) -> None:
    assert bound_requests(256, model_s=model_s, threads=threads, timeout_s=10.0) == bound


def test_bound_requests__fewer_allowed_than_the_fewest__are_kept_to() -> None:
    assert bound_requests(1, model_s=5.0, threads=1, timeout_s=10.0) == 1


def test_work__places_left__are_given_back_even_after_an_error() -> None:
    admission = Admission(max_requests=1, max_buffered_bytes=10)
    with pytest.raises(KeyError), admission.work():
        raise KeyError
    with admission.work():
        assert admission.requests == 1
    assert admission.requests == 0


def test_work__all_places_taken__is_refused_at_once_and_takes_none() -> None:
    admission = Admission(max_requests=1, max_buffered_bytes=10)
    with admission.work():
        with pytest.raises(Problem) as caught, admission.work():
            raise AssertionError("two are inside")
        assert admission.requests == 1
    assert caught.value.kind is OVERLOADED
    assert caught.value.headers["Retry-After"] == "1"


def test_take_bytes__room_just_enough__is_given() -> None:
    admission = Admission(max_requests=1, max_buffered_bytes=10)
    admission.take_bytes(10)
    with pytest.raises(Problem, match="10 bytes"):
        admission.take_bytes(1)
    admission.give_bytes(10)
    admission.take_bytes(1)
    assert admission.buffered_bytes == 1
