"""`perch predictions` and `perch why`, over a real registry, a real ledger and files that the service's code wrote."""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.core.prediction_ids import first_id_at, new_prediction_id, time_of
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal, TryLater
from pipelines.params import Params
from pipelines.registry.ledger import Ledger
from pipelines.registry.registration import register
from pipelines.settings import Settings
from serving.prediction_journal import encode_block, encode_records, read_journal
from serving.prediction_records import JournalHeader, PredictionRecord
from serving.prediction_stores import FolderPredictionStore
from serving.prediction_tables import make_parquet_files

MakeRun = Callable[..., Workspace]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


def keep(settings: Settings, count: int = 1, onnx_sha256: str = "ab" * 32, ago: timedelta = timedelta(hours=1)) -> str:
    """Keep predictions a second apart; the last one's id."""
    start = datetime.now(UTC) - ago
    records = [
        PredictionRecord(
            first_id_at(time)[:10] + new_prediction_id()[10:],
            *(time, "7f3c", "predict", "circle" if number % 2 else "square", 0.5 + number / 100, (0.5, 0.5)),
            *("cd" * 32, "PNG", "L", 8, 8, 300, "a-rather-long-name-of-a-client", 1.5),
        )
        for number, time in enumerate(start + timedelta(seconds=number) for number in range(count))
    ]
    header = JournalHeader("predictions", "shapes-classification", "1", onnx_sha256, ("circle", "square"))
    lines = b"".join(line + b"\n" for line in encode_records(records))
    content = read_journal(encode_block(orjson.dumps(asdict(header)) + b"\n") + encode_block(lines))
    for file in make_parquet_files(new_prediction_id(), content):
        FolderPredictionStore(settings.home / "predictions").put(file.path, file.content)
    return records[-1].prediction_id


@pytest.fixture
def trained(registry_settings: Settings, registry_params: Params, make_run: MakeRun) -> str:
    """A registered and packaged version; the digest of its model file."""
    workspace = make_run("run-1")
    register(registry_settings, registry_params, workspace)
    ledger = Ledger(registry_settings.ledger_url)
    ledger.append(
        "packaged",
        model="shapes-classification",
        version="1",
        evidence={"run_id": "run-1", "release_sha256": "9b1e" * 16, "key_id": "2026-a"},
        key="packaged:1",
        now=datetime.now(UTC) - timedelta(days=1),
    )
    ledger.close()
    return hashlib.sha256((workspace.model / "model.onnx").read_bytes()).hexdigest()


def test_predictions__listed__fits_into_eighty_columns_newest_first(registry_settings: Settings) -> None:
    newest = keep(registry_settings, 30)
    code, output = run("predictions", "--last", "7")
    lines = output.splitlines()
    assert code == 0
    assert len(lines) == 8
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(newest)
    assert "0.79" in lines[1]


def test_predictions__none_kept__says_where_it_looked(registry_settings: Settings) -> None:
    code, output = run("predictions")
    assert code == 0
    assert "No such prediction in" in output


def test_predictions__as_csv_json_and_parquet__have_the_same_rows(registry_settings: Settings, tmp_path: Path) -> None:
    keep(registry_settings, 5)
    rows = list(csv.DictReader(io.StringIO(run("predictions", "--format", "csv")[1])))
    read = json.loads(run("predictions", "--format", "json")[1])
    code, output = run("predictions", "--format", "parquet", "--out", str(tmp_path / "kept.parquet"))
    assert (code, output) == (0, "")
    table = parquet.read_table(tmp_path / "kept.parquet")
    ids = [row["prediction_id"] for row in read]
    assert len(ids) == 5
    assert ids == [row["prediction_id"] for row in rows] == table["prediction_id"].to_pylist()
    assert list(read[0]) == list(rows[0]) == table.column_names
    assert dict(table["probabilities"][0].as_py()) == read[0]["probabilities"]


@pytest.mark.parametrize(("name", "beginning"), [("p.csv", b"prediction_id,"), ("p.JSON", b"["), ("p.txt", b"id   ")])
def test_predictions__only_a_file_is_named__is_written_as_its_name_says(
    registry_settings: Settings, tmp_path: Path, name: str, beginning: bytes
) -> None:
    keep(registry_settings, 5)
    assert run("predictions", "--out", str(tmp_path / name)) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(beginning)


def test_predictions__a_parquet_file_is_named__is_one(registry_settings: Settings, tmp_path: Path) -> None:
    keep(registry_settings, 5)
    run("predictions", "--out", str(tmp_path / "p.parquet"))
    assert parquet.read_table(tmp_path / "p.parquet").num_rows == 5


def test_predictions__counted_and_asked__answer(registry_settings: Settings) -> None:
    keep(registry_settings, 5)
    assert "square  3" in run("predictions", "--count", "label")[1]
    assert run("predictions", "--sql", "select count(*) as n from predictions", "--format", "csv")[1] == "n\n5\n"
    assert "No such prediction" in run("predictions", "--accuracy")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "parquet"],
        ["--count", "label", "--accuracy"],
        ["--sql", "select 1", "--label", "circle"],
        ["--since", "whenever"],
        ["--sql", "select from nowhere"],
    ],
)
def test_predictions__wrong_options__are_refused(registry_settings: Settings, arguments: list[str]) -> None:
    with pytest.raises(Refusal):
        run("predictions", *arguments)


def test_why__a_prediction_of_a_packaged_version__prints_the_chain(registry_settings: Settings, trained: str) -> None:
    prediction_id = keep(registry_settings, 3, trained)
    code, output = run("why", prediction_id.lower())
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    text = " ".join(output.split())
    for fact in (
        "prediction square 0.52",
        "request 7f3c",
        "model shapes-classification v1",
        "as registered",
        "release sha256 9b1e9b1e9b1e",
        "signed with key 2026-a",
        "trained run run-1",
        "code 3e9d1c2",
        "14 of 14 expectations",
        "accuracy 0.963 [0.926, 0.985]",
        "ledger rows 1, 2 · chain intact",
    ):
        assert fact in text


def test_why__json__holds_the_data_version_that_mlflow_holds(registry_settings: Settings, trained: str) -> None:
    from pipelines.registry.models import get_version

    code, output = run("why", keep(registry_settings, 1, trained), "--json")
    tree = json.loads(output)
    tags = get_version(registry_settings, "shapes-classification", 1).tags
    assert code == 0
    assert tree["registered"]["data"]["sha256"] == tags["perch.data_sha256"]
    assert tree["registered"]["data"]["md5"] == tags["perch.data_md5"]
    assert tree["prediction"]["onnx_sha256"] == tags["perch.onnx_sha256"]
    assert tree["problems"] == []


def test_why__made_by_another_file_than_was_registered__exits_with_1(registry_settings: Settings, trained: str) -> None:
    code, output = run("why", keep(registry_settings, 1, "ef" * 32))
    assert code == 1
    assert "✗ the prediction was made with the model file efefefefefef" in output


def test_why__unknown_or_no_id__is_refused(registry_settings: Settings) -> None:
    old = first_id_at(datetime.now(UTC) - timedelta(hours=1))
    with pytest.raises(Refusal, match="is not in"):
        run("why", old)
    with pytest.raises(Refusal, match="26 characters"):
        run("why", "abc")


def test_why__made_this_minute__may_be_on_its_way(registry_settings: Settings) -> None:
    fresh = new_prediction_id()
    assert datetime.now(UTC) - time_of(fresh) < timedelta(seconds=5)
    with pytest.raises(TryLater, match=r"not in .* yet"):
        run("why", fresh)
