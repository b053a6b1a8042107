"""The prediction service of this machine: a packaged version, with the keys, folders and limits of the home."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from pipelines.core.champions import champions_by_ledger
from pipelines.errors import Refusal
from pipelines.registry.ledger import Ledger
from pipelines.release.artifact_store import open_store
from pipelines.services.secrets import api_keys_file, ensure_demo_key
from pipelines.settings import Settings


@dataclass(frozen=True)
class PackagedVersion:
    """A version that has a release.

    Attributes:
        model: name of the registered model.
        version: in the registry.
        digest: SHA-256 of its latest release.
    """

    model: str
    version: int
    digest: str


def find_packaged_version(settings: Settings, model: str, version: int | None = None) -> PackagedVersion | None:
    """The version to serve, by the ledger: the one asked for, else the champion, else the last packaged.

    A champion is served by the very release that was promoted, though it may have been packaged again since.

    Returns:
        None where there is none.

    Raises:
        TryLater: the ledger's database did not answer.
    """
    ledger = Ledger(settings.ledger_url)
    try:
        entries = ledger.entries(model)
    finally:
        ledger.close()
    digests = {
        int(entry.version): json.loads(entry.evidence)["release_sha256"]
        for entry in entries
        if entry.event == "packaged"
    }
    if version is None:
        champion = champions_by_ledger(entries, model).champion
        version = int(champion) if champion else max(digests, default=None)
        for entry in entries:
            if entry.event == "promoted" and entry.version == champion:
                released = json.loads(entry.evidence).get("release_sha256")
                digests |= {int(champion): released} if released else {}
    if version is None or version not in digests:
        return None
    return PackagedVersion(model, version, digests[version])


def require_packaged_version(settings: Settings, model: str, version: int | None = None) -> PackagedVersion:
    """As `find_packaged_version`.

    Raises:
        Refusal: there is none.
        TryLater: the ledger's database did not answer.
    """
    found = find_packaged_version(settings, model, version)
    if found is not None:
        return found
    if version is None:
        raise Refusal(
            f"the model {model}",
            "has no packaged version",
            way_out="`perch run` ends with one; or `perch models` lists versions and `perch package VERSION` makes one",
        )
    raise Refusal(
        f"version {version} of {model}",
        "is not packaged",
        way_out=f"perch package {version}",
    )


def serving_environment(settings: Settings) -> dict[str, str]:
    """What a service of this machine is told: keys, folders, stores.

    What is set in the environment already (`PERCH_SERVING_*`) stays: limits, workers, address, other stores.
    """
    folder = settings.home / "serving"
    defaults = {
        "API_KEYS_FILE": str(api_keys_file(settings)),
        "PUBLIC_KEYS": str(settings.keys_dir),
        "CACHE_DIR": str(folder / "cache"),
        "SPOOL_DIR": str(folder / "spool"),
        "PREDICTIONS_URL": settings.predictions_url or str(settings.home / "predictions"),
        "S3_ENDPOINT_URL": settings.s3_endpoint_url,
        "HOST": "127.0.0.1",
        # The agreement of a release in shadow is read from what was shipped.
        "FLUSH_INTERVAL_S": "10",
    }
    given = {name: value for name, value in os.environ.items() if name.startswith("PERCH_SERVING_")}
    return {f"PERCH_SERVING_{name}": value for name, value in defaults.items() if value} | given


def release_address(settings: Settings, digest: str) -> str:
    """Where a release lies, for `python -m serving`."""
    from pipelines.core.release_unit import release_name

    return open_store(settings).address(release_name(digest))


def serving_command(settings: Settings, packaged: PackagedVersion) -> tuple[list[str], dict[str, str]]:
    """The command that serves a packaged version, and its environment."""
    ensure_demo_key(settings)
    environment = {**os.environ, **serving_environment(settings)}
    address = release_address(settings, packaged.digest)
    return [sys.executable, "-m", "serving", address, "--digest", packaged.digest], environment
