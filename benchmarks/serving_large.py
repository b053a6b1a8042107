"""What one large image costs: EfficientNet-B4 at 380 px, float32 and int8, by threads and session settings.

    python -m benchmarks.serving_large [--rounds 3] [--images 12] [--quick]

The network has random weights, goes through Perch's own export and quantization, and is asked as the service asks it:
decode a JPEG of 1024 x 1024 grey pixels, shape it, run the model.  Each setting is a process of its own, in turn, round
after round; in it, 1, 2 and 4 clients wait for their own images side by side.  Latency is of decoding and model, the
median over rounds of each round's median and 95th percentile; the target is 200 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generated_images import write_image_folder
from pipelines.core.contract import INPUT_NAME, PROBABILITIES_NAME, InputContract, ModelContract
from pipelines.core.image_decoding import read_model_input

TARGET_MS = 200.0
CLIENTS = (1, 2, 4)
LEVELS = ("disable_all", "enable_basic", "enable_extended", "enable_all")
IMAGE_SIDE_PX = 1024
_CALIBRATION_IMAGES = 16
_LIMITS = {"max_pixels": 25_000_000, "max_bytes": 10_000_000}


@dataclass(frozen=True)
class Setting:
    """How a session is opened.

    Attributes:
        precision: `fp32` or `int8`.
        threads: that work on one image together.
        spinning: whether idle ones wait for work in a loop instead of sleeping.
        level: of graph optimisation.
        arena: whether memory is kept between images.
    """

    precision: str
    threads: int
    spinning: bool = False
    level: str = "enable_all"
    arena: bool = True

    def __str__(self) -> str:
        words = [self.precision, f"{self.threads} thread{'s'[: self.threads - 1]}"]
        words += ["spinning"] if self.spinning else []
        words += [self.level] if self.level != "enable_all" else []
        words += [] if self.arena else ["no arena"]
        return ", ".join(words)


@dataclass(frozen=True)
class Measurement:
    """One setting with some clients in one round.

    Attributes:
        p50_ms: of decoding and model together, per image.
        p95_ms: as well.
        images_per_s: of all clients.
        cpu_ms: processor time per image.
        memory_mib: largest resident set of the process so far.
        load_s: opening the session.
    """

    p50_ms: float
    p95_ms: float
    images_per_s: float
    cpu_ms: float
    memory_mib: float
    load_s: float


def settings() -> Iterator[Setting]:
    """All that are compared."""
    for precision in ("fp32", "int8"):
        yield Setting(precision, 1)
        yield Setting(precision, 2)
        yield Setting(precision, 2, spinning=True)
        yield Setting(precision, 1, arena=False)
        for level in LEVELS[:-1]:
            yield Setting(precision, 1, level=level)


def main() -> None:
    """Build the models once, measure every setting in its own process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=12, help="per client in each measurement")
    parser.add_argument("--network", default="efficientnet-b4")
    parser.add_argument("--size", type=int, default=380, help="side of the model's input, in pixels")
    parser.add_argument("--quick", action="store_true", help="B0 at 224 px, one round: shows that everything runs")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # folder and setting: one process's share
    arguments = parser.parse_args()
    if arguments.measure:
        folder, setting = arguments.measure
        found = _measure(Path(folder), Setting(**json.loads(setting)), arguments.images)
        print(json.dumps({clients: asdict(measurement) for clients, measurement in found.items()}))
        return
    if arguments.quick:
        arguments.rounds, arguments.images = 1, 4
        arguments.network, arguments.size = "efficientnet-b0", 224
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    results: dict[Setting, list[dict[int, Measurement]]] = {}
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as temporary:
        folder = Path(temporary)
        console.print(f"building {arguments.network} at {arguments.size} px, float32 and int8")
        _build(folder, arguments.network, arguments.size)
        for number in range(arguments.rounds):
            for setting in settings():
                found = _measure_apart(folder, setting, arguments.images)
                results.setdefault(setting, []).append(found)
                console.print(f"round {number + 1}  {setting!s:36} {found[1].p50_ms:6.0f} ms")
    Console(width=None if sys.stdout.isatty() else 140).print(_table(results))
    if arguments.out:
        raw = [
            {**asdict(setting), "rounds": [_plain(found) for found in rounds]} for setting, rounds in results.items()
        ]
        arguments.out.write_text(json.dumps(raw, indent=2) + "\n")


def _build(folder: Path, network: str, size_px: int) -> None:
    """Write `fp32.onnx`, `int8.onnx` and the images; random weights suffice, for time does not depend on them."""
    from pipelines.modeling.export import export_onnx
    from pipelines.modeling.huggingface import build_huggingface
    from pipelines.modeling.networks import NormalizedNet, PixelNormalization
    from pipelines.modeling.quantization import quantize
    from pipelines.params import HuggingFaceParams

    contract = ModelContract(
        input=InputContract(size_px=size_px, channels=1, resize="squash"), labels=("normal", "pneumonia")
    )
    backbone = build_huggingface(HuggingFaceParams(checkpoint=network, pretrained=False), contract)
    export_onnx(NormalizedNet(PixelNormalization([128.0], [64.0]), backbone).eval(), contract, folder / "fp32.onnx")
    write_image_folder(folder / "images", _CALIBRATION_IMAGES, IMAGE_SIDE_PX)
    calibration = np.stack([read_model_input(data, contract.input, **_LIMITS) for data in _read_images(folder)])
    quantize(folder / "fp32.onnx", folder / "int8.onnx", contract, calibration)


def _read_images(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "images").rglob("*.jpg"))]


def _measure_apart(folder: Path, setting: Setting, images: int) -> dict[int, Measurement]:
    command = [sys.executable, "-m", "benchmarks.serving_large", "--images", str(images)]
    command += ["--measure", str(folder), json.dumps(asdict(setting))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return {int(clients): Measurement(**found) for clients, found in json.loads(done.stdout).items()}


def _measure(folder: Path, setting: Setting, images: int) -> dict[int, Measurement]:
    import onnxruntime
    import psutil

    from pipelines.core.contract import CONTRACT_KEY

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(setting.spinning)))
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{setting.level.upper()}")
    options.enable_cpu_mem_arena = setting.arena
    options.log_severity_level = 3
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(
        str(folder / f"{setting.precision}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    load_s = time.perf_counter() - started
    text = session.get_modelmeta().custom_metadata_map[CONTRACT_KEY]
    contract = ModelContract.model_validate_json(text).input
    encoded = _read_images(folder)

    def answer(number: int) -> float:
        began = time.perf_counter()
        pixels = read_model_input(encoded[number % len(encoded)], contract, **_LIMITS)
        session.run([PROBABILITIES_NAME], {INPUT_NAME: pixels[np.newaxis]})
        return 1000 * (time.perf_counter() - began)

    for number in range(3):
        answer(number)
    found = {}
    for clients in CLIENTS:
        with ThreadPoolExecutor(clients) as pool:
            cpu_before_s, began = _cpu_s(), time.perf_counter()
            times = list(pool.map(answer, range(clients * images)))
            seconds, cpu_s = time.perf_counter() - began, _cpu_s() - cpu_before_s
        found[clients] = Measurement(
            p50_ms=statistics.median(times),
            p95_ms=float(np.quantile(times, 0.95)),
            images_per_s=len(times) / seconds,
            cpu_ms=1000 * cpu_s / len(times),
            memory_mib=psutil.Process().memory_info().rss / 2**20,
            load_s=load_s,
        )
    return found


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def _table(results: dict[Setting, list[dict[int, Measurement]]]) -> Table:
    shown = Table(
        box=None, title=f"one image, decoding and model; the target is {TARGET_MS:g} ms", title_justify="left"
    )
    shown.add_column("session", no_wrap=True)
    for clients in CLIENTS:
        shown.add_column(f"{clients} at once: p50 ms", justify="right")
        shown.add_column("p95 ms", justify="right")
        shown.add_column("images/s", justify="right")
    for column in ("CPU ms", "MiB", "load s"):
        shown.add_column(column, justify="right")
    for setting, rounds in results.items():

        def middle(clients: int, name: str, rounds: list[dict[int, Measurement]] = rounds) -> float:
            return statistics.median(getattr(found[clients], name) for found in rounds)

        cells = []
        for clients in CLIENTS:
            p50 = middle(clients, "p50_ms")
            cells.append(f"[{'green' if p50 <= TARGET_MS else 'red'}]{p50:.0f}[/]")
            cells += [f"{middle(clients, 'p95_ms'):.0f}", f"{middle(clients, 'images_per_s'):.1f}"]
        rest = (f"{middle(1, 'cpu_ms'):.0f}", f"{middle(max(CLIENTS), 'memory_mib'):.0f}", f"{middle(1, 'load_s'):.1f}")
        shown.add_row(str(setting), *cells, *rest)
    return shown


def _plain(found: dict[int, Measurement]) -> dict[int, Any]:
    return {clients: asdict(measurement) for clients, measurement in found.items()}


if __name__ == "__main__":
    main()
