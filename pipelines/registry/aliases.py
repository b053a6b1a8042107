"""MLflow's aliases: `champion` and `previous` as releases move them, and all of them held against the ledger."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.core.champions import aliases_by_ledger, find_alias_disagreements
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import find_model, list_versions
from pipelines.settings import Settings


class RegistryAliases:
    """The aliases of the registry that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def move(self, model: str, aliases: Mapping[str, str | None]) -> None:
        """Point each alias at a version, or remove it where that is None; what is so already stays untouched.

        Raises:
            TryLater: MLflow did not answer.
        """
        with_mlflow(self._settings, lambda mlflow: _move(mlflow, model, aliases))


def _move(mlflow: Mlflow, model: str, aliases: Mapping[str, str | None]) -> None:
    present = _read(mlflow, model)
    for alias, version in aliases.items():
        if version is None and alias in present:
            mlflow.client.delete_registered_model_alias(model, alias)
        elif version is not None and present.get(alias) != version:
            mlflow.client.set_registered_model_alias(model, alias, version)


def find_alias_contradictions(settings: Settings, candidate_alias: str) -> list[str]:
    """Aliases that point elsewhere than the ledger says, in every model that it knows; one sentence each.

    Args:
        settings: where MLflow and the ledger are.
        candidate_alias: the alias of the version that may be released next.

    Raises:
        TryLater: the ledger's database or MLflow did not answer.
    """
    ledger = Ledger(settings.ledger_url)
    try:
        records = ledger.entries()
    finally:
        ledger.close()
    problems = []
    for model in sorted({record.model for record in records}):
        versions = list_versions(settings, model)
        actual = {alias: str(version.version) for version in versions for alias in version.aliases}
        expected = aliases_by_ledger(records, model, {version.version for version in versions}, candidate_alias)
        problems += find_alias_disagreements(model, actual, expected)
    return problems


def _read(mlflow: Mlflow, model: str) -> dict[str, str]:
    registered = find_model(mlflow, model)
    return {alias: str(version) for alias, version in registered.aliases.items()} if registered else {}
