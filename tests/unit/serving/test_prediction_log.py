"""The log, its journals and its shipper together, on real files; kills are in tests/integration/test_predictions.py."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.release_unit import ReleaseManifest
from serving import prediction_log
from serving.prediction_journal import Journal, encode_records, list_journals
from serving.prediction_log import FeedbackRecord, PredictionLog, PredictionRecord
from serving.prediction_records import JournalHeader
from serving.prediction_shipping import Shipper
from serving.prediction_stores import FolderPredictionStore
from serving.settings import ServingSettings

PROJECT = Path(__file__).parents[3]
MANIFEST = ReleaseManifest.model_construct(model="m", version="3", onnx_sha256="ab" * 32, labels=("cat", "dog"))
HEADER = JournalHeader("predictions", "m", "3", "ab" * 32, ("cat", "dog"))


def predict() -> PredictionRecord:
    now = datetime.now(UTC)
    return PredictionRecord(
        new_prediction_id(), now, "r", "predict", "dog", 0.7, (0.3, 0.7), "", "PNG", "L", 8, 8, 300, "demo", 1.5
    )


def kept(root: Path, kind: str = "predictions") -> list[str]:
    files = sorted((root / "kept" / kind).rglob("*.parquet"))
    return [entry for file in files for entry in parquet.read_table(file)["prediction_id"].to_pylist()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def make_log(tmp_path: Path) -> Iterator[Callable[..., PredictionLog]]:
    logs = []

    def make(**settings: Any) -> PredictionLog:
        values = {"predictions_url": str(tmp_path / "kept"), "spool_dir": tmp_path / "spool"} | settings
        logs.append(PredictionLog(ServingSettings(**values), MANIFEST))
        logs[-1].start()
        return logs[-1]

    yield make
    for log in logs:
        log.close(1)


def test_log__closed__has_shipped_everything_once(make_log, tmp_path) -> None:
    log, records = make_log(flush_rows=100), [predict() for _ in range(1010)]
    for record in records:
        log.append(record)
    log.append_feedback(FeedbackRecord(records[0].prediction_id, "cat", datetime.now(UTC), "demo", "r"))
    log.close()
    assert sorted(kept(tmp_path)) == sorted(record.prediction_id for record in records)
    assert kept(tmp_path, "feedback") == [records[0].prediction_id]
    assert len(list((tmp_path / "kept" / "predictions").rglob("*.parquet"))) == 11
    assert (log.shipped_rows, log.dropped_rows, log.backlog_rows, log.spooled_bytes) == (1011, 0, 0, 0)
    assert list((tmp_path / "spool").iterdir()) == []


def test_log__few_rows__are_shipped_after_the_interval(make_log, tmp_path) -> None:
    log = make_log(flush_interval_s=0.5)
    log.append(predict())
    wait_until(lambda: log.shipped_rows == 1)
    assert len(kept(tmp_path)) == 1


def test_log__no_url__keeps_nothing_and_touches_nothing(make_log, tmp_path) -> None:
    log = make_log(predictions_url="")
    log.append(predict())
    log.close()
    assert (log.backlog_rows, log.dropped_rows) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_log__store_down__answers_go_on_and_everything_arrives_later(make_log, tmp_path) -> None:
    (tmp_path / "kept").write_text("a file where the folder belongs")
    log, records = make_log(flush_rows=10), [predict() for _ in range(50)]
    for record in records:
        log.append(record)
    wait_until(lambda: log.shipping_failures > 0 and log.spooled_bytes > 0)
    assert (log.backlog_rows, log.dropped_rows, log.shipped_rows) == (0, 0, 0)
    (tmp_path / "kept").unlink()
    log.close()
    assert sorted(kept(tmp_path)) == sorted(record.prediction_id for record in records)
    assert log.spooled_bytes == 0


def test_log__store_down_when_it_closes__leaves_the_journals_to_the_next(make_log, tmp_path) -> None:
    (tmp_path / "kept").write_text("a file where the folder belongs")
    log, records = make_log(), [predict() for _ in range(5)]
    for record in records:
        log.append(record)
    log.close()
    assert len(list_journals(tmp_path / "spool")) == 1
    (tmp_path / "kept").unlink()
    following = make_log()
    wait_until(lambda: following.shipped_rows == 5)
    assert sorted(kept(tmp_path)) == sorted(record.prediction_id for record in records)


def test_log__disk_of_the_spool_gone_for_a_while__keeps_rows_in_memory_and_counts_the_rest(
    make_log, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(prediction_log, "_MAX_ROWS_IN_MEMORY", 30)
    spool = tmp_path / "spool"
    log = make_log()
    spool.rmdir()
    records = [predict() for _ in range(50)]
    for record in records:
        log.append(record)
    time.sleep(0.5)
    assert (log.backlog_rows, log.dropped_rows) == (30, 20)
    spool.mkdir()
    wait_until(lambda: log.backlog_rows == 0)
    log.close()
    assert sorted(kept(tmp_path)) == sorted(record.prediction_id for record in records[:30])
    assert log.dropped_rows == 20


def test_log__a_record_that_json_cannot_say__is_dropped_and_counted(make_log, tmp_path) -> None:
    log, bad = make_log(), predict()
    bad.caller = "\ud800"
    log.append(bad)
    log.append(predict())
    log.close()
    assert len(kept(tmp_path)) == 1
    assert log.dropped_rows == 1


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


def leave_journal(spool: Path, n_rows: int) -> Path:
    journal = Journal(spool, HEADER)
    journal.append(encode_records([predict() for _ in range(n_rows)]))
    journal.close()
    time.sleep(0.002)  # ids of one millisecond have no order
    return journal.path


def test_shipper__spool_full_and_store_down__oldest_complete_journals_give_way(spool, tmp_path) -> None:
    (tmp_path / "kept").write_text("a file where the folder belongs")
    paths = [leave_journal(spool, 10) for _ in range(6)]
    open_one = Journal(spool, HEADER)
    size = paths[0].stat().st_size
    shipper = Shipper(spool, FolderPredictionStore(tmp_path / "kept"), max_bytes=3 * size + open_one.n_bytes + 5)
    shipper.look()
    assert list_journals(spool) == [*paths[3:], open_one.path]
    assert (shipper.dropped_rows, shipper.failures) == (30, 1)
    assert shipper.spooled_bytes == sum(path.stat().st_size for path in spool.iterdir())
    open_one.close()


def test_shipper__killed_between_storing_and_removing__ships_again_without_doubling(spool, tmp_path) -> None:
    path = leave_journal(spool, 10)
    before = path.read_bytes()
    for _ in range(2):
        path.write_bytes(before)
        Shipper(spool, FolderPredictionStore(tmp_path / "kept"), 10**9).look()
    assert len(kept(tmp_path)) == len(set(kept(tmp_path))) == 10


def test_shipper__torn_journal__ships_what_is_whole(spool, tmp_path) -> None:
    path = leave_journal(spool, 10)
    data = path.read_bytes()
    path.write_bytes(data + data[-200:])
    shipper = Shipper(spool, FolderPredictionStore(tmp_path / "kept"), 10**9)
    shipper.look()
    assert (shipper.shipped_rows, len(kept(tmp_path))) == (10, 10)


def test_shipper__a_journal_it_cannot_read__is_set_aside_and_the_next_goes_out(spool, tmp_path) -> None:
    (spool / f"{new_prediction_id()}.journal").write_bytes(b"nothing of ours")
    headless = leave_journal(spool, 4)
    headless.write_bytes(headless.read_bytes()[5:])
    good = leave_journal(spool, 3)
    shipper = Shipper(spool, FolderPredictionStore(tmp_path / "kept"), 10**9)
    shipper.look()
    assert (shipper.shipped_rows, shipper.dropped_rows) == (3, 4)
    assert not good.exists()
    assert {path.suffix for path in spool.iterdir()} == {".damaged"}


def test_shipper__store_just_failed__waits_before_it_tries_again(spool, tmp_path) -> None:
    (tmp_path / "kept").write_text("a file where the folder belongs")
    leave_journal(spool, 1)
    leave_journal(spool, 1)
    shipper = Shipper(spool, FolderPredictionStore(tmp_path / "kept"), 10**9)
    for _ in range(20):
        shipper.look()
    assert shipper.failures == 1
    shipper.look(even_now=True)
    assert shipper.failures == 2


def test_append__a_thousand_times__costs_microseconds(make_log) -> None:
    log, record = make_log(flush_interval_s=60), predict()
    best = min(_time_append(log, record) for _ in range(5))
    assert best < 20e-6  # measured: 0.1 µs; the limit only catches a lock or a write


def _time_append(log: PredictionLog, record: PredictionRecord) -> float:
    started = time.perf_counter()
    for _ in range(1000):
        log.append(record)
    return (time.perf_counter() - started) / 1000


def test_log__in_a_process_of_its_own__imports_late_and_never_pandas(tmp_path) -> None:
    code = f"""
import sys
from datetime import UTC, datetime
from pathlib import Path
from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.release_unit import ReleaseManifest
from serving.prediction_log import PredictionLog, PredictionRecord
from serving.settings import ServingSettings
assert not {{"pyarrow", "boto3", "numpy"}} & set(sys.modules), "imported before it was started"
manifest = ReleaseManifest.model_construct(model="m", version="3", onnx_sha256="ab" * 32, labels=("cat", "dog"))
folder = Path({str(tmp_path)!r})
log = PredictionLog(ServingSettings(predictions_url=str(folder / "kept"), spool_dir=folder / "spool"), manifest)
log.start()
assert "pyarrow.parquet" in sys.modules, "not imported before the first answer"
log.append(PredictionRecord(new_prediction_id(), datetime.now(UTC), "r", "predict", "dog", 0.7, (0.3, 0.7), "", "PNG",
                            "L", 8, 8, 300, "demo", 1.5))
log.close()
assert log.shipped_rows == 1
assert "pandas" not in sys.modules, "a worker on a development machine is to be like one in a release"
"""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
