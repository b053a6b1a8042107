"""From `data_ingestion.source` to the source it means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pipelines.data.sources.base import Source
from pipelines.data.sources.folder import FolderSource
from pipelines.data.sources.stores import FileStore, LocalStore
from pipelines.errors import Refusal
from pipelines.params import DataIngestionParams
from pipelines.settings import Settings

KINDS = (
    "`digits`, a folder, a .csv or .parquet table, an .npz, an s3:// address of these, or an http(s):// one of an .npz"
)


def open_source(params: DataIngestionParams, settings: Settings) -> Source:
    """Find the source that the parameters name; a relative path starts at the project's folder.

    Raises:
        Refusal: there is nothing there, or it is nothing that Perch reads.
        TryLater: it lies elsewhere and cannot be reached now.
    """
    location = params.source
    scheme = urlsplit(location).scheme
    if location == "digits":
        from pipelines.data.sources.digits import DigitsSource

        return DigitsSource()
    if scheme in ("http", "https"):
        from pipelines.data.sources.download import download
        from pipelines.data.sources.npz import NpzSource

        name = without_secrets(location)
        file = download(location, params.sha256, settings.ingest_cache_dir, name=name)
        return NpzSource(file, params.sha256, settings.ingest_cache_dir, name=name)
    if scheme == "s3":
        from pipelines.data.sources.s3 import S3Store

        bucket, key = urlsplit(location).netloc, urlsplit(location).path.lstrip("/")
        folder, _, name = key.rpartition("/")
        if not name.casefold().endswith((".csv", ".parquet", ".npz")):
            folder, name = key.rstrip("/"), ""
        store = S3Store(bucket, folder, settings.s3_endpoint_url)
        return _open_file(store, name, params, settings) if name else FolderSource(store, location)
    if "://" in location:
        raise Refusal("data_ingestion.source", location, limit=KINDS)
    path = settings.project_dir / Path(location).expanduser()
    if path.is_dir():
        return FolderSource(LocalStore(path), location)
    if path.is_file():
        return _open_file(LocalStore(path.parent), path.name, params, settings)
    raise Refusal(
        "data_ingestion.source",
        f"there is no {location}" + ("" if Path(location).is_absolute() else f" in {settings.project_dir}"),
        limit=KINDS,
        way_out="correct data_ingestion.source in params.yaml",
    )


def without_secrets(location: str) -> str:
    """The location as it may be written down: without user, password and query of an address."""
    parts = urlsplit(location)
    if parts.scheme not in ("http", "https", "s3"):
        return location
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _open_file(store: FileStore, name: str, params: DataIngestionParams, settings: Settings) -> Source:
    """A table or an .npz, by the ending of its name."""
    suffix = Path(name).suffix.casefold()
    if suffix in (".csv", ".parquet"):
        from pipelines.data.sources.table import TableSource

        return TableSource(store, name, params.table, settings.ingest_cache_dir)
    if suffix == ".npz":
        from pipelines.data.sources.npz import NpzSource

        file = store.local_copy(name, settings.ingest_cache_dir)
        return NpzSource(file, params.sha256, settings.ingest_cache_dir, name=without_secrets(params.source))
    raise Refusal("data_ingestion.source", f"{name} is a file of no kind that is read", limit=KINDS)
