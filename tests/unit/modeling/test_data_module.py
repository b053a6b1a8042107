import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.modeling.data_module import BatchSampler, ImageDataModule


@given(st.integers(1, 200), st.integers(1, 64), st.one_of(st.none(), st.integers(0, 9)))
def test_batch_sampler__any_sizes__every_image_once_in_batches_of_almost_equal_size(images, batch_size, seed):
    sampler = BatchSampler(images, batch_size, seed=seed)
    batches = list(sampler)
    sizes = [len(batch) for batch in batches]
    assert sorted(np.concatenate(batches)) == list(range(images))
    assert len(batches) == len(sampler)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def order_of(sampler: BatchSampler) -> list[int]:
    return np.concatenate(list(sampler)).tolist()


def test_batch_sampler__next_epoch__other_order_that_depends_on_nothing_else():
    sampler = BatchSampler(50, 8, seed=7)
    first = order_of(sampler)
    sampler.set_epoch(1)
    second = order_of(sampler)
    fresh = BatchSampler(50, 8, seed=7)
    fresh.set_epoch(1)
    assert second == order_of(fresh) != first


def test_batch_sampler__epoch_set_after_iter__counts():
    """Lightning does it in this order when it resumes."""
    expected = BatchSampler(50, 8, seed=7)
    expected.set_epoch(3)
    sampler = BatchSampler(50, 8, seed=7)
    batches = iter(sampler)
    sampler.set_epoch(3)
    assert np.concatenate(list(batches)).tolist() == order_of(expected)


def test_image_data_module__validation__keeps_the_order_and_pairs_images_with_labels(training_data):
    images, labels = zip(*ImageDataModule(training_data, batch_size=16, seed=7).val_dataloader(), strict=True)
    assert np.array_equal(np.concatenate(images), training_data.val.images)
    assert np.array_equal(np.concatenate(labels), training_data.val.labels)


def test_image_data_module__training__pairs_images_with_labels(training_data):
    images, labels = zip(*ImageDataModule(training_data, batch_size=16, seed=7).train_dataloader(), strict=True)
    order = BatchSampler(len(training_data.train), 16, seed=7)
    rows = order_of(order)
    assert np.array_equal(np.concatenate(images), training_data.train.images[rows])
    assert np.array_equal(np.concatenate(labels), training_data.train.labels[rows])
