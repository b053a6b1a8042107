"""How many probes a step lacks, and that they are sent so: to a real server, marked, and never more."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.core.request_origins import PROBE_HEADER
from pipelines.errors import PerchError, Refusal
from pipelines.params import ModelReleaseParams
from pipelines.release.prober import ClientRate, Prober, ProbeSender, wanted_probes_per_s
from pipelines.release.rollout_state import RolloutState, StepReading
from pipelines.release.steps import SHADOW, Phase, Plan, Step
from pipelines.services.probing import _open_key
from pipelines.settings import Settings
from tests.integration.s3_fault_proxy import make_authority
from tests.unit.release.simulated_release import EPOCH, QUICK, Simulation, release

PARAMS = ModelReleaseParams(probe_requests_per_s=50)
IN_CANARY = RolloutState(
    "m:2:d:1", release(2), release(1), Plan(PARAMS), "scheduler", EPOCH, "5d" * 32, step=Step(Phase.CANARY, 10)
)
UNDER_WAY = 8  # one for each sender


class Server:
    """Notes what it is asked, and answers as told."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[float, str, str, bytes]] = []
        self.status, self.answers_after_s = 200, 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.asked.append((time.monotonic(), self.headers["X-API-Key"], self.headers[PROBE_HEADER], body))
                time.sleep(server.answers_after_s)
                self.send_response(server.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def wait_for(self, count: int) -> None:
        """Wait until it has been asked so often."""
        deadline = time.monotonic() + 30
        while len(self.asked) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


# How many


def test_wanted__no_clients__is_what_the_step_needs_within_its_shortest_time() -> None:
    assert wanted_probes_per_s(IN_CANARY, 0.0) == pytest.approx(2_942 / 0.1 / 600)
    assert wanted_probes_per_s(replace(IN_CANARY, step=SHADOW), 0.0) == pytest.approx(197 / 600)


def test_wanted__some_clients__is_what_they_lack() -> None:
    assert wanted_probes_per_s(IN_CANARY, 40.0) == pytest.approx(2_942 / 60 - 40)
    assert wanted_probes_per_s(IN_CANARY, 50.0) == 0


def test_wanted__a_step_without_a_shortest_time_or_a_small_share__is_never_more_than_is_allowed() -> None:
    hasty = replace(IN_CANARY, plan=Plan(PARAMS.model_copy(update={"min_step_s": 0})))
    assert wanted_probes_per_s(hasty, 0.0) == 50
    assert wanted_probes_per_s(replace(IN_CANARY, step=Step(Phase.CANARY, 1)), 0.0) == 50


@pytest.mark.parametrize(("verdict", "sends"), [("promote", False), ("need more data", True)])
def test_wanted__gates_have_enough__is_none(verdict: str, sends: bool) -> None:
    state = replace(IN_CANARY, reading=StepReading(verdict, (), ""))
    assert (wanted_probes_per_s(state, 0.0) > 0) is sends


def test_client_rate__clients_and_copies_of_theirs__are_counted_once(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    rollout = simulation.begin()
    simulation.answer()
    engine = simulation.engine()
    rate = ClientRate(simulation.clock)
    state = engine.advance(rollout.rollout_id)
    assert state.step == SHADOW
    assert rate.measure(simulation.target, state) is None
    simulation.tick(2, requests=100)
    assert rate.measure(simulation.target, state) == 50
    while state.step.phase is not Phase.CANARY:
        simulation.tick()
        state = engine.advance(rollout.rollout_id)
    assert rate.measure(simulation.target, state) is None, "another step counts from its own beginning"
    simulation.tick(1, requests=70)
    assert rate.measure(simulation.target, state) == 70


# Sending


def test_sender__a_rate__sends_the_images_in_turn_and_marked(server: Server) -> None:
    with ProbeSender(server.url, "the-key", [b"one", b"two", b"three"]) as sender:
        began = time.monotonic()
        sender.send(40)
        server.wait_for(40)
        sender.send(0)
        took_s = time.monotonic() - began
        time.sleep(0.2)
        count = len(server.asked)
        time.sleep(0.5)
        assert len(server.asked) - count <= UNDER_WAY, "sent after it was told to pause"
    assert count <= 40 * took_s + 1 + UNDER_WAY
    assert {(key, mark) for _, key, mark, _ in server.asked} == {("the-key", "1")}
    sent = [body for *_, body in server.asked]
    assert {sent.count(image) - len(sent) // 3 for image in (b"one", b"two", b"three")} <= {0, 1}


def test_sender__nobody_renews_its_rate__stops_by_itself(server: Server) -> None:
    with ProbeSender(server.url, "the-key", [b"one"], rate_holds_s=0.4) as sender:
        sender.send(50)
        server.wait_for(1)
        time.sleep(0.6)
        count = len(server.asked)
        time.sleep(0.5)
    assert len(server.asked) - count <= UNDER_WAY


def test_sender__answers_that_are_slow__are_not_made_up_for(server: Server) -> None:
    server.answers_after_s = 0.5
    with ProbeSender(server.url, "the-key", [b"one"]) as sender:
        sender.send(100)
        time.sleep(1.2)
        server.answers_after_s = 0.0
        time.sleep(0.5)
        began = time.monotonic()
        time.sleep(0.5)
    took_s = time.monotonic() - began
    assert len([moment for moment, *_ in server.asked if moment > began]) <= 100 * took_s + 20


def test_sender__nobody_listens__goes_on(server: Server) -> None:
    url = server.url
    with ProbeSender(url.replace("127.0.0.1", "127.0.0.2"), "the-key", [b"one"]) as sender:
        sender.send(50)
        time.sleep(0.3)
        assert not sender.is_refused


def test_sender__clients_come_by_https__does_too_and_trusts_whom_the_machine_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = make_authority(tmp_path)
    server = Server(tls)
    try:
        with ProbeSender(server.url, "the-key", [b"one"]) as sender:
            sender.send(50)
            time.sleep(0.3)
        assert server.asked == [], "sent to whom nobody vouches for"
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        with ProbeSender(server.url, "the-key", [b"one"]) as sender:
            sender.send(50)
            server.wait_for(5)
    finally:
        server.close()


@pytest.mark.parametrize("key", ["perch_key", ""])
def test_probing__on_a_cluster__takes_the_standing_key_and_writes_no_file(tmp_path: Path, key: str) -> None:
    settings = Settings(home=tmp_path, target="kubernetes", prober_api_key=key)
    if key:
        with _open_key(settings) as given:
            assert given == key
    else:
        with pytest.raises(Refusal, match="PERCH_PROBER_API_KEY"):
            _open_key(settings)
    assert list(tmp_path.iterdir()) == []


# Looking


class Probing:
    """A prober over a simulated release in the shadow, and a real server as the clients' door."""

    def __init__(self, folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipelines.release.prober._KEY_KNOWN_AFTER_S", 0.0)
        params = QUICK.model_copy(update={"probe_requests_per_s": 30})
        self.simulation = Simulation(folder, params=params)
        self.simulation.target.client_url = lambda: server.url
        self.rollout = self.simulation.begin()
        self.images: Sequence[bytes] = [b"one"]
        self.keys_open = 0
        self.prober = Prober(self.simulation.world(), self.find_images, self.open_key, self.simulation.clock)

    def find_images(self, state: RolloutState) -> Sequence[bytes]:
        if not self.images:
            raise Refusal("the images", "are gone")
        return self.images

    @contextmanager
    def open_key(self) -> Iterator[str]:
        self.keys_open += 1
        yield "the-key"
        self.keys_open -= 1

    def look(self, seconds: float = 1.0) -> float:
        self.simulation.tick(seconds, requests=0)
        return self.prober.look()

    def advance(self) -> RolloutState:
        return self.simulation.engine().advance(self.rollout.rollout_id)


@pytest.fixture
def probing(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probing]:
    probing = Probing(tmp_path, server, monkeypatch)
    yield probing
    probing.prober._rest()


def test_prober__release_that_waits_for_approval__sends_nothing(probing: Probing, server: Server) -> None:
    assert [probing.look(), probing.look()] == [0, 0]
    assert (probing.keys_open, server.asked) == (0, [])


def test_prober__release_without_clients__sends_until_it_is_over(probing: Probing, server: Server) -> None:
    probing.simulation.answer()
    probing.advance()
    assert [probing.look(), probing.look()] == [0, 30]  # the first look at a step knows no rate of clients yet
    assert probing.keys_open == 1
    server.wait_for(1)
    probing.simulation.target.behave(2, crashes=True)
    probing.simulation.tick()
    assert probing.advance().step.name == "rolled_back"
    assert probing.look() == 0
    assert probing.keys_open == 0


def test_prober__one_release_after_the_other_or_a_key_that_ages__gets_a_new_key(probing: Probing) -> None:
    probing.simulation.answer()
    probing.advance()
    probing.look()
    probing.look()
    first = probing.prober._session
    probing.look(1000)
    assert probing.prober._session is not first
    assert probing.keys_open == 1


def test_prober__no_images__says_so_and_sends_nothing(probing: Probing, server: Server) -> None:
    probing.images = []
    probing.simulation.answer()
    probing.advance()
    probing.look()
    with pytest.raises(Refusal, match="are gone"):
        probing.look()
    assert (probing.keys_open, server.asked) == (0, [])


@pytest.mark.parametrize("failure", [Refusal("the key", "is missing"), PermissionError("read-only")])
def test_prober__no_key_to_be_had__fetches_the_images_once_a_minute(probing: Probing, failure: Exception) -> None:
    fetched: list[str] = []

    def find_images(state: RolloutState) -> Sequence[bytes]:
        fetched.append(state.rollout_id)
        return [b"one"]

    def open_key() -> AbstractContextManager[str]:
        raise failure

    probing.prober._find_images, probing.prober._open_key = find_images, open_key
    probing.simulation.answer()
    probing.advance()
    probing.look()
    with pytest.raises(type(failure)):
        probing.look()
    for _ in range(3):
        with pytest.raises(PerchError):
            probing.look()
    assert len(fetched) == 1


def test_prober__nobody_at_the_clients_door__is_told_once(
    probing: Probing, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    door = server.url.replace("127.0.0.1", "127.0.0.2")
    probing.simulation.target.client_url = lambda: door
    probing.simulation.answer()
    probing.advance()
    probing.look()
    probing.look()
    deadline = time.monotonic() + 30
    while not probing.prober._session.sender.trouble:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for _ in range(3):
        probing.look()
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(f"probes get no answer: {door}: ConnectionRefusedError")


def test_prober__services_that_do_not_take_its_key__stops(probing: Probing, server: Server) -> None:
    server.status = 401
    probing.simulation.answer()
    probing.advance()
    probing.look()
    probing.look()
    deadline = time.monotonic() + 30
    while not probing.prober._session.sender.is_refused:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.2)
    assert 1 <= len(server.asked) <= UNDER_WAY, "more than were under way when the first was refused"
    with pytest.raises(Refusal, match="not taken"):
        probing.look()


def test_run__looks_that_fail__do_not_end_it_and_leave_no_key(
    probing: Probing, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    probing.simulation.answer()
    probing.advance()
    probing.look()
    probing.look()
    probing.simulation.target.observe = lambda slot: 1 / 0
    stop = threading.Event()
    thread = threading.Thread(target=probing.prober.run, args=(stop, 0.02))
    thread.start()
    deadline = time.monotonic() + 30
    while probing.keys_open:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert thread.is_alive()
    stop.set()
    thread.join()
    assert len([record for record in caplog.records if "no probes" in record.message]) == 1, "said once"
