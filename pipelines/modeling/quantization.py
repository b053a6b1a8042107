"""An int8 variant of the exported model, kept only where it is faster and not worse."""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from pipelines.core.contract import INPUT_NAME, ModelContract
from pipelines.core.gates import GateCheck, non_inferior
from pipelines.modeling.export import open_session, set_contract
from pipelines.modeling.inference import OnnxPredictor
from pipelines.modeling.seeds import generator_at
from pipelines.modeling.training_data import LabelledImages, TrainingData

_CALIBRATION_IMAGES = 256
_CALIBRATION_BATCH = 32
_TIMED_ROUNDS = 9
_ROUND_S = 0.1

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class QuantizationLimits:
    """What the int8 variant must satisfy.

    Attributes:
        min_speedup: how many times faster it must be.
        max_accuracy_drop: the gate's non-inferiority margin, here on the validation split.
        confidence: of the gate's test.
    """

    min_speedup: float
    max_accuracy_drop: float
    confidence: float


@dataclass(frozen=True)
class QuantizationOutcome:
    """What came of the attempt.

    Attributes:
        kept: whether the file is there.
        reason: in words, without anything that differs from one run to the next.
        speedup: time of float32 over time of int8, one image, one thread; depends on the machine.
        check: the gate's test on the validation split.
    """

    kept: bool
    reason: str
    speedup: float
    check: GateCheck


def try_int8(
    model: Path, target: Path, data: TrainingData, limits: QuantizationLimits, *, seed: int
) -> QuantizationOutcome:
    """Quantize, measure, and keep the result where it is worth it.

    Args:
        model: the float32 ONNX file.
        target: of the int8 file; absent afterwards unless kept.
        data: calibrates with training images, judges with validation images.
        limits: what is worth it.
        seed: of the choice of calibration images.
    """
    quantize(model, target, data.contract, choose_calibration_images(data.train, seed))
    right = [OnnxPredictor(path).predict(data.val.images).argmax(axis=1) == data.val.labels for path in (target, model)]
    check = non_inferior(right[0], right[1], limits.max_accuracy_drop, limits.confidence)
    speedup = measure_speedup(model, target, data.val.images[:1])
    if not check.passed:
        reason = f"worse: accuracy drop beyond {limits.max_accuracy_drop:g} not ruled out"
    elif speedup < limits.min_speedup:
        reason = f"not {limits.min_speedup:g} times as fast"
    else:
        return QuantizationOutcome(True, f"at least {limits.min_speedup:g} times as fast, not worse", speedup, check)
    target.unlink()
    return QuantizationOutcome(False, reason, speedup, check)


def quantize(model: Path, target: Path, contract: ModelContract, images: Images) -> None:
    """Write a statically quantized copy: int8 weights per channel, uint8 activations.

    Weights take seven bits: with eight, products of two neighbours saturate on processors without VNNI.

    Args:
        model: the float32 ONNX file.
        target: of the new file.
        contract: goes into the new file, too.
        images: uint8 `(N, H, W, C)` that the ranges of activations are measured on.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet_quantizer():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _CalibrationBatches(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        proto = onnx.load(quantized)
    set_contract(proto, contract)
    target.write_bytes(proto.SerializeToString(deterministic=True))


def choose_calibration_images(train: LabelledImages, seed: int) -> Images:
    """Up to 256 training images, chosen at random by the seed, in the order of the array."""
    count = min(len(train), _CALIBRATION_IMAGES)
    rows = torch.randperm(len(train), generator=generator_at(seed, "calibration"))[:count].sort().values
    return np.asarray(train.images[rows.numpy()])


def measure_speedup(slow: Path, fast: Path, image: Images) -> float:
    """Median time of one over the median time of the other, in turns, on one thread.

    Args:
        slow: an ONNX file.
        fast: an ONNX file with the same input.
        image: uint8 `(1, H, W, C)`.
    """
    sessions = [open_session(path, threads=1) for path in (slow, fast)]
    feed = {INPUT_NAME: np.ascontiguousarray(image)}
    warm = [_time_runs(session, feed, 2) for session in sessions]
    runs = max(1, int(_ROUND_S / max(warm)))
    rounds = [[_time_runs(session, feed, runs) for session in sessions] for _ in range(_TIMED_ROUNDS)]
    slow_s, fast_s = (float(statistics.median(times)) for times in zip(*rounds, strict=True))
    return slow_s / fast_s


def _time_runs(session: onnxruntime.InferenceSession, feed: dict[str, Images], runs: int) -> float:
    """Seconds per run."""
    began = time.perf_counter()
    for _ in itertools.repeat(None, runs):
        session.run(None, feed)
    return (time.perf_counter() - began) / runs


class _CalibrationBatches(CalibrationDataReader):  # type: ignore[misc]
    """Feeds images to ONNX Runtime's calibration."""

    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), _CALIBRATION_BATCH)
        self._feeds: Iterator[dict[str, Images]] = ({INPUT_NAME: images[i : i + _CALIBRATION_BATCH]} for i in starts)

    def get_next(self) -> dict[str, Images] | None:
        """The next batch; None after the last."""
        return next(self._feeds, None)


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Its advice goes to the root logger."""
    logger = logging.getLogger()
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(previous)
