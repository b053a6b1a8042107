"""Kept predictions with real processes that are killed and a real S3-speaking server that goes down."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from pyarrow import parquet

from pipelines.predictions.queries import Filter, Predictions
from pipelines.predictions.stores import open_store
from pipelines.settings import Settings
from serving.prediction_journal import list_journals

PROJECT = Path(__file__).parents[2]

# A worker: appends as fast as asked and prints, flushed, each id half a second after it was appended.
WORKER = """
import sys, time, itertools
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.release_unit import ReleaseManifest
from serving.prediction_log import PredictionLog, PredictionRecord
from serving.settings import ServingSettings
count, flush_rows = int(sys.argv[1]), int(sys.argv[2])
manifest = ReleaseManifest.model_construct(model="m", version="3", onnx_sha256="ab" * 32, labels=("cat", "dog"))
log = PredictionLog(ServingSettings(flush_rows=flush_rows), manifest)
log.start()
appended = deque()
for number in itertools.count():
    if number < count:
        record = PredictionRecord(new_prediction_id(), datetime.now(UTC), "r", "predict", "dog", 0.7, (0.3, 0.7), "",
                                  "PNG", "L", 8, 8, 300, "demo", 1.5)
        log.append(record)
        appended.append((time.monotonic(), record.prediction_id))
    while appended and time.monotonic() - appended[0][0] > 0.5:
        print(appended.popleft()[1], flush=True)
    if number >= count and not appended:
        break
    time.sleep(0.0005)
if "stay" in sys.argv:
    print("done", flush=True)
    sys.stdin.read()
log.close()
print("closed", log.shipped_rows, log.dropped_rows, log.shipping_failures, flush=True)
"""


class Worker:
    def __init__(self, tmp_path: Path, url: str, count: int, flush_rows: int = 200, *more: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "PERCH_SERVING_PREDICTIONS_URL": url,
            "PERCH_SERVING_SPOOL_DIR": str(tmp_path / "spool"),
            "PERCH_SERVING_FLUSH_INTERVAL_S": "1",
        }
        command = [sys.executable, "-c", WORKER, str(count), str(flush_rows), *more]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.ids: list[str] = []

    def read(self, n_ids: int) -> None:
        assert self.process.stdout is not None
        while len(self.ids) < n_ids:
            self.ids.append(self.process.stdout.readline().strip())
            assert self.ids[-1], "the worker ended"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        rest, _ = self.process.communicate()
        # The last line may be cut in two.
        self.ids += [line for line in rest.split("\n")[:-1] if len(line) == 26]

    def finish(self) -> str:
        rest, _ = self.process.communicate(timeout=60)
        lines = rest.split()
        self.ids += [line for line in lines if len(line) == 26]
        assert self.process.returncode == 0
        return " ".join(lines[lines.index("closed") :])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers = []

    def run(*arguments: Any) -> Worker:
        workers.append(Worker(tmp_path, *arguments))
        return workers[-1]

    yield run
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.communicate()


def kept(root: Path) -> list[str]:
    return [
        entry
        for file in sorted(root.rglob("*.parquet"))
        for entry in parquet.read_table(file)["prediction_id"].to_pylist()
    ]


def test_prediction_log__killed_in_mid_flow_again_and_again__every_journaled_row_is_shipped_once(
    start, tmp_path: Path
) -> None:
    url = str(tmp_path / "kept")
    told: list[str] = []
    for round_ in range(3):
        worker = start(url, 10**6)
        worker.read(150 + 100 * round_)
        worker.kill()
        told += worker.ids
    last = start(url, 10)
    last.finish()
    told += last.ids
    found = kept(tmp_path / "kept")
    assert len(found) == len(set(found))
    # Each was appended half a second before it was told: longer than a row may be in memory alone.
    assert set(told) <= set(found)
    assert len(told) > 700
    assert list_journals(tmp_path / "spool") == []


def test_prediction_log__two_workers_one_killed__the_other_ships_for_it(start, tmp_path: Path) -> None:
    url = str(tmp_path / "kept")
    killed = start(url, 100, 10**6, "stay")
    killed.read(50)
    survivor = start(url, 3000)
    killed.kill()
    survivor.finish()
    found = kept(tmp_path / "kept")
    assert len(found) == len(set(found))
    assert set(killed.ids) | set(survivor.ids) <= set(found)
    assert list_journals(tmp_path / "spool") == []


class Moto:
    """An S3 server that can go down and come back, empty, at the same address."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.address}/moto-api/data.json", timeout=1).close()
                break
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.25)
        boto3.client("s3", endpoint_url=self.address).create_bucket(Bucket="kept")

    def down(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


@pytest.fixture
def moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = Moto(tmp_path / "moto.log")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
    yield server
    server.down()


@pytest.mark.services
def test_prediction_log__s3_down_and_up_again__loses_nothing_and_queries_find_it(
    start, moto: Moto, tmp_path: Path
) -> None:
    worker = start("s3://kept/some/prefix", 600, 100, "stay")
    worker.read(600)
    assert len(list_journals(tmp_path / "spool")) >= 6, "nothing was there to ship to"
    moto.up()
    assert worker.process.stdout is not None
    assert worker.process.stdout.readline() == "done\n"
    report = worker.finish().split()
    assert (report[1], report[2]) == ("600", "0")
    assert int(report[3]) >= 1
    assert list_journals(tmp_path / "spool") == []

    store = open_store(Settings(home=tmp_path, predictions_url="s3://kept/some/prefix"))
    with Predictions(store) as predictions:
        listed = [row["prediction_id"] for row in predictions.latest(Filter(), 1000).records()]
        assert sorted(listed) == sorted(worker.ids)
        found = predictions.find(worker.ids[300])
        assert found is not None
        assert found["probabilities"] == {"cat": pytest.approx(0.3), "dog": pytest.approx(0.7)}
        assert predictions.count(Filter(), "label").rows[0][:2] == ("dog", 600)

    environment = {**os.environ, "PERCH_HOME": str(tmp_path), "PERCH_PREDICTIONS_URL": "s3://kept/some/prefix"}
    command = [sys.executable, "-m", "pipelines", "why", worker.ids[0], "--json"]
    answer = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert answer.returncode == 1, answer.stderr  # the ledger knows nothing of this model
    assert json.loads(answer.stdout)["prediction"]["label"] == "dog"


@pytest.mark.services
def test_queries__s3_does_not_answer_or_has_no_bucket__say_which(
    moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.errors import Refusal, TryLater

    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")  # seconds pass between two
    settings = Settings(home=tmp_path, predictions_url="s3://there-is-none")
    with Predictions(open_store(settings)) as predictions, pytest.raises(TryLater, match="cannot be reached"):
        predictions.latest(Filter(), 1)
    moto.up()
    with Predictions(open_store(settings)) as predictions, pytest.raises(Refusal, match="NoSuchBucket"):
        predictions.latest(Filter(), 1)
