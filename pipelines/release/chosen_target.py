"""Which target releases are moved on: the one place that reads `PERCH_TARGET`."""

from __future__ import annotations

from pipelines.release.targets import ReleaseTarget
from pipelines.settings import Settings


def open_target(settings: Settings) -> ReleaseTarget:
    """Where releases run, as `PERCH_TARGET` says."""
    if settings.target == "kubernetes":
        from pipelines.release.kubernetes_target import KubernetesTarget

        return KubernetesTarget(settings)
    from pipelines.release.local_target import LocalTarget

    return LocalTarget(settings)
