import numpy as np
import pandas as pd
import pytest

from pipelines.errors import Refusal
from pipelines.modeling.training_data import load_training_data


def test_load_training_data__shuffled_table__labels_follow_the_rows(training_workspace, training_data):
    loaded = load_training_data(training_workspace)
    assert isinstance(loaded.train.images, np.memmap)
    assert np.array_equal(loaded.train.labels, training_data.train.labels)
    assert np.array_equal(loaded.val.labels, training_data.val.labels)
    assert loaded.contract == training_data.contract
    assert (loaded.mean, loaded.std) == ((80.0,), (95.0,))


def test_load_training_data__class_without_training_image__is_named(training_workspace):
    file = training_workspace.splits / "images.parquet"
    table = pd.read_parquet(file)
    table.loc[table["label_index"] == 1, "label_index"] = 0
    table.to_parquet(file)
    with pytest.raises(Refusal, match="the training split: holds no image of 1"):
        load_training_data(training_workspace)


def test_load_training_data__array_and_table_disagree__says_both_counts(training_workspace):
    file = training_workspace.splits / "images.parquet"
    pd.read_parquet(file).iloc[1:].to_parquet(file)
    with pytest.raises(Refusal, match=r"train.npy: 160 images \(limit: 159|val.npy: 60 images \(limit: 59"):
        load_training_data(training_workspace)
