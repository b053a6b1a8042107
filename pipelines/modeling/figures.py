"""Pictures for the model card, as PNG; equal numbers give equal bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipelines.core.calibration import CalibrationBin
from pipelines.core.statistics import IntArray
from pipelines.modeling.inference import Images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#858b96"  # reads on white and on black: the background is transparent
_BLUE = "#3b82f6"
_DPI = 160
_MAX_COUNTED_CLASSES = 20  # beyond it, numbers in the cells cannot be read


def draw_confusion(confusion: IntArray, labels: Sequence[str]) -> bytes:
    """The confusion matrix as PNG, each row shaded by its shares.

    Args:
        confusion: int64 `(K, K)`: row the true class, column the predicted one.
        labels: the classes' names.
    """
    count = len(labels)
    side = min(12.0, max(3.2, 0.45 * count + 1.4))
    figure, axes = _new_figure(side, side)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), [_shorten(label) for label in labels], rotation=45, ha="right")
    axes.set_yticks(range(count), [_shorten(label) for label in labels])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= _MAX_COUNTED_CLASSES:
        for (row, column), images in np.ndenumerate(confusion):
            if images:
                ink = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(images), ha="center", va="center", color=ink, fontsize=8)
    return _to_png(figure)


def draw_reliability(bins: Sequence[CalibrationBin]) -> bytes:
    """Accuracy against confidence as PNG, the area of a point by its images; the diagonal is perfect calibration."""
    figure, axes = _new_figure(4.6, 4.0)
    lowest = min(0.9, *(min(part.confidence, part.accuracy) for part in bins)) - 0.05
    lowest = max(0.0, lowest)
    axes.plot([lowest, 1], [lowest, 1], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    most = max(part.images for part in bins)
    x, y = [part.confidence for part in bins], [part.accuracy for part in bins]
    axes.plot(x, y, color=_BLUE, linewidth=1.2, alpha=0.6)
    axes.scatter(x, y, s=[30 + 90 * part.images / most for part in bins], color=_BLUE, alpha=0.85, linewidths=0)
    axes.set_xlim(lowest, 1.02)
    axes.set_ylim(lowest, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that was right")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    return _to_png(figure)


def enlarge(image: Images, side_px: int) -> bytes:
    """An image as PNG, its pixels repeated a whole number of times to come near a size; a large one is reduced.

    Args:
        image: uint8 `(H, W, C)`, C 1 or 3.
        side_px: what the longer side should come to, at most.
    """
    picture = Image.fromarray(np.asarray(image[..., 0] if image.shape[-1] == 1 else image))
    factor = side_px // max(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    elif factor == 0:
        picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG that needs no file beside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.tick_params(colors=_INK, labelsize=8)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    return figure, axes


def _to_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()


def _shorten(label: str, most: int = 18) -> str:
    """A label that fits an axis; `$` would switch matplotlib to its mathematics."""
    text = label if len(label) <= most else label[: most - 1] + "…"
    return text.replace("$", r"\$")
