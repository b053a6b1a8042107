"""The whole loop on a cluster: Airflow starts each step in a pod, and what they make is released through the canary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy import create_engine, text
from sqlalchemy.exc import ProgrammingError

from pipelines.core.workspace import Workspace
from pipelines.params import load_params
from pipelines.registry.ledger import Ledger
from pipelines.registry.tracking import find_run
from pipelines.release.kubernetes_target import KubernetesTarget
from pipelines.release.targets import Routing, Slot
from pipelines.runs.pipeline import pipeline_steps
from pipelines.runs.replaying import lock_outs
from pipelines.runs.sharing import SharedRun
from pipelines.runs.workspaces import workspace_of
from pipelines.services import orphan_pods
from pipelines.services.demo_release import DemoTraffic
from pipelines.services.orphan_pods import clean_pods
from pipelines.settings import Settings
from tests.cluster.conftest import IMAGE, Phases
from tests.cluster.installed import killed_store
from tests.cluster.kubernetes_cluster import Cluster
from tests.cluster.outages import PROBED_AGAIN_S, drained_node, keep_one_pod, killed, without_control_plane
from tests.cluster.training_rig import LIMITS, NAMESPACE, ONE_CORE, RELEASING, TRAINING, TrainingRig, training_rig
from tests.integration.conftest import PROJECT
from tests.integration.postgresql_server import killed_postgresql
from tests.integration.release_target_behaviour import wait_until
from tests.missing_parts import miss

PIPELINE_IMAGE = os.environ.get("PERCH_PIPELINE_IMAGE", "")
PIPELINE_ARCHIVE = os.environ.get("PERCH_PIPELINE_ARCHIVE", "")
EPOCHS, AS_OF = 12, "2026-11-01"
IN_PODS, HERE, DISTURBED, TUNED = "in-pods", "on-this-machine", "disturbed", "tuned"
DOWN_S = 10.0
# Longer than what watches a pod is patient, and than the training still takes: it ends while nobody can see it.
API_SERVER_DOWN_S = 90.0
FORM = {"epochs": EPOCHS, "as_of": AS_OF}
STEPS = pipeline_steps(Settings(project_dir=PROJECT))
# What neither the reference model nor a measured speed has a say in.
REPEATABLE = ("data/raw", "data/quarantine.parquet", "data/splits", "data/features")

pytestmark = [pytest.mark.cluster, pytest.mark.services, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def rig(cluster: Cluster, phases: Phases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRig]:
    if not PIPELINE_ARCHIVE:
        miss("PERCH_PIPELINE_IMAGE and PERCH_PIPELINE_ARCHIVE name no image", "`make cluster-test` makes one")
    phases.end("release tests on the cluster")
    cluster.load_image(Path(PIPELINE_ARCHIVE))
    phases.end("image of the steps given to the node")
    folder = tmp_path_factory.mktemp("training-on-a-cluster")
    with training_rig(cluster, IMAGE, PIPELINE_IMAGE, folder) as rig:
        for dag_id in (TRAINING, RELEASING):  # before there is a candidate that it would miss
            rig.client().wait_for_dag(dag_id)
        phases.end("chart installed, Airflow and MLflow up")
        yield rig
        phases.end("Airflow and MLflow down")


@pytest.fixture(scope="module")
def in_pods(rig: TrainingRig, phases: Phases, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run whose steps were pods, of which that of the training was evicted half-way."""
    rig.client().trigger(TRAINING, IN_PODS, {**FORM, "release": LIMITS})
    rig.evict(rig.wait_for_checkpoint(IN_PODS))
    assert rig.wait_for_run(TRAINING, IN_PODS) == "success", rig.explain(TRAINING, IN_PODS)
    phases.end("the training DAG in pods")
    print(f"in pods: {rig.durations(IN_PODS)}")
    return rig.fetch(IN_PODS, tmp_path_factory.mktemp("fetched"))


@pytest.fixture(scope="module")
def first_release(rig: TrainingRig, in_pods: Workspace, phases: Phases) -> str:
    """The version that the run in pods has become, which is the first that serves."""
    assert in_pods.run_file.is_file()
    run_id = rig.approve("1")
    assert rig.wait_for_run(RELEASING, run_id, 300) == "success", rig.explain(RELEASING, run_id)
    phases.end("its model released, the first one")
    return "1"


@pytest.fixture(scope="module")
def on_this_machine(
    rig: TrainingRig, first_release: str, phases: Phases, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    """The same run in processes of this machine, registered and packaged as the next version."""
    assert first_release == "1"
    home = tmp_path_factory.mktemp("one-machine")
    own = {
        "PERCH_HOME": str(home),
        "PERCH_PROJECT_DIR": str(PROJECT),
        "PERCH_RUNS_URL": "",
        "PERCH_TARGET": "local",
        "PERCH_SIGNING_KEY": str(rig.settings.keys_dir / "release.pem"),
        "PERCH_SERVING_PUBLIC_KEYS": str(rig.settings.keys_dir),
    }
    values = [f"--set=model_training.epochs={EPOCHS}", f"--set=data_ingestion.as_of={AS_OF}"]
    rig.perch("run", "--run", HERE, *values, **own, **ONE_CORE)
    phases.end("the same run on this machine")
    return workspace_of(rig.settings.model_copy(update={"home": home}), HERE)


def weights(workspace: Workspace) -> str:
    return str(json.loads(workspace.result_file("model_training").read_text())["weights_sha256"])


def test_task__marked_failed_while_its_pod_is_at_work__takes_the_pod_with_it(rig: TrainingRig) -> None:
    with SharedRun(rig.settings, "killed").lease("the test"):  # for which the step waits, three quarters of a minute
        rig.client().trigger(TRAINING, "killed", FORM)
        rig.wait_for_pod("killed", "data_ingestion", "Running")
        rig.wait_for_state(TRAINING, "killed", "data_ingestion", "deferred")
        rig.mark_failed("killed", "data_ingestion")
        print(f"pod of a task that was marked as failed: gone after {rig.wait_without_pods('killed'):.1f} s")
    assert SharedRun(rig.settings, "killed").outcome("data_ingestion") is None  # it was ended, it did not end
    assert rig.wait_for_run(TRAINING, "killed", 60) == "failed"


def test_pods_clean__task_that_ended_while_the_triggerer_was_away__its_pod_is_removed(
    rig: TrainingRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphan_pods, "_SETTLING_S", 0.0)
    with rig.without("airflow-triggerer"):
        rig.client().trigger(TRAINING, "orphaned", FORM)
        rig.wait_for_state(TRAINING, "orphaned", "data_ingestion", "deferred")
        rig.mark_failed("orphaned", "data_ingestion")
        rig.wait_for_pod("orphaned", "data_ingestion", "Running", "Succeeded")
        (orphan,) = clean_pods(rig.settings)
        assert (orphan.pod.run_id, orphan.reason) == ("orphaned", "its task has ended: failed")
        rig.wait_without_pods("orphaned")
    assert rig.wait_for_run(TRAINING, "orphaned", 60) == "failed"


def test_dag_in_pods__training_evicted_half_way__succeeds_and_leaves_no_pod(
    rig: TrainingRig, in_pods: Workspace
) -> None:
    assert weights(in_pods)
    tasks = rig.client().tasks(TRAINING, IN_PODS)
    assert {step: tasks[step].state for step in STEPS} == dict.fromkeys(STEPS, "success")
    tries = {step: tasks[step].try_number for step in STEPS}
    assert tries == {**dict.fromkeys(STEPS, 1), "model_training": 2}
    log = "\n".join(rig.client().log_tail(TRAINING, IN_PODS, tasks["model_training"], 1000))
    assert "going on after epoch" in log  # and the pod's log is in Airflow's
    assert rig.pods(IN_PODS) == []


def test_release__of_what_the_pods_trained__is_asked_for_and_serves(rig: TrainingRig, first_release: str) -> None:
    state = KubernetesTarget(rig.settings).state()
    assert (state.slots[Slot.STABLE].version, state.routing) == (first_release, Routing())


def test_run_in_pods__beside_one_on_this_machine__has_the_same_data_and_weights(
    in_pods: Workspace, on_this_machine: Workspace
) -> None:
    here, pods = lock_outs(on_this_machine), lock_outs(in_pods)
    assert {path: pods[path] for path in REPEATABLE} == {path: here[path] for path in REPEATABLE}
    assert weights(in_pods) == weights(on_this_machine)


def test_release__of_the_next_version__goes_through_the_canary_and_no_request_fails(
    rig: TrainingRig, on_this_machine: Workspace, phases: Phases
) -> None:
    assert on_this_machine.run_file.is_file()
    rig.perch("releases", "begin", "2", "--by", "scientist", "--conf", json.dumps(LIMITS))
    rig.client().trigger(RELEASING, "second", {"version": 2})
    with DemoTraffic(rig.settings, rig.gateway.url).flowing() as traffic:
        assert rig.approve("2") == "second"
        assert rig.wait_for_run(RELEASING, "second", 420) == "success", rig.explain(RELEASING, "second")
    phases.end("the next version released through the canary")
    assert traffic.sent > 100
    assert traffic.failed == 0
    state = KubernetesTarget(rig.settings).state()
    assert (state.slots[Slot.STABLE].version, state.routing) == ("2", Routing())
    events = [record.event for record in Ledger(rig.settings.ledger_url).entries()]
    assert events[-1] == "promoted"
    assert events.count("promoted") == 2


def test_run_in_pods__store_and_database_killed_under_it__ends_with_the_same_weights(
    rig: TrainingRig, in_pods: Workspace, phases: Phases, tmp_path: Path
) -> None:
    rig.client().trigger(TRAINING, DISTURBED, {**FORM, "release": LIMITS})
    rig.wait_for_pod(DISTURBED, "model_training", "Running", limit_s=600)
    with killed_store(rig.settings.s3_endpoint_url):  # the step is at its start, and reads what was made before it
        time.sleep(DOWN_S)
    rig.wait_for_pod(DISTURBED, "model_registration", "Pending", "Running", limit_s=600)
    with killed_postgresql(rig.postgresql):  # which the version's entry in the ledger goes to
        time.sleep(DOWN_S)
    assert rig.wait_for_run(TRAINING, DISTURBED) == "success", rig.explain(TRAINING, DISTURBED)
    phases.end("the training DAG in pods, store and database killed under it")
    tasks = rig.client().tasks(TRAINING, DISTURBED)
    print(f"disturbed: {rig.durations(DISTURBED)}, tries { {name: task.try_number for name, task in tasks.items()} }")
    assert weights(rig.fetch(DISTURBED, tmp_path)) == weights(in_pods)
    require_whole_ledger(rig)


def test_trials__shared_by_mapped_pods_and_their_database_killed__are_all_in_the_study_and_the_training_takes_the_best(
    rig: TrainingRig, phases: Phases, tmp_path: Path
) -> None:
    rig.client().trigger(TRAINING, TUNED, {**FORM, "epochs": 3, "trials": 4, "parallel_trials": 2, "release": LIMITS})
    rig.wait_for_pod(TUNED, "trials", "Running", limit_s=600)
    wait_until(lambda: count_trials(rig) > 0)
    with killed_postgresql(rig.postgresql):
        time.sleep(DOWN_S)
    rig.wait_for_state(TRAINING, TUNED, "model_training", "success", limit_s=600)
    phases.end("trials in pods, their database killed under them, and a training with the best")
    workspace = rig.fetch(TUNED, tmp_path)
    trials = json.loads((workspace.tuning / "trials.json").read_text())["trials"]
    assert len(trials) == 4
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}, trials
    assert rig.client().tasks(TRAINING, TUNED)["collect_trials"].state == "success"
    best = min(trials, key=lambda trial: trial["metrics"]["val/loss"])["values"]
    run = find_run(rig.settings, load_params(workspace.params_file), workspace)
    taken = MlflowClient(rig.settings.mlflow_uri).get_run(run).data.params
    assert float(taken["tuned.learning_rate"]) == pytest.approx(best["learning_rate"], rel=1e-5), (taken, trials)
    rig.client().call("PATCH", f"/dags/{TRAINING}/dagRuns/{TUNED}", json={"state": "failed"})  # the rest is as ever
    rig.wait_without_pods(TUNED)


def count_trials(rig: TrainingRig) -> int:
    engine = create_engine(rig.settings.tuning_url)
    try:
        with engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM trials")).scalar_one())
    except ProgrammingError:  # no table yet
        return 0
    finally:
        engine.dispose()


def require_whole_ledger(rig: TrainingRig) -> None:
    ledger = Ledger(rig.settings.ledger_url)
    registered = [record for record in ledger.entries() if record.event == "registered"]
    assert ledger.verify() == []
    assert len(registered) == len({record.version for record in registered})
    ledger.close()


def take_away(part: str, rig: TrainingRig) -> None:
    """Have a part of Kubernetes gone for a while; it is back, and may have yet to find itself, at the end."""
    if part == "API server":
        with without_control_plane(rig.cluster):
            time.sleep(API_SERVER_DOWN_S)
    elif part == "kubelet":
        with killed(rig.cluster, part):
            time.sleep(DOWN_S)
    else:
        budgets = keep_one_pod(rig.cluster, NAMESPACE, Slot.STABLE)
        try:
            with drained_node(rig.cluster, int(DOWN_S)) as said:
                assert "model-training" in said
        finally:
            rig.cluster.kubectl("delete", *budgets, f"--namespace={NAMESPACE}")


@pytest.mark.parametrize("part", ["API server", "kubelet", "node"])
def test_run_in_pods__part_of_kubernetes_gone_while_it_trains__ends_with_the_same_weights_and_stable_serves_on(
    rig: TrainingRig, in_pods: Workspace, first_release: str, phases: Phases, tmp_path: Path, part: str
) -> None:
    before, run = KubernetesTarget(rig.settings).state(), f"without-{part.lower().replace(' ', '-')}"
    rig.client().trigger(TRAINING, run, {**FORM, "release": LIMITS})
    rig.wait_for_checkpoint(run)
    with rig.traffic() as traffic:
        take_away(part, rig)
        back_at = time.monotonic()
        assert rig.wait_for_run(TRAINING, run) == "success", rig.explain(TRAINING, run)
    phases.end(f"the training DAG in pods, {part} gone while it trains")
    tasks = rig.client().tasks(TRAINING, run)
    tries = {name: task.try_number for name, task in tasks.items() if task.try_number > 1}
    print(f"{part}: {rig.durations(run)}, tries {tries}, {len(traffic.failed)} requests failed")
    assert tries == ({"model_training": 2} if part == "node" else {})
    assert weights(rig.fetch(run, tmp_path)) == weights(in_pods)
    assert rig.pods(run) == []
    require_whole_ledger(rig)
    assert KubernetesTarget(rig.settings).state() == before
    if part == "kubelet":  # which calls each pod of the one node not ready at first; see test_kubernetes_faults.py
        assert all(back_at < exchange.ended_at < back_at + PROBED_AGAIN_S for exchange in traffic.failed)
    else:
        assert traffic.failed == []
