"""Images in one folder per class, optionally below `train/`, `val/` and `test/`."""

from __future__ import annotations

from pathlib import PurePosixPath

from pipelines.data.sources.base import SourceItem, split_name
from pipelines.data.sources.stores import FileStore, Listing
from pipelines.errors import Refusal

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp"}
_LAYOUT = "one sub-folder per class, e.g. scans/normal/*.png and scans/pneumonia/*.png"


class FolderSource:
    """A tree of files: the first folder of a path names the class, or the split and the second the class.

    Args:
        store: where the files lie.
        name: the source as the user wrote it, for messages.
    """

    def __init__(self, store: FileStore, name: str) -> None:
        self._store, self._name = store, name
        self.identity = f"folder {store.identity}"
        self.concurrent_reads = store.concurrent_reads

    def list_items(self) -> list[SourceItem]:
        """Every file below a class's folder.

        A picture outside every class's folder is listed with a fault, so that it ends in quarantine; other stray files
        (a README, a table) are passed over.

        Raises:
            Refusal: there is no class folder, a class folder holds nothing, or split folders stand beside others.
        """
        listing = self._store.list_tree()
        depth = 1 if self._has_splits(listing) else 0
        items, filled = [], set()
        for file in listing.files:
            parts = PurePosixPath(file.path).parts
            if len(parts) <= depth + 1:
                if PurePosixPath(file.path).suffix.casefold() in _IMAGE_SUFFIXES:
                    items.append(SourceItem(file.path, "", file.path, file.n_bytes, fault="lies in no class's folder"))
                continue
            given = (split_name(parts[0]) or "") if depth else ""
            filled.add("/".join(parts[: depth + 1]))
            items.append(
                SourceItem(file.path, parts[depth], file.path, file.n_bytes, file.fingerprint, given, fault=file.fault)
            )
        classes = {folder for folder in listing.folders if folder.count("/") == depth}
        if not classes:
            raise self._flat_folder(len(items))
        if empty := sorted(classes - filled):
            raise Refusal(
                f"the source {self._name}",
                f"has {'a class folder' if len(empty) == 1 else 'class folders'} without images: {', '.join(empty)}",
                limit="at least one image per class",
                way_out="put images there, or remove the folder",
            )
        return items

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """The file's bytes."""
        return self._store.read(item.location, max_bytes)

    def _flat_folder(self, pictures: int) -> Refusal:
        if pictures:
            beside = f", but {pictures:,} picture{'s' if pictures > 1 else ''} that no folder gives a class"
            way_out = (
                "make a sub-folder per class and move the pictures into them; or list them in a .csv with the columns "
                "path and label, and name that as data_ingestion.source"
            )
        else:
            beside, way_out = "", "put the images there, or correct data_ingestion.source in params.yaml"
        return Refusal(
            f"the source {self._name}", f"has no sub-folders with images{beside}", limit=_LAYOUT, way_out=way_out
        )

    def _has_splits(self, listing: Listing) -> bool:
        """Whether the top folders are splits: `train` and nothing but splits, with folders of classes below them."""
        top = sorted(folder for folder in listing.folders if "/" not in folder)
        splits = [folder for folder in top if split_name(folder)]
        others = [folder for folder in top if not split_name(folder)]
        if "train" not in {split_name(folder) for folder in splits}:
            return False
        if len(splits) > 1 and others:
            raise Refusal(
                f"the source {self._name}",
                f"has the split folders {', '.join(splits)} beside {', '.join(others)}",
                limit="train, val and test only, or classes only",
                way_out="move the other folders out of it",
            )
        return not others
