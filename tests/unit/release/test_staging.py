"""The parts of staging that need no service; `tests/integration/test_staging.py` tries them with one."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.core.api_keys import ApiKeyFile, editing, new_key, read_keys, write_keys
from pipelines.core.image_limits import ImageLimits
from pipelines.core.scopes import Scope
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal, TryLater
from pipelines.release import smoke_tests, staging
from pipelines.release.kubernetes_target import KubernetesTarget
from pipelines.release.local_plan import Deployment
from pipelines.release.smoke_tests import Expected, GoldenImage, run_smoke_tests
from pipelines.release.staging import CALLER, SharedSlot, stage_release, temporary_key
from pipelines.release.targets import ReleaseRef, Slot, SlotCounters
from pipelines.settings import Settings
from pipelines.stages.deploy_to_staging import _open_place, choose_golden
from tests.unit.release.simulated_release import Clock, SimulatedTarget

RELEASE = ReleaseRef("shapes", "3", "9b1e" * 16, "/releases/9b1e.bento")


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Expected:
    monkeypatch.setattr(smoke_tests, "_COUNTED_WITHIN_S", 0.0)
    return Expected(
        manifest={"version": "3"},
        labels=("circle", "square"),
        digest=RELEASE.digest,
        golden=[GoldenImage("a.png", b"bytes of an image", (0.25, 0.75))],
        max_probability_difference=1e-4,
        latency_requests=20,
        max_p95_ms=500,
        max_body_bytes=1000,
    )


@pytest.fixture
def odd_service() -> Iterator[str]:
    """Answers everything with 200 and an object that nobody expects."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = b'{"probabilities": {"circle": NaN, "square": 0.75}, "results": []}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_smoke_tests__nobody_answers__all_twelve_fail_and_say_so(expected: Expected) -> None:
    tests = run_smoke_tests("http://127.0.0.1:9", "key", expected, lambda: None)
    assert len(tests) == len({test.name for test in tests}) == 12
    assert not any(test.passed for test in tests)
    assert "ConnectError" in tests[0].as_line()


def test_smoke_tests__service_that_says_yes_to_everything__fails_all_but_its_speed(
    expected: Expected, odd_service: str
) -> None:
    tests = {test.name: test for test in run_smoke_tests(odd_service, "key", expected, lambda: None)}
    assert {name for name, test in tests.items() if test.passed} <= {"latency"}
    assert tests["contract"].value == "version None instead of 3"
    assert tests["golden probabilities"].value == "largest difference nan on 1 images"
    assert tests["golden batch"].value == "1 of 1 images refused"
    assert tests["no key"].value == "200 an answer"


class Place:
    """A staging slot that notes what was done to it."""

    def __init__(self, *, refuse: Exception | None = None) -> None:
        self.done: list[str] = []
        self._refuse = refuse

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        assert (slot, release) == (Slot.STAGING, RELEASE)
        self.done.append("deploy")

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        self.done.append(f"wait {timeout_s:g}")
        if self._refuse:
            raise self._refuse

    def observe(self, slot: Slot) -> SlotCounters | None:
        return None

    def remove(self, slot: Slot) -> None:
        self.done.append("remove")

    def slot_url(self, slot: Slot) -> str:
        return "http://127.0.0.1:9"


def test_stage_release__service_that_ends__is_removed_and_reported_as_the_one_failure(
    expected: Expected, tmp_path: Path
) -> None:
    place = Place(refuse=Refusal("the service", "ended: no such model"))
    open_key = partial(temporary_key, tmp_path / "keys.json")
    report = stage_release(place, RELEASE, expected, open_key=open_key, ready_timeout_s=7)
    assert [test.as_line() for test in report.failed] == [
        "start: ended: no such model (limit: a service that takes requests)"
    ]
    assert report.as_tree()["passed"] is False
    assert place.done == ["deploy", "wait 7", "remove"]


@pytest.mark.parametrize("refuse", [None, TryLater("not ready in time")])
def test_stage_release__however_it_ends__leaves_neither_service_nor_key(
    expected: Expected, tmp_path: Path, refuse: Exception | None
) -> None:
    place, keys = Place(refuse=refuse), tmp_path / "keys.json"
    try:
        report = stage_release(place, RELEASE, expected, open_key=partial(temporary_key, keys), ready_timeout_s=7)
        assert len(report.failed) == 12
    except TryLater:
        assert refuse is not None
    assert place.done[-1] == "remove"
    assert read_keys(keys).keys == ()


def test_shared_slot__another_run_in_it__is_waited_for_then_taken_for_left_over_and_never_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "_LOOK_AGAIN_S", 0.01)
    target, other = SimulatedTarget(Clock()), replace(RELEASE, version="4", digest="44" * 32)
    SharedSlot(target, 60).remove(Slot.STAGING)  # nothing there
    first, second = SharedSlot(target, 60), SharedSlot(target, 0.2)
    first.deploy(Slot.STAGING, RELEASE)
    first.deploy(Slot.STAGING, RELEASE)  # again, after a kill
    began = time.monotonic()
    second.deploy(Slot.STAGING, other)
    assert time.monotonic() - began > 0.2
    assert target.state().slots[Slot.STAGING] == other
    with pytest.raises(TryLater, match="shapes v4 there meanwhile"):
        first.remove(Slot.STAGING)
    assert target.state().slots[Slot.STAGING] == other
    second.remove(Slot.STAGING)
    assert Slot.STAGING not in target.state().slots


def test_shared_slot__another_run_has_come_and_gone_meanwhile__is_to_be_tried_later_and_no_verdict(
    expected: Expected,
) -> None:
    target = SimulatedTarget(Clock())
    first, second = SharedSlot(target, 0), SharedSlot(target, 0)

    def deploy(slot: Slot, release: ReleaseRef) -> None:
        SharedSlot.deploy(first, slot, release)
        second.deploy(slot, replace(RELEASE, version="4", digest="44" * 32))
        second.remove(slot)

    first.deploy = deploy  # type: ignore[method-assign]
    with pytest.raises(TryLater, match="another run has emptied it meanwhile"):
        stage_release(first, RELEASE, expected, open_key=partial(nullcontext, "key"), ready_timeout_s=1)


def test_shared_slot__nobody_knows_what_the_service_counts__is_to_be_tried_later_and_no_verdict(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(staging, "_SEEN_LIMIT_S", 0.1)
    target = SimulatedTarget(Clock())
    monkeypatch.setattr(target, "observe", lambda slot: None)
    with pytest.raises(TryLater, match="Prometheus"):
        stage_release(SharedSlot(target, 1), RELEASE, expected, open_key=partial(nullcontext, "key"), ready_timeout_s=1)
    assert Slot.STAGING not in target.state().slots


@pytest.mark.parametrize("is_evicted", [True, False])
def test_shared_slot__smoke_tests_failed__is_no_verdict_where_the_pod_was_ended_meanwhile(
    expected: Expected, monkeypatch: pytest.MonkeyPatch, is_evicted: bool
) -> None:
    target = SimulatedTarget(Clock())
    slot_url = target.slot_url

    def evict(slot: Slot) -> str:  # after the service was ready and known
        target.evictions += is_evicted
        return slot_url(slot)

    monkeypatch.setattr(target, "slot_url", evict)
    place = SharedSlot(target, 1)
    if is_evicted:
        with pytest.raises(TryLater, match="1 of 1 pods were ended while it was asked"):
            stage_release(place, RELEASE, expected, open_key=partial(nullcontext, "key"), ready_timeout_s=1)
    else:  # the same answers of a pod that stayed: a release that ends at each request gives them, too
        report = stage_release(place, RELEASE, expected, open_key=partial(nullcontext, "key"), ready_timeout_s=1)
        assert "contract" in {test.name for test in report.failed}
    assert Slot.STAGING not in target.state().slots


def test_pod_uids__pods_of_the_slots_release__are_those_that_were_not_told_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pod(uid: str, digest: str = RELEASE.digest, phase: str = "Running", **metadata: str) -> dict[str, object]:
        labels, annotations = {"perch/server": "staging"}, {"perch/release-digest": digest}
        return {
            "metadata": {"uid": uid, "labels": labels, "annotations": annotations, **metadata},
            "status": {"phase": phase},
        }

    target = KubernetesTarget(Settings(home=tmp_path, target="kubernetes"))
    pods = [
        pod("well"),
        pod("put out by its node", phase="Failed"),
        pod("drained", deletionTimestamp="2026-11-22T00:00:00Z"),
        pod("of another release", "00" * 32),
    ]
    monkeypatch.setattr(target, "_pods", lambda: pods)
    monkeypatch.setattr(target, "_deployment", lambda slot: Deployment(RELEASE, "serving-staging", 0))
    assert target.pod_uids(Slot.STAGING) == {"well", "put out by its node"}


def test_deploy_to_staging__release_target_is_a_cluster__takes_its_slot_and_a_standing_key(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, target="kubernetes", staging_api_key="perch_key")
    with _open_place(settings) as (place, open_key):
        assert isinstance(place, SharedSlot)
        assert isinstance(place._target, KubernetesTarget)
        with open_key() as key:
            assert key == "perch_key"
    assert list(tmp_path.iterdir()) == []
    without = settings.model_copy(update={"staging_api_key": ""})
    with pytest.raises(Refusal, match="PERCH_STAGING_API_KEY"), _open_place(without):
        pass


def test_smoke_tests__service_asked_before_by_a_try_that_was_killed__counts_what_is_new(
    expected: Expected, odd_service: str
) -> None:
    asked = iter(range(7, 10**6))

    def observe() -> SlotCounters:
        return SlotCounters(0.0, 0.0, 7 if next(asked) == 7 else 29, 1, 0, {0.5: 20}, {"circle": 1})

    tests = {test.name: test for test in run_smoke_tests(odd_service, "key", expected, observe)}
    assert tests["counters"].value == "22 requests (20 timed), 0 errors, 0 crashes"


def test_temporary_key__beside_other_keys__comes_and_goes_alone_and_sweeps_up_old_ones(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    past = datetime.now(UTC) - timedelta(minutes=1)
    _, client = new_key("client", (Scope.PREDICT,), rate_per_s=10)
    _, left = new_key(CALLER, (Scope.PREDICT,), rate_per_s=10, expires=past)
    write_keys(file, ApiKeyFile(keys=(client, left)))
    with temporary_key(file), editing(file) as keys:
        assert [key.name for key in keys] == ["client", CALLER]
        assert set(keys[1].scopes) == {Scope.PREDICT, Scope.MODEL}
        assert keys[1].expires is not None
    assert read_keys(file).keys == (client,)


def test_golden_images__some_too_large_for_the_service__are_spread_over_the_others(
    make_run: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, count = make_run(), 50
    keys = [f"{number:02d}.png" for number in range(count)]
    sizes = {"n_bytes": [2000 if number < 10 else 10 for number in range(count)]}
    sizes |= {"width_px": [8] * count, "height_px": [8 if number < 40 else 80 for number in range(count)]}
    pq.write_table(pa.table({"key": keys, **sizes}), workspace.splits / "images.parquet")
    columns = {"key": keys, "p_0": [number / 100 for number in range(count)], "p_1": [0.5] * count}
    pq.write_table(pa.table(columns), workspace.evaluation / "predictions.parquet")
    monkeypatch.setattr("pipelines.data.shards.read_images", lambda _, wanted: {key: key.encode() for key in wanted})
    limits = ImageLimits(max_body_bytes=1000, max_pixels=100)
    golden = choose_golden(workspace, 2, 4, limits)
    assert [image.key for image in golden] == ["10.png", "20.png", "29.png", "39.png"]
    assert golden[0].probabilities == (0.1, 0.5)
    assert len(choose_golden(workspace, 2, 100, limits)) == 30
    few = choose_golden(workspace, 2, 100, limits, most_bytes=75)
    assert (few[0].key, few[-1].key, len(few)) == ("10.png", "39.png", 7)
    with pytest.raises(Refusal, match="no image among 50"):
        choose_golden(workspace, 2, 4, ImageLimits(max_body_bytes=5, max_pixels=100))
