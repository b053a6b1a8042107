"""The trigger form: the parameters a data scientist changes, with the limits that `pipelines.params` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Param

from pipelines.params import Params

# Name in the form -> key in params.yaml and the sentence beside the field.
FORM_FIELDS = {
    "network": ("model_training.network", "Which network is trained; its own settings are in params.yaml."),
    "epochs": ("model_training.epochs", "Passes over the training images at most; early stopping may end sooner."),
    "learning_rate": ("model_training.learning_rate", "The schedule's peak."),
    "trials": ("model_training.trials", "Optuna trials before the final training; 0 trains with the values above."),
    "parallel_trials": (
        "model_training.parallel_trials",
        "Tasks that share the trials, where a database is named for them; 1 leaves them to the training.",
    ),
    "source": (
        "data_ingestion.source",
        "digits, a folder with one sub-folder per class, a .csv/.parquet table, an .npz, or an s3:// address.",
    ),
    "as_of": ("data_ingestion.as_of", "Take the images that had arrived by this date; empty is the run's own date."),
}
_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "pattern", "format")


def form_params(params: Params) -> dict[str, Param]:
    """One field per entry of `FORM_FIELDS`, its default from `params.yaml`, its limits from the models' JSON Schema."""
    schema = Params.model_json_schema()
    return {
        name: Param(_value(params, path), title=name, description_md=f"{text}  \n({path})", **_limits(schema, path))
        for name, (path, text) in FORM_FIELDS.items()
    }


def form_overrides(chosen: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The keys whose value in the form differs from `params.yaml`, as overrides of a run."""
    return {
        path: chosen[name]
        for name, (path, _) in FORM_FIELDS.items()
        if name in chosen and chosen[name] != _value(params, path)
    }


def _value(params: Params, path: str) -> Any:
    section, _, key = path.partition(".")
    return getattr(params, section).model_dump(mode="json")[key]


def _limits(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The JSON Schema of one key, reduced to what the form understands."""
    section, _, key = path.partition(".")
    reference = schema["properties"][section]["$ref"].rsplit("/", 1)[-1]
    field = schema["$defs"][reference]["properties"][key]
    options = field.get("anyOf", [field])
    merged = {name: option[name] for option in options for name in _KEPT if name in option}
    merged["type"] = [option["type"] for option in options] if len(options) > 1 else field["type"]
    return merged
