"""The journal: a local file of records that a killed process leaves readable.

A journal is a row of blocks: a line `perch1 <bytes> <crc32>`, then that many bytes of JSON lines.  The first block is
the header.  A block that was torn by a kill, a full disk or a power cut fails its length or checksum, and reading goes
on at the next one.

The owner holds a lock (flock) on the file; the kernel gives it back when the owner closes the file or dies, however it
dies.  So **a journal that nobody holds is complete**: whoever locks it may ship it and then remove it.
"""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from pipelines.core.prediction_ids import new_prediction_id
from serving.prediction_records import JournalHeader

SUFFIX = ".journal"
UNSET_SUFFIX = ".new"  # not yet locked: a shipper must not take it
DAMAGED_SUFFIX = ".damaged"  # nothing in it can be read; kept for a person to look at

_BLOCK = re.compile(rb"perch1 (\d{1,12}) ([0-9a-f]{8})\n")


class Journal:
    """A journal that this process writes.

    Args:
        spool: folder of the journals, which exists.
        header: written as the first block.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, spool: Path, header: JournalHeader) -> None:
        self.path = spool / f"{new_prediction_id()}{SUFFIX}"
        self.rows = 0
        self.n_bytes = 0
        unset = self.path.with_suffix(UNSET_SUFFIX)
        self._descriptor = os.open(unset, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._write(encode_block(orjson.dumps(asdict(header)) + b"\n"))
            unset.rename(self.path)
        except BaseException:
            os.close(self._descriptor)
            with suppress(OSError):
                unset.unlink()
            raise

    def append(self, lines: Sequence[bytes]) -> None:
        """Write records as one block: all of them or none.

        Args:
            lines: of `encode_records`.

        Raises:
            OSError: the disk is full or gone.
        """
        if lines:
            self._write(encode_block(b"\n".join(lines) + b"\n"))
            self.rows += len(lines)

    def close(self) -> None:
        """Give the journal to whoever ships it."""
        os.close(self._descriptor)

    def _write(self, block: bytes) -> None:
        try:
            view = memoryview(block)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            # What was written of the block must not stand in the way of the next.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.n_bytes)
                os.lseek(self._descriptor, self.n_bytes, os.SEEK_SET)
            raise
        self.n_bytes += len(block)


@dataclass(frozen=True)
class JournalContent:
    """What could be read of a journal.

    Attributes:
        header: None when the first block is damaged: without it the rows have no model.
        blocks: JSON lines, each block ending in a newline.
        damaged: stretches that could not be read.
    """

    header: JournalHeader | None
    blocks: list[memoryview]
    damaged: int

    @property
    def rows(self) -> int:
        """Records in the blocks."""
        return sum(bytes(block).count(b"\n") for block in self.blocks)


def encode_records(records: Iterable[object]) -> list[bytes]:
    """Records as lines of JSON; one that JSON has no words for is left out."""
    lines = []
    for record in records:
        try:
            lines.append(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY))
        except orjson.JSONEncodeError:
            continue
    return lines


def encode_block(payload: bytes) -> bytes:
    """A block around its content."""
    return b"perch1 %d %08x\n" % (len(payload), zlib.crc32(payload)) + payload


def read_journal(data: bytes) -> JournalContent:
    """Everything in a journal's bytes that is whole."""
    view = memoryview(data)
    blocks: list[memoryview] = []
    damaged = position = 0
    header: JournalHeader | None = None
    header_end = 0
    while position < len(data):
        match = _BLOCK.match(data, position)
        if match is not None:
            payload = view[match.end() : match.end() + int(match[1])]
            if len(payload) == int(match[1]) and zlib.crc32(payload) == int(match[2], 16):
                if position == 0:
                    header, header_end = _decode_header(payload), match.end() + len(payload)
                else:
                    blocks.append(payload)
                position = match.end() + len(payload)
                continue
        damaged += 1
        following = _BLOCK.search(data, position + 1)
        position = following.start() if following else len(data)
    if header_end and header is None:
        damaged += 1
    return JournalContent(header, blocks, damaged)


@contextmanager
def take_journal(path: Path) -> Iterator[bytes | None]:
    """A complete journal's bytes, for this caller alone; None when somebody else has it, or has shipped it.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    with os.fdopen(descriptor, "rb") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Between opening and locking, another process may have shipped it and removed the name.
        yield file.read() if os.fstat(descriptor).st_nlink else None


def list_journals(spool: Path) -> list[Path]:
    """The journals of a spool folder, oldest first."""
    return sorted(spool.glob(f"*{SUFFIX}"))


def _decode_header(payload: memoryview) -> JournalHeader | None:
    try:
        tree = orjson.loads(payload)
        return JournalHeader(
            str(tree["kind"]),
            str(tree["model"]),
            str(tree["version"]),
            str(tree["onnx_sha256"]),
            tuple(str(label) for label in tree["labels"]),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
