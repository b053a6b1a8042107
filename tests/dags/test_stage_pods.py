"""With PERCH_RUNNER=kubernetes the same DAG makes pods: what they ask for and may do, and how they are judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import ApiClient

from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, Refusal
from pipelines.params import PodsParams, StepPodParams
from pipelines.settings import Settings, get_settings

PROJECT = Path(__file__).parents[2]
SETTINGS = {
    "PERCH_RUNNER": "kubernetes",
    "PERCH_PIPELINE_IMAGE": "registry.example.org/perch-pipeline:v1-3e9d1c2",
    "PERCH_RUNS_URL": "s3://perch/runs",
    "PERCH_KUBERNETES_NAMESPACE": "ml",
    "PERCH_POD_CONFIG_MAPS": "perch-steps",
    "PERCH_POD_SECRETS": "perch-database perch-store",
    "PERCH_POD_SIGNING_SECRET": "perch-signing",
    "PERCH_POD_STAGING_SECRET": "perch-own-keys",
    "PERCH_POD_PULL_SECRETS": "registry",
    "PERCH_POD_SERVICE_ACCOUNT": "perch-steps",
}
CONTEXT = {
    "ti": SimpleNamespace(
        dag_id="ml_training_pipeline", run_id="manual__2026-11-01T02:00+00:00", task_id="t", map_index=-1, try_number=2
    ),
    "run_id": "manual__2026-11-01T02:00+00:00",
    "dag": SimpleNamespace(),
    "dag_run": SimpleNamespace(
        run_id="manual__2026-11-01T02:00+00:00",
        logical_date=datetime(2026, 11, 1, 2, tzinfo=UTC),
        run_after=None,
        run_type="manual",
        triggering_user_name="scientist",
        conf={},
    ),
    "params": {"epochs": 3},
}
PARSE = """
import importlib, json, os, time
started = time.process_time()
dags = {}
for name in ("ml_training_pipeline", "data_validation_pipeline", "pod_maintenance"):
    dag = importlib.import_module(f"dags.{name}").dag
    dags[name] = {
        "edges": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
        "rules": {task.task_id: task.trigger_rule.value for task in dag.tasks},
        "timeouts": [task.execution_timeout is not None for task in dag.tasks],
        "mapped": [task.task_id for task in dag.tasks if task.is_mapped],
        "kinds": sorted({type(task).__name__ for task in dag.tasks}),
        "retries": [task.retries for task in dag.tasks],
        "schedule": getattr(dag.timetable, "expression", None),
    }
print(json.dumps(dags))
"""


@pytest.fixture(autouse=True)
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def make_pod(stage: str, **kwargs: Any) -> dict[str, Any]:
    from dags.dag_support.stage_pods import StagePodOperator

    operator = StagePodOperator(stage=stage, **kwargs)
    document: dict[str, Any] = ApiClient().sanitize_for_serialization(
        operator.build_pod_request_obj(CONTEXT, dry_run=True)
    )
    return document


def parse(runner: str, tmp_path: Path, **further: str) -> dict[str, Any]:
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT), "PERCH_RUNNER": runner}
    environment |= further
    completed = subprocess.run(
        [sys.executable, "-c", PARSE], env=environment, capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def test_dags__in_pods__have_the_same_tasks_edges_and_tries(tmp_path: Path) -> None:
    here, pods = parse("local", tmp_path), parse("kubernetes", tmp_path)
    for name in ("ml_training_pipeline", "data_validation_pipeline"):
        assert pods[name]["edges"] == here[name]["edges"]
        assert pods[name]["retries"] == here[name]["retries"]
        assert here[name]["kinds"] == ["StageOperator"]
        assert pods[name]["kinds"] == ["StagePodOperator"]
    assert here["pod_maintenance"]["schedule"] != pods["pod_maintenance"]["schedule"] == "*/15 * * * *"


@pytest.mark.parametrize("runner", ["local", "kubernetes"])
def test_training_dag__with_a_database_for_trials__runs_them_side_by_side_before_the_training(
    tmp_path: Path, runner: str
) -> None:
    dag = parse(runner, tmp_path, PERCH_TUNING_URL="postgresql+psycopg://db/tuning")["ml_training_pipeline"]
    before = ["data_preprocessing", "feature_engineering"]
    assert dag["edges"]["plan_trials"] == before
    assert dag["edges"]["trials"] == ["plan_trials"]
    assert dag["edges"]["collect_trials"] == ["trials"]
    assert dag["edges"]["model_training"] == sorted([*before, "collect_trials"])
    assert dag["rules"]["model_training"] == "none_failed"  # no shares are no reason to stop
    assert dag["mapped"] == ["trials"]
    assert all(dag["timeouts"])
    assert all(retries >= 1 for retries in dag["retries"])


def test_trials_pod__made_of_a_share__runs_that_share_with_what_training_asks_for() -> None:
    from dags.dag_support.trial_pods import CollectTrialsPodOperator, TrialsPodOperator

    run = TrialsPodOperator(task_id="trials", share={"share": 1, "of": 4})
    container = run.build_pod_request_obj(CONTEXT, dry_run=True).spec.containers[0]
    assert container.args == ["trials", "run", "--run", CONTEXT["run_id"], "--share", "1", "--of", "4"]
    assert container.resources.limits["memory"] == "8192Mi"
    collect = CollectTrialsPodOperator(task_id="collect_trials")
    made = collect.build_pod_request_obj(CONTEXT, dry_run=True)
    assert made.spec.containers[0].args == ["trials", "collect", "--run", CONTEXT["run_id"]]


def test_pod__its_command__is_that_of_a_process() -> None:
    container = make_pod("data_ingestion", run_prefix="validation__")["spec"]["containers"][0]
    assert container["command"] == ["perch"]
    assert container["args"] == [
        *("data_ingestion", "--run", "validation__manual__2026-11-01T02:00+00:00"),
        *("--conf", '{"model_training.epochs": 3}', "--as-of", "2026-11-01", "--by", "scientist", "--json"),
    ]
    assert container["image"] == SETTINGS["PERCH_PIPELINE_IMAGE"]


def test_pod__as_made__passes_pod_security_restricted() -> None:
    for stage in ("model_training", "model_packaging"):
        spec = make_pod(stage)["spec"]
        assert len(spec["containers"]) == 1  # no sidecar: results go through storage
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        container = spec["containers"][0]["securityContext"]
        assert container["allowPrivilegeEscalation"] is False
        assert container["readOnlyRootFilesystem"] is True
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert not spec.get("hostNetwork")
        assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= {"emptyDir", "secret"}
        mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert {"/var/lib/perch", "/tmp"} <= mounts


def test_pod__of_a_step__gets_no_token_and_secrets_by_reference_alone() -> None:
    spec = make_pod("model_training")["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == "perch-steps"
    assert spec["enableServiceLinks"] is False
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["containers"][0]["envFrom"] == [
        {"configMapRef": {"name": "perch-steps"}},
        {"secretRef": {"name": "perch-database"}},
        {"secretRef": {"name": "perch-store"}},
    ]
    assert "keys" not in {volume["name"] for volume in spec["volumes"]}


def test_pod__that_signs__has_the_key_and_no_other_has() -> None:
    spec = make_pod("model_packaging")["spec"]
    assert {"name": "keys", "secret": {"secretName": "perch-signing", "defaultMode": 0o440}} in spec["volumes"]
    values = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
    assert values["PERCH_SIGNING_KEY"] == "/etc/perch/keys/release.pem"


def test_pod__that_tries_a_release__has_the_key_for_it_and_no_other_has() -> None:
    reference = {"secretKeyRef": {"name": "perch-own-keys", "key": "PERCH_STAGING_API_KEY"}}
    (given,) = (
        variable
        for variable in make_pod("deploy_to_staging")["spec"]["containers"][0]["env"]
        if variable["name"] == "PERCH_STAGING_API_KEY"
    )
    assert given["valueFrom"] == reference
    for step in ("data_ingestion", "model_training", "model_evaluation", "model_packaging"):
        assert "perch-own-keys" not in json.dumps(make_pod(step))


def test_pod__store_with_a_certificate_of_ones_own__trusts_its_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "object-store-ca" not in {volume["name"] for volume in make_pod("model_training")["spec"]["volumes"]}
    monkeypatch.setenv("PERCH_POD_CA_CONFIG_MAP", "store-ca")
    get_settings.cache_clear()
    spec = make_pod("model_training")["spec"]
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "object-store-ca")
    assert volume["configMap"] == {"name": "store-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    container = spec["containers"][0]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "object-store-ca")
    assert mount["readOnly"] is True
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert values["PERCH_S3_CA_BUNDLE"] == f"{mount['mountPath']}/ca.crt"


def test_pod__that_releases_on_the_cluster__is_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_TARGET", "kubernetes")
    get_settings.cache_clear()
    spec = make_pod("deploy_to_staging")["spec"]
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("perch-engine", True)


def test_pod__its_resources__are_those_of_its_step_and_its_threads_are_its_cores() -> None:
    for stage, cpu, memory in (("model_training", "2", "8192Mi"), ("data_validation", "1", "4096Mi")):
        container = make_pod(stage)["spec"]["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["resources"]["limits"]["cpu"] == cpu
        assert container["resources"]["limits"]["memory"] == memory
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["OMP_NUM_THREADS"]["value"] == cpu
        assert variables["PERCH_POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_pod_template__training_on_gpus__asks_for_them_and_goes_where_they_are() -> None:
    from dags.dag_support.pod_spec import pod_template

    step = StepPodParams(
        gpus=2, node_selector=["accelerator=nvidia-l4"], tolerations=["nvidia.com/gpu:NoSchedule", "pool=ml:NoExecute"]
    )
    wanted = PodsParams(steps={"model_training": step}).of_step("model_training")
    spec = ApiClient().sanitize_for_serialization(pod_template("model_training", wanted, Settings()))["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert spec["nodeSelector"] == {"accelerator": "nvidia-l4"}
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "pool", "operator": "Equal", "value": "ml", "effect": "NoExecute"},
    ]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in spec["volumes"]
    others = PodsParams(steps={"model_training": step}).of_step("data_ingestion")
    plain = ApiClient().sanitize_for_serialization(pod_template("data_ingestion", others, Settings()))["spec"]
    assert "nvidia.com/gpu" not in plain["containers"][0]["resources"]["limits"]
    assert not plain.get("nodeSelector")


@pytest.mark.parametrize(
    "changes",
    [
        {"node_selector": ["nvidia"]},
        {"tolerations": ["a=b:Never"]},
        {"cpu": 0},
        {"steps": {"model_training": {"gpu": 1}}},
        {"steps": {"Model Training": {}}},
    ],
)
def test_pods_params__what_kubernetes_would_not_take__is_refused(changes: dict[str, Any]) -> None:
    from pipelines.params import check_params

    with pytest.raises(Refusal, match="pods"):
        check_params({"dataset": "a", "model_name": "a-b", "pods": changes})


def test_pod__its_names__say_whose_it_is_word_for_word() -> None:
    metadata = make_pod("model_training")["metadata"]
    assert metadata["namespace"] == "ml"
    assert metadata["name"].startswith("perch-model-training-")
    assert metadata["annotations"]["perch/run-id"] == CONTEXT["run_id"]
    assert metadata["annotations"]["perch/try-number"] == "2"
    assert metadata["labels"]["app.kubernetes.io/part-of"] == "perch"
    assert metadata["labels"]["app.kubernetes.io/component"] == "pipeline"
    assert metadata["labels"]["perch/step"] == "model_training"


def test_operator__as_made__holds_no_worker_and_leaves_no_pod() -> None:
    from dags.dag_support.stage_pods import StagePodOperator

    operator = StagePodOperator(stage="model_training")
    assert operator.deferrable
    assert operator.durable
    assert not operator.do_xcom_push
    assert (operator.on_finish_action.value, operator.on_kill_action.value) == ("delete_pod", "delete_pod")
    assert operator.active_deadline_seconds == 24 * 3600 + 600
    assert operator.get_logs
    assert operator.logging_interval == 10


@pytest.mark.parametrize("name", ["PERCH_PIPELINE_IMAGE", "PERCH_RUNS_URL"])
def test_operator__without_image_or_bucket__is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    get_settings.cache_clear()
    with pytest.raises(Refusal, match=name):
        make_pod("model_training")


def judge(monkeypatch: pytest.MonkeyPatch, *, pod_failed: bool, exit_code: int, **outcome: Any) -> dict[str, Any]:
    """What a task pushes whose pod ended so, and whose step left this outcome."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    from dags.dag_support import stage_pods
    from dags.dag_support.perch_command import CommandOutcome

    def watched(self: Any, context: Any, event: Any) -> None:
        if pod_failed:
            raise AirflowException("Pod perch-x returned a failure.")

    monkeypatch.setattr(KubernetesPodOperator, "trigger_reentry", watched)
    monkeypatch.setattr(stage_pods, "run_perch", lambda *words: CommandOutcome(exit_code, outcome))
    pushed: dict[str, Any] = {}
    task = SimpleNamespace(xcom_push=lambda key, value: pushed.update({key: value}))
    operator = stage_pods.StagePodOperator(stage="model_evaluation")
    operator.trigger_reentry({**CONTEXT, "ti": task}, {"name": "perch-x", "status": "success"})
    return {**pushed, "links": operator.links}


def test_step__done__is_its_result_whatever_became_of_its_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for pod_failed in (False, True):  # a pod can be collected, or its node lost, after its step has ended
        found = judge(
            monkeypatch, pod_failed=pod_failed, exit_code=0, by="perch-x", summary="done", links={"Model card": "http"}
        )
        assert found == {"return_value": {"summary": "done"}, "links": {"Model card": "http"}}


def test_step__refused__is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AirflowFailException, match="model_evaluation refused"):
        judge(monkeypatch, pod_failed=True, exit_code=EXIT_REFUSED, by="perch-x")


@pytest.mark.parametrize(
    ("exit_code", "outcome", "says"),
    [
        (EXIT_TRY_LATER, {"by": "perch-x"}, "exit code 75"),
        (1, {"by": "perch-x"}, "exit code 1"),
        (EXIT_TRY_LATER, {"by": ""}, "returned a failure"),  # it has none yet: the pod was evicted
        (EXIT_REFUSED, {"by": "perch-earlier"}, "returned a failure"),  # an earlier try's refusal says nothing of this
    ],
)
def test_step__failed_or_lost__may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, exit_code: int, outcome: dict[str, Any], says: str
) -> None:
    with pytest.raises(AirflowException, match=says) as caught:
        judge(monkeypatch, pod_failed=True, exit_code=exit_code, **outcome)
    assert not isinstance(caught.value, AirflowFailException)


def test_step__pod_succeeded_without_a_word__may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AirflowException, match="left no outcome"):
        judge(monkeypatch, pod_failed=False, exit_code=EXIT_TRY_LATER, by="")


def judge_with(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """What a task pushes whose pod has ended well, and whose outcome is answered so, one time after the other."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    from dags.dag_support import stage_pods
    from dags.dag_support.perch_command import CommandOutcome

    left = iter(answers)
    monkeypatch.setattr(KubernetesPodOperator, "trigger_reentry", lambda *_: None)
    monkeypatch.setattr(stage_pods, "run_perch", lambda *_: CommandOutcome(*next(left)))
    monkeypatch.setattr(stage_pods, "_OUTCOME_PAUSE_S", 0)
    pushed: dict[str, Any] = {}
    task = SimpleNamespace(xcom_push=lambda key, value: pushed.update({key: value}))
    operator = stage_pods.StagePodOperator(stage="model_evaluation")
    operator.trigger_reentry({**CONTEXT, "ti": task}, {"name": "perch-x", "status": "success"})
    return pushed


def test_step__done_while_the_bucket_is_away__is_its_result_once_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    away = (EXIT_TRY_LATER, {})
    pushed = judge_with(monkeypatch, away, (-9, {}), away, (0, {"by": "perch-x", "summary": "done"}))
    assert pushed == {"return_value": {"summary": "done"}}


def test_step__bucket_away_for_long__may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from dags.dag_support import stage_pods

    monkeypatch.setattr(stage_pods, "_OUTCOME_LIMIT_S", -1)
    with pytest.raises(AirflowException, match="could not be read") as caught:
        judge_with(monkeypatch, (EXIT_TRY_LATER, {}))
    assert not isinstance(caught.value, AirflowFailException)


def test_step__of_a_run_that_the_bucket_does_not_know__is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AirflowException, match="could not be read"):
        judge_with(monkeypatch, (EXIT_REFUSED, {}))
