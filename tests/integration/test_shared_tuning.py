"""Two processes run the trials of one Optuna study in a real PostgreSQL at the same time."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.core import patience
from pipelines.errors import TryLater
from pipelines.params import ModelTrainingParams, SmallCNNParams
from pipelines.runs.workspaces import find_workspace
from pipelines.settings import Settings
from tests.integration.postgresql_proxy import Proxy
from tests.integration.postgresql_server import execute

PROJECT = Path(__file__).parents[2]
TRIALS = 6
PARAMS = ModelTrainingParams(
    small_cnn=SmallCNNParams(widths=[8], dropout=0.2), batch_size=64, trials=TRIALS, trial_epochs=2, parallel_trials=2
)
PROCESS = """
import sys
from tests.integration.test_shared_tuning import PARAMS, training_data
from pipelines.modeling.shared_tuning import run_share
share, of = int(sys.argv[2]), int(sys.argv[3])
print(run_share(training_data(), PARAMS, seed=7, url=sys.argv[1], name="run 1", share=share, of=of))
"""

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


def training_data():
    """The digits 0, 1 and 2 as 8 px images; PyTorch keeps to one thread."""
    import torch
    from sklearn.datasets import load_digits

    from pipelines.core.contract import InputContract, ModelContract
    from pipelines.modeling.training_data import LabelledImages, TrainingData

    torch.set_num_threads(1)
    bunch = load_digits(n_class=3)
    images, labels = (bunch.images * 15.9).astype(np.uint8)[..., None], bunch.target
    contract = ModelContract(input=InputContract(size_px=8, channels=1, resize="squash"), labels=("0", "1", "2"))
    return TrainingData(
        LabelledImages(images[:300], labels[:300]),
        LabelledImages(images[300:450], labels[300:450]),
        contract,
        mean=(80.0,),
        std=(95.0,),
        class_weights=np.ones(3, dtype=np.float32),
    )


def start(url: str, share: int, of: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, url, str(share), str(of)],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_shares__two_at_once_on_an_empty_database__run_each_trial_once(postgresql_url: str, tmp_path: Path) -> None:
    from pipelines.modeling import tuning
    from pipelines.modeling.live_run import LiveRun
    from pipelines.modeling.search_space import configured_values
    from pipelines.modeling.shared_tuning import collect_trials

    processes = [start(postgresql_url, share) for share in (0, 1)]
    for process in processes:
        output, log = process.communicate()
        assert process.returncode == 0, log
        assert output.strip() == "3"
    trials = collect_trials(postgresql_url, "run 1")
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert sum(trial.values == pytest.approx(configured_values(PARAMS)) for trial in trials) == 1
    assert len({json.dumps(trial.values, sort_keys=True) for trial in trials}) == TRIALS
    assert any(trial.state == "complete" and len(trial.losses) == 2 for trial in trials)
    found = tuning.tune(
        training_data(), PARAMS, seed=7, folder=tmp_path, fingerprint="f", live_run=LiveRun("", ""), given=trials
    )
    assert found.trials == trials
    best = min((trial for trial in trials if trial.state == "complete"), key=lambda trial: min(trial.losses))
    assert found.hyperparameters["learning_rate"] == pytest.approx(best.values["learning_rate"], rel=1e-5)


@pytest.mark.slow
def test_share__killed_in_a_trial_and_started_again__runs_what_is_missing(postgresql_url: str) -> None:
    from sqlalchemy import create_engine, text

    from pipelines.modeling.shared_tuning import collect_trials

    process = start(postgresql_url, 0, of=1)
    engine = create_engine(postgresql_url)
    while True:  # until it is in its third trial
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
        with engine.connect() as connection:
            if connection.execute(text("SELECT to_regclass('trials')")).scalar() is None:
                continue
            if connection.execute(text("SELECT count(*) FROM trials")).scalar_one() >= 3:
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(collect_trials(postgresql_url, "run 1"))
    assert 2 <= before < TRIALS
    again = start(postgresql_url, 0, of=1)
    _, log = again.communicate()
    assert again.returncode == 0, log
    assert log.count("epoch") <= 2 * (TRIALS - before) + 2
    trials = collect_trials(postgresql_url, "run 1")
    assert len(trials) == TRIALS
    with engine.connect() as connection:
        states = connection.execute(text("SELECT DISTINCT CAST(state AS text) FROM trials")).scalars().all()
    assert "RUNNING" not in states
    engine.dispose()


@pytest.fixture
def proxy(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    proxy = Proxy.before(postgresql_url)
    yield proxy
    proxy.close()


def run_two_trials(url: str) -> int:
    from pipelines.modeling.shared_tuning import run_share

    params = PARAMS.model_copy(update={"trials": 2})
    return run_share(training_data(), params, seed=7, url=url, name="run 1", share=0, of=1)


def states_of(url: str) -> list[str]:
    """How the trials of the only study ended, those that count first."""
    from sqlalchemy import create_engine, text

    counted = "EXISTS (SELECT 1 FROM trial_user_attributes a WHERE a.trial_id = t.trial_id AND a.key = 'perch_state')"
    engine = create_engine(url)
    with engine.connect() as connection:
        query = f"SELECT {counted}, CAST(state AS text) FROM trials t ORDER BY number"
        rows = connection.execute(text(query)).all()
    engine.dispose()
    assert all(state in {"COMPLETE", "PRUNED"} if counts else state == "FAIL" for counts, state in rows), rows
    return [state for counts, state in rows if counts]


@pytest.mark.parametrize(
    "word",
    [
        b"INSERT INTO trials",
        pytest.param(b"INSERT INTO trial_params", marks=pytest.mark.slow),
        pytest.param(b"INSERT INTO trial_intermediate_values", marks=pytest.mark.slow),
        b"INSERT INTO trial_user_attributes",
        b"UPDATE trials SET state",
    ],
    ids=lambda word: word.decode().split()[-1] if b"UPDATE" not in word else "told",
)
def test_share__answer_to_a_commit_lost__runs_each_trial_once_and_leaves_none_at_work(
    postgresql_url: str, proxy: Proxy, word: bytes
) -> None:
    proxy.lose_commits_after(word, 2)
    assert run_two_trials(proxy.url(postgresql_url)) == 2
    assert proxy.left == 0
    assert len(states_of(postgresql_url)) == 2


def test_share__server_falls_silent__asks_again_over_another_connection(
    postgresql_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.modeling import shared_tuning

    monkeypatch.setattr(shared_tuning, "_LIMIT_S", 2)
    proxy.set("none")
    run_two_trials(proxy.url(postgresql_url))
    questions = proxy.questions
    execute(postgresql_url, "TRUNCATE studies CASCADE")
    proxy.set("stall", questions // 2)
    began = time.monotonic()
    assert run_two_trials(proxy.url(postgresql_url)) == 2
    assert proxy.questions > questions // 2
    assert 2 < time.monotonic() - began < 30
    assert len(states_of(postgresql_url)) == 2


def test_collect__no_database__may_be_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.modeling import shared_tuning

    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    with pytest.raises(TryLater, match="PERCH_TUNING_URL"):
        shared_tuning.collect_trials("postgresql+psycopg://perch@127.0.0.1:9/tuning", "run 1")


@pytest.mark.slow
def test_run__tuned_by_two_processes__trains_with_what_they_found_and_replays(
    postgresql_url: str, tmp_path: Path
) -> None:
    overrides = {
        "model_training.epochs": 3,
        "model_training.trials": 4,
        "model_training.trial_epochs": 2,
        "model_training.parallel_trials": 2,
        "model_training.int8": False,
        "data_ingestion.as_of": "2026-11-01",
    }
    environment = {**os.environ, "PERCH_HOME": str(tmp_path), "PERCH_PROJECT_DIR": str(PROJECT)}
    environment["PERCH_TUNING_URL"] = postgresql_url

    def perch(*words: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).parent / "perch"), *words]
        return subprocess.Popen(
            command, env=environment, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def done(process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    for stage in ("data_ingestion", "data_validation", "data_preprocessing", "feature_engineering"):
        done(perch(stage, "--run", "r", "--conf", json.dumps(overrides)))
    plan = json.loads(done(perch("trials", "plan", "--run", "r", "--json")).splitlines()[-1])
    assert plan == {"shares": [{"share": 0, "of": 2}, {"share": 1, "of": 2}]}
    shares = [perch("trials", "run", "--run", "r", "--share", str(share), "--of", "2") for share in (0, 1)]
    for process in shares:
        done(process)
    done(perch("trials", "collect", "--run", "r"))
    assert "trial 1 of" not in done(perch("model_training", "--run", "r"))  # none is left for the training to run
    done(perch("model_evaluation", "--run", "r"))
    workspace = find_workspace(Settings(project_dir=PROJECT, home=tmp_path), "r")
    with (workspace.model / "trials.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    del environment["PERCH_TUNING_URL"]
    assert "identical" in done(perch("replay", "r"))
