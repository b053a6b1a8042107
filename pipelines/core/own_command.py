"""How `perch` is called from the shell that reads a hint: `make` and Airflow run it without its folder on the path."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def own_command() -> str:
    """`perch` where the shell finds this very one by that name, else its path, from the current folder if below it."""
    program = Path(sys.executable).parent / "perch"
    found = shutil.which("perch")
    if not program.is_file() or (found is not None and Path(found).samefile(program)):
        return "perch"  # without a program beside this Python, nobody knows a better name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def make_runnable(text: str) -> str:
    """A text with each `perch …` between backquotes as the reader can call it."""
    return text.replace("`perch ", f"`{own_command()} ")
