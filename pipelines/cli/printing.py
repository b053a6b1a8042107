"""How the command line prints an error that is meant for a person."""

from __future__ import annotations

from rich.console import Console

from pipelines.core.own_command import make_runnable
from pipelines.errors import EXIT_REFUSED, PerchError


def print_error(error: PerchError) -> None:
    """Print an error without a traceback to the standard error stream, with its hints as this shell can run them."""
    console = Console(stderr=True, highlight=False)
    verb = "refused:" if error.exit_code == EXIT_REFUSED else "failed:"
    console.print(f"{error.stage} {verb}".lstrip(), style="bold red", end=" ")
    console.print(make_runnable(str(error)), markup=False, soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        console.print(make_runnable(f"  {note}"), markup=False, soft_wrap=True)
