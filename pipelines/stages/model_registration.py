"""Register a model that passed its gate: in MLflow under the candidate alias, and in the ledger."""

from __future__ import annotations

from pydantic import Field

from pipelines.core.results import StageResult
from pipelines.core.workspace import Workspace
from pipelines.params import Params


class ModelRegistrationResult(StageResult):
    """Which version the run became."""

    version: str = Field(description="In MLflow's registry.")
    alias: str = Field(description="The alias that points at it; empty when a later version has it.")
    run_id: str = Field(description="The Perch run.")
    mlflow_run_id: str = Field(description="The MLflow run that holds the files.")
    ledger_sequence: int = Field(description="Number of its row in the ledger.")
    ledger_sha256: str = Field(description="Hash of that row; noted elsewhere, it anchors the ledger.")


def run(params: Params, workspace: Workspace) -> ModelRegistrationResult:
    """Register the run's model; a second call changes nothing.

    Raises:
        Refusal: the model did not pass; the message names the failed checks with their numbers.
        TryLater: MLflow or the ledger's database did not answer.
    """
    from pipelines.registry.registration import register
    from pipelines.settings import get_settings

    entered = register(get_settings(), params, workspace)
    name = f"{params.model_name} v{entered.version}"
    alias = params.model_registration.candidate_alias
    is_latest = entered.alias_version == entered.version
    holder = f"stays v{entered.alias_version}" if entered.alias_version is not None else "is none"
    same = f"; the same model file as v{entered.same_as}" if entered.same_as is not None else ""
    return ModelRegistrationResult(
        summary=(f"{name}, {alias}" if is_latest else f"{name}; {alias} {holder}") + same,
        version=str(entered.version),
        alias=alias if is_latest else "",
        run_id=entered.run_id,
        mlflow_run_id=entered.mlflow_run_id,
        ledger_sequence=entered.ledger_sequence,
        ledger_sha256=entered.ledger_sha256,
    )
