"""A heat map laid over its image, as a PNG with a legend."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipelines.core.contract import InputContract

LARGEST_SIDE_PX = 1024
_SMALLEST_SIDE_PX = 256  # a digit of 28 pixels is enlarged, or the legend would hide it
_LEGEND_PX = 44
_STRONGEST = 0.8  # opacity where the evidence is strongest: the image still shows through

# Inferno (S. van der Walt and N. Smith, 2015, CC0) at 16 even steps: its lightness rises evenly, so that equal steps of
# evidence look equal, in grey and to the colour-blind too.
_INFERNO = (
    "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4"
)
_COLOURS = np.array(
    [[int(code[place : place + 2], 16) for place in (0, 2, 4)] for code in _INFERNO.split()], np.float32
)


def overlay_png(
    original: Image.Image,
    heat: npt.NDArray[np.float32],
    *,
    contract: InputContract,
    label: str,
    probability: float,
    masks: int,
) -> bytes:
    """Draw the heat map over the image, in grey, with the label and its probability beneath.

    Args:
        original: the decoded image, upright; any size, drawn at 1024 px at most.
        heat: float32 `(H, W)`, 0-1, in the model's own pixels.
        contract: how the image became the model's input, and so where the heat map lies on it.
        label: what the heat map explains.
        probability: 0-1.
        masks: how many the map rests on.

    Returns:
        PNG, RGB.
    """
    width, height = _shown_size(original.size)
    grey = np.asarray(original.convert("L").resize((width, height), Image.Resampling.LANCZOS), np.float32)
    strength = _spread(heat, (width, height), contract.resize)
    opacity = (_STRONGEST * np.sqrt(strength))[..., None]
    blended = grey[..., None] * (1 - opacity) + _colour(strength) * opacity
    canvas = Image.new("RGB", (width, height + _LEGEND_PX), "white")
    canvas.paste(Image.fromarray(np.rint(blended).astype(np.uint8)), (0, 0))
    _draw_legend(canvas, height, f"{label}  {probability:.1%}", f"{masks} masks")
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    longest = max(size)
    scale = min(1.0, LARGEST_SIDE_PX / longest) if longest >= _SMALLEST_SIDE_PX else _SMALLEST_SIDE_PX / longest
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _spread(
    heat: npt.NDArray[np.float32], size: tuple[int, int], resize: Literal["squash", "pad", "crop"]
) -> npt.NDArray[np.float32]:
    """The heat of each shown pixel `(height, width)`: undoes `to_model_input`; 0 where the model saw nothing."""
    width, height = size
    rows, columns = heat.shape
    part = Image.fromarray(heat)
    if resize == "crop":
        side = min(width, height)
        spread = np.zeros((height, width), np.float32)
        top, left = (height - side) // 2, (width - side) // 2
        spread[top : top + side, left : left + side] = np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))
    else:
        box = (0.0, 0.0, float(columns), float(rows))
        if resize == "pad":
            longest = max(width, height)
            used = (width / longest * columns, height / longest * rows)
            left_, top_ = (columns - used[0]) / 2, (rows - used[1]) / 2
            box = (left_, top_, left_ + used[0], top_ + used[1])
        spread = np.asarray(part.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return np.clip(spread, 0.0, 1.0)


def _colour(strength: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The table's colour `(..., 3)`, 0-255, between its steps too."""
    place = strength * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(np.int64), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    mixed: npt.NDArray[np.float32] = _COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share
    return mixed


def _draw_legend(canvas: Image.Image, top: int, text: str, masks: str) -> None:
    draw = ImageDraw.Draw(canvas)
    ramp = _colour(np.linspace(0, 1, canvas.width, dtype=np.float32))
    canvas.paste(Image.fromarray(np.rint(np.tile(ramp, (8, 1, 1))).astype(np.uint8)), (0, top))
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    draw.text((6, top + 10), text, fill="black", font=font)
    draw.text((6, top + 28), "no evidence", fill="#555555", font=small)
    draw.text((canvas.width - 6, top + 28), "most", fill="#555555", font=small, anchor="ra")
    if draw.textlength(text, font) + draw.textlength(masks, small) + 24 < canvas.width:
        draw.text((canvas.width - 6, top + 12), masks, fill="#555555", font=small, anchor="ra")
