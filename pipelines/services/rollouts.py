"""Puts the release engine together for the settings of this machine: target, database, MLflow, Airflow's answers."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipelines.core.canary_observations import MirrorWindow
from pipelines.core.champions import Champions, champions_by_ledger
from pipelines.core.hash_chain import Record
from pipelines.core.moments import format_minute
from pipelines.core.release_unit import release_name
from pipelines.errors import Refusal, TryLater
from pipelines.params import ModelReleaseParams, check_params, load_params, override
from pipelines.registry.aliases import RegistryAliases
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.registry.staged_version import last_staged_version, read_evidence, staged_digest, staged_probes
from pipelines.release.approvals import ApprovalRequest, Response, evidence_hash
from pipelines.release.artifact_store import open_store
from pipelines.release.chosen_target import open_target
from pipelines.release.engine import ReleaseEngine, ReleaseRequest
from pipelines.release.gates import Gates, forecast
from pipelines.release.policy import EVERY_MODEL, ModelRule, PromotionPolicy, load_policy
from pipelines.release.rollout_state import RolloutState, from_document
from pipelines.release.steps import ROLLED_BACK, Plan
from pipelines.release.targets import ReleaseRef, ReleaseTarget, Slot
from pipelines.release.world import World
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.services.approval_pages import ApprovalPage

_RATE_SAMPLE_S = 2.0
_NOBODY = PromotionPolicy(models={EVERY_MODEL: ModelRule(approvers=("nobody",))})


class AirflowAnswers:
    """An `ApprovalSource` that looks for Airflow only when it is asked: nothing else of a release needs it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def responses(self, request: ApprovalRequest) -> Sequence[Response]:
        """The recorded answers to a request."""
        from pipelines.release.airflow_approvals import AirflowApprovals
        from pipelines.services.airflow_access import open_airflow

        return AirflowApprovals(open_airflow(self._settings)).responses(request)


def open_world(settings: Settings, *, patient: bool = True, policy: PromotionPolicy | None = None) -> World:
    """All that engine, rollback and watchdog act upon.

    Args:
        settings: where things are.
        patient: wait for a database that is away; a watchdog cannot.
        policy: whose answers count; nobody's by default, for what takes traffic away must not fail on a mistake in it.
    """
    glance = RolloutTable(settings.ledger_url, patient=False)
    return World(
        target=open_target(settings),
        rollouts=RolloutTable(settings.ledger_url) if patient else glance,
        glance=glance,
        ledger=Ledger(settings.ledger_url),
        aliases=RegistryAliases(settings),
        approvals=AirflowAnswers(settings),
        policy=policy or _NOBODY,
        evidence=lambda release, plan: read_evidence_hash(settings, release, plan),
        judge=Gates(lambda state: _compare_answers(settings, state)),
    )


def open_engine(settings: Settings) -> ReleaseEngine:
    """An engine of this process.

    Raises:
        Refusal: the promotion policy cannot be read.
    """
    world = open_world(settings, policy=load_policy(settings.promotion_policy))
    return ReleaseEngine(world, f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}")


def read_evidence_hash(settings: Settings, release: ReleaseRef, plan: Plan) -> str:
    """Hash of all that an approval of a release rests on, as it is now: what it is, and what it is held to."""
    known = read_evidence(settings, release.model, release.version, release.digest)
    return evidence_hash(**known, plan_sha256=plan.sha256)


def begin_release(
    settings: Settings,
    version: int | None,
    *,
    requested_by: str,
    model: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> RolloutState:
    """Begin the release of a version that has passed in staging; it waits for its approval then.

    Args:
        settings: where things are.
        version: in the registry; None takes the last one that passed.
        requested_by: who asks; for the policy.
        model: by default that of params.yaml.
        overrides: dotted keys of params.yaml that are otherwise in this release, e.g. `model_release.min_step_s`.

    Raises:
        Refusal: it has not passed in staging, or another release is under way, or what serves is not the champion.
        TryLater: the target, MLflow or the database does not answer.
    """
    params = load_params(settings.project_dir / "params.yaml")
    if foreign := [key for key in overrides or {} if not key.startswith("model_release.")]:
        raise Refusal(foreign[0], "is no key of a release", limit="model_release.*", way_out="`perch params --schema`")
    if overrides:
        params = check_params(override(params.model_dump(mode="json"), overrides), own=overrides)
    model = model or params.model_name
    version = version or last_staged_version(settings, model)
    digest = staged_digest(settings, model, str(version))
    release = ReleaseRef(model, str(version), digest, open_store(settings).address(release_name(digest)))
    engine, target = open_engine(settings), open_target(settings)
    champion = find_champion(settings, target, model)
    plan = Plan(params.model_release)
    if plan.params.probe_requests_per_s > 0 and champion is not None:
        _require_probe_images(settings, release)
    expected = forecast(plan, requests_per_s=measure_traffic(target), is_first=champion is None)
    request = ReleaseRequest(
        release=release,
        champion=champion,
        requested_by=requested_by,
        evidence_sha256=read_evidence_hash(settings, release, plan),
        run_id=_run_of(settings, model, str(version)),
        forecast={"steps": [asdict(step) for step in expected]},
    )
    return engine.begin(request, plan)


def write_approval_page(settings: Settings, state: RolloutState) -> ApprovalPage:
    """What approvers of a rollout are to read, with the evidence as it is now.

    Raises:
        Refusal: a file of the evidence is not the registered one, or the policy cannot be read.
        TryLater: MLflow or the database does not answer.
    """
    from pipelines.services.approval_pages import write_page

    policy = load_policy(settings.promotion_policy)
    request = open_engine(settings).approval_request(state)
    champion = state.champion.version if state.champion else ""
    steps = [str(step["sentence"]) for step in state.forecast.get("steps", [])]
    if changed := describe_changes(state.plan.params, load_params(settings.project_dir / "params.yaml").model_release):
        steps.append(f"This release is not held to params.yaml: {changed}.")
    if before := _describe_rollbacks(settings, state):
        steps.insert(0, before)
    return write_page(settings, policy, request, champion=champion, forecast=steps)


def _describe_rollbacks(settings: Settings, state: RolloutState) -> str:
    """That the same version was taken back before, and why the last time; empty where it was not."""
    taken_back = [
        (other.passages[-1].at, other.reason)
        for other in list_rollouts(settings, state.release.model)
        if other.release.version == state.release.version and other.step == ROLLED_BACK and other.passages
    ]
    if not taken_back:
        return ""
    at, reason = max(taken_back)
    times = "once" if len(taken_back) == 1 else f"{len(taken_back)} times"
    moment = format_minute(datetime.fromtimestamp(at, UTC))
    return f"**This version was taken back {times} before**, last on {moment}: {reason}."


def describe_changes(params: ModelReleaseParams, usual: ModelReleaseParams) -> str:
    """What a release's steps and limits are instead of the usual ones, for a person; empty where they are the same."""
    own, others = params.model_dump(mode="json"), usual.model_dump(mode="json")
    return ", ".join(f"{key} {own[key]} instead of {others[key]}" for key in own if own[key] != others[key])


def find_champion(settings: Settings, target: ReleaseTarget, model: str) -> ReleaseRef | None:
    """What a release would replace: the ledger's champion, which has to be the one that serves.

    Returns:
        None where nothing was ever released.

    Raises:
        Refusal: the stable slot holds another version than the ledger's champion.
    """
    version = read_champions(settings, model).champion
    if version is None:
        return None
    stable = target.state().slots.get(Slot.STABLE)
    if stable is None or (stable.model, stable.version) != (model, version):
        serves = f"{stable.model} v{stable.version}" if stable else "nothing"
        raise Refusal(
            "the stable slot",
            f"holds {serves}",
            limit=f"{model} v{version}, the ledger's champion",
            way_out="`perch up` serves the champion; `perch ledger` says how it became that",
        )
    return stable


def read_champions(settings: Settings, model: str) -> Champions:
    """Champion and the one before, by the ledger."""
    return champions_by_ledger(_entries(settings, model), model)


def find_rollout(settings: Settings, name: str = "", model: str = "") -> RolloutState:
    """A rollout by its id, or the one that is under way, else the last one of a model.

    Raises:
        Refusal: there is none.
    """
    table = RolloutTable(settings.ledger_url)
    rows = table.list_rollouts(model)
    table.close()
    if name:
        rows = [row for row in rows if row.rollout_id == name]
    row = next((row for row in reversed(rows) if row.is_open), rows[-1] if rows else None)
    if row is None:
        raise Refusal(f"the release {name or model}".strip(), "is not there", way_out="`perch releases begin`")
    return from_document(row.document)


def list_rollouts(settings: Settings, model: str = "") -> list[RolloutState]:
    """All rollouts, or those of a model, oldest first."""
    table = RolloutTable(settings.ledger_url)
    try:
        return [from_document(row.document) for row in table.list_rollouts(model)]
    finally:
        table.close()


def measure_traffic(target: ReleaseTarget) -> float:
    """Requests per second to the stable slot at present; 0 where it cannot be asked."""
    try:
        first = target.observe(Slot.STABLE)
        if first is None:
            return 0.0
        time.sleep(_RATE_SAMPLE_S)
        second = target.observe(Slot.STABLE)
    except TryLater:
        return 0.0
    if second is None or second.taken_at <= first.taken_at:
        return 0.0
    return max(0, second.requests - first.requests) / (second.taken_at - first.taken_at)


def _compare_answers(settings: Settings, state: RolloutState) -> MirrorWindow | None:
    from pipelines.predictions.mirrored import compare_answers
    from pipelines.predictions.stores import open_store as open_predictions

    if state.champion is None:
        return None
    since = datetime.fromtimestamp(state.entered_at, UTC)
    return compare_answers(
        open_predictions(settings),
        state.release.model,
        state.champion.version,
        state.release.version,
        since,
        count_probes=state.plan.params.count_probes,
    )


def _require_probe_images(settings: Settings, release: ReleaseRef) -> None:
    """Refuse a release whose forecast would count on a prober that has nothing to send."""
    if not staged_probes(settings, release.model, release.version, release.digest):
        raise Refusal(
            f"the prober of {release.model} v{release.version}",
            "has no images to send",
            way_out="only a run whose model_release.probe_requests_per_s is above 0 keeps them; begin with "
            "--set model_release.probe_requests_per_s=0, or release a version of such a run",
        )


def _run_of(settings: Settings, model: str, version: str) -> str:
    rows = [row for row in _entries(settings, model) if row.event == "registered" and row.version == version]
    return str(json.loads(rows[-1].evidence).get("run_id", "")) if rows else ""


def _entries(settings: Settings, model: str) -> list[Record]:
    ledger = Ledger(settings.ledger_url)
    try:
        return ledger.entries(model)
    finally:
        ledger.close()
