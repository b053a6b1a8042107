"""The service's code that goes into a release: what `serving.service` imports of ours, and which commit it is of."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import PerchError

SERVICE = "serving.service:service"
REQUIREMENTS = "serving/requirements.lock"

_PACKAGES = ("pipelines", "serving")
_ENTRY = "serving.service"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:\w+)?")


@dataclass(frozen=True)
class ServiceCode:
    """Files of one state of the code.

    Attributes:
        root: folder that holds the packages.
        files: relative to it, sorted.
        git_sha: commit that last changed one of them, with `+changes` where they were edited since; `PERCH_GIT_SHA`
            where there is no Git, and `unknown` without it.
    """

    root: Path
    files: tuple[str, ...]
    git_sha: str


def find_service_code(root: Path | None = None) -> ServiceCode:
    """Follow the imports from the service; what only starts or fetches a release stays outside of it.

    Args:
        root: folder that holds the packages `serving` and `pipelines`; where they are installed when None.

    Raises:
        PerchError: the packages are not there.
    """
    if root is None:
        spec = find_spec("serving")  # not `pipelines`: a run works on a copy of that one alone
        if spec is None or spec.origin is None:
            raise PerchError("the package `serving` is not installed beside `pipelines`\n  what to do: `make env`")
        root = Path(spec.origin).parents[1]
    found: set[Path] = set()
    waiting = _module_files(root, _ENTRY)
    if not waiting:
        raise PerchError(f"{root} holds no module {_ENTRY}\n  what to do: run Perch from its own source or wheel")
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= _imports(root, file) - found
    files = tuple(sorted([*(file.relative_to(root).as_posix() for file in found), REQUIREMENTS]))
    return ServiceCode(root, files, _last_commit(root, files))


def _imports(root: Path, file: Path) -> set[Path]:
    """Our own modules that a file imports anywhere or names in a string, with the packages around them.

    Servers are given some of their parts as strings, such as `serving.http_protocol:Protocol`.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            names.add(node.value.partition(":")[0])
    return {found for name in names if name.split(".")[0] in _PACKAGES for found in _module_files(root, name)}


def _module_files(root: Path, name: str) -> set[Path]:
    """The files that importing a module runs: its own, if it is one, and its packages'."""
    parts = name.split(".")
    candidates = [root.joinpath(*parts).with_suffix(".py")]
    candidates += [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    return {file for file in candidates if file.is_file()}


def _last_commit(root: Path, files: Sequence[str]) -> str:
    # Not simply HEAD: a commit that leaves the service alone must not change the release.
    try:
        commit = _git(root, "log", "-1", "--format=%H", "--", *files)
        if commit:
            return commit + ("+changes" if _git(root, "status", "--porcelain", "--", *files) else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get("PERCH_GIT_SHA", "unknown")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
