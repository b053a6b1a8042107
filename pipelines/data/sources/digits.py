"""The handwritten digits inside scikit-learn, arriving week by week: the source that needs no file and no network.

1797 real images of 8 x 8 pixels (Alpaydin and Kaynak, UCI 1998).  The first 897 count as having arrived by
2026-11-01, and 300 more each following Sunday, so that retraining as of a date sees real growth.
"""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np

from pipelines.data.png import encode_png
from pipelines.data.sources.base import SourceItem

FIRST_ARRIVAL = date(2026, 11, 1)
FIRST_IMAGES = 897
WEEKLY_IMAGES = 300


class DigitsSource:
    """`digits`, in scikit-learn's own order."""

    identity = "digits"
    concurrent_reads = 0

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = np.rint(data.images * (255.0 / 16.0)).astype(np.uint8)
        self._labels = [str(label) for label in data.target]

    def list_items(self) -> list[SourceItem]:
        """All digits with the day each arrived; the key begins with that day."""
        items = []
        for index, label in enumerate(self._labels):
            week = 0 if index < FIRST_IMAGES else 1 + (index - FIRST_IMAGES) // WEEKLY_IMAGES
            arrived = FIRST_ARRIVAL + timedelta(weeks=week)
            key = f"{arrived.isoformat()}/{index + 1:04d}.png"
            items.append(SourceItem(key, label, str(index), fingerprint="1", arrived=arrived))
        return items

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """One digit as PNG."""
        return encode_png(self._images[int(item.location)])[: max_bytes + 1]
