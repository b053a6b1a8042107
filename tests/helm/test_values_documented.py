"""Every value stands in values.yaml, in the schema and in the chart's README, and means the same in all three."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from tests.helm.rendering import CHART, ENVIRONMENTS

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def _leaves(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Values with a meaning of their own: whatever is not a group of named others."""
    for name, known in schema["properties"].items():
        if known.get("properties"):
            yield from _leaves(known, f"{path}{name}.")
        elif f"{path}{name}" != "global":
            yield f"{path}{name}", known


def _default(path: str) -> Any:
    value = VALUES
    for name in path.split("."):
        value = value[name]
    return value


def _paths(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        known = schema["properties"][name]
        if known.get("properties"):
            yield from _paths(value, known, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _groups(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for known in schema["properties"].values():
        if known.get("properties"):
            yield from _groups(known)


def _row(path: str, known: dict[str, Any]) -> str:
    default = _default(path)
    shown = "" if default in ("", [], {}) else f"`{json.dumps(default) if not isinstance(default, str) else default}`"
    return f"| `{path}` | {shown} | {known['description']} |"


def table() -> list[str]:
    """The README's table, as it has to be: a row per value, under a row for its group."""
    rows = []
    for section, schema in SCHEMA["properties"].items():
        if section != "global":
            rows.append(f"| **{section}** | | {schema['description']} |")
            rows += [_row(path, known) for path, known in _leaves(schema, f"{section}.")]
    return rows


def test_values__as_committed__are_those_of_the_schema_in_its_order() -> None:
    assert list(_paths(VALUES, SCHEMA)) == [path for path, _ in _leaves(SCHEMA)]


def test_schema__every_group__refuses_what_it_does_not_know() -> None:
    for group in _groups(SCHEMA):
        assert group["additionalProperties"] is False, group["description"]
        assert group["description"].endswith(".")


def test_schema__every_value__is_described_in_a_sentence() -> None:
    assert [path for path, known in _leaves(SCHEMA) if not known.get("description", "").endswith(".")] == []


def test_readme__its_table__is_what_schema_and_values_say() -> None:
    section = (CHART / "README.md").read_text().partition("## Values")[2]
    assert [line for line in section.splitlines() if line.startswith(("| `", "| **"))] == table()


def test_environments__each_of_their_values__differs_from_the_default() -> None:
    """What is repeated there would hide what the environments differ in."""
    for environment in ENVIRONMENTS[1:]:
        values = yaml.safe_load((CHART / f"values-{environment}.yaml").read_text())
        same = [path for path in _paths(values, SCHEMA) if _value(values, path) == _default(path)]
        assert same == [], environment


def _value(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found
