"""One item of a source becomes one row: read, hashed, decoded completely, measured, and shaped while it is decoded."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.core.contract import InputContract
from pipelines.core.image_decoding import (
    REDUCED_DECODING_FLOOR_PX,
    DecodingError,
    Reason,
    decode_image,
    decoding_floor_px,
    to_model_input,
)
from pipelines.core.image_features import measure_image
from pipelines.data.sources.base import Source, SourceItem


@dataclass(frozen=True, slots=True)
class ReadImage:
    """A sound image: its columns, its encoded bytes, and its pixels as the model will see them."""

    record: dict[str, Any]
    image: bytes
    shaped: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class UnusableFile:
    """What is no sound image: its row in the quarantine table.

    `lasting`: the bytes themselves are at fault, so that reading them again is of no use.
    """

    record: dict[str, Any]
    lasting: bool


class ImageReader:
    """Reads items of one source; safe from several threads.

    Args:
        source: where the bytes come from.
        max_pixels: of one image.
        max_bytes: of one encoded image.
        contract: the shape to keep for `data_preprocessing`.
        decodes: how many images may be decoded at once, however many are being read.
    """

    def __init__(
        self, source: Source, *, max_pixels: int, max_bytes: int, contract: InputContract, decodes: int
    ) -> None:
        self._source, self._contract = source, contract
        self._max_pixels, self._max_bytes = max_pixels, max_bytes
        self._decoding = threading.Semaphore(decodes)

    def read(self, item: SourceItem) -> ReadImage | UnusableFile:
        """Read one item; whatever is wrong with it alone becomes its quarantine record."""
        if item.fault:
            return _unusable(item, Reason.UNREADABLE, item.fault)
        if item.n_bytes > self._max_bytes:
            return _unusable(item, Reason.TOO_MANY_BYTES, f"{item.n_bytes:,} bytes (limit: {self._max_bytes:,})")
        try:
            data = self._source.read(item, self._max_bytes)
        except OSError as error:
            return _unusable(item, Reason.UNREADABLE, error.strerror or str(error))
        if len(data) > self._max_bytes:
            return _unusable(item, Reason.TOO_MANY_BYTES, f"more than {self._max_bytes:,} bytes")
        digest = hashlib.sha256(data).hexdigest()
        try:
            with self._decoding:
                return self._decode(item, data, digest)
        except DecodingError as error:
            return _unusable(item, error.reason, error.detail, n_bytes=len(data), sha256=digest)

    def _decode(self, item: SourceItem, data: bytes, digest: str) -> ReadImage:
        limits = {"max_pixels": self._max_pixels, "max_bytes": self._max_bytes}
        decoded = decode_image(data, **limits)
        # The properties must not depend on the contract: only a contract that needs more pixels decodes once more.
        floor_px = decoding_floor_px(self._contract)
        pixels = decoded.pixels
        if floor_px > REDUCED_DECODING_FLOOR_PX and pixels.size != (decoded.width_px, decoded.height_px):
            pixels = decode_image(data, **limits, floor_px=floor_px).pixels
        measured = measure_image(decoded.pixels)
        record = {
            "key": item.key,
            "label": item.label,
            "given_split": item.given_split,
            "group": item.group,
            "arrived": item.arrived,
            "sha256": digest,
            "format": decoded.format,
            "mode": decoded.mode,
            "width_px": decoded.width_px,
            "height_px": decoded.height_px,
            "n_bytes": len(data),
            "mean": measured.mean,
            "std": measured.std,
            "p01": measured.p01,
            "p99": measured.p99,
            "phash": measured.phash,
        }
        return ReadImage(record, data, to_model_input(pixels, self._contract))


def _unusable(item: SourceItem, reason: Reason, detail: str, n_bytes: int = -1, sha256: str = "") -> UnusableFile:
    record = {
        "key": item.key,
        "label": item.label,
        "reason": str(reason),
        "detail": detail,
        "n_bytes": max(n_bytes, item.n_bytes, 0),
        "sha256": sha256,
    }
    return UnusableFile(record, lasting=reason is not Reason.UNREADABLE)
