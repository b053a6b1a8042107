"""The optimiser and the learning-rate schedules of `model_training`."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from pipelines.modeling.lit_module import OptimizerFactory
from pipelines.params import ModelTrainingParams

_WARMUP_SHARE = 0.3  # of one_cycle's steps


def optimizer_factory(params: ModelTrainingParams) -> OptimizerFactory:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); biases and normalisation gains do not decay."""

    def make(network: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler]:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": params.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=params.learning_rate)
        return optimizer, _schedule(optimizer, params, steps)

    return make


def _schedule(optimizer: Optimizer, params: ModelTrainingParams, steps: int) -> LRScheduler:
    match params.schedule:
        case "constant":
            return LambdaLR(optimizer, lambda _: 1.0)
        case "cosine":
            return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
        case "one_cycle":
            # Two steps are the least that OneCycleLR can divide into a rise and a fall.
            return OneCycleLR(
                optimizer, max_lr=params.learning_rate, total_steps=max(2, steps) + 1, pct_start=_WARMUP_SHARE
            )
