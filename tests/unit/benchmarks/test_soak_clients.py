import asyncio
import csv
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.soak_clients import (
    BROKEN,
    COLUMNS,
    SLOW_KINDS,
    Clients,
    Journal,
    Kind,
    SlowClients,
    bomb,
    prediction_ids,
)
from pipelines.core.image_decoding import DecodingError, Reason, decode_image

KEYS = {"good": "good", "slow": "slow", "wrong": "wrong"}
PNG = Kind("PNG", 1, "/v1/predict", frozenset({200}), lambda: (b"image", {"Content-Type": "image/png"}))
NOBODY = "http://127.0.0.1:1"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/predict", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def answer(request: web.Request) -> web.Response:
    assert request.headers["X-API-Key"] == "good"
    await request.read()
    return web.json_response({"prediction_id": request.headers["X-Request-ID"].upper()})


async def open_loop(folder: Path, addresses: list[str], rate_per_s: float, seconds: float) -> None:
    """An open loop of one kind of request."""
    journal = Journal(folder)
    clients = Clients(addresses, KEYS, journal, max_body_bytes=100)
    clients.kinds = [PNG]
    async with clients.open():
        await clients.open_loop(rate_per_s, journal.now() + seconds)
    journal.close()


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: list(csv.DictReader((folder / f"{name}.csv").open())) for name in COLUMNS}


def test_open_loop__a_server_that_stalls__is_asked_on_time_and_the_wait_is_counted(tmp_path: Path) -> None:
    async def run() -> dict[str, list[dict[str, Any]]]:
        stalled = asyncio.Event()

        async def stall_then_answer(request: web.Request) -> web.Response:
            asyncio.get_running_loop().call_later(0.3, stalled.set)
            await stalled.wait()
            return await answer(request)

        async with serve(stall_then_answer) as address:
            await open_loop(tmp_path, [address], 100, 0.4)
        return read(tmp_path)

    found = asyncio.run(run())
    due = [float(row["due_s"]) for row in found["requests"]]
    assert len(due) == 40
    assert max(due) - min(due) < 0.4
    latencies = sorted(float(row["latency_ms"]) for row in found["requests"])
    assert 250 < latencies[-1] < 30_000
    assert latencies[0] < latencies[-1] / 1.5  # the last ones came when the stall was over
    assert len({row["prediction_id"] for row in found["predictions"]}) == 40


def test_open_loop__nobody_listens_at_the_first_address__the_second_is_asked(tmp_path: Path) -> None:
    async def run() -> None:
        async with serve(answer) as address:
            await open_loop(tmp_path, [NOBODY, address], 50, 0.1)

    asyncio.run(run())
    found = read(tmp_path)
    assert {row["status"] for row in found["requests"]} == {"200"}
    assert found["broken"] == []


def test_open_loop__a_connection_breaks__is_written_down_and_tried_again_under_another_id(tmp_path: Path) -> None:
    seen: list[str] = []

    async def break_the_first(request: web.Request) -> web.Response:
        seen.append(request.headers["X-Request-ID"])
        if len(seen) == 1:
            assert request.transport is not None
            request.transport.abort()
        return await answer(request)

    async def run() -> None:
        async with serve(break_the_first) as address:
            await open_loop(tmp_path, [address], 50, 0.02)

    asyncio.run(run())
    found = read(tmp_path)
    assert [row["request_id"] for row in found["broken"]] == seen[:1]
    assert [(row["status"], row["request_id"]) for row in found["requests"]] == [("200", seen[1])]


def test_closed_loop__clients_that_wait__give_the_capacity(tmp_path: Path) -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return await answer(request)

    async def run() -> float:
        journal = Journal(tmp_path)
        async with serve(slow) as address:
            clients = Clients([address], KEYS, journal, max_body_bytes=100)
            clients.kinds = [PNG]
            async with clients.open():
                return await clients.closed_loop(4, 0.5)

    assert 4 < asyncio.run(run()) <= 80


def test_slow_clients__a_patient_server__all_get_what_they_may(tmp_path: Path) -> None:
    """A plain server has no limit of time, so those who wait for one are left out."""
    quick = {"dribbled body", "late reader", "vanishes"}

    async def run() -> None:
        journal = Journal(tmp_path)
        async with serve(answer) as address:
            clients = Clients([address], {**KEYS, "good": "good"}, journal, max_body_bytes=100)
            slow = SlowClients(clients, "good", journal, [kind for kind in SLOW_KINDS if kind.name in quick], 0.05)
            await slow.run(journal.now() + 0.1)
        journal.close()

    asyncio.run(run())
    found = read(tmp_path)
    outcomes = {(row["kind"], row["status"]) for row in found["requests"]}
    assert outcomes == {("dribbled body", "200"), ("late reader", "200"), ("vanishes", "0")}
    assert len(found["predictions"]) == sum(row["status"] == "200" for row in found["requests"])
    assert found["broken"] == []


def test_slow_clients__the_server_goes_away__is_written_down(tmp_path: Path) -> None:
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def run() -> None:
        journal = Journal(tmp_path)
        async with serve(hang_up) as address:
            clients = Clients([address], KEYS, journal, max_body_bytes=100)
            late = [kind for kind in SLOW_KINDS if kind.name == "late reader"]
            await SlowClients(clients, "good", journal, late, 0.05).run(journal.now() + 0.1)
        journal.close()

    asyncio.run(run())
    found = read(tmp_path)
    assert {row["status"] for row in found["requests"]} == {str(BROKEN)}
    assert len(found["broken"]) == len(found["requests"])


def test_prediction_ids__a_batch_with_a_broken_image__gives_the_others() -> None:
    body = {"results": [{"index": 0, "prediction_id": "a"}, {"index": 1, "problem": {}}]}
    assert list(prediction_ids(json.dumps(body).encode())) == ["a"]


def test_bomb__as_the_decoder_sees_it__has_too_many_pixels() -> None:
    data = bomb()
    assert len(data) < 1000
    with pytest.raises(DecodingError, match=str(Reason.TOO_MANY_PIXELS)):
        decode_image(data, max_pixels=25_000_000, max_bytes=10_000_000)
