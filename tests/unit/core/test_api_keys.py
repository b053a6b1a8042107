"""API keys are random, kept as digests, and their file is replaced whole."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines.core.api_keys import (
    ApiKeyFile,
    default_burst,
    digest_of,
    editing,
    id_of,
    new_key,
    read_keys,
    write_keys,
)
from pipelines.core.scopes import Scope
from pipelines.errors import Refusal


def test_new_key__its_text__holds_the_id_and_256_bits_and_is_not_in_the_record() -> None:
    made = [new_key("ward-3", (Scope.PREDICT,), rate_per_s=50) for _ in range(50)]
    for text, record in made:
        assert id_of(text) == record.id
        assert digest_of(text).hex() == record.sha256
        assert text.rpartition("_")[2] not in record.model_dump_json()
        assert len(text.rpartition("_")[2]) == 43
        assert text.isascii()
        assert text.replace("_", "").isalnum()
    assert len({text for text, _ in made}) == len(made)


@pytest.mark.parametrize(
    "text", ["", "perch_", "perch_abcdefgh", "perch_abcdefgh_" + "x" * 42, "other_abcdefgh_" + "x" * 43, "é" * 200]
)
def test_id_of__what_is_no_key__is_empty(text: str) -> None:
    assert id_of(text) == ""


def test_default_burst__small_and_large_rates__is_a_batch_or_two_seconds() -> None:
    assert default_burst(0.1) == 64
    assert default_burst(500) == 1000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "two words"}, "name"),
        ({"rate_per_s": 0}, "rate_per_s"),
        ({"burst": 0}, "burst"),
        ({"scopes": ()}, "scopes"),
    ],
)
def test_new_key__what_no_key_may_have__is_refused_by_name(changes: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {"name": "a", "scopes": (Scope.PREDICT,), "rate_per_s": 1.0} | changes
    with pytest.raises(Refusal, match=named):
        new_key(arguments.pop("name"), arguments.pop("scopes"), **arguments)  # type: ignore[arg-type]


def test_key_file__written_and_read__is_the_same_and_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "secrets" / "keys.json"
    keys = tuple(new_key("a", (Scope.PREDICT, Scope.MODEL), rate_per_s=1.5)[1] for _ in range(3))
    write_keys(file, ApiKeyFile(keys=keys))
    assert read_keys(file).keys == keys
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"schema_version": 1, "keys": [',
        b'{"schema_version": 2, "keys": []}',
        b'{"keys": [], "more": 1}',
        b'{"keys": [{"id": "short"}]}',
        b"\xff\xfe",
    ],
)
def test_read_keys__content_that_is_not_whole__is_a_value_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"\w+: "):
        read_keys(file)
    with pytest.raises(Refusal, match=r"keys\.json"), editing(file):
        pass
    assert file.read_bytes() == content


def test_read_keys__the_same_id_twice__is_a_value_error(tmp_path: Path) -> None:
    key = json.loads(new_key("a", (Scope.PREDICT,), rate_per_s=1)[1].model_dump_json())
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [key, key]}))
    with pytest.raises(ValueError, match="same id"):
        read_keys(file)


def test_editing__many_at_once__loses_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def add() -> None:
        with editing(file) as keys:
            keys.append(new_key("a", (Scope.PREDICT,), rate_per_s=1)[1])

    threads = [threading.Thread(target=add) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(file).keys) == 12


def test_editing__an_error_inside__leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(RuntimeError), editing(file) as keys:  # noqa: PT012 - the block is what is tested
        keys.append(new_key("a", (Scope.PREDICT,), rate_per_s=1)[1])
        raise RuntimeError
    assert not file.exists()


def test_expired__at_the_moment_itself__is_true() -> None:
    moment = datetime(2027, 1, 1, tzinfo=UTC)
    _, key = new_key("a", (Scope.PREDICT,), rate_per_s=1, expires=moment)
    assert key.expired(moment)
    assert not key.expired(moment - timedelta(seconds=1))
