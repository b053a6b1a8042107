"""From what the user names to the images it means: files of a folder or prefix, rows of a table, one file.

Nothing here asks for classes: unlike a source to train on, a folder may be flat, and a table may hold paths alone.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipelines.data.sources.base import Source, SourceItem
from pipelines.data.sources.opening import without_secrets
from pipelines.data.sources.stores import FileStore, LocalStore
from pipelines.errors import Refusal
from pipelines.params import TableParams
from pipelines.settings import Settings

KINDS = "a folder, an image, a .csv or .parquet table, an .npz, an s3:// address of one, or `digits`"
_FILES = (".csv", ".parquet", ".npz")


class TreeSource:
    """Every file below a store's root, in the order of their paths; a file's path is its key.

    A file of any name is tried: what it holds decides whether it is an image, here as in the service.

    Args:
        store: where the files lie.
        only: take this file alone.
        leave_out: the predictions, to pass over with their parts.
    """

    def __init__(self, store: FileStore, *, only: str = "", leave_out: str = "") -> None:
        self._store, self._only, self._leave_out = store, only, leave_out
        self.identity = f"tree {store.identity}"
        self.concurrent_reads = store.concurrent_reads

    def list_items(self) -> list[SourceItem]:
        """As `Source.list_items`."""
        files = self._store.find([self._only]) if self._only else self._store.list_tree().files
        items = [
            SourceItem(file.path, "", file.path, file.n_bytes, file.fingerprint, fault=file.fault)
            for file in files
            if file.path != self._leave_out and not file.path.startswith(f"{self._leave_out}.parts/")
        ]
        return sorted(items, key=lambda item: item.key)

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """The file's bytes."""
        return self._store.read(item.location, max_bytes)


def open_location(location: str, settings: Settings, *, path_column: str, out: Path) -> Source:
    """Find the images that a location means; a relative path starts where the command was given.

    Args:
        location: see `KINDS`.
        settings: S3's endpoint, and where fetched tables are kept.
        path_column: of a table; its other columns are not read.
        out: the predictions to be written, which are no images even where they lie in the folder.

    Raises:
        Refusal: there is nothing there, or it is nothing that Perch reads.
        TryLater: it lies elsewhere and cannot be reached now.
    """
    if urlsplit(location).scheme == "s3":
        from pipelines.data.sources.s3 import S3Store

        bucket, key = urlsplit(location).netloc, urlsplit(location).path.lstrip("/")
        folder, _, name = key.rpartition("/")
        if name.casefold().endswith(_FILES):
            store = S3Store(bucket, folder, settings.s3_endpoint_url)
            return _open_file(store, name, settings, path_column, without_secrets(location))
        return TreeSource(S3Store(bucket, key.rstrip("/"), settings.s3_endpoint_url))
    path = Path(location).expanduser()
    if path.is_dir():
        root, ignored = path.resolve(), out.resolve()
        below = ignored.is_relative_to(root)
        return TreeSource(LocalStore(path), leave_out=ignored.relative_to(root).as_posix() if below else "")
    if path.is_file():
        store_here = LocalStore(path.parent)
        if path.name.casefold().endswith(_FILES):
            return _open_file(store_here, path.name, settings, path_column, location)
        return TreeSource(store_here, only=path.name)
    if location == "digits":
        from pipelines.data.sources.digits import DigitsSource

        return DigitsSource()
    raise Refusal("what to predict", f"there is no {without_secrets(location)}", limit=KINDS)


def _open_file(store: FileStore, name: str, settings: Settings, path_column: str, shown: str) -> Source:
    if name.casefold().endswith(".npz"):
        from pipelines.data.sources.npz import NpzSource

        file = store.local_copy(name, settings.ingest_cache_dir)
        return NpzSource(file, None, settings.ingest_cache_dir, name=shown)
    from pipelines.data.sources.table import TableSource

    # A table source wants a class in every row; here the path, which every row has, stands in for it.
    columns = TableParams(path_column=path_column, label_column=path_column)
    return TableSource(
        store, name, columns, settings.ingest_cache_dir, way_out="name the column of paths with --path-column"
    )
