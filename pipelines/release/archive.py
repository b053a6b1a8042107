"""Packs a folder into a `.tar.xz` whose bytes depend on nothing but the files' names and contents.

BentoML reads a `.bento` as `tar.xz`.  A compressor's output changes with its version, and a network's weights hardly
shrink, so the data is stored: xz knows uncompressed chunks, which any xz reads, at the speed of memory.
https://tukaani.org/xz/xz-file-format.txt
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from datetime import datetime
from pathlib import Path
from typing import IO

_CHECK_CRC32 = b"\x00\x01"
_LZMA2_64K = bytes([0x02, 0x00, 0x21, 0x01, 0x08, 0x00, 0x00, 0x00])  # a block header of 12 bytes: LZMA2, 64 KiB window
_CHUNK_BYTES = 2**16
_FIRST_CHUNK, _NEXT_CHUNK, _END_OF_CHUNKS = b"\x01", b"\x02", b"\x00"


def pack_folder(folder: Path, file: Path, *, modified: datetime) -> None:
    """Write a folder's files, in the order of their names, without owners, modes or times of their own.

    Args:
        folder: holds regular files and folders, nothing else.
        file: to write.
        modified: the time that every entry gets.

    Raises:
        ValueError: something in the folder is neither a file nor a folder.
    """
    with (
        file.open("wb") as raw,
        _StoredXz(raw) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_CHUNK_BYTES) as archive,
    ):
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.mtime = int(modified.timestamp())
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"{path} is neither a file nor a folder")
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
                continue
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)


class _StoredXz(io.RawIOBase):
    """Writes one xz stream of one block of uncompressed chunks."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._waiting = bytearray()
        self._size = self._stored = self._check = 0
        raw.write(b"\xfd7zXZ\x00" + _CHECK_CRC32 + _crc32(_CHECK_CRC32))
        raw.write(_LZMA2_64K + _crc32(_LZMA2_64K))

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Take bytes of any number; whole chunks go out."""
        self._waiting += data
        while len(self._waiting) >= _CHUNK_BYTES:
            self._write_chunk(bytes(self._waiting[:_CHUNK_BYTES]))
            del self._waiting[:_CHUNK_BYTES]
        return len(data)

    def close(self) -> None:
        """Write the rest, the index and the footer; the raw file stays open."""
        if self.closed:
            return
        if self._waiting:
            self._write_chunk(bytes(self._waiting))
        self._raw.write(_END_OF_CHUNKS)
        stored = self._stored + len(_END_OF_CHUNKS)
        self._raw.write(_padding(stored) + struct.pack("<I", self._check))
        unpadded = len(_LZMA2_64K) + 4 + stored + 4
        index = b"\x00\x01" + _number(unpadded) + _number(self._size)
        index += _padding(len(index))
        self._raw.write(index + _crc32(index))
        footer = struct.pack("<I", (len(index) + 4) // 4 - 1) + _CHECK_CRC32
        self._raw.write(_crc32(footer) + footer + b"YZ")
        super().close()

    def _write_chunk(self, chunk: bytes) -> None:
        head = (_NEXT_CHUNK if self._size else _FIRST_CHUNK) + struct.pack(">H", len(chunk) - 1)
        self._raw.write(head + chunk)
        self._stored += len(head) + len(chunk)
        self._size += len(chunk)
        self._check = zlib.crc32(chunk, self._check)


def _crc32(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def _padding(length: int) -> bytes:
    return bytes(-length % 4)


def _number(value: int) -> bytes:
    """An integer in xz's variable length: seven bits a byte, the lowest first."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])
