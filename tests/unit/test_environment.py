"""What a wrong variable is told, in the words of whoever set it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.environment import read_environment
from pipelines.errors import EXIT_REFUSED, Refusal
from pipelines.settings import Settings
from serving.settings import ServingSettings


def test_read_environment__variables_that_settings_do_not_take__names_each_with_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERCH_SERVING_PORT", "abc")
    monkeypatch.setenv("PERCH_SERVING_WORKERS", "-1")
    monkeypatch.setenv("PERCH_SERVING_AUTHENTICATION", "sometimes")
    with pytest.raises(Refusal) as refused:
        read_environment(ServingSettings)
    lines = str(refused.value).splitlines()
    assert lines[0] == "the environment: "
    assert "  PERCH_SERVING_PORT: value 'abc' should be a valid integer, unable to parse string as an integer" in lines
    assert "  PERCH_SERVING_WORKERS: value '-1' should be greater than or equal to 0" in lines
    assert "  PERCH_SERVING_AUTHENTICATION: value 'sometimes' should be required or off" in lines
    assert lines[-1].startswith("  what to do: correct the variable")


def test_read_environment__sound_variables__are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_WORKERS", "3")
    assert read_environment(Settings).workers == 3


@pytest.mark.parametrize(
    ("variable", "command"), [("PERCH_WORKERS", ["pipelines", "runs"]), ("PERCH_SERVING_PORT", ["serving", "x.bento"])]
)
def test_command__wrong_variable__is_refused_without_a_traceback(
    variable: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_HOME", str(tmp_path))
    monkeypatch.setenv(variable, "many")
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_REFUSED
    assert f"{variable}: value 'many' should be a valid integer" in done.stderr
    assert "Traceback" not in done.stderr
