"""The aliases of a model as MLflow has them, for tests that hold them against what they did."""

from __future__ import annotations

from pipelines.registry.models import list_versions
from pipelines.settings import Settings


def read_aliases(settings: Settings, model: str) -> dict[str, str]:
    """Alias to version; none where the model was never registered."""
    return {alias: str(known.version) for known in list_versions(settings, model) for alias in known.aliases}
