import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.modeling.augmentation import BatchAugmentation, augmentation_for
from pipelines.modeling.seeds import generator_at
from pipelines.params import AugmentationParams

STILL = {"shift": 0.0, "rotation_deg": 0.0, "scale": 0.0, "contrast": 0.0, "brightness": 0.0}
below_one = st.floats(0, 0.99)


@pytest.fixture
def half_bright() -> torch.Tensor:
    """Sixteen images whose left half is bright."""
    images = torch.zeros(16, 20, 20, 1, dtype=torch.uint8)
    images[:, :, :10] = 200
    return images


def changed(images: torch.Tensor, seed: int = 0, **amounts: float) -> torch.Tensor:
    return BatchAugmentation(AugmentationParams(**{**STILL, **amounts}))(images, generator_at(seed, "test"))


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        AugmentationParams,
        shift=st.floats(0, 1),
        rotation_deg=st.floats(0, 180),
        scale=below_one,
        contrast=below_one,
        brightness=below_one,
        noise=below_one,
        flip_horizontal=st.booleans(),
        flip_vertical=st.booleans(),
    ),
    st.sampled_from([1, 3]),
)
def test_batch_augmentation__any_amounts__keep_shape_and_scale(params, channels):
    images = torch.randint(0, 256, (3, 9, 9, channels), dtype=torch.uint8, generator=generator_at(1))
    result = BatchAugmentation(params)(images, generator_at(2))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert 0 <= result.min() <= result.max() <= 255


def test_batch_augmentation__equal_generators__equal_images(half_bright):
    augment = BatchAugmentation(AugmentationParams(noise=0.1))
    assert torch.equal(augment(half_bright, generator_at(3)), augment(half_bright, generator_at(3)))
    assert not torch.equal(augment(half_bright, generator_at(3)), augment(half_bright, generator_at(4)))


def test_batch_augmentation__all_amounts_zero__changes_nothing(half_bright):
    assert torch.equal(changed(half_bright), half_bright.float())


def test_batch_augmentation__defaults__mirror_nothing(half_bright):
    result = BatchAugmentation(AugmentationParams())(half_bright.repeat(20, 1, 1, 1), generator_at(0))
    assert (result[:, :, :10].mean(dim=(1, 2, 3)) > result[:, :, 10:].mean(dim=(1, 2, 3))).all()


def test_batch_augmentation__flip_horizontal__mirrors_some(half_bright):
    mirrored = changed(half_bright, flip_horizontal=True)[:, 0, 0, 0] < 100
    assert 0 < mirrored.sum() < len(half_bright)


def test_batch_augmentation__flip_vertical__leaves_left_and_right(half_bright):
    assert torch.allclose(changed(half_bright, flip_vertical=True), half_bright.float(), atol=1e-3)


def test_batch_augmentation__shift__moves_no_further_than_asked():
    images = torch.zeros(64, 41, 41, 1, dtype=torch.uint8)
    images[:, 20, 20] = 255
    result = changed(images, shift=0.1)[..., 0]
    rows, columns = torch.nonzero(result.amax(dim=0) > 1, as_tuple=True)
    assert 20 - 5.1 <= rows.min() < rows.max() <= 20 + 5.1
    assert 20 - 5.1 <= columns.min() < columns.max() <= 20 + 5.1


def test_batch_augmentation__rotation_by_a_right_angle_at_most__turns_about_the_centre():
    images = torch.zeros(64, 41, 41, 1, dtype=torch.uint8)
    images[:, 20, 36] = 255
    result = changed(images, rotation_deg=90.0)[..., 0].amax(dim=0)
    rows, columns = torch.nonzero(result > 1, as_tuple=True)
    distance = ((rows - 20.0) ** 2 + (columns - 20.0) ** 2).sqrt()
    assert (distance - 16).abs().max() < 1.5
    assert rows.min() < 10
    assert rows.max() > 30


def test_batch_augmentation__contrast__keeps_each_mean(half_bright):
    result = changed(half_bright // 2 + 60, contrast=0.2)  # far from 0 and 255, where values are cut
    assert torch.allclose(result.mean(dim=(1, 2, 3)), torch.full((16,), 110.0), atol=1e-3)
    assert result.std(dim=(1, 2, 3)).unique().numel() > 1


def test_batch_augmentation__brightness__shifts_each_image_by_its_own_amount():
    result = changed(torch.full((32, 5, 5, 1), 100, dtype=torch.uint8), brightness=0.1)
    offsets = result.mean(dim=(1, 2, 3)) - 100
    assert offsets.abs().max() <= 25.5
    assert offsets.min() < -5 < 5 < offsets.max()


def test_augmentation_for__nothing_asked__gives_none():
    assert augmentation_for(AugmentationParams(**STILL)) is None
    assert augmentation_for(AugmentationParams(**{**STILL, "noise": 0.1})) is not None
