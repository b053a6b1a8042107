"""Settings from a process's environment; a mistake there is refused in words, by the variable's name."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from pipelines.errors import Refusal

SettingsT = TypeVar("SettingsT", bound=BaseSettings)

_CHOICE = re.compile(r"\^\(([\w|]+)\)\$")


def read_environment(kind: type[SettingsT]) -> SettingsT:
    """Settings of a kind, as the environment has them.

    Raises:
        Refusal: variables hold what the settings do not take; one line for each.
    """
    try:
        return kind()
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        lines = []
        for detail in error.errors(include_url=False):
            variable = prefix + "_".join(str(part) for part in detail["loc"]).upper()
            choice = _CHOICE.fullmatch(str(detail.get("ctx", {}).get("pattern", "")))
            message = f"should be {' or '.join(choice[1].split('|'))}" if choice else detail["msg"]
            lines.append(f"{variable}: value {detail['input']!r} {message.removeprefix('Input ')}")
        raise Refusal(
            "the environment", "\n  " + "\n  ".join(lines), way_out="correct the variable, or unset it for its default"
        ) from None
