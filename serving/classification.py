"""From an image's bytes to probabilities: at once where that is quick, else on a thread, with a bound on the wait.

A small image and a small network take less time than handing work to a thread and back, so they are done in the event
loop; whatever may take longer is not, for every other client of the worker would wait for it.  The model's speed is
measured at the warm-up, the image's cost judged from its header.
"""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.core.image_decoding import (
    DecodedImage,
    DecodingError,
    Reason,
    decode_image,
    decoding_floor_px,
    to_model_input,
)
from pipelines.core.jpeg_markers import MalformedJpegError, read_jpeg_markers
from serving.batching import ObserveCall, TurnBatcher
from serving.predictor import Predictor, Probabilities
from serving.problems import (
    BAD_REQUEST,
    OUT_OF_TIME,
    OVERLOADED,
    TOO_LARGE,
    TOO_MANY_PIXELS,
    UNREADABLE_IMAGE,
    UNSUPPORTED_MEDIA,
    Problem,
)

T = TypeVar("T")

_LONGEST_CALL_S = 0.005  # of the model in the event loop; others wait for it
_LARGEST_BATCH = 32
QUICK_MODEL_S = 0.002  # a model that answers sooner is asked in the event loop
_QUICK_BYTES, _QUICK_PIXELS = 2**14, 2**18  # decoded in about 2 ms, and in a few where the bytes are hostile
_INFLATED_PNG_CHUNK = re.compile(rb"iCCP|zTXt|iTXt")  # whose size says nothing of what they become
_MANY_IMAGES_AT_ONCE = 8

_PROBLEMS = {
    Reason.EMPTY: BAD_REQUEST,
    Reason.NOT_AN_IMAGE: UNSUPPORTED_MEDIA,
    Reason.TOO_MANY_BYTES: TOO_LARGE,
    Reason.TOO_MANY_PIXELS: TOO_MANY_PIXELS,
    Reason.CORRUPT: UNREADABLE_IMAGE,
    Reason.TRUNCATED: UNREADABLE_IMAGE,
    Reason.UNREADABLE: UNREADABLE_IMAGE,
}
_WAYS_OUT = {
    Reason.EMPTY: "send the image as the body, or as the field `image` of a form",
    Reason.NOT_AN_IMAGE: "send one of these",
    Reason.TOO_MANY_PIXELS: "send it smaller; the model sees far fewer pixels",
    Reason.TOO_MANY_BYTES: "send it smaller",
}


@dataclass(frozen=True, slots=True)
class Classification:
    """What the model says of one image.

    Attributes:
        image: what was sent.
        label_index: of the most probable label.
        probabilities: one per label, in the order of the contract.
        begun: `time.perf_counter()` when its turn came.
        decode_s: seconds that its decoding took.
        model_began: `time.perf_counter()` when the model was asked.
        model_s: seconds that the model took, for all the images that it was asked about at once.
    """

    image: DecodedImage
    label_index: int
    probabilities: list[float]
    begun: float
    decode_s: float
    model_began: float
    model_s: float


class Classifier:
    """Decodes and predicts, within limits.

    Args:
        predictor: warmed up.
        model_s: seconds that the model takes for one image.
        max_pixels: largest width times height.
        max_bytes: of one encoded image.
        timeout_s: seconds after which an answer comes too late.
        threads: for what is not quick.
        observe: told of each call of the model.

    Attributes:
        predictor: the model.
        contract: how an image must be shaped for it.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        model_s: float,
        max_pixels: int,
        max_bytes: int,
        timeout_s: float,
        threads: int,
        observe: ObserveCall,
    ) -> None:
        self.predictor = predictor
        self.contract = predictor.contract.input
        self._floor_px = decoding_floor_px(self.contract)
        self._max_pixels, self._max_bytes, self._timeout_s = max_pixels, max_bytes, timeout_s
        self._model_is_quick = model_s <= QUICK_MODEL_S
        self._observe = observe
        max_images = max(1, int(_LONGEST_CALL_S / max(model_s, 1e-6)))
        self._batcher = TurnBatcher(predictor.predict, max_images=min(max_images, _LARGEST_BATCH), observe=observe)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="classify")

    async def classify(self, data: bytes) -> Classification:
        """Classify one encoded image.

        Raises:
            Problem: the bytes are no image that may be used, or the answer would come too late.
        """
        if not (self._model_is_quick and _decodes_quickly(data)):
            return await self.run(partial(self._classify, data, time.perf_counter()))
        begun = time.perf_counter()
        image = self.decode(data)
        array = self.shape(image)
        decode_s = time.perf_counter() - begun
        row, model_began, model_s = await self._batcher.predict(array)
        return Classification(image, row.index(max(row)), row, begun, decode_s, model_began, model_s)

    async def classify_many(self, items: Sequence[bytes]) -> list[Classification | Problem]:
        """Classify several, each for itself: one that fails does not touch the others.

        Raises:
            Problem: the answers would come too late.
        """
        answers: list[Classification | Problem] = []
        until = time.monotonic() + self._timeout_s
        # In slices, so that a large batch takes turns with the requests of others.
        for start in range(0, len(items), _MANY_IMAGES_AT_ONCE):
            piece = items[start : start + _MANY_IMAGES_AT_ONCE]
            answers += await self.run(
                partial(self._classify_each, piece, time.perf_counter()), until - time.monotonic()
            )
        return answers

    async def run(self, work: Callable[[], T], timeout_s: float | None = None) -> T:
        """Do something on a thread of the pool.

        Raises:
            Problem: it was not done in time; what had not begun by then never begins.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise Problem(
                OUT_OF_TIME,
                f"No answer within {self._timeout_s:g} s; try again after the time in Retry-After.",
                headers={"Retry-After": "1"},
            ) from None

    def decode(self, data: bytes) -> DecodedImage:
        """Decode one image.

        Raises:
            Problem: the bytes are no image that may be used.
        """
        try:
            return decode_image(data, max_pixels=self._max_pixels, max_bytes=self._max_bytes, floor_px=self._floor_px)
        except DecodingError as error:
            raise _as_problem(error) from error
        except MemoryError as error:
            raise Problem(OVERLOADED, "Not enough memory for this image now.", headers={"Retry-After": "1"}) from error

    def shape(self, image: DecodedImage) -> npt.NDArray[np.uint8]:
        """The image as the model sees it, uint8 `(size_px, size_px, channels)`; the same road as in training."""
        return to_model_input(image.pixels, self.contract)

    def warm_up(self) -> None:
        """Classify real images of the usual formats, so that the first client does not wait for their decoders."""
        picture = Image.linear_gradient("L").resize((self.contract.size_px, self.contract.size_px))
        for image_format in ("PNG", "JPEG"):
            stream = io.BytesIO()
            picture.save(stream, image_format)
            self._classify(stream.getvalue(), time.perf_counter())

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _classify(self, data: bytes, submitted: float) -> Classification:
        begun = time.perf_counter()
        image = self.decode(data)
        array = self.shape(image)
        decoded = time.perf_counter()
        probabilities: Probabilities = self.predictor.predict(array[np.newaxis])
        model_s = time.perf_counter() - decoded
        self._observe(begun - submitted, model_s, 1)
        row: list[float] = probabilities[0].tolist()
        return Classification(image, row.index(max(row)), row, begun, decoded - begun, decoded, model_s)

    def _classify_each(self, items: Sequence[bytes], submitted: float) -> list[Classification | Problem]:
        """One by one, so that memory holds one decoded image at a time; the model gains little from more at once."""
        answers: list[Classification | Problem] = []
        for data in items:
            try:
                answers.append(self._classify(data, submitted))
            except Problem as problem:
                # Without the tracebacks, whose frames hold the image, all the others and, in a circle, this list: the
                # memory of a batch would be free only when the collector comes by.
                problem.__cause__ = problem.__context__ = None
                answers.append(problem.with_traceback(None))
        return answers


def _decodes_quickly(data: bytes) -> bool:
    """Whether the header promises an image that takes about a millisecond to decode."""
    if len(data) > _QUICK_BYTES:
        return False
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels = int.from_bytes(data[16:20]) * int.from_bytes(data[20:24])
        return pixels <= _QUICK_PIXELS and not _INFLATED_PNG_CHUNK.search(data)
    if data.startswith(b"\xff\xd8"):
        try:
            markers = read_jpeg_markers(data, max_scans=1)
        except MalformedJpegError:
            return False
        # Each further scan goes through all pixels once more, for a few bytes.
        return markers.sequential and markers.scans == 1 and markers.width_px * markers.height_px <= _QUICK_PIXELS
    return len(data) < 64  # no image at all: refused at once


def _as_problem(error: DecodingError) -> Problem:
    way_out = _WAYS_OUT.get(error.reason, "check the file; another program may have cut or changed it")
    return Problem(_PROBLEMS[error.reason], f"The image {error.detail}; {way_out}.", reason=str(error.reason))
