"""What a source of images is: it lists its items cheaply, and reads the bytes of one of them when asked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Protocol

from pipelines.errors import Refusal

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image as its source lists it, before a byte of it is read.

    Attributes:
        key: path relative to the source, `/` between folders; unique within the source.
        label: the class's name; empty where the source does not say.
        location: how the source finds the bytes.
        n_bytes: encoded size, or -1 where it is not known before reading.
        fingerprint: changes when the bytes may have changed; empty: unknown, read it every time.
        given_split: `train`, `val`, `test`, or empty.
        group: images of one group share a split; empty: the image stands alone.
        arrived: when the image arrived, or None where the source does not know.
        fault: why the item cannot be read, found while listing; empty where nothing is known against it.
    """

    key: str
    label: str
    location: str
    n_bytes: int = -1
    fingerprint: str = ""
    given_split: str = ""
    group: str = ""
    arrived: date | None = None
    fault: str = ""


class Source(Protocol):
    """Where images come from.  Reading is safe from several threads at once."""

    @property
    def identity(self) -> str:
        """Tells this source from every other on this machine, for the ingest cache; holds no credentials."""

    @property
    def concurrent_reads(self) -> int:
        """How many reads at once serve it best; 0: as many as images are decoded at once."""

    def list_items(self) -> list[SourceItem]:
        """Everything the source holds, in any order, without reading images.

        Raises:
            Refusal: the source is not there, or not arranged as a source must be.
            TryLater: it cannot be reached now.
        """

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """The encoded bytes of one item; at most `max_bytes` + 1 of them.

        Raises:
            OSError: this item cannot be read; the others may.
            TryLater: the source cannot be reached now.
        """


def split_name(text: str) -> str | None:
    """`train`, `val` or `test` for a customary name of a split, else None."""
    return _SPLIT_NAMES.get(text.strip().casefold())


def parse_split(text: str, where: str) -> str:
    """The split that a source names; empty stays empty.

    Raises:
        Refusal: the name is none that is known.
    """
    if not text.strip():
        return ""
    name = split_name(text)
    if name is None:
        raise Refusal(
            where,
            f"names the split {text!r}",
            limit="train, val or test",
            way_out="rename it, or drop the given splits",
        )
    return name
