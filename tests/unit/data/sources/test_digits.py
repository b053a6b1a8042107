import io
from collections import Counter
from datetime import date

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.data.sources.digits import DigitsSource


def test_list_items__by_week__grows_as_documented():
    items = DigitsSource().list_items()
    arrived = Counter(item.arrived for item in items)
    assert arrived == {
        date(2026, 11, 1): 897,
        date(2026, 11, 8): 300,
        date(2026, 11, 15): 300,
        date(2026, 11, 22): 300,
    }
    assert items[0].key == "2026-11-01/0001.png"
    assert {item.label for item in items} == set("0123456789")


def test_read__any_digit__is_the_real_image():
    source = DigitsSource()
    items = source.list_items()
    pixels = np.asarray(Image.open(io.BytesIO(source.read(items[5], 10_000))))
    assert np.array_equal(np.rint(pixels / 255 * 16), load_digits().images[5])
    assert pixels.max() == 255
