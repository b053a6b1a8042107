"""The alias of the version that may be released next: moved by registration and by staging, as the ledger says."""

from __future__ import annotations

from pipelines.core.champions import candidate_by_ledger
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import find_versions
from pipelines.settings import Settings


def move_candidate(settings: Settings, ledger: Ledger, model: str, alias: str) -> int | None:
    """Point the candidate's alias at the latest version that staging has not turned away, or remove it.

    Args:
        settings: where MLflow is.
        ledger: the authority.
        model: name of the registered model.
        alias: to move; where it points there already, nothing is written.

    Returns:
        The version that it points at.

    Raises:
        TryLater: MLflow or the ledger's database did not answer.
    """
    return with_mlflow(settings, lambda mlflow: _move(mlflow, ledger, model, alias))


def _move(mlflow: Mlflow, ledger: Ledger, model: str, alias: str) -> int | None:
    # The ledger is read again after the alias was set, so that of two writers at once the later one wins in the end.
    while True:
        versions = find_versions(mlflow, model)
        expected = candidate_by_ledger(ledger.entries(model), model, {version.version for version in versions})
        holder = next((version.version for version in versions if alias in version.aliases), None)
        if holder == expected:
            return expected
        if expected is None:
            mlflow.client.delete_registered_model_alias(model, alias)
        else:
            mlflow.client.set_registered_model_alias(model, alias, str(expected))
