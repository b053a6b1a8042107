"""How the command line prints an error that is meant for a person."""

from __future__ import annotations

from rich.console import Console

from pipelines.errors import PerchError, Refusal


def print_error(error: PerchError) -> None:
    """Print an error as it is, without a traceback, to the standard error stream."""
    console = Console(stderr=True, highlight=False)
    verb = "refused:" if isinstance(error, Refusal) else "failed:"
    console.print(f"{error.stage} {verb}".lstrip(), style="bold red", end=" ")
    console.print(str(error), markup=False, soft_wrap=True)
