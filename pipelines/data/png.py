"""Writes arrays as PNG files whose bytes depend on the pixels alone.

Encoders choose filters and deflate blocks as they please, and the choice changes with the version of zlib; an image's
SHA-256 decides its split, so sources that hold bare arrays need bytes that are the same everywhere and for ever.
Stored (uncompressed) blocks leave nothing to choose.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

_LARGEST_STORED_BLOCK = 65_535  # RFC 1951, section 3.2.4


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode uint8 `(H, W)` grey or `(H, W, 3)` colour pixels, without filter and without compression."""
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    blocks = [raw[start : start + _LARGEST_STORED_BLOCK] for start in range(0, len(raw), _LARGEST_STORED_BLOCK)]
    stream = b"".join(
        struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for index, block in enumerate(blocks)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", b"\x78\x01" + stream + struct.pack(">I", zlib.adler32(raw)))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
