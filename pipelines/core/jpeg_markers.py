"""How often a JPEG makes its decoder go over the image, from its markers alone.

Markers are those of ITU-T T.81, table B.1; their segments are laid out in its annex B.2.
"""

from __future__ import annotations

import re

MAX_MARKERS = 10_000  # cameras write dozens; each costs a decoder in Python microseconds and memory

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_SEQUENTIAL_HUFFMAN = frozenset((0xC0, 0xC1))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
# Compressed data escapes FF as FF 00, and holds the restart markers D0 to D7.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class MalformedJpegError(Exception):
    """The markers follow each other in no way that a JPEG's may."""


def count_scans(data: bytes, *, limit: int) -> int:
    """Count the passes over the coefficients, walking from marker to marker as far as a decoder would.

    Args:
        data: that starts with FF D8.
        limit: after one more, the rest is not looked at.

    Raises:
        MalformedJpegError: there are more than `MAX_MARKERS`.
    """
    scans = 0
    one_scan_of = b""  # so many components make the image whole: the decoder stops there, and most JPEGs are such
    position = 2
    for _ in range(MAX_MARKERS):
        found = _NEXT_MARKER.search(data, position)
        if found is None:
            return scans
        position = found.end()
        marker = data[position - 1]
        if marker == _END_OF_IMAGE:
            return scans
        if marker in _WITHOUT_LENGTH:
            continue
        if marker in _FRAMES:
            one_scan_of = data[position + 7 : position + 8] if marker in _SEQUENTIAL_HUFFMAN else b""
        elif marker == _START_OF_SCAN:
            scans += 1
            if scans > limit or (one_scan_of and data[position + 2 : position + 3] == one_scan_of):
                return scans
        position += int.from_bytes(data[position : position + 2])
    raise MalformedJpegError(f"has more than {MAX_MARKERS:,} markers")
