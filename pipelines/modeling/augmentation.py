"""Random changes of a whole batch of training images at once, on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.params import AugmentationParams

FULL_SCALE = 255.0
_DRAWS_PER_IMAGE = 8


class BatchAugmentation:
    """Shifts, turns, scales and re-lights each image of a batch by its own random amounts.

    All geometry is one affine map per image, sampled once (bilinear; what lies outside repeats the border, so that no
    black frame gives the change away).  The draws come from the caller's CPU generator and are the same on any device.
    """

    def __init__(self, params: AugmentationParams) -> None:
        self._params = params
        self._moves = any(
            (params.shift, params.rotation_deg, params.scale, params.flip_horizontal, params.flip_vertical)
        )
        self._relights = any((params.contrast, params.brightness))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change a batch.

        Args:
            images: uint8 `(N, H, W, C)`.
            generator: a CPU generator; equal states give equal changes.

        Returns:
            float32 `(N, H, W, C)`, 0-255.
        """
        pixels = images.permute(0, 3, 1, 2).float()
        draws = torch.rand(len(images), _DRAWS_PER_IMAGE, generator=generator)
        if self._moves:
            pixels = self._move(pixels, draws)
        if self._relights:
            pixels = self._relight(pixels, draws)
        if self._params.noise:
            noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
            pixels = pixels + noise * (self._params.noise * FULL_SCALE)
        return pixels.clamp_(0.0, FULL_SCALE).permute(0, 2, 3, 1)

    def _move(self, pixels: Tensor, draws: Tensor) -> Tensor:
        params, signed = self._params, draws * 2 - 1
        shift = signed[:, 0:2] * (2 * params.shift)  # the image spans [-1, 1] in grid_sample's coordinates
        angle = signed[:, 2] * math.radians(params.rotation_deg)
        zoom = 1.0 / (1.0 + signed[:, 3] * params.scale)
        mirror_x = 1.0 - 2.0 * (draws[:, 4] < 0.5 * params.flip_horizontal)
        mirror_y = 1.0 - 2.0 * (draws[:, 5] < 0.5 * params.flip_vertical)
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows = (
            torch.stack([cosine * mirror_x, -sine * mirror_y, shift[:, 0]], dim=1),
            torch.stack([sine * mirror_x, cosine * mirror_y, shift[:, 1]], dim=1),
        )
        affine = torch.stack(rows, dim=1).to(pixels.device)
        grid = functional.affine_grid(affine, list(pixels.shape), align_corners=False)
        return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _relight(self, pixels: Tensor, draws: Tensor) -> Tensor:
        signed = (draws[:, 6:8] * 2 - 1).to(pixels.device)
        contrast = (1 + signed[:, 0] * self._params.contrast).view(-1, 1, 1, 1)
        brightness = (signed[:, 1] * (self._params.brightness * FULL_SCALE)).view(-1, 1, 1, 1)
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        return (pixels - mean) * contrast + (mean + brightness)


def augmentation_for(params: AugmentationParams) -> BatchAugmentation | None:
    """The augmentation that the parameters ask for; None where every amount is zero."""
    return BatchAugmentation(params) if any(params.model_dump().values()) else None
