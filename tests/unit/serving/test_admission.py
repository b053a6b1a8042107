import pytest

from serving.admission import Admission
from serving.problems import OVERLOADED, Problem


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
