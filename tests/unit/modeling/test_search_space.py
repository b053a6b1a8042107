import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.modeling.search_space import (
    configured_values,
    hyperparameters,
    search_space,
    with_hyperparameters,
)
from pipelines.params import AugmentationParams, ModelTrainingParams, SmallCNNParams

share = st.floats(0, 0.99)
configurations = st.builds(
    ModelTrainingParams,
    network=st.sampled_from(["small_cnn", "huggingface"]),
    learning_rate=st.floats(1e-6, 1),
    weight_decay=st.floats(0, 1),
    label_smoothing=share,
    small_cnn=st.builds(SmallCNNParams, dropout=share),
    augmentation=st.builds(
        AugmentationParams, shift=st.floats(0, 1), rotation_deg=st.floats(0, 180), contrast=share, noise=share
    ),
)


@given(configurations)
def test_search_space__any_configuration__holds_the_configured_values(params):
    space, values = search_space(params), configured_values(params)
    assert space.keys() == values.keys()
    assert all(space[name].low <= value <= space[name].high for name, value in values.items())


@given(configurations, st.sampled_from(["low", "high"]))
def test_with_hyperparameters__ends_of_the_space__are_valid_parameters(params, end):
    values = {name: getattr(dimension, end) for name, dimension in search_space(params).items()}
    chosen = with_hyperparameters(params, hyperparameters(params, values))
    assert chosen.learning_rate == pytest.approx(values["learning_rate"], rel=1e-5)


def test_hyperparameters__strength_doubled__every_amount_doubles():
    params = ModelTrainingParams()
    found = hyperparameters(params, {**configured_values(params), "augmentation_strength": 2.0})
    assert found["augmentation.shift"] == 2 * params.augmentation.shift
    assert found["augmentation.rotation_deg"] == 2 * params.augmentation.rotation_deg
    assert "augmentation_strength" not in found


def test_search_space__no_augmentation__none_is_searched():
    still = AugmentationParams(shift=0.0, rotation_deg=0.0, scale=0.0, contrast=0.0, brightness=0.0)
    assert "augmentation_strength" not in search_space(ModelTrainingParams(augmentation=still))
