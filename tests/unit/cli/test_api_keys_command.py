"""`perch api-keys`: what it prints once is what the service takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from typer.testing import CliRunner, Result

from pipelines.cli.api_keys import app
from pipelines.errors import Refusal
from pipelines.settings import Settings
from serving.authentication import Authenticator
from serving.problems import Problem
from serving.settings import ServingSettings


def _run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), catch_exceptions=False)


def test_add__its_output__is_one_key_that_the_service_takes_and_the_file_does_not_hold(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    done = _run(
        *("add", "ward-3", "--scope", "predict", "--scope", "feedback", "--rate", "5", "--expires", "2999-01-01"),
        *("--file", file),
    )
    key = done.stdout.strip()
    assert re.fullmatch(r"perch_\w{8}_\w{43}", key)
    assert key[15:] not in Path(file).read_text()
    assert key not in done.stderr
    assert "until 2999-01-01 00:00 UTC" in done.stderr
    caller = Authenticator.from_settings(ServingSettings(api_keys_file=Path(file))).authenticate(
        Headers({"X-API-Key": key})
    )
    assert (caller.name, caller.scopes, caller.rate_per_s, caller.burst) == ("ward-3", {"predict", "feedback"}, 5.0, 64)


def test_own__its_output__is_variables_that_the_settings_take_and_keys_that_the_service_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "keys.json")
    done = _run("own", "--file", file)
    for line in done.stdout.splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    assert "perch_" not in done.stderr
    settings = Settings(home=tmp_path)
    assert "perch_" not in repr(settings)
    authenticator = Authenticator.from_settings(ServingSettings(api_keys_file=Path(file)))
    callers = [
        authenticator.authenticate(Headers({"X-API-Key": key}))
        for key in (settings.staging_api_key, settings.prober_api_key)
    ]
    assert [(caller.name, caller.scopes) for caller in callers] == [
        ("staging", {"predict", "model"}),
        ("prober", {"predict"}),
    ]


def test_list_and_revoke__one_of_two_keys_of_a_name__leaves_the_other(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    assert "make one with" in _run("list", "--file", file).output
    old, new = (_run("add", "ward-3", "--file", file).stdout.strip() for _ in range(2))
    old_id, new_id = old[6:14], new[6:14]
    assert [line.split()[:3] for line in _run("list", "--file", file).output.splitlines()[1:]] == [
        [id_, "ward-3", "predict"] for id_ in (old_id, new_id)
    ]
    assert f"revoked {old_id} of ward-3" in _run("revoke", old_id, "--file", file).output
    authenticator = Authenticator.from_settings(ServingSettings(api_keys_file=Path(file)))
    assert authenticator.authenticate(Headers({"X-API-Key": new})).name == "ward-3"
    with pytest.raises(Problem, match="not known"):
        authenticator.authenticate(Headers({"X-API-Key": old}))
    with pytest.raises(Refusal, match="nothing was revoked"):
        _run("revoke", new_id, "nosuchid", "--file", file)
    assert "holds no key now" in _run("revoke", new_id, "--file", file).output
    assert json.loads(Path(file).read_text())["keys"] == []


def test_list__an_expired_key__says_so(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _run("add", "a", "--expires", "2999-01-01", "--file", str(file))
    file.write_text(file.read_text().replace("2999", "2020"))
    assert "2020-01-01 00:00 (over)" in _run("list", "--file", str(file)).output


def test_add__wrong_values__are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    with pytest.raises(Refusal, match="in the future"):
        _run("add", "a", "--expires", "2020-01-01", "--file", file)
    with pytest.raises(Refusal, match="name"):
        _run("add", "two words", "--file", file)
    assert _run("add", "a", "--scope", "everything", "--file", file).exit_code == 2
    assert not Path(file).exists()


def test_add__the_name_of_the_prober__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="marks the prober's own keys"):
        _run("add", "prober", "--file", str(tmp_path / "keys.json"))
