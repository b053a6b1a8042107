"""What a JPEG's markers say of its size and of the work of decoding it, without decoding anything.

Markers are those of ITU-T T.81, table B.1; their segments are laid out in its annex B.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_MARKERS = 10_000  # cameras write dozens; each costs a decoder in Python microseconds and memory

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_SEQUENTIAL_HUFFMAN = frozenset((0xC0, 0xC1))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
# Compressed data escapes FF as FF 00, and holds the restart markers D0 to D7.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class MalformedJpegError(Exception):
    """The markers follow each other in no way that a JPEG's may."""


@dataclass(frozen=True, slots=True)
class JpegMarkers:
    """What was found.

    Attributes:
        scans: passes over the coefficients.
        width_px: of the frame; 0 where there is none.
        height_px: of the frame.
        sequential: whether it is Huffman-coded and not progressive: decoded in one pass if it has one scan.
    """

    scans: int
    width_px: int
    height_px: int
    sequential: bool


def read_jpeg_markers(data: bytes, *, max_scans: int) -> JpegMarkers:
    """Walk from marker to marker, as far as a decoder would and is allowed to.

    Args:
        data: that starts with FF D8.
        max_scans: after one more, the rest is not looked at.

    Raises:
        MalformedJpegError: there are more than `MAX_MARKERS`.
    """
    scans = width = height = 0
    sequential = False
    components = b""
    position = 2
    for _ in range(MAX_MARKERS):
        found = _NEXT_MARKER.search(data, position)
        if found is None:
            break
        position = found.end()
        marker = data[position - 1]
        if marker == _END_OF_IMAGE:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        if marker in _FRAMES:
            height = int.from_bytes(data[position + 3 : position + 5])
            width = int.from_bytes(data[position + 5 : position + 7])
            components = data[position + 7 : position + 8]
            sequential = marker in _SEQUENTIAL_HUFFMAN
        elif marker == _START_OF_SCAN:
            scans += 1
            # Most JPEGs have all in one scan, and a decoder stops there; the other bytes need no search.
            if scans > max_scans or (sequential and data[position + 2 : position + 3] == components):
                break
        position += int.from_bytes(data[position : position + 2])
    else:
        raise MalformedJpegError(f"has more than {MAX_MARKERS:,} markers")
    return JpegMarkers(scans, width, height, sequential)
