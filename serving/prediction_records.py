"""What is kept of a prediction and of a feedback; docs/reference/predictions.md lists the columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any


# Not frozen: a frozen dataclass takes four times as long to make, and this happens in every request.
@dataclass(slots=True)
class PredictionRecord:
    """One answer: what was asked, by whom, and what was said; never the image or the key.

    Attributes:
        prediction_id: of `pipelines.core.prediction_ids`.
        time: when the answer was made, UTC.
        request_id: of the request; the images of a batch share it.
        endpoint: `predict` or `batch`.
        label: name of the likeliest class.
        confidence: its probability, 0-1.
        probabilities: one per label, in the order of the model's labels; a list, or float32 of shape (labels,).
        image_sha256: of the encoded bytes, hex.
        format: as Pillow names it, e.g. `PNG`.
        mode: as Pillow names it, before conversion, e.g. `L`.
        width_px: of the decoded image.
        height_px: of the decoded image.
        n_bytes: of the encoded image.
        caller: name of the key or subject of the token.
        duration_ms: from the request's arrival to its answer.
        origin: `client`, or `mirror` where the gateway sent a copy, whose answer nobody got;
            `probe` where the prober asked, a copy of that included.
    """

    prediction_id: str
    time: datetime
    request_id: str
    endpoint: str
    label: str
    confidence: float
    probabilities: Sequence[float] | Any
    image_sha256: str
    format: str
    mode: str
    width_px: int
    height_px: int
    n_bytes: int
    caller: str
    duration_ms: float
    origin: str = "client"


@dataclass(slots=True)
class FeedbackRecord:
    """What a client learned later about an image.

    Attributes:
        prediction_id: of the answer it is about.
        true_label: what the image shows.
        time: when it was told, UTC.
        caller: name of the key or subject of the token.
        request_id: of the request that told it.
    """

    prediction_id: str
    true_label: str
    time: datetime
    caller: str
    request_id: str


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What all records of a journal share; another process may ship it, of another model version.

    Attributes:
        kind: `predictions` or `feedback`.
        model: name of the model.
        version: its version.
        onnx_sha256: digest of the model file.
        labels: in the order of the probabilities.
    """

    kind: str
    model: str
    version: str
    onnx_sha256: str
    labels: tuple[str, ...]
