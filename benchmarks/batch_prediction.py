"""How fast a folder is predicted: `perch predict` against a loop that only opens, decodes, stacks and runs the model.

Both take the same files through the same ONNX file with the same number of threads, in turn, several rounds; the ratio
of their images per second, from the medians, is what `docs/` reports.  Perch also lists, hashes, judges limits, writes
parts that survive a kill, and joins them.  The images are those of an `.npz` in MedMNIST's format, as they are (PNG)
and enlarged (JPEG); the network is `SmallConvNet` as `params.yaml` has it, untrained.

    python benchmarks/batch_prediction.py pneumoniamnist.npz
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import predict_source
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.contract import INPUT_NAME, PROBABILITIES_NAME, InputContract, ModelContract
from pipelines.core.file_hash import hash_file
from pipelines.core.image_limits import ImageLimits
from pipelines.modeling.export import export_onnx
from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet
from pipelines.params import Params
from pipelines.settings import Settings, get_settings

BATCH_IMAGES = 128  # of the bare loop, and of Perch at this size
CASES = {"28 px PNG": (28, "png", 4096), "1024 px JPEG": (1024, "jpg", 512)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", type=Path, help="an .npz in MedMNIST's format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=get_settings().decode_workers)
    options = parser.parse_args()
    with np.load(options.npz) as arrays:
        pixels = arrays["train_images"]
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as name:
        root = Path(name)
        model = root / "model.onnx"
        _write_model(model)
        for case, (size_px, ending, images) in CASES.items():
            folder = root / ending
            folder.mkdir()
            _write_images(folder, pixels[:images], size_px, ending)
            files = sorted(folder.iterdir())
            predict = partial(_predict, folder, model, root / "predictions.parquet", options.threads)
            bare, perch = [], []
            for _ in range(options.rounds):
                bare.append(_measure(lambda files=files: _bare_loop(files, model, options.threads)))
                perch.append(_measure(predict))
            wall = [statistics.median(seconds for seconds, _ in times) for times in (bare, perch)]
            cpu = [statistics.median(seconds for _, seconds in times) for times in (bare, perch)]
            result = {
                "images": f"{len(files)} x {case}",
                "threads": options.threads,
                "bare_images_per_s": round(len(files) / wall[0]),
                "perch_images_per_s": round(len(files) / wall[1]),
                "ratio": round(wall[0] / wall[1], 2),
                "ratio_of_cpu_time": round(cpu[0] / cpu[1], 2),
            }
            print(json.dumps(result), flush=True)


def _write_model(path: Path) -> None:
    params = Params(dataset="bench", model_name="bench").model_training.small_cnn
    torch.manual_seed(0)
    network = SmallConvNet(1, 2, widths=params.widths, dropout=params.dropout)
    contract = ModelContract(input=InputContract(size_px=28, channels=1, resize="squash"), labels=("no", "yes"))
    export_onnx(NormalizedNet(PixelNormalization([128.0], [64.0]), network).eval(), contract, path)


def _write_images(folder: Path, pixels: np.ndarray, size_px: int, ending: str) -> None:
    for index, image in enumerate(pixels):
        scaled = Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC)
        scaled.save(folder / f"{index:05d}.{ending}")


def _measure(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _bare_loop(files: list[Path], model: Path, threads: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def predict(start: int) -> np.ndarray:
        batch = []
        for file in files[start : start + BATCH_IMAGES]:
            with Image.open(file) as image:
                image.draft(None, (256, 256))  # a JPEG at a reduced scale, as Perch does
                grey = image.convert("L")
                batch.append(np.asarray(grey if grey.size == (28, 28) else grey.resize((28, 28), Image.Resampling.BOX)))
        answer: np.ndarray = session.run([PROBABILITIES_NAME], {INPUT_NAME: np.stack(batch)[..., None]})[0]
        return answer

    with ThreadPoolExecutor(threads) as pool:
        np.concatenate(list(pool.map(predict, range(0, len(files), BATCH_IMAGES))))


def _predict(folder: Path, model: Path, out: Path, threads: int) -> None:
    source = open_location(str(folder), Settings(), path_column="path", out=out)
    identity = ModelIdentity("bench", "1", hash_file(model))
    predict_source(
        source, model, identity, out, limits=ImageLimits(), threads=threads, name="bench", say=lambda _: None
    )


if __name__ == "__main__":
    main()
