"""Who is let in by an API key, who is not, and that keys change without a restart."""

from __future__ import annotations

import hmac
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from pipelines.core.api_keys import ApiKeyFile, editing, new_key, write_keys
from pipelines.core.scopes import Scope
from pipelines.errors import Refusal
from serving.authentication import ALL_SCOPES, Authenticator, Caller, require
from serving.problems import FORBIDDEN, UNAUTHORIZED, Problem
from serving.settings import ServingSettings

AN_HOUR = timedelta(hours=1)


def _authenticator(file: Path | None, **more: Any) -> Authenticator:
    return Authenticator.from_settings(ServingSettings(api_keys_file=file, **more))


def _add(file: Path, name: str = "ward-3", **more: Any) -> tuple[str, str]:
    text, record = new_key(name, (Scope.PREDICT, Scope.FEEDBACK), rate_per_s=50, **more)
    with editing(file) as keys:
        keys.append(record)
    return text, record.id


def _refused(authenticator: Authenticator, headers: dict[str, str]) -> Problem:
    with pytest.raises(Problem) as caught:
        authenticator.authenticate(Headers(headers))
    assert caught.value.kind is UNAUTHORIZED
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer realm=")
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_authenticate__a_key_in_either_header__is_its_caller(file: Path) -> None:
    key, id_ = _add(file)
    authenticator = _authenticator(file)
    caller = Caller("ward-3", frozenset({"predict", "feedback"}), 50.0, 100, id_)
    assert authenticator.authenticate(Headers({"X-API-Key": key})) == caller
    assert authenticator.authenticate(Headers({"Authorization": f"Bearer {key}"})) == caller
    assert authenticator.authenticate(Headers({"authorization": f"bearer  {key}"})) == caller


def test_authenticate__wrong_credentials__are_refused_and_not_echoed(file: Path) -> None:
    key, _ = _add(file)
    authenticator = _authenticator(file)
    changed = key[:-1] + ("a" if key[-1] != "a" else "b")
    unknown, _record = new_key("ward-3", (Scope.PREDICT,), rate_per_s=50)
    for wrong in (changed, unknown, key + "a", key[:20], "perch_é", "eyJh.eyJz.c2ln", "a" * 100_000):
        for header in ({"X-API-Key": wrong}, {"Authorization": f"Bearer {wrong}"}):
            problem = _refused(authenticator, header)
            assert wrong not in str(problem.as_json()) + str(problem.headers)
    for nothing in ({}, {"Authorization": "Basic cGVyY2g6"}, {"Authorization": "Bearer"}, {"Authorization": ""}):
        assert "error=" not in _refused(authenticator, nothing).headers["WWW-Authenticate"]  # RFC 6750: none was sent
    _refused(authenticator, {"X-API-Key": ""})


def test_authenticate__a_token_where_no_issuer_is_known__says_so_and_not_that_the_key_is_wrong(file: Path) -> None:
    _add(file)
    problem = _refused(_authenticator(file), {"Authorization": "Bearer eyJh.eyJz.c2ln"})
    assert problem.detail == "No tokens are taken here, for this service knows no issuer. Send an API key as X-API-Key."


def test_authenticate__an_unknown_id__is_compared_as_a_known_one_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = _add(file)
    authenticator = _authenticator(file)
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    _refused(authenticator, {"X-API-Key": key[:-2] + "zz"})
    _refused(authenticator, {"X-API-Key": new_key("a", (Scope.PREDICT,), rate_per_s=1)[0]})
    assert compared == [(32, 32), (32, 32)]


def test_authenticate__expired_key__is_refused_and_its_successor_is_taken(file: Path) -> None:
    old, _ = _add(file, expires=datetime.now(UTC) - AN_HOUR)
    new, new_id = _add(file, expires=datetime.now(UTC) + AN_HOUR)
    authenticator = _authenticator(file)
    assert "expired" in _refused(authenticator, {"X-API-Key": old}).detail
    assert authenticator.authenticate(Headers({"X-API-Key": new})).bucket == new_id


def test_authenticate__keys_added_and_revoked__count_within_a_second(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = _Clock()
    monkeypatch.setattr("serving.watched_file.time", clock)
    old, old_id = _add(file)
    authenticator = _authenticator(file)
    new, _ = _add(file)
    clock.now += 1.0
    assert authenticator.authenticate(Headers({"X-API-Key": old})).name == "ward-3"
    assert authenticator.authenticate(Headers({"X-API-Key": new})).name == "ward-3"
    with editing(file) as keys:
        keys[:] = [key for key in keys if key.id != old_id]
    clock.now += 1.0
    _refused(authenticator, {"X-API-Key": old})
    with caplog.at_level(logging.WARNING):
        file.write_text('{"schema_version": 1, "keys": [{"id": "')
        clock.now += 1.0
        assert authenticator.authenticate(Headers({"X-API-Key": new})).name == "ward-3"
        file.unlink()
        clock.now += 1.0
        assert authenticator.authenticate(Headers({"X-API-Key": new})).name == "ward-3"
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"] * 2
    assert new not in caplog.text


def test_from_settings__nobody_could_come_in__is_refused_with_the_way_out(file: Path) -> None:
    with pytest.raises(Refusal, match="perch api-keys add"):
        _authenticator(None)
    with pytest.raises(Refusal, match="perch api-keys add"):
        _authenticator(file)
    write_keys(file, ApiKeyFile())
    with pytest.raises(Refusal, match="holds no key"):
        _authenticator(file)
    file.write_text("{")
    with pytest.raises(Refusal, match="cannot be read"):
        _authenticator(file)


def test_from_settings__off__lets_everybody_do_everything() -> None:
    caller = _authenticator(None, authentication="off").authenticate(Headers({"X-API-Key": "whatever"}))
    assert caller.name == "anonymous"
    assert caller.scopes == ALL_SCOPES


def test_require__a_scope_that_is_missing__is_forbidden_and_named() -> None:
    caller = Caller("a", frozenset({"predict"}), 1.0, 1)
    require(caller, "predict")
    with pytest.raises(Problem) as caught:
        require(caller, "metrics")
    assert caught.value.kind is FORBIDDEN
    assert 'scope="metrics"' in caught.value.headers["WWW-Authenticate"]
    assert "predict" in caught.value.detail


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now
