import io
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pyarrow import parquet

from pipelines.core.prediction_columns import FEEDBACK_COLUMNS, PREDICTION_COLUMNS
from pipelines.core.prediction_ids import first_id_at, new_prediction_id
from pipelines.errors import Refusal
from pipelines.predictions import queries
from pipelines.predictions.queries import Filter, Predictions, dump_json, parse_since
from pipelines.predictions.stores import FolderStore
from pipelines.predictions.tree import Selection

MONDAY = datetime(2026, 11, 16, 10, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def predictions(root: Path):
    with Predictions(FolderStore(root)) as found:
        yield found


def ids(answer) -> list[str]:
    return [row["prediction_id"] for row in answer.records()]


def test_columns__of_a_file_that_the_service_wrote__are_those_of_the_table(predictions, keep, tell) -> None:
    (kept,) = keep(MONDAY, ["circle"])
    tell(kept, "circle", MONDAY)
    for table, columns in (("predictions", PREDICTION_COLUMNS), ("feedback", FEEDBACK_COLUMNS)):
        described = predictions.ask(f"describe {table}", Selection()).records()
        expected = columns | {"time": "TIMESTAMP"}  # the view shows it as UTC without a zone
        assert {row["column_name"]: row["column_type"] for row in described} == expected


def test_columns__of_an_empty_tree__are_the_same(predictions) -> None:
    described = predictions.ask("describe predictions", Selection()).records()
    assert {row["column_name"]: row["column_type"] for row in described} == PREDICTION_COLUMNS | {"time": "TIMESTAMP"}
    assert predictions.latest(Filter(), 5).rows == []
    assert predictions.accuracy(Filter()).rows == []


def test_find__each_of_many__is_found_with_all_its_columns(predictions, keep) -> None:
    kept = [
        *keep(MONDAY, ["circle"] * 5, version="1"),
        *keep(MONDAY, ["square"] * 5, version="2", model="a/b"),
        *keep(MONDAY + DAY, ["circle"] * 5, version="2"),
    ]
    for prediction_id in kept:
        found = predictions.find(prediction_id)
        assert found is not None
        assert found["prediction_id"] == prediction_id
    assert found["probabilities"] == {"circle": pytest.approx(0.9), "square": pytest.approx(0.1)}
    assert list(found) == list(PREDICTION_COLUMNS)
    assert predictions.find(first_id_at(MONDAY)) is None
    with pytest.raises(ValueError, match="prediction id"):
        predictions.find("nonsense")


def test_find__answered_just_after_midnight__is_found_in_the_next_day(predictions, keep) -> None:
    before = datetime(2026, 11, 16, 23, 59, 59, 999_000, tzinfo=UTC)
    (kept,) = keep(before, ["circle"], time=before + timedelta(milliseconds=5))
    found = predictions.find(kept)
    assert found is not None
    assert found["time"].date() == date(2026, 11, 17)


def test_latest__over_days_versions_and_overlapping_files__are_the_newest(predictions, keep, monkeypatch) -> None:
    monkeypatch.setattr(queries, "_FIRST_LOOK", 1)
    kept = sorted(
        prediction_id
        for day in range(4)
        for shift in range(3)
        for prediction_id in keep(MONDAY + day * DAY + timedelta(seconds=shift), ["circle"] * 4, version=str(shift))
    )
    for n_rows in (1, 5, 13, 48, 100):
        assert ids(predictions.latest(Filter(), n_rows)) == kept[::-1][:n_rows]


def test_latest__filters__take_only_what_fits(predictions, keep) -> None:
    keep(MONDAY, ["circle", "square"], version="1", caller="a")
    (doubtful,) = keep(MONDAY + DAY, ["circle"], version="2", confidence=0.55, caller="b")
    keep(MONDAY + 2 * DAY, ["circle"], version="10", model="other")
    assert len(predictions.latest(Filter(model="shapes-classification"), 9).rows) == 3
    assert len(predictions.latest(Filter(version="1"), 9).rows) == 2
    assert len(predictions.latest(Filter(label="square"), 9).rows) == 1
    assert ids(predictions.latest(Filter(max_confidence=0.55), 9)) == [doubtful]
    assert ids(predictions.latest(Filter(caller="b"), 9)) == [doubtful]
    since = (MONDAY + timedelta(seconds=1)).replace(tzinfo=None)
    assert len(predictions.latest(Filter(since=since), 9).rows) == 3


def test_latest__copies_that_a_canary_got__are_left_out_unless_asked_for(predictions, keep) -> None:
    asked = keep(MONDAY, ["circle"] * 2)
    copied = keep(MONDAY, ["square"], version="2", origin="mirror")
    assert set(ids(predictions.latest(Filter(), 10))) == set(asked)
    assert ids(predictions.latest(Filter(origin="mirror"), 10)) == copied
    assert len(predictions.latest(Filter(origin=""), 10).rows) == 3
    assert predictions.count(Filter(), "label").records()[0]["predictions"] == 2


def test_latest__file_of_before_there_was_the_column__reads_as_clients(predictions, keep, root) -> None:
    old = keep(MONDAY, ["circle"])
    (file,) = root.rglob("*.parquet")
    parquet.write_table(parquet.read_table(file).drop_columns("origin"), file)
    assert ids(predictions.latest(Filter(), 10)) == old
    new = keep(MONDAY + DAY, ["circle"])
    found = predictions.latest(Filter(), 10)
    assert (set(ids(found)), {row["origin"] for row in found.records()}) == ({*old, *new}, {"client"})


def test_count__by_each_key__adds_up(predictions, keep) -> None:
    keep(MONDAY, ["circle", "circle", "square"], confidence=0.8)
    keep(MONDAY + DAY, ["circle"], version="2", confidence=0.6)
    by_label = predictions.count(Filter(), "label").rows
    assert by_label == [("circle", 3, 0.733, 0.6), ("square", 1, 0.8, 0.8)]
    assert [row[:2] for row in predictions.count(Filter(), "day").rows] == [
        (date(2026, 11, 16), 3),
        (date(2026, 11, 17), 1),
    ]
    for key in queries.COUNTED_BY:
        assert sum(row[1] for row in predictions.count(Filter(), key).rows) == 4


def test_accuracy__feedback_told_twice__counts_the_latest(predictions, keep, tell) -> None:
    first, second, third, _ = keep(MONDAY, ["circle", "circle", "square", "square"])
    tell(first, "circle", MONDAY + DAY)
    tell(second, "circle", MONDAY + DAY)
    tell(second, "square", MONDAY + 2 * DAY)
    tell(third, "square", MONDAY + DAY)
    tell(new_prediction_id(), "square", MONDAY + DAY)  # of a prediction that is not kept
    model = ("shapes-classification", "1")
    assert predictions.accuracy(Filter()).rows == [
        (*model, "all", 3, 2, 0.667),
        (*model, "circle", 1, 1, 1.0),
        (*model, "square", 2, 1, 0.5),
    ]


def test_feedback__of_one_prediction__comes_in_the_order_it_was_told(predictions, keep, tell) -> None:
    first, second = keep(MONDAY, ["circle", "circle"])
    tell(second, "square", MONDAY + 3 * DAY)
    tell(second, "circle", MONDAY + DAY)
    tell(first, "circle", MONDAY)
    assert [row["true_label"] for row in predictions.feedback(second)] == ["circle", "square"]
    assert predictions.feedback(new_prediction_id()) == []


def test_ask__selection__leaves_out_whole_folders_and_time_is_utc(predictions, keep) -> None:
    keep(MONDAY, ["circle"], version="1")
    keep(MONDAY + DAY, ["circle"], version="2")
    query = "select model_version, time::varchar, probabilities['circle'] > 0.8 from predictions order by 1"
    assert predictions.ask(query, Selection()).rows == [
        ("1", "2026-11-16 10:00:00", True),
        ("2", "2026-11-17 10:00:00", True),
    ]
    assert len(predictions.ask(query, Selection(version="2")).rows) == 1
    assert len(predictions.ask(query, Selection(since=date(2026, 11, 17))).rows) == 1


def test_ask__nonsense__is_refused_with_duckdbs_reason(predictions) -> None:
    with pytest.raises(Refusal, match="nothing_of_ours"):
        predictions.ask("select nothing_of_ours from predictions", Selection())


def test_ask__a_file_was_damaged__names_it(predictions, keep, root) -> None:
    keep(MONDAY, ["circle"])
    (file,) = root.rglob("*.parquet")
    file.write_bytes(b"PAR1 but no more")
    with pytest.raises(Refusal, match=file.name):
        predictions.ask("select count(*) from predictions", Selection())


def test_ask__a_path_with_a_quote__is_read(tmp_path, keep, root) -> None:
    keep(MONDAY, ["circle"])
    odd = root.rename(tmp_path / "it's kept")
    with Predictions(FolderStore(odd)) as found:
        assert found.ask("select count(*) from predictions", Selection()).rows == [(1,)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-01", datetime(2026, 11, 1)),  # noqa: DTZ001 - UTC without a zone is what the queries compare
        ("2026-11-01T14:00:00+02:00", datetime(2026, 11, 1, 12)),  # noqa: DTZ001
        ("90m", datetime(2026, 11, 16, 8, 30)),  # noqa: DTZ001
        ("7d", datetime(2026, 11, 9, 10)),  # noqa: DTZ001
    ],
)
def test_parse_since__a_time_or_how_long_ago__is_a_time(text: str, expected: datetime) -> None:
    assert parse_since(text, MONDAY.replace(tzinfo=None)) == expected


@pytest.mark.parametrize("text", ["yesterday", "d", "-1d", "99999999999d", "2026-13-01"])
def test_parse_since__anything_else__is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="--since"):
        parse_since(text, MONDAY.replace(tzinfo=None))


def test_dump_json__rows__are_read_back(predictions, keep) -> None:
    keep(MONDAY, ["circle", "square"])
    read = json.load(io.StringIO(dump_json(predictions.latest(Filter(), 5).records())))
    assert [row["label"] for row in read] == ["square", "circle"]
    assert read[0]["time"] == "2026-11-16T10:00:01.000000Z"
    assert set(read[0]) == set(PREDICTION_COLUMNS)
    assert dump_json([]) == "[]"
