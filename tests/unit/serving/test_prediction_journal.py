import errno
import os
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.prediction_journal import (
    Journal,
    encode_block,
    encode_records,
    list_journals,
    read_journal,
    take_journal,
)
from serving.prediction_records import JournalHeader

HEADER = JournalHeader("predictions", "digits", "3", "ab" * 32, ("cat", "dog"))


def lines_of(data: bytes) -> list[object]:
    return [orjson.loads(line) for block in read_journal(data).blocks for line in bytes(block).splitlines()]


def make(spool: Path, *batches: list[object]) -> Path:
    journal = Journal(spool, HEADER)
    for batch in batches:
        journal.append(encode_records(batch))
    journal.close()
    return journal.path


def test_journal__written_and_closed__is_read_back(tmp_path: Path) -> None:
    path = make(tmp_path, [{"a": 1}, {"a": "zwei\n\u2028"}], [{"a": 3}])
    content = read_journal(path.read_bytes())
    assert (content.header, content.damaged, content.rows) == (HEADER, 0, 3)
    assert lines_of(path.read_bytes()) == [{"a": 1}, {"a": "zwei\n\u2028"}, {"a": 3}]


@given(st.integers(0, 2000), st.integers(1, 255))
def test_read_journal__torn_at_any_byte_or_one_byte_changed__loses_that_block_only(cut: int, flip: int) -> None:
    header = encode_block(_header_line())
    blocks = [
        encode_block(b"".join(b'{"n":%d}\n' % (100 + 10 * block + row) for row in range(4))) for block in range(6)
    ]
    data = header + b"".join(blocks)
    cut %= len(data)

    expected = [block.partition(b"\n")[2] for block in blocks]
    whole = max(cut - len(header), 0) // len(blocks[0])
    assert [bytes(block) for block in read_journal(data[:cut]).blocks] == expected[:whole]

    damaged = bytearray(data)
    damaged[cut] ^= flip
    read = read_journal(bytes(damaged))
    survivors = [bytes(block) for block in read.blocks]
    assert read.damaged >= 1
    assert len(survivors) >= 5
    assert [block for block in expected if block in survivors] == survivors


def _header_line() -> bytes:
    return b'{"kind":"predictions","model":"m","version":"1","onnx_sha256":"","labels":[]}\n'


def test_read_journal__header_gone__says_so_and_counts_the_rows(tmp_path: Path) -> None:
    data = make(tmp_path, [{"a": 1}, {"a": 2}]).read_bytes()
    content = read_journal(data[3:])
    assert (content.header, content.rows, content.damaged) == (None, 2, 1)
    assert read_journal(b"").rows == 0


def test_encode_records__what_json_cannot_say__is_left_out() -> None:
    records = [{"a": 1}, {"a": "\ud800"}, {"a": object()}, {"a": np.float32([0.5, 0.25])}]
    assert encode_records(records) == [b'{"a":1}', b'{"a":[0.5,0.25]}']


def test_take_journal__while_its_owner_lives__is_none_and_then_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, HEADER)
    with take_journal(journal.path) as data:
        assert data is None
    journal.close()
    with take_journal(journal.path) as data:
        assert data is not None
        with take_journal(journal.path) as second:
            assert second is None
        journal.path.unlink()
    with take_journal(journal.path) as data:
        assert data is None
    assert list_journals(tmp_path) == []


def test_take_journal__removed_after_it_was_opened__is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path = make(tmp_path, [{"a": 1}])
    lock = fcntl.flock

    def another_was_quicker(descriptor: int, operation: int) -> None:
        path.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr("serving.prediction_journal.fcntl.flock", another_was_quicker)
    with take_journal(path) as data:
        assert data is None


def test_append__disk_full_in_the_middle_of_a_block__leaves_no_half_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, HEADER)
    journal.append([b'{"n":1}'])
    write, calls = os.write, iter([True, False])

    def half_then_full(descriptor: int, data: memoryview) -> int:
        if next(calls):
            return write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "write", half_then_full)
        with pytest.raises(OSError, match="No space"):
            journal.append([b'{"n":2}'])
    journal.append([b'{"n":3}'])
    journal.close()
    content = read_journal(journal.path.read_bytes())
    assert (content.damaged, journal.rows) == (0, 2)
    assert lines_of(journal.path.read_bytes()) == [{"n": 1}, {"n": 3}]
