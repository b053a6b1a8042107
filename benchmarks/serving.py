"""How fast Perch answers, beside a bare floor and other ways to serve the same model: `make bench-serving`.

    python -m benchmarks.serving [--rounds 5] [--seconds 8] [--connections 16] [--only NAME]... [--quick]

In each round every server is started afresh, in turn, on one core; `wrk` loads it from another.  Then Perch, as
shipped, with a worker for each core and `wrk` beside it on the same cores.  Numbers are medians over the rounds, ratios
are medians of the ratios within a round.  The raw numbers and a figure are left in a folder, see --out.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import wrk
from benchmarks.server_processes import ServerProcess, free_port
from benchmarks.serving_contenders import Contender, contenders, perch, raw_body
from benchmarks.serving_model import BenchModel, digit_png, prepare_model
from benchmarks.serving_release import prepare_release
from benchmarks.serving_report import BOTH_CORES, Measurement, Results, draw, judge, table, write_json
from pipelines.core.contract import INPUT_NAME, PROBABILITIES_NAME
from pipelines.modeling.export import open_session
from pipelines.params import load_params
from pipelines.settings import get_settings

PROJECT = Path(__file__).parents[1]
SERVER_CORE, LOAD_CORE = 0, 1
SETTLE_S = 0.5  # between two servers


def main() -> None:
    """Measure everything, print it, and end with 1 when a target was missed."""
    arguments = _parse_arguments()
    if missing := [program for program in ("wrk", "taskset") if shutil.which(program) is None]:
        sys.exit(f"{' and '.join(missing)} not found; Debian has them in the packages wrk and util-linux")
    out: Path = arguments.out or get_settings().home / "benchmarks" / "serving"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as temporary:
        results, payloads = _measure_all(arguments, Path(temporary), Console(stderr=True, soft_wrap=True))
    targets = judge(results)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(results, payloads))
    for target in targets:
        console.print(f"{'[green]met   [/]' if target.held else '[red]missed[/]'} {target.promise}: {target.found}")
    write_json(out / "serving.json", vars(arguments), results, targets)
    draw(out / "serving.png", results)
    console.print(f"raw numbers and figure: {out}", highlight=False)
    if not all(target.held for target in targets):
        sys.exit(1)


def measure(
    contender: Contender, folder: Path, *, label: str, pinned: bool, warm_s: float, seconds: float, connections: int
) -> Measurement:
    """Start a server, see that it computes what the others do, warm it, load it, end it.

    Args:
        contender: the server.
        folder: for its log and its payload.
        label: that it must predict.
        pinned: server on one core and wrk on another; else both anywhere.
        warm_s: seconds of load before the measurement.
        seconds: of the measurement.
        connections: that wrk holds open.

    Raises:
        RuntimeError: the server did not start, or predicts something else.
    """
    port = free_port()
    body = folder / f"{port}.body"
    body.write_bytes(contender.payload.body)
    url = contender.url(port)

    def load(interval_s: float) -> wrk.Load:
        line = wrk.command(
            url,
            body,
            contender.payload.content_type,
            contender.payload.headers,
            connections=connections,
            seconds=interval_s,
            core=LOAD_CORE if pinned else None,
        )
        return wrk.run(line, interval_s)

    server = ServerProcess(
        contender.command(port),
        contender.environment(port),
        folder / f"{port}.log",
        cores=str(SERVER_CORE) if pinned else "",
        folder=PROJECT,
    )
    try:
        start_s, answer = server.wait_for_answer(contender.payload.request(url))
        if contender.label_in(answer) != label:
            raise RuntimeError(f"{contender.name} predicts {contender.label_in(answer)}, ONNX Runtime itself {label}")
        load(warm_s)
        cpu_before_s = server.cpu_s()
        measured = load(seconds)
        cpu_ms = 1000 * (server.cpu_s() - cpu_before_s) / max(1, measured.requests)
        return Measurement(start_s, server.memory_mib(), cpu_ms, measured)
    finally:
        server.stop()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--warm-seconds", type=float, default=3.0, help="of load before it")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="servers whose name holds this")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the results; .perch/benchmarks/serving by default")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.warm_seconds = 1, 2.0, 1.0
    return arguments


def _measure_all(arguments: argparse.Namespace, folder: Path, console: Console) -> tuple[Results, dict[str, str]]:
    settings = get_settings()
    params = load_params(settings.project_dir / "params.yaml")
    model = prepare_model(settings, params.model_name, folder)
    release = prepare_release(settings, model, folder)
    png = digit_png()
    label = _predict(model, png)
    plan = [(entry, True) for entry in contenders(model, release, png)]
    plan.append((perch(BOTH_CORES, release, raw_body(png), workers=0), False))
    chosen = [pair for pair in plan if not arguments.only or any(part in pair[0].name for part in arguments.only)]
    results: Results = {}
    for number in range(arguments.rounds):
        for contender, pinned in chosen:
            measured = measure(
                contender,
                folder,
                label=label,
                pinned=pinned,
                warm_s=arguments.warm_seconds,
                seconds=arguments.seconds,
                connections=arguments.connections,
            )
            results.setdefault(contender.name, []).append(measured)
            load = measured.load
            console.print(
                f"round {number + 1}  {contender.name:34}{load.requests_per_s:7.0f}/s   p50 {load.p50_ms:6.1f} ms   "
                f"p99 {load.p99_ms:6.1f} ms   errors {load.errors}   start {measured.start_s:4.1f} s",
                highlight=False,
            )
            time.sleep(SETTLE_S)
    return results, {contender.name: contender.payload.kind for contender, _ in chosen}


def _predict(model: BenchModel, png: bytes) -> str:
    """The label that every server must find."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))[None, :, :, None]
    probabilities = open_session(model.onnx, threads=1).run([PROBABILITIES_NAME], {INPUT_NAME: pixels})[0]
    return model.contract.labels[int(probabilities[0].argmax())]


if __name__ == "__main__":
    main()
