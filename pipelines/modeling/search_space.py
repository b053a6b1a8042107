"""Which hyperparameters tuning may change, how far, and how they turn back into parameters."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import FloatDistribution

from pipelines.params import ModelTrainingParams, override

AUGMENTATION_STRENGTH = "augmentation_strength"  # multiplies every amount of the augmentation
_AMOUNTS = ("shift", "rotation_deg", "scale", "contrast", "brightness", "noise")
_LARGEST_AMOUNT = {"shift": 1.0, "rotation_deg": 180.0}
_BELOW_ONE = 0.999  # the other amounts are shares that stay below 1
_SIGNIFICANT_DIGITS = 6


def search_space(params: ModelTrainingParams) -> dict[str, FloatDistribution]:
    """Ranges around the configured values, each of which lies inside its range."""
    rate, decay, smoothing = params.learning_rate, params.weight_decay, params.label_smoothing
    ranges = {
        "learning_rate": FloatDistribution(rate / 10, min(1.0, rate * 10), log=True),
        "weight_decay": FloatDistribution(min(1e-4, decay or 1.0), max(0.3, decay), log=True),
        "label_smoothing": FloatDistribution(0.0, max(0.15, smoothing)),
    }
    if any(getattr(params.augmentation, name) for name in _AMOUNTS):
        ranges[AUGMENTATION_STRENGTH] = FloatDistribution(0.0, 2.0)
    if params.network == "small_cnn":
        ranges["small_cnn.dropout"] = FloatDistribution(0.0, max(0.5, params.small_cnn.dropout))
    return ranges


def configured_values(params: ModelTrainingParams) -> dict[str, float]:
    """The point of the search space that the parameters already name; the first trial tries it."""
    values = {
        "learning_rate": params.learning_rate,
        "weight_decay": params.weight_decay,
        "label_smoothing": params.label_smoothing,
        AUGMENTATION_STRENGTH: 1.0,
        "small_cnn.dropout": params.small_cnn.dropout,
    }
    space = search_space(params)
    return {name: max(values[name], space[name].low) for name in space}


def hyperparameters(params: ModelTrainingParams, values: Mapping[str, float]) -> dict[str, float]:
    """Keys of `model_training` with the values that a point of the search space gives them."""
    found = {name: value for name, value in values.items() if name != AUGMENTATION_STRENGTH}
    if AUGMENTATION_STRENGTH in values:
        for name in _AMOUNTS:
            amount = getattr(params.augmentation, name) * values[AUGMENTATION_STRENGTH]
            found[f"augmentation.{name}"] = min(amount, _LARGEST_AMOUNT.get(name, _BELOW_ONE))
    return {name: float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for name, value in sorted(found.items())}


def with_hyperparameters(params: ModelTrainingParams, chosen: Mapping[str, float]) -> ModelTrainingParams:
    """The parameters with some of their keys replaced."""
    return ModelTrainingParams.model_validate(override(params.model_dump(), chosen))
