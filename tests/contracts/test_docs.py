"""The reference pages, the decision records and the links between pages hold what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from pipelines.cli.params_reference import render
from pipelines.object_storage.settings import S3Settings
from pipelines.params import Params
from pipelines.settings import Settings
from serving.settings import ServingSettings

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
RECORDS = sorted((DOCS / "adr").glob("[0-9]*.md"))
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(PROJECT.glob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name[:4])


def _commands(group: TyperGroup, path: str = "perch") -> dict[str, Any]:
    """Every command below a group by its full name, e.g. `perch models show`; groups that do something included."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found |= _commands(command, f"{path} {name}")
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            found[f"{path} {name}"] = command
    return found


def _cli() -> dict[str, Any]:
    from pipelines.cli.main import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return _commands(group)


def test_params_page__as_committed__is_what_the_models_say() -> None:
    assert (DOCS / "reference/params.md").read_text() == render() + "\n", (
        "run `perch params --markdown > docs/reference/params.md`"
    )


def test_params__every_key__has_a_description() -> None:
    schema = Params.model_json_schema()
    bare = [
        f"{section['title']}.{key}"
        for section in (schema, *schema["$defs"].values())
        for key, prop in section["properties"].items()
        if "$ref" not in prop and not prop.get("description")
    ]
    assert not bare


def test_settings_page__its_table__names_every_variable_and_no_other() -> None:
    documented = re.findall(r"^\| `(PERCH_\w+)` \|", (DOCS / "reference/settings.md").read_text(), re.MULTILINE)
    assert documented == [f"PERCH_{name.upper()}" for name in Settings.model_fields]


def test_serving_settings_page__its_table__is_what_the_model_says() -> None:
    rows = [
        f"| `PERCH_SERVING_{name.upper()}` | {_shown(field.default)} | {field.description} |"
        for name, field in ServingSettings.model_fields.items()
    ]
    page = (DOCS / "reference/serving-settings.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_storage_page__its_table__is_what_the_model_says() -> None:
    rows = [
        f"| `PERCH_S3_{name.upper()}` | {_shown(field.default)} | {field.description} |"
        for name, field in S3Settings.model_fields.items()
    ]
    page = (DOCS / "reference/storage.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| `PERCH_S3_")] == rows


def _shown(default: object) -> str:
    """A default as a table shows it: nothing for what is empty, sizes in the unit that a person thinks in."""
    if default in ("", None):
        return ""
    if isinstance(default, int) and default % 2**20 == 0 and default:
        return f"{default} ({default // 2**20} MiB)"
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_settings_pages__variables_that_the_code_names__are_on_them() -> None:
    page = "".join((DOCS / "reference" / name).read_text() for name in ("settings.md", "serving-settings.md"))
    sources = [file for folder in ("pipelines", "dags", "scripts") for file in (PROJECT / folder).rglob("*.[ps][yh]")]
    named = {name for file in sources for name in re.findall(r"\b(PERCH_[A-Z0-9]\w*[A-Z0-9])\b", file.read_text())}
    assert len(named) > 5
    assert {name for name in named if name not in page} == set()


def test_commands_page__its_tables__name_every_command_and_no_other() -> None:
    documented = re.findall(r"^\| `(perch [\w -]+?)(?: [A-Z\[-].*)?` \|", _commands_page(), re.MULTILINE)
    assert sorted(documented) == sorted(_cli())


def test_commands_page__every_option__is_named() -> None:
    page = _commands_page()
    missing = {
        f"{name} {option}"
        for name, command in _cli().items()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and option not in page
    }
    assert not missing


def test_command_line__every_command_and_option__has_a_help_text() -> None:
    for name, command in _cli().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_expectations_page__its_tables__name_every_fact() -> None:
    from pipelines.data.validation_tables import FACTS

    page = (DOCS / "reference/expectations.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page.partition("## `dataset.json`")[2], re.MULTILINE) == list(FACTS)


@each_page
def test_page__commands_it_shows__exist(page: Path) -> None:
    """`perch …` in code: a command that was renamed would fail the reader."""
    known = _cli()
    shown = re.findall(r"[`\n](?:\$ )?(perch(?: [a-z_]+(?:-[a-z]+)*)+)", page.read_text())
    unknown = {
        command for command in shown if not any(command == name or command.startswith(f"{name} ") for name in known)
    }
    assert not unknown


@each_page
def test_page__make_targets_it_shows__exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?:`|^|=1 )make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert shown <= targets


@each_page
def test_page__its_links__lead_to_files_and_headings(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", page.read_text())
    dead = []
    for target in targets:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            dead.append(target)
    assert not dead


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_docs_index__every_page__can_be_found_from_it() -> None:
    index = (DOCS / "README.md").read_text()
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"README.md"}
    unlisted = {page for page in pages if not re.match(r"adr/\d", page) and f"({page})" not in index}
    assert not unlisted


def test_readme__the_two_commands__stand_near_the_top() -> None:
    top = (PROJECT / "README.md").read_text().splitlines()[:15]
    assert any(line.startswith("make demo") for line in top)
    assert any(line.startswith("make test") for line in top)


@each_record
def test_decision_record__its_parts__are_complete_and_in_order(record: Path) -> None:
    lines = record.read_text().splitlines()
    assert re.fullmatch(rf"# {int(record.name[:4])}\. \S.*", lines[0])
    assert re.fullmatch(r"Status: (proposed|accepted|superseded by ADR \d+)\b.* · \d{4}-\d{2}-\d{2}", lines[2])
    parts = [line for line in lines if line.startswith("## ")]
    assert parts == ["## Context", "## Decision", "## Consequences", "## A change violates this when…"]


def test_decision_records__their_index__has_each_title_and_status() -> None:
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (.+) \|$", (DOCS / "adr/README.md").read_text(), re.MULTILINE)
    actual = []
    for record in RECORDS:
        title, _, status, *_ = record.read_text().splitlines()
        number, _, sentence = title.removeprefix("# ").partition(". ")
        actual.append((number, sentence, record.name, status.removeprefix("Status: ").rpartition(" · ")[0]))
    assert rows == actual


def test_decision_records__their_numbers__have_no_gap() -> None:
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))


def _commands_page() -> str:
    return (DOCS / "reference/commands.md").read_text()


def test_client_page__its_table_of_problems__is_the_services(tmp_path: Path) -> None:
    from serving.problems import ALL

    page = (DOCS / "runbooks" / "client.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(urn:perch:[a-z-]+)` \| (\d+) \|", page, re.MULTILINE)
    assert sorted(told) == sorted((kind.urn, str(kind.status)) for kind in ALL)
