from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.prediction_ids import first_id_at, new_prediction_id, time_of

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def test_new_prediction_id__many__are_unique_and_carry_their_time() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    ids = [new_prediction_id() for _ in range(10_000)]
    after = datetime.now(UTC)
    assert len(set(ids)) == len(ids)
    assert all(len(entry) == 26 and before <= time_of(entry) <= after for entry in ids)
    assert [time_of(entry) for entry in ids] == sorted(time_of(entry) for entry in ids)


def test_time_of__the_specifications_example__is_its_time() -> None:
    # 01ARZ3NDEKTSV4RRFFQ69G5FAV is the example of the ULID specification's text
    assert time_of("01ARZ3NDEKTSV4RRFFQ69G5FAV") == datetime(2016, 7, 30, 23, 54, 10, 259_000, tzinfo=UTC)


MOMENTS = st.integers(0, 253_402_300_799_999_999).map(lambda us: EPOCH + timedelta(microseconds=us))  # to year 9999


@given(st.lists(MOMENTS, min_size=2))
def test_first_id_at__any_moments__sorts_as_they_do(moments: list[datetime]) -> None:
    milliseconds = [moment.replace(microsecond=moment.microsecond // 1000 * 1000) for moment in moments]
    ids = [first_id_at(moment) for moment in moments]
    assert [time_of(entry) for entry in ids] == milliseconds
    assert sorted(ids) == [first_id_at(moment) for moment in sorted(moments)]


@pytest.mark.parametrize(
    "wrong",
    ["", "01ARZ3NDEKTSV4RRFFQ69G5FA", "01ARZ3NDEKTSV4RRFFQ69G5FAVV", "01ARZ3NDEKTSV4RRFFQ69G5FAI",
     "01arz3ndektsv4rrffq69g5fav", "01ARZ3NDEKTSV4RRFFQ69G5F\n.", "\u06601ARZ3NDEKTSV4RRFFQ69G5FAV", "Z" * 26],
)  # fmt: skip
def test_time_of__no_id__is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="prediction id"):
        time_of(wrong)


def test_first_id_at__before_1970__is_refused() -> None:
    with pytest.raises(ValueError, match="before 1970"):
        first_id_at(datetime(1969, 12, 31, tzinfo=UTC))
