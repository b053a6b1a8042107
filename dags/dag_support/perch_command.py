"""Runs a `perch` command in a process of its own, its log live, and reads the JSON of its last line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from dags.dag_support.project import PROJECT_DIR
from pipelines.errors import EXIT_OK, EXIT_REFUSED


@dataclass(frozen=True)
class CommandOutcome:
    """How a command ended.

    Attributes:
        exit_code: 0, or one of `pipelines.errors`.
        result: the JSON object of its last line; empty where it printed none.
    """

    exit_code: int
    result: dict[str, Any]

    def raise_for_exit(self, name: str) -> None:
        """Fail the task for good where the command refused, so that it is tried again where it may help.

        Raises:
            AirflowFailException: it refused.
            AirflowException: it ended in another way.
        """
        if self.exit_code == EXIT_REFUSED:
            raise AirflowFailException(f"{name} refused; the last lines of the log say what, why and the way out")
        if self.exit_code != EXIT_OK:
            raise AirflowException(f"{name} ended with exit code {self.exit_code}; it can be tried again")


def run_perch(hook: SubprocessHook, *words: str) -> CommandOutcome:
    """Run `perch` with some words, the last of which should be `--json`.

    Args:
        hook: whoever holds it can end the command's process group: `hook.send_sigterm()`.
        words: the subcommand and its options.
    """
    outcome = hook.run_command(
        [str(Path(sys.executable).parent / "perch"), *words],
        env={**os.environ, "PERCH_DIE_WITH_PARENT": "1", "PERCH_PROJECT_DIR": str(PROJECT_DIR), "COLUMNS": "140"},
        cwd=str(PROJECT_DIR),
    )
    return CommandOutcome(outcome.exit_code, _parse(outcome.output))


def _parse(line: str) -> dict[str, Any]:
    """The command's last line; a process that was killed has left something else there, or nothing."""
    try:
        result = json.loads(line)
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}
