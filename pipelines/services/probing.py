"""Puts the prober together for the settings of this machine: images from the artifact store, a key in the file."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pipelines.core.api_keys import DEFAULT_FILE_NAME
from pipelines.core.request_origins import PROBER
from pipelines.core.scopes import Scope
from pipelines.errors import Refusal
from pipelines.registry.staged_version import staged_probes
from pipelines.release.artifact_store import open_store
from pipelines.release.probe_images import fetch_probe_images
from pipelines.release.prober import Prober
from pipelines.release.rollout_state import RolloutState
from pipelines.release.staging import temporary_key
from pipelines.services.rollouts import open_world
from pipelines.settings import Settings


def open_prober(settings: Settings) -> Prober:
    """The prober of the releases on the settings' target."""
    return Prober(
        open_world(settings, patient=False),
        lambda state: _find_images(settings, state),
        lambda: _open_key(settings),
    )


def _open_key(settings: Settings) -> AbstractContextManager[str]:
    """A key of the prober's own: for the time of the work, or where the services' file is a Secret, a standing one."""
    if settings.target == "kubernetes":
        if not settings.prober_api_key:
            raise Refusal(
                "PERCH_PROBER_API_KEY",
                "is empty",
                limit="a key that the services of the cluster take",
                way_out="`perch api-keys own` makes it; docs/reference/authentication.md says where it goes",
            )
        return nullcontext(settings.prober_api_key)
    given = os.environ.get("PERCH_SERVING_API_KEYS_FILE")
    return temporary_key(Path(given) if given else settings.home / DEFAULT_FILE_NAME, PROBER, (Scope.PREDICT,))


def _find_images(settings: Settings, state: RolloutState) -> list[bytes]:
    release = state.release
    archive_sha256 = staged_probes(settings, release.model, release.version, release.digest)
    return fetch_probe_images(open_store(settings), release.digest, archive_sha256)
