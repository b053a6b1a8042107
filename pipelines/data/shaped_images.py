"""A shard's images as the model will see them, kept on this machine so that nothing is decoded twice.

`data_ingestion` decodes every image to check and measure it, and leaves the shaped pixels here on the way;
`data_preprocessing` takes them, or makes them from the shards where they are missing.  The pixels are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pipelines.core.contract import InputContract
from pipelines.core.image_decoding import read_model_input
from pipelines.data.ingest_cache import code_version, temporary_file
from pipelines.data.parallel import map_ordered
from pipelines.data.shards import ShardEntry, iterate_images

_DIGEST_BYTES = 32
_CHECKED_AT_ONCE = 2**22


class ShapedImages:
    """The shaped images of every shard, for one contract.

    A file holds uint8 `(rows, size_px, size_px, channels)` and after it a seal, a SHA-256 over the pixels and the
    shard's own digest; a file that does not match is made anew.

    Args:
        root: `Settings.ingest_cache_dir`.
        contract: how the images are shaped.
    """

    def __init__(self, root: Path, contract: InputContract) -> None:
        text = contract.model_dump_json() + code_version()
        self._folder = root / "shaped" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._root, self._contract = root, contract
        self._opened: tuple[str, npt.NDArray[np.uint8] | None] = ("", None)

    def open(self, shard: ShardEntry) -> npt.NDArray[np.uint8] | None:
        """The images of one shard, mapped into memory; None where they are not kept or not sound."""
        if self._opened[0] != shard.name:
            self._opened = (shard.name, self._map(shard))
        return self._opened[1]

    def open_or_make(
        self, shard: ShardEntry, raw: Path, *, max_pixels: int, max_bytes: int, threads: int
    ) -> npt.NDArray[np.uint8]:
        """The images of one shard, decoded from `raw` where they are not kept.

        Raises:
            DecodingError: an image is beyond the limits now, which the shard's ingestion did not have.
        """
        images = self.open(shard)
        if images is not None:
            return images

        def shape(data: bytes) -> npt.NDArray[np.uint8]:
            return read_model_input(data, self._contract, max_pixels=max_pixels, max_bytes=max_bytes)

        with self.new_file() as file:
            for image in map_ordered(shape, iterate_images(raw / shard.name), threads=threads, ahead=4 * threads):
                file.add(image)
            file.keep(shard)
        self._opened = (shard.name, self._map(shard))
        made = self._opened[1]
        if made is None:
            raise OSError(f"{self._file(shard)} was changed while it was written")
        return made

    @contextlib.contextmanager
    def new_file(self) -> Iterator[ShapedFile]:
        """A file to add the images of a new shard to, in order."""
        with temporary_file(self._root) as path, path.open("wb") as stream:
            yield ShapedFile(stream, path, self._folder)

    def _map(self, shard: ShardEntry) -> npt.NDArray[np.uint8] | None:
        side, channels = self._contract.size_px, self._contract.channels
        shape = (shard.rows, side, side, channels)
        n_bytes = int(np.prod(shape))
        try:
            file = np.memmap(self._file(shard), dtype=np.uint8, mode="r")
        except (OSError, ValueError):  # absent, or empty
            return None
        if file.size != n_bytes + _DIGEST_BYTES:
            return None
        digest = hashlib.sha256()
        for start in range(0, n_bytes, _CHECKED_AT_ONCE):
            digest.update(file[start : min(start + _CHECKED_AT_ONCE, n_bytes)].data)
        return file[:n_bytes].reshape(shape) if _seal(digest.digest(), shard) == file[n_bytes:].tobytes() else None

    def _file(self, shard: ShardEntry) -> Path:
        return self._folder / _name(shard)


class ShapedFile:
    """One shard's shaped images while they are being written; `ShapedImages.new_file` makes one."""

    def __init__(self, stream: BinaryIO, path: Path, folder: Path) -> None:
        self._stream, self._path, self._folder = stream, path, folder
        self._digest = hashlib.sha256()
        self._complete = True

    def add(self, image: npt.NDArray[np.uint8] | None) -> None:
        """Append the next image; None where it is not at hand, and the file will not be kept."""
        if image is None:
            self._complete = False
        elif self._complete:
            pixels = image.tobytes()
            self._digest.update(pixels)
            self._stream.write(pixels)

    def keep(self, shard: ShardEntry) -> None:
        """Put the file in its place, if it is complete."""
        if self._complete:
            self._stream.write(_seal(self._digest.digest(), shard))
            self._stream.flush()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path.replace(self._folder / _name(shard))


def _name(shard: ShardEntry) -> str:
    return Path(shard.name).with_suffix(".uint8").name


def _seal(pixels_digest: bytes, shard: ShardEntry) -> bytes:
    """Binds the pixels to the shard they were made from."""
    return hashlib.sha256(pixels_digest + bytes.fromhex(shard.sha256)).digest()
