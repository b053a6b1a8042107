"""The reference page of `params.yaml`, written from the parameters' JSON Schema: `perch params --markdown`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.params import PATTERNS_IN_WORDS, Params

Schema = Mapping[str, Any]

_HEAD = """\
# params.yaml

<!-- Written by `perch params --markdown`; edit the descriptions in pipelines/params.py instead. -->

Every tunable number of the pipeline.  A key that is left out has the default given here; an unknown key, or a value
outside its limits, is refused with its path, value and limit before anything runs.  `perch params` checks the file,
and `perch run --set model_training.epochs=3` overrides a key for one run.

A stage reads its own section and those that `dvc.yaml` names for it: changing a value reruns those stages and what
depends on them."""


def render() -> str:
    """Return the page as Markdown, without a final newline: one table per section, in the order of the file."""
    schema = Params.model_json_schema()
    parts = [_HEAD]
    for path, section in _sections("", schema, schema["$defs"]):
        title = f"## `{path}`\n\n{section['description']}" if path else "## Top level"
        rows = [
            _row(path, key, prop, required=key in section.get("required", []))
            for key, prop in section["properties"].items()
            if "$ref" not in prop
        ]
        table = "\n".join(["| key | default | limits | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts)


def _sections(path: str, section: Schema, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    """This section and, depth first, those inside it, each with its dotted path."""
    yield path, section
    for key, prop in section["properties"].items():
        if "$ref" in prop:
            inner = definitions[prop["$ref"].removeprefix("#/$defs/")]
            yield from _sections(f"{path}.{key}" if path else key, inner, definitions)


def _row(path: str, key: str, prop: Schema, *, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(_without_nulls(prop['default']))}`"
    dotted = f"{path}.{key}" if path else key
    cells = (f"`{dotted}`", default, _limits(prop), prop.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _without_nulls(default: Any) -> Any:
    """Sections that stand in a default, without the keys that they leave open."""
    if not isinstance(default, dict):
        return default
    return {key: _without_nulls(value) for key, value in default.items() if value is not None}


def _limits(prop: Schema) -> str:
    """A value's type and bounds in words, e.g. `integer, 1 to 1000`."""
    if "anyOf" in prop:
        return " or ".join(_limits(choice) for choice in prop["anyOf"])
    if "enum" in prop:
        return " or ".join(f"`{choice}`" for choice in prop["enum"])
    if prop.get("format") == "date":
        return "date, `YYYY-MM-DD`"
    if prop["type"] == "object":
        return "steps by their names"
    if prop["type"] == "array":
        length = _range(prop, "minItems", "maxItems")
        return f"list{f' of {length}' if length else ''}, each {_limits(prop['items'])}"
    if prop["type"] == "string":
        longest = f" of at most {prop['maxLength']} characters" if "maxLength" in prop else ""
        pattern = f": {PATTERNS_IN_WORDS[prop['pattern']]}" if "pattern" in prop else ""
        return "text" + longest + (", not empty" if prop.get("minLength") == 1 else "") + pattern
    bounds = _range(prop, "minimum", "maximum")
    return f"{prop['type']}, {bounds}" if bounds else str(prop["type"])


def _range(prop: Schema, low_key: str, high_key: str) -> str:
    """Bounds in words: `1 to 1000`, `above 0, at most 1`, `at least 1`."""
    words = {
        low_key: "at least",
        "exclusiveMinimum": "above",
        high_key: "at most",
        "exclusiveMaximum": "below",
    }
    found = {key: str(prop[key]).removesuffix(".0") for key in words if key in prop}
    if found.keys() == {low_key, high_key}:
        return f"{found[low_key]} to {found[high_key]}"
    return ", ".join(f"{words[key]} {value}" for key, value in found.items())
