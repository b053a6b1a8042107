"""An `.npz` in MedMNIST's format (Yang et al., Scientific Data 2023): arrays of images and labels for each split."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipelines.core.file_hash import hash_file
from pipelines.core.splitting import SPLITS
from pipelines.data.png import encode_png
from pipelines.data.sources.base import SourceItem
from pipelines.errors import Refusal

_FORMAT = (
    "MedMNIST's: train_images, val_images, test_images of uint8 (N, H, W) or (N, H, W, 3), "
    "and train_labels, … of integers (N, 1)"
)
_ZIP_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True)
class _Split:
    """One split's images as they lie in the archive."""

    name: str
    shape: tuple[int, ...]
    labels: list[str]


class NpzSource:
    """The images of an `.npz`, with the splits it gives.

    Classes are named by their index, or by the array `label_names` where the file has one.  Images are read from an
    unpacked copy on disk, so that memory does not grow with the file.

    Args:
        file: the archive on this machine.
        sha256: what its digest must be; None takes it as it is.
        cache_dir: for the unpacked copy, which is gone when the process is.
        name: the source as the user wrote it, for messages.
    """

    concurrent_reads = 0

    def __init__(self, file: Path, sha256: str | None, cache_dir: Path, *, name: str) -> None:
        self._file, self._cache_dir, self._name = file, cache_dir, name
        self._digest = hash_file(file)
        if sha256 is not None and self._digest != sha256:
            raise Refusal(
                f"the file {name}",
                f"has the SHA-256 {self._digest}",
                limit=f"{sha256}, data_ingestion.sha256",
                way_out="fetch it again, or correct the digest if the file was changed on purpose",
            )
        self.identity = f"npz {self._digest}"
        self._unpacking = threading.Lock()
        self._unpacked: dict[str, tuple[IO[bytes], int, npt.NDArray[Any]]] = {}

    def list_items(self) -> list[SourceItem]:
        """One item per image, keyed by split and position.

        Raises:
            Refusal: the file is not arranged as MedMNIST's are.
        """
        return [
            SourceItem(
                key=f"{split.name}/{position:06d}.png",
                label=label,
                location=f"{split.name}/{position}",
                fingerprint=self._digest,
                given_split=split.name,
            )
            for split in self._read_splits()
            for position, label in enumerate(split.labels)
        ]

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """One image as PNG."""
        split, _, position = item.location.partition("/")
        stream, start, like = self._unpack(split)
        pixels = os.pread(stream.fileno(), like.nbytes, start + int(position) * like.nbytes)
        return encode_png(np.frombuffer(pixels, np.uint8).reshape(like.shape))[: max_bytes + 1]

    def _read_splits(self) -> list[_Split]:
        if not zipfile.is_zipfile(self._file):
            with self._file.open("rb") as stream:
                beginning = stream.read(8)
            if beginning.startswith(_ZIP_SIGNATURE):
                raise self._refusal(
                    "begins as an .npz archive and has no end: it was cut off, or is still being written"
                )
            found = f"starts with {beginning.hex(' ')}" if beginning else "is empty"
            raise self._refusal(f"{found}, and is no .npz archive")
        try:
            with np.load(self._file, allow_pickle=False) as arrays:
                names = [split for split in SPLITS if f"{split}_images" in arrays.files]
                if not names:
                    raise self._refusal(f"holds {', '.join(arrays.files) or 'nothing'}")
                label_names = [str(name) for name in arrays["label_names"]] if "label_names" in arrays.files else None
                return [self._read_split(split, arrays, label_names) for split in names]
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise self._refusal(f"is damaged: {error}") from error
        except ValueError as error:  # NumPy's own words advise to load what may run code
            objects = "allow_pickle" in str(error)
            reason = "holds Python objects, which are not read" if objects else f"cannot be read: {error}"
            raise self._refusal(reason) from error

    def _read_split(self, split: str, arrays: Any, label_names: list[str] | None) -> _Split:
        if f"{split}_labels" not in arrays.files:
            raise self._refusal(f"holds {split}_images without {split}_labels")
        labels = np.asarray(arrays[f"{split}_labels"])
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise self._refusal(f"{split}_labels are {labels.dtype} {labels.shape}: one class per image is needed")
        shape, fortran_order, dtype, _ = self._read_header(split)
        colours = shape[3:]
        if dtype != np.uint8 or fortran_order or len(shape) not in (3, 4) or colours not in ((), (1,), (3,)):
            order = " in Fortran order" if fortran_order else ""
            raise self._refusal(f"{split}_images are {dtype} {shape}{order}")
        if len(labels) != shape[0]:
            raise self._refusal(f"holds {shape[0]} {split}_images and {len(labels)} {split}_labels")
        if label_names is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(label_names):
            raise self._refusal(
                f"{split}_labels go from {labels.min()} to {labels.max()}; there are {len(label_names)} label_names"
            )
        return _Split(split, shape, [label_names[label] if label_names else str(label) for label in labels])

    def _read_header(self, split: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        """Shape, order, type and length of the header of a split's images, without reading them."""
        with zipfile.ZipFile(self._file) as archive, archive.open(f"{split}_images.npy") as member:
            major, _ = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(member)
            return shape, fortran_order, dtype, member.tell()

    def _unpack(self, split: str) -> tuple[IO[bytes], int, npt.NDArray[Any]]:
        """A split's images in a nameless file, where they begin in it, and an array of one image's shape."""
        with self._unpacking:
            if split not in self._unpacked:
                shape, _, _, start = self._read_header(split)
                self._cache_dir.mkdir(parents=True, exist_ok=True)
                # Nameless from the start: whatever ends the process, the space is given back.
                stream = tempfile.TemporaryFile(dir=self._cache_dir)  # noqa: SIM115 - lives as long as the source
                try:
                    with zipfile.ZipFile(self._file) as archive, archive.open(f"{split}_images.npy") as member:
                        shutil.copyfileobj(member, stream, 2**20)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise self._refusal(f"is damaged: {error}") from error
                stream.flush()
                one = shape[1:3] if shape[3:] == (1,) else shape[1:]
                self._unpacked[split] = (stream, start, np.empty(one, np.uint8))
            return self._unpacked[split]

    def _refusal(self, value: str) -> Refusal:
        way_out = "write it with numpy.savez, or correct data_ingestion.source; a folder of images needs no such file"
        return Refusal(f"the file {self._name}", value, limit=_FORMAT, way_out=way_out)
