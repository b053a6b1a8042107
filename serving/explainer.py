"""Explains one answer of the model: a heat map over the image, within a budget of time and one at a time.

An explanation asks the model hundreds of times, as much work as hundreds of requests.  It has a thread of its own, so
that predictions go on beside it, and few may wait for that thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from serving.admission import Admission
from serving.classification import Classifier
from serving.explanation import explain
from serving.heat_map_png import overlay_png

_MOST_AT_ONCE = 3  # one computed, two waiting


@dataclass(frozen=True, slots=True)
class HeatMap:
    """An explanation, drawn.

    Attributes:
        png: the heat map over the image.
        label: that it explains.
        probability: of that label.
        masks: masked copies that the model was asked about.
    """

    png: bytes
    label: str
    probability: float
    masks: int


class Explainer:
    """Draws heat maps.

    Args:
        classifier: decodes, and holds the model.
        labels: in the order of the model's outputs.
        budget_s: seconds that one may take.
    """

    def __init__(self, classifier: Classifier, labels: Sequence[str], *, budget_s: float) -> None:
        self._classifier, self._labels, self._budget_s = classifier, labels, budget_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._places = Admission(max_requests=_MOST_AT_ONCE, max_buffered_bytes=0)

    async def explain(self, data: bytes, label: str | None) -> HeatMap:
        """Explain why the model gives a label its probability.

        Args:
            data: the encoded image.
            label: one of the model's; None takes the most probable.

        Raises:
            Problem: the bytes are no image that may be used, or too many explanations are asked for.
        """
        with self._places.work():
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._explain, data, label)

    def close(self) -> None:
        """End the thread; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _explain(self, data: bytes, label: str | None) -> HeatMap:
        image = self._classifier.decode(data)
        array = self._classifier.shape(image)
        predict = self._classifier.predictor.predict
        probabilities = predict(array[np.newaxis])[0]
        index = int(probabilities.argmax()) if label is None else self._labels.index(label)
        explanation = explain(predict, array, index, self._budget_s)
        png = overlay_png(
            image.pixels,
            explanation.heat,
            contract=self._classifier.contract,
            label=self._labels[index],
            probability=float(probabilities[index]),
            masks=explanation.masks,
        )
        return HeatMap(png, self._labels[index], float(probabilities[index]), explanation.masks)
