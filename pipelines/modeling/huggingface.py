"""Any Hugging Face image classifier as a backbone: from a local folder, the hub, or with random weights."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.core.contract import ModelContract
from pipelines.errors import Refusal
from pipelines.modeling.preconditions import find_checkpoint_folder
from pipelines.params import HuggingFaceParams

# Compound scaling of Tan and Le 2019 (arXiv 1905.11946), with the image side, the width of the last convolution, the
# dropout and the padding exceptions of the checkpoints named google/efficientnet-b0 to -b7.
_EFFICIENTNET_SIZES: dict[str, tuple[float, float, int, int, float, list[int]]] = {
    "b0": (1.0, 1.0, 224, 1280, 0.2, []),
    "b1": (1.0, 1.1, 240, 1280, 0.2, [16]),
    "b2": (1.1, 1.2, 260, 1408, 0.3, [5, 8, 16]),
    "b3": (1.2, 1.4, 300, 1536, 0.3, [5, 18]),
    "b4": (1.4, 1.8, 380, 1792, 0.4, [6]),
    "b5": (1.6, 2.2, 456, 2048, 0.4, [13, 27]),
    "b6": (1.8, 2.6, 528, 2304, 0.5, [31]),
    "b7": (2.0, 3.1, 600, 2560, 0.5, [18]),
}
_MAX_BATCH_NORM_MOMENTUM = 0.1


class HuggingFaceNet(nn.Module):
    """A `transformers` image classifier that takes and gives plain tensors.

    Args:
        model: an `AutoModelForImageClassification`.
        channels: that the model expects; grey images are repeated to fill them.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        super().__init__()
        self.model = model
        self._channels = channels

    def forward(self, inputs: Tensor) -> Tensor:
        """From float32 `(N, C, H, W)` to logits `(N, classes)`."""
        if inputs.shape[1] != self._channels:
            inputs = inputs.expand(-1, self._channels, -1, -1)
        logits: Tensor = self.model(pixel_values=inputs).logits
        return logits


def build_huggingface(params: HuggingFaceParams, contract: ModelContract) -> HuggingFaceNet:
    """Load a checkpoint with a new head for the contract's classes, or build its architecture with random weights.

    With `pretrained: false` nothing is fetched: the checkpoint is a local folder with a `config.json`, the name of an
    architecture such as `vit`, or one of google/efficientnet-b0 to -b7, whose dimensions are known here.

    Raises:
        Refusal: the checkpoint is neither here nor reachable, or is no image classifier.
    """
    overrides: dict[str, Any] = {
        "num_labels": len(contract.labels),
        "id2label": dict(enumerate(contract.labels)),
        "label2id": {label: index for index, label in enumerate(contract.labels)},
    }
    if folder := find_checkpoint_folder(params.checkpoint):
        params = params.model_copy(update={"checkpoint": str(folder)})
    with _quiet_transformers():
        model = _load_pretrained(params, overrides) if params.pretrained else _build_random(params, contract, overrides)
    _calm_batch_norm(model)
    network = HuggingFaceNet(model, int(getattr(model.config, "num_channels", 3)))
    _refuse_misfit(network, params.checkpoint, contract)
    return network


def _load_pretrained(params: HuggingFaceParams, overrides: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        return AutoModelForImageClassification.from_pretrained(
            params.checkpoint, ignore_mismatched_sizes=True, **overrides
        )
    except (OSError, ValueError) as error:
        raise _refuse_checkpoint(params.checkpoint, error) from error


def _build_random(params: HuggingFaceParams, contract: ModelContract, overrides: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification

    known_size = re.fullmatch(r"(?:google/)?efficientnet-(b[0-7])", params.checkpoint)
    try:
        if known_size:
            config = AutoConfig.for_model("efficientnet", **_efficientnet_dimensions(known_size[1]), **overrides)
        elif params.checkpoint in CONFIG_MAPPING:
            config = AutoConfig.for_model(params.checkpoint, **overrides)
        else:
            config = AutoConfig.from_pretrained(params.checkpoint, **overrides)
        if hasattr(config, "image_size"):
            config.image_size = contract.input.size_px
        model = AutoModelForImageClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise _refuse_checkpoint(params.checkpoint, error) from error
    _initialise(model)
    return model


def _efficientnet_dimensions(size: str) -> dict[str, Any]:
    width, depth, side, hidden, dropout, padding = _EFFICIENTNET_SIZES[size]
    return {
        "width_coefficient": width,
        "depth_coefficient": depth,
        "image_size": side,
        "hidden_dim": hidden,
        "dropout_rate": dropout,
        "depthwise_padding": padding,
    }


def _initialise(model: nn.Module) -> None:
    """Give convolutions and batch norms weights that keep the variance (He et al. 2015, arXiv 1502.01852).

    Transformers draws them all from N(0, 0.02), batch norm's gains too, which ends in logits of zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2.0 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def _calm_batch_norm(model: nn.Module) -> None:
    """Average batch statistics over many batches; EfficientNet's 0.99, TensorFlow's way round, keeps only the last."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = min(module.momentum, _MAX_BATCH_NORM_MOMENTUM)


def _refuse_misfit(network: HuggingFaceNet, checkpoint: str, contract: ModelContract) -> None:
    """Try one batch now rather than fail in the first epoch."""
    side, channels, classes = contract.input.size_px, contract.input.channels, len(contract.labels)
    try:
        with torch.inference_mode():
            logits = network.eval()(torch.zeros(2, channels, side, side))
    except (ValueError, RuntimeError, AttributeError) as error:
        raise Refusal(
            f"the network {checkpoint}",
            f"cannot take images of {side}x{side} px: {error}",
            way_out="set data_preprocessing.size_px to the checkpoint's own size, or choose another checkpoint",
        ) from error
    if logits.shape != (2, classes):
        raise Refusal(
            f"the network {checkpoint}", f"gives {tuple(logits.shape)}", limit=f"(2, {classes}) for two images"
        )
    network.train()


def _refuse_checkpoint(checkpoint: str, error: Exception) -> Refusal:
    missing = isinstance(error, OSError) and not Path(checkpoint).is_dir()
    problem = "is neither a local folder nor on a reachable hub" if missing else "cannot be loaded"
    return Refusal(
        f"model_training.huggingface.checkpoint {checkpoint}",
        f"{problem}: {str(error).strip().splitlines()[0]}",
        limit="an image classifier that transformers can load",
        way_out="give a local folder made by save_pretrained, mend the network, or set pretrained: false with the name "
        "of an architecture such as efficientnet",
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No advice to train the head, which is about to happen, and no line for each retry of a hub that is away."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
