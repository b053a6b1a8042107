"""Predictions as rows of a table: what an image was, what the model said of it, or why it could not be asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.core.image_decoding import DecodingError, Reason, read_model_input
from pipelines.core.image_limits import ImageLimits
from pipelines.core.metrics import check_probabilities
from pipelines.data.parallel import map_ordered
from pipelines.data.sources.base import Source, SourceItem
from pipelines.modeling.inference import OnnxPredictor

FORMAT_KEY = b"perch.predictions"  # in the schema's metadata, so that the files of Perch can be told from others
FORMAT = b"1"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model answered.

    Attributes:
        name: of the registered model.
        version: its version in the registry.
        onnx_sha256: of its file.
    """

    name: str
    version: str
    onnx_sha256: str


@dataclass(frozen=True, slots=True)
class _Fetched:
    """An image's bytes, or why there are none."""

    data: bytes = b""
    sha256: str | None = None
    reason: Reason | None = None
    detail: str = ""


class BatchPredictor:
    """Reads, decodes and predicts a few images at a time; safe from several threads.

    Args:
        source: where the bytes come from.
        predictor: the model.
        identity: the model, as the rows name it.
        limits: as the service's.
        readers: how many images of one batch are read at once; 1 reads each as it is decoded.
    """

    def __init__(
        self, source: Source, predictor: OnnxPredictor, identity: ModelIdentity, limits: ImageLimits, *, readers: int
    ) -> None:
        self._source, self._predictor, self._identity = source, predictor, identity
        self._limits, self._readers = limits, readers
        self.schema = schema_for(predictor.contract.labels)

    def predict(self, items: list[SourceItem]) -> pa.Table:
        """One row per item, in their order; whatever is wrong with an image alone is a row with an error.

        Raises:
            TryLater: the source cannot be reached now.
            Refusal: the model's answer is not what its contract promises.
        """
        # Filled from the front, and only the filled part is predicted: a batch holds sound images alone.
        images = np.empty((len(items), *self._predictor.image_shape), np.uint8)
        sound: list[int] = []
        sha256: list[str | None] = []
        errors: list[str | None] = []
        details: list[str | None] = []
        for index, fetched in enumerate(self._fetch_all(items)):
            reason, detail = fetched.reason, fetched.detail
            if reason is None:
                try:
                    images[len(sound)] = read_model_input(
                        fetched.data,
                        self._predictor.contract.input,
                        max_pixels=self._limits.max_pixels,
                        max_bytes=self._limits.max_body_bytes,
                    )
                    sound.append(index)
                except DecodingError as error:
                    reason, detail = error.reason, error.detail
            sha256.append(fetched.sha256)
            errors.append(None if reason is None else str(reason))
            details.append(None if reason is None else detail)
        probabilities = self._predictor.predict_batch(images[: len(sound)])
        if len(sound):
            check_probabilities(probabilities, f"the probabilities of {self._identity.name}")
        return self._table([item.key for item in items], sha256, errors, details, np.asarray(sound, int), probabilities)

    def _fetch_all(self, items: list[SourceItem]) -> Any:
        if self._readers == 1:
            return map(self._fetch, items)
        return map_ordered(self._fetch, items, threads=self._readers, ahead=2 * self._readers)

    def _fetch(self, item: SourceItem) -> _Fetched:
        most = self._limits.max_body_bytes
        if item.fault:
            return _Fetched(reason=Reason.UNREADABLE, detail=item.fault)
        if item.n_bytes > most:
            return _Fetched(reason=Reason.TOO_MANY_BYTES, detail=f"{item.n_bytes:,} bytes (limit: {most:,})")
        try:
            data = self._source.read(item, most)
        except OSError as error:
            return _Fetched(reason=Reason.UNREADABLE, detail=error.strerror or str(error))
        if len(data) > most:
            return _Fetched(reason=Reason.TOO_MANY_BYTES, detail=f"more than {most:,} bytes")
        return _Fetched(data, hashlib.sha256(data).hexdigest())

    def _table(
        self,
        keys: list[str],
        sha256: list[str | None],
        errors: list[str | None],
        details: list[str | None],
        sound: np.ndarray[Any, np.dtype[np.int64]],
        probabilities: np.ndarray[Any, np.dtype[np.float32]],
    ) -> pa.Table:
        labels = self._predictor.contract.labels
        best = probabilities.argmax(axis=1) if len(sound) else np.zeros(0, int)
        label = np.full(len(keys), None, object)
        label[sound] = [labels[index] for index in best]
        unsound = np.ones(len(keys), bool)
        unsound[sound] = False

        def spread(values: np.ndarray[Any, np.dtype[np.float32]]) -> pa.Array:
            all_rows = np.zeros(len(keys), np.float32)
            all_rows[sound] = values
            return pa.array(all_rows, pa.float32(), mask=unsound)

        identity = self._identity
        columns = [
            pa.array(keys, pa.string()),
            pa.array(sha256, pa.string()),
            pa.array(label, pa.string()),
            spread(probabilities[np.arange(len(sound)), best]),
            *(spread(probabilities[:, index]) for index in range(len(labels))),
            pa.array(errors, pa.string()),
            pa.array(details, pa.string()),
            *(pa.array([text] * len(keys), pa.string()) for text in (identity.name, identity.version)),
            pa.array([identity.onnx_sha256] * len(keys), pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def schema_for(labels: tuple[str, ...]) -> pa.Schema:
    """The columns of a predictions file; the `p_` columns are in the order of the model's outputs."""
    text = pa.string()
    return pa.schema(
        [
            ("key", text),
            ("sha256", text),
            ("label", text),
            ("confidence", pa.float32()),
            *((f"p_{label}", pa.float32()) for label in labels),
            ("error", text),
            ("error_detail", text),
            ("model", text),
            ("model_version", text),
            ("onnx_sha256", text),
        ],
        metadata={FORMAT_KEY: FORMAT},
    )
