"""The network that `model_training.network` names, with its initial weights."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet
from pipelines.modeling.seeds import derive_seed
from pipelines.modeling.training_data import TrainingData
from pipelines.params import ModelTrainingParams


def build_network(params: ModelTrainingParams, data: TrainingData, seed: int) -> nn.Module:
    """A network for the data's images and classes, normalisation included.

    Args:
        params: which network, and its dimensions.
        data: channels, classes and normalisation constants.
        seed: of the initial weights.

    Raises:
        Refusal: a Hugging Face checkpoint is neither here nor reachable.
    """
    classes, channels = len(data.contract.labels), data.contract.input.channels
    torch.manual_seed(derive_seed(seed, "weights"))
    backbone: nn.Module
    if params.network == "small_cnn":
        small = params.small_cnn
        backbone = SmallConvNet(channels, classes, widths=small.widths, dropout=small.dropout)
    else:
        from pipelines.modeling.huggingface import build_huggingface  # transformers takes seconds to import

        backbone = build_huggingface(params.huggingface, data.contract)
    network = NormalizedNet(PixelNormalization(data.mean, data.std), backbone)
    # Pixels come with their channels last; convolutions that keep them there are a third faster on CPUs.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
