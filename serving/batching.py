"""Asks the model once for all the images that one turn of the event loop has brought.

Nobody waits for company: under load several requests are read in one turn anyway, and alone an image goes alone.  The
model takes as long for N images at once as for N one by one; what is saved is going to and fro between it and Python,
which throws the other's code and data out of the processor's caches each time (docs/adr/0021 has the numbers).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
ObserveCall = Callable[[float, float, int], object]
"""Told of each call of the model: seconds that its first image waited, seconds that it took, how many images."""


class Answer(NamedTuple):
    """What the model says of one image.

    Attributes:
        probabilities: one per label.
        started: `time.perf_counter()` when the model was asked.
        model_s: seconds that it took, for all images of the call.
    """

    probabilities: list[float]
    started: float
    model_s: float


class TurnBatcher:
    """Gathers images within a turn of the event loop; used from that loop alone.

    Args:
        predict: uint8 `(N, H, W, C)` to float32 `(N, classes)`, quick enough for the event loop.
        max_images: of one call; the rest of a turn follows in the next call.
        observe: told of each call.
    """

    def __init__(self, predict: Callable[[Images], Probabilities], *, max_images: int, observe: ObserveCall) -> None:
        self._predict, self._max_images, self._observe = predict, max_images, observe
        self._waiting: list[tuple[Images, asyncio.Future[Answer], float]] = []

    async def predict(self, image: Images) -> Answer:
        """Ask about one image, uint8 `(H, W, C)`, together with whatever else this turn brings."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((image, answer, time.perf_counter()))
        if len(self._waiting) == 1:
            loop.call_soon(self._ask)
        return await answer

    def _ask(self) -> None:
        batch, self._waiting = self._waiting[: self._max_images], self._waiting[self._max_images :]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._ask)
        started = time.perf_counter()
        try:
            rows: list[list[float]] = self._predict(np.stack([image for image, _, _ in batch])).tolist()
        except Exception as error:  # noqa: BLE001 - each request has to hear of it, not the event loop
            for _, answer, _ in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        model_s = time.perf_counter() - started
        self._observe(started - batch[0][2], model_s, len(batch))
        for (_, answer, _), row in zip(batch, rows, strict=True):
            if not answer.done():  # its client may have gone
                answer.set_result(Answer(row, started, model_s))
