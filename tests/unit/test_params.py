"""`params.yaml` is strict: every mistake is refused with its path, its value and its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.errors import Refusal
from pipelines.params import ModelReleaseParams, Params, check_params, load_params, override

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def tree() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_training.epochs", 0, r"model_training\.epochs: value 0 should be greater than or equal to 1"),
        ("model_training.epochs", "ten", r"model_training\.epochs: value 'ten'"),
        ("model_training.epochs", 3.0, r"model_training\.epochs: value 3\.0"),
        (
            "model_training.lerning_rate",
            1,
            r"model_training\.lerning_rate: unknown key; did you mean model_training\.learning_rate\?",
        ),
        ("epochs", 1, r"epochs: unknown key; did you mean model_training\.epochs\?"),
        ("data_ingestion.size_px", 64, r"unknown key; did you mean data_preprocessing\.size_px\?"),
        ("data_preprocessing.zzz", 64, r"data_preprocessing\.zzz: unknown key\n"),
        ("trainning", {}, r"trainning: unknown key"),
        ("data_preprocessing.channels", 2, r"data_preprocessing\.channels: value 2 should be 1 or 3"),
        ("data_preprocessing.val_share", 0.4, r"leave a test split"),
        ("data_ingestion.as_of", "2026-13-01", r"data_ingestion\.as_of: value '2026-13-01'"),
        ("data_ingestion.group_pattern", "person", r"group_pattern: value 'person' needs one group"),
        ("data_ingestion.group_pattern", "(", r"is no regular expression"),
        ("dataset", "My Data", r"dataset: value 'My Data' should be small letters and digits, with single - or _"),
        ("data_ingestion.sha256", "ABC", r"sha256: value 'ABC' should be 64 hexadecimal digits"),
        ("model_evaluation.min_accuracy", float("nan"), r"min_accuracy: value nan"),
    ],
)
def test_check_params__bad_value__names_path_value_and_limit(
    tree: dict[str, Any], key: str, value: object, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        check_params(override(tree, {key: value}))


def test_check_params__several_mistakes__names_them_all(tree: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        check_params(override(tree, {"seed": -1, "model_training.batch_size": 0}))
    assert "seed: value -1" in str(caught.value)
    assert "model_training.batch_size: value 0" in str(caught.value)


@pytest.mark.parametrize(
    ("own", "named", "unnamed"),
    [
        ([], "my.yaml: ", "own value"),
        (
            ["seed", "model_training.batch_size"],
            "the run's own values (--set, --conf or the trigger form): ",
            "my.yaml",
        ),
        (
            ["seed"],
            "seed: value -1 should be greater than or equal to 0 (the run's own value, not the file's)",
            "--set",
        ),
    ],
)
def test_check_params__mistake_in_a_runs_own_value__does_not_blame_the_file(
    tree: dict[str, Any], own: list[str], named: str, unnamed: str
) -> None:
    with pytest.raises(Refusal) as caught:
        check_params(override(tree, {"seed": -1, "model_training.batch_size": 0}), name="my.yaml", own=own)
    assert named in str(caught.value)
    assert unnamed not in str(caught.value)
    assert str(caught.value).count("own value, ") <= 1


def test_check_params__whole_number_for_a_fraction__is_taken(tree: dict[str, Any]) -> None:
    assert check_params(override(tree, {"model_training.learning_rate": 1})).model_training.learning_rate == 1.0


@pytest.mark.parametrize("content", ["{", "just text", "- a\n- list\n", ""])
def test_load_params__file_that_is_no_mapping__is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(content)
    with pytest.raises(Refusal, match=r"params\.yaml"):
        load_params(file)


def test_params__loaded__cannot_be_changed(tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        check_params(tree).model_training.epochs = 3  # type: ignore[misc]


@given(st.integers(1, 1000), st.floats(1e-6, 1.0), st.booleans())
def test_params__dumped_and_loaded__are_the_same(epochs: int, learning_rate: float, int8: bool) -> None:
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    changes = {
        "model_training.epochs": epochs,
        "model_training.learning_rate": learning_rate,
        "model_training.int8": int8,
    }
    params = check_params(override(tree, changes))
    assert check_params(yaml.safe_load(yaml.safe_dump(params.model_dump(mode="json")))) == params


def test_override__given_tree__is_left_as_it_was(tree: dict[str, Any]) -> None:
    before = yaml.safe_dump(tree)
    override(tree, {"model_training.augmentation.shift": 0.5})
    assert yaml.safe_dump(tree) == before


def test_schema__every_key__has_a_type_or_a_reference() -> None:
    schema = Params.model_json_schema()
    assert schema["additionalProperties"] is False
    assert {"data_ingestion", "model_training", "model_evaluation"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 10.0), ({"min_step_s": 5.0, "max_step_s": 60}, 2.0), ({"max_blind_s": 600}, 30.0)]
)
def test_release_pause__of_a_plan__is_short_beside_each_of_its_times(changes: dict[str, Any], expected: float) -> None:
    assert ModelReleaseParams(**changes).pause_s == expected


def test_load_params__line_without_its_colon__points_at_the_line_above_the_named_one_too(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("dataset: a\nmodel_name: b\nseed 7\ndata_ingestion:\n  source: digits\n")
    with pytest.raises(Refusal, match=r"line 4(.|\n)*the line it names, or the one above it"):
        load_params(file)
