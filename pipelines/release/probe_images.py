"""The images that a prober sends: a plain archive beside the release in the artifact store, of the same name.

They are the test split's, which no client sent: kept predictions hold no image that could be replayed.  The ledger's
row `staged` has the archive's SHA-256, so that nobody can give the prober easier ones.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.core.file_hash import hash_file
from pipelines.errors import Refusal
from pipelines.release.artifact_store import ArtifactStore

MOST_BYTES = 64 * 2**20  # a prober holds them all in memory
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest time of a zip: equal images give equal bytes


def keep_probe_images(store: ArtifactStore, release_sha256: str, images: Sequence[bytes]) -> str:
    """Put the archive into the store.

    Args:
        store: of releases.
        release_sha256: digest of the release.
        images: encoded.

    Returns:
        SHA-256 of the archive.

    Raises:
        TryLater: the store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="perch-probes-") as folder:
        file = Path(folder) / _name(release_sha256)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for number, image in enumerate(images):
                archive.writestr(zipfile.ZipInfo(f"{number:05d}", _LONG_AGO), image)
        store.put(file.name, file)
        return hash_file(file)


def fetch_probe_images(store: ArtifactStore, release_sha256: str, archive_sha256: str) -> list[bytes]:
    """The images of a release.

    Args:
        store: of releases.
        release_sha256: digest of the release.
        archive_sha256: of the archive, by the ledger.

    Raises:
        Refusal: the archive is gone, or is another one.
        TryLater: the store does not answer.
    """
    name = _name(release_sha256)
    with tempfile.TemporaryDirectory(prefix="perch-probes-") as folder:
        file = Path(folder) / name
        found = hash_file(file) if store.get(name, file) else "missing"
        if found != archive_sha256:
            raise Refusal(
                f"the prober's images {store.address(name)}",
                found[:12],
                limit=f"SHA-256 {archive_sha256[:12]}…, by the ledger",
                way_out="`perch deploy_to_staging --run RUN` puts them there again",
            )
        with zipfile.ZipFile(file) as archive:
            return [archive.read(entry) for entry in archive.infolist()]


def _name(release_sha256: str) -> str:
    return f"{release_sha256}.probes.zip"
