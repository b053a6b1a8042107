"""One name per step and one truth per edge: params.yaml, the models, dvc.yaml, the stages' code, the command line.

What a stage's code uses is read from its source: the functions it can reach, and in them the arguments annotated
`Params` and `Workspace`.  Nothing is imported for it, so these tests stay quick.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipelines.core.workspace import Workspace
from pipelines.params import Params, load_params

PROJECT = Path(__file__).parents[2]
STAGES: dict[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
SHIPPED_PARAMS: dict[str, Any] = yaml.safe_load((PROJECT / "params.yaml").read_text())
STAGE_MODULES = {file.stem for file in (PROJECT / "pipelines/stages").glob("*.py")} - {"__init__"}

# Code that a stage imports and that cannot change what it writes: where things lie, and how a refusal is worded.
NOT_A_DEPENDENCY = {
    "pipelines/__init__.py",
    "pipelines/stages/__init__.py",
    "pipelines/settings.py",
    "pipelines/environment.py",
    "pipelines/errors.py",
    *(file.relative_to(PROJECT).as_posix() for file in (PROJECT / "pipelines/object_storage").glob("*.py")),
}
# Dependencies without a reader: they hold a stage back until another has passed.
GATES = {("data_preprocessing", "data/validation")}
# Files of a workspace that DVC does not track: a stage that reads them must not let them into its outputs.
UNTRACKED = {"params.yaml", "checkpoints"}
# Sections that steer what follows a run: a release is no step of one, for it waits for a person and for traffic.
NOT_A_STAGE = {"model_release", "pods"}
# Keys whose own keys are names that a user chooses.
BY_NAME = {"pods.steps"}


# What stands in params.yaml

as_shipped = pytest.mark.skipif(SHIPPED_PARAMS["dataset"] != "digits", reason="params.yaml describes your own data set")


def _keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key, dotted, in the models' order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and f"{path}{name}" not in BY_NAME:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


@as_shipped
def test_params_file__every_field_of_the_models__is_in_the_file_in_the_same_order() -> None:
    assert list(_leaves(SHIPPED_PARAMS)) == list(_keys(Params))


@as_shipped
def test_params_file__as_shipped__holds_the_defaults_of_the_code() -> None:
    """Somebody who deletes a line of the file must not get another pipeline than the one who keeps it."""
    loaded = load_params(PROJECT / "params.yaml")
    defaults = Params(dataset=loaded.dataset, model_name=loaded.model_name)
    assert loaded.model_dump() == defaults.model_dump()


def test_params__every_section_of_the_file__is_a_stage_with_a_module() -> None:
    sections = {name for name, field in Params.model_fields.items() if isinstance(field.annotation, type(BaseModel))}
    assert sections - NOT_A_STAGE <= STAGE_MODULES
    assert set(STAGES) <= sections


def test_params_schema__every_key__has_limits_that_a_form_understands() -> None:
    """pydantic writes a constraint that it cannot translate under its own name, which every reader ignores."""
    schema = Params.model_json_schema()
    known = {"type", "title", "description", "default", "enum", "format", "pattern", "items", "anyOf", "$ref"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    known |= {"minLength", "maxLength", "minItems", "maxItems"}
    known |= {"additionalProperties", "patternProperties", "propertyNames"}  # of what only the file can say
    for section in (schema, *schema["$defs"].values()):
        for key, prop in section["properties"].items():
            assert prop.keys() <= known, f"{section['title']}.{key}"


# What stands in dvc.yaml


def test_stage_graph__every_stage__has_a_module_and_calls_its_subcommand() -> None:
    assert set(STAGES) <= STAGE_MODULES
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {
        name: f"exec python -m pipelines {name}" for name in STAGES
    }


def test_stage_graph__every_stage__has_a_description_and_tracks_its_result() -> None:
    for name, stage in STAGES.items():
        assert stage["desc"].endswith("."), name
        assert stage["metrics"] == [{f"results/{name}.json": {"cache": False}}], name


def test_command_line__commands_of_stages__are_the_modules() -> None:
    from pipelines.cli.main import app

    registered = {command.name for command in app.registered_commands}
    assert registered >= STAGE_MODULES
    assert set(STAGES) <= registered


def test_command_line__steps_of_a_run__are_the_stages_then_those_with_side_effects() -> None:
    from pipelines.runs.pipeline import pipeline_steps
    from pipelines.settings import Settings

    steps = pipeline_steps(Settings(project_dir=PROJECT))
    assert set(steps[: len(STAGES)]) == set(STAGES)
    assert set(steps) == STAGE_MODULES


@pytest.mark.parametrize("stage", sorted(STAGE_MODULES))
def test_stage_module__its_run__takes_params_and_workspace_and_returns_its_own_result(stage: str) -> None:
    tree = _parse(PROJECT / f"pipelines/stages/{stage}.py")
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    annotations = [argument.annotation for argument in run.args.args]
    assert [ast.unparse(annotation) for annotation in annotations if annotation] == ["Params", "Workspace"]
    assert run.returns is not None
    assert ast.unparse(run.returns) == "".join(word.title() for word in stage.split("_")) + "Result"


# What a stage's code reaches


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _module_file(dotted: str) -> Path | None:
    """The file of a module of ours, None for anything else, e.g. a function."""
    base = PROJECT.joinpath(*dotted.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _imports(file: Path) -> frozenset[Path]:
    """Our own modules that a file imports anywhere, with the packages around them."""
    names: set[str] = set()
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = {name for name in names if name.split(".")[0] == "pipelines"}
    ours |= {name.rsplit(".", depth)[0] for name in ours for depth in range(1, name.count(".") + 1)}
    return frozenset(found for name in ours if (found := _module_file(name)))


@cache
def _reached(stage: str) -> frozenset[Path]:
    """A stage's module and everything of ours that it imports, at whatever distance."""
    found: set[Path] = set()
    waiting = {PROJECT / f"pipelines/stages/{stage}.py"}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= _imports(file) - found
    return frozenset(found)


def _used(stage: str, annotation: str) -> set[str]:
    """Attributes taken, in the code that a stage reaches, of arguments with this annotation."""
    found = set()
    for file in _reached(stage):
        for function in ast.walk(_parse(file)):
            if not isinstance(function, ast.FunctionDef):
                continue
            every = [*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs]
            names = {arg.arg for arg in every if arg.annotation and ast.unparse(arg.annotation) == annotation}
            found |= {
                node.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
            }
    return found


def _paths(items: list[str | dict[str, Any]]) -> set[str]:
    """The paths of a list in dvc.yaml, whose items may carry options."""
    return {next(iter(item)) if isinstance(item, dict) else item for item in items}


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stage_graph__code_of_a_stage__is_what_its_deps_name(stage: str) -> None:
    named = {dep for dep in _paths(STAGES[stage]["deps"]) if _lies_in(dep, "pipelines")}
    reached = {file.relative_to(PROJECT).as_posix() for file in _reached(stage)} - NOT_A_DEPENDENCY
    missing = {file for file in reached if not any(_lies_in(file, dep) for dep in named)}
    assert not missing, f"an edit of these would not rerun {stage}: name them in its deps"
    superfluous = {dep for dep in named if not any(_lies_in(file, dep) for file in reached)}
    assert not superfluous, f"{stage} does not import these: take them out of its deps"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stage_graph__parameters_of_a_stage__are_those_its_code_reads(stage: str) -> None:
    assert set(STAGES[stage]["params"]) == _used(stage, "Params")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stage_graph__files_of_a_stage__are_those_its_code_names(stage: str) -> None:
    root = Path("/run")
    taken = {getattr(Workspace(root), name, None) for name in _used(stage, "Workspace")}
    named = {path.relative_to(root).as_posix() for path in taken if isinstance(path, Path) and path != root} - UNTRACKED
    gates = {dep for gated, dep in GATES if gated == stage}
    tracked = _paths(STAGES[stage]["deps"]) | _paths(STAGES[stage]["outs"])
    assert named | gates == {path for path in tracked if not _lies_in(path, "pipelines")}


def test_stage_graph__outputs__have_one_producer_and_lie_in_the_workspace() -> None:
    outs = [out for stage in STAGES.values() for out in _paths(stage["outs"])]
    assert len(outs) == len(set(outs))
    assert not any(Path(out).is_absolute() or ".." in Path(out).parts for out in outs)
    inputs = {dep for stage in STAGES.values() for dep in _paths(stage["deps"])}
    without_producer = {dep for dep in inputs if not _lies_in(dep, "pipelines")} - set(outs)
    assert without_producer == {"reference", "expectations", "tuning"}, (
        "laid out when a run opens; a stage makes all else"
    )
