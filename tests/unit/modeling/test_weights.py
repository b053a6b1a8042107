import torch
from torch import nn

from pipelines.modeling.weights import hash_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))


def test_hash_weights__equal_weights__equal_hashes():
    assert hash_weights(network()) == hash_weights(network())


def test_hash_weights__other_layout_in_memory__same_hash():
    assert hash_weights(network().to(memory_format=torch.channels_last)) == hash_weights(network())


def test_hash_weights__last_bit_of_one_weight__other_hash():
    changed = network()
    with torch.no_grad():
        changed[0].weight.view(-1).view(torch.int32)[5] ^= 1
    assert hash_weights(changed) != hash_weights(network())


def test_hash_weights__a_buffer_changes__other_hash():
    changed = network()
    changed[1].running_mean += 1
    assert hash_weights(changed) != hash_weights(network())
