"""The heat map lands where it belongs on the client's own image, whatever its size and shape."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.core.contract import InputContract
from serving.heat_map_png import overlay_png

LEGEND_PX = 44


def _overlay(size: tuple[int, int], heat: np.ndarray, resize: str = "squash", label: str = "seven") -> np.ndarray:
    contract = InputContract(size_px=heat.shape[0], channels=1, resize=resize)  # type: ignore[arg-type]
    data = overlay_png(Image.new("L", size, 90), heat, contract=contract, label=label, probability=0.987, masks=64)
    assert data.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(data)))


def _hot(row: int, column: int, side: int = 32) -> np.ndarray:
    heat = np.zeros((side, side), np.float32)
    heat[row - 2 : row + 3, column - 2 : column + 3] = 1.0
    return heat


def _hottest(picture: np.ndarray) -> tuple[float, float]:
    """Centre of what is coloured, as shares of width and height."""
    image = picture[:-LEGEND_PX].astype(int)
    rows, columns = np.nonzero(image.max(axis=2) - image.min(axis=2) > 60)
    return (columns.mean() + 0.5) / image.shape[1], (rows.mean() + 0.5) / image.shape[0]


@pytest.mark.parametrize(
    ("size", "shown"),
    [((4000, 2000), (1024, 512)), ((300, 600), (300, 600)), ((28, 28), (256, 256)), ((5000, 1), (1024, 1))],
)
def test_overlay_png__any_size__is_shown_at_a_readable_one(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert _overlay(size, _hot(16, 16)).shape == (shown[1] + LEGEND_PX, shown[0], 3)


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ("squash", (8.5 / 32, 16.5 / 32)),
        ("pad", (8.5 / 32, 0.5 + 2 * (16.5 / 32 - 0.5))),  # the model saw bars above and below
        ("crop", (0.25 + 0.5 * 8.5 / 32, 16.5 / 32)),  # the model saw the square in the middle
    ],
)
def test_overlay_png__oblong_image__undoes_how_it_was_shaped(resize: str, expected: tuple[float, float]) -> None:
    assert _hottest(_overlay((800, 400), _hot(16, 8), resize)) == pytest.approx(expected, abs=0.01)


def test_overlay_png__no_evidence__is_the_image_in_grey() -> None:
    picture = _overlay((300, 300), np.zeros((32, 32), np.float32))
    assert (picture[:300] == 90).all()


def test_overlay_png__labels_of_any_script__are_drawn() -> None:
    for label in ("肺炎", "pneumonie à droite", "x" * 500, ""):
        _overlay((300, 300), _hot(16, 16), label=label)
