import pytest
import torch

from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet


def test_pixel_normalization__two_levels__have_mean_zero_and_deviation_one():
    pixels = torch.tensor([[[[0], [200]]]], dtype=torch.uint8)
    assert PixelNormalization([100.0], [100.0])(pixels).flatten().tolist() == [-1.0, 1.0]


def test_pixel_normalization__three_channels__each_has_its_own_constants():
    pixels = torch.full((1, 2, 2, 3), 100, dtype=torch.uint8)
    result = PixelNormalization([100.0, 90.0, 80.0], [1.0, 10.0, 5.0])(pixels)
    assert result.shape == (1, 3, 2, 2)
    assert result[0, :, 0, 0].tolist() == [0.0, 1.0, 4.0]


@pytest.mark.parametrize("size_px", [8, 9, 28, 65])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_conv_net__any_size__gives_logits(size_px, channels):
    net = SmallConvNet(channels, 4, widths=[8, 16, 16], dropout=0.5)
    assert net(torch.rand(2, channels, size_px, size_px)).shape == (2, 4)


def test_normalized_net__uint8_or_float_pixels__same_logits():
    net = NormalizedNet(PixelNormalization([100.0], [50.0]), SmallConvNet(1, 3, widths=[8], dropout=0.0)).eval()
    pixels = torch.randint(0, 256, (2, 12, 12, 1), dtype=torch.uint8)
    assert torch.equal(net(pixels), net(pixels.float()))


def test_small_conv_net__training__every_parameter_has_a_gradient():
    net = SmallConvNet(1, 3, widths=[8, 16], dropout=0.2)
    net(torch.rand(4, 1, 12, 12)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())
