"""Sends test images to a release's slots where clients send too few requests for its gates.

The requests go through the clients' door, divided and copied as clients' are, so that canary and stable slot get them
in the proportion in which they are compared.  They are marked, and counted apart from clients' (`slot_metrics`).

How many: as many per second as clients lack for the step to have its evidence by when it may end at the earliest, and
never more than `model_release.probe_requests_per_s`.  Once the gates say promote, none.

A prober decides nothing and is trusted with nothing.  One that is dead, slow or without images means less evidence, and
a step without evidence ends in a rollback.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Self
from urllib.parse import urlsplit

from pipelines.core.request_origins import PROBE_HEADER
from pipelines.core.rollout_forecast import probes_per_s
from pipelines.errors import PerchError, Refusal
from pipelines.release.engine import PROMOTE
from pipelines.release.gates import likely_requests
from pipelines.release.rollout_state import RolloutState, from_document
from pipelines.release.staging import KEY_LIFE
from pipelines.release.steps import Phase
from pipelines.release.targets import ReleaseTarget, Slot
from pipelines.release.world import World

INTERVAL_S = 2.0
_RENEW_AFTER_S = KEY_LIFE.total_seconds() / 2
_KEY_KNOWN_AFTER_S = 2.5  # services look for new keys once a second
_RATE_OVER_S = 10.0
_SENDERS = 8
_ANSWER_LIMIT_S = 30.0
_RETRY_S = 60.0
_KEY_ADVICE = (
    "PERCH_SERVING_API_KEYS_FILE must name one file for the services and the watchdog; on a cluster the services' "
    "Secret must hold PERCH_PROBER_API_KEY"
)
_log = logging.getLogger(__name__)


class Prober:
    """Looks again and again whether a release lacks requests.

    Args:
        world: where rollouts and slots are looked at; nothing in it is changed.
        find_images: the encoded images for a release.
        open_key: an API key of the prober, valid for the context.
        clock: seconds that never jump.
    """

    def __init__(
        self,
        world: World,
        find_images: Callable[[RolloutState], Sequence[bytes]],
        open_key: Callable[[], AbstractContextManager[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world, self._find_images, self._open_key, self._clock = world, find_images, open_key, clock
        self._session: _Session | None = None
        self._clients = ClientRate(clock)
        self._not_before = 0.0
        self._said = ""

    def run(self, stop: threading.Event, interval_s: float = INTERVAL_S) -> None:
        """Look once per interval until told to stop; no failure of a look ends it, each only stops the probes."""
        try:
            while not stop.wait(interval_s):
                try:
                    self.look()
                    self._said = ""
                except Exception as error:  # noqa: BLE001 - what fails here must cost evidence and nothing else
                    self._rest()
                    if str(error) != self._said:
                        self._said = str(error)
                        _log.log(
                            logging.WARNING if isinstance(error, PerchError) else logging.ERROR,
                            "no probes: %s",
                            error,
                            exc_info=not isinstance(error, PerchError),
                        )
        finally:
            self._rest()

    def look(self) -> float:
        """Look once.

        Returns:
            Probes per second from now on.

        Raises:
            TryLater: database, target or artifact store does not answer.
            Refusal: there are no images for the release.
        """
        state = self._find_rollout()
        if state is None:
            self._rest()
            return 0.0
        clients = self._clients.measure(self._world.target, state)
        rate = 0.0 if clients is None else wanted_probes_per_s(state, clients)
        if rate > 0 or self._session is not None:
            session = self._require_session(state)
            sender = session.sender
            if sender.trouble and not session.is_trouble_told:
                session.is_trouble_told = True
                _log.warning("probes get no answer: %s", sender.trouble)
            if sender.is_refused:
                self._not_before = self._clock() + _RETRY_S
                raise Refusal("the prober's API key", "is not taken by the services", way_out=_KEY_ADVICE)
            sender.send(rate)
        return rate

    def _find_rollout(self) -> RolloutState | None:
        for row in self._world.glance.list_current():
            if row.is_open:
                state = from_document(row.document)
                if state.plan.params.probe_requests_per_s > 0 and state.settled and state.step.is_watched:
                    return state
        return None

    def _require_session(self, state: RolloutState) -> _Session:
        session, now = self._session, self._clock()
        if session and (session.rollout_id != state.rollout_id or now - session.began > _RENEW_AFTER_S):
            self._rest()
            session = None
        if session is None:
            if now < self._not_before:
                raise PerchError(self._said)
            try:
                images = self._find_images(state)
                url = self._world.target.client_url()
                session = self._session = _Session(state.rollout_id, now, url, images, self._open_key)
            except Exception:  # whatever it was: the images may come from far away, and are not fetched at each look
                self._not_before = now + _RETRY_S
                raise
            _log.info("probing for %s with %d images", state.rollout_id, len(images))
        return session

    def _rest(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def wanted_probes_per_s(state: RolloutState, clients_per_s: float) -> float:
    """What the prober adds in a step that is watched, by what the gates have said of it and what clients send.

    Args:
        state: of the rollout.
        clients_per_s: requests per second of clients, to all slots.
    """
    if state.reading is not None and state.reading.verdict == PROMOTE:
        return 0.0
    params, step = state.plan.params, state.step
    return probes_per_s(
        likely_requests(state.plan, step),
        1.0 if step.phase is Phase.SHADOW else step.percent / 100,
        requests_per_s=clients_per_s,
        within_s=params.min_step_s,
        max_probes_per_s=params.probe_requests_per_s,
    )


class ClientRate:
    """How many requests clients send in a step, over the last seconds.

    Args:
        clock: seconds that never jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key: tuple[object, ...] = ()
        self._samples: deque[tuple[float, int]] = deque()

    def measure(self, target: ReleaseTarget, state: RolloutState) -> float | None:
        """Requests per second to all slots together; None at the first look at a step."""
        stable, canary = target.observe(Slot.STABLE), target.observe(Slot.CANARY)
        # In the shadow the canary counts copies of what the stable slot counts.
        counted = [stable, canary] if state.step.phase is Phase.CANARY else [stable]
        key = (state.rollout_id, state.step, *(seen.started_at if seen else None for seen in counted))
        if key != self._key:
            self._key = key
            self._samples.clear()
        now = self._clock()
        self._samples.append((now, sum(seen.requests for seen in counted if seen)))
        while now - self._samples[0][0] > _RATE_OVER_S:
            self._samples.popleft()
        (began, first), (_, last) = self._samples[0], self._samples[-1]
        return max(0, last - first) / (now - began) if now > began else None


class _Session:
    """One release's probes: a key of its own, and whoever sends with it."""

    def __init__(
        self,
        rollout_id: str,
        began: float,
        url: str,
        images: Sequence[bytes],
        open_key: Callable[[], AbstractContextManager[str]],
    ) -> None:
        self.rollout_id, self.began = rollout_id, began
        self.is_trouble_told = False
        with contextlib.ExitStack() as opened:
            key = opened.enter_context(open_key())
            # Another order for each release, the same whenever it begins anew.
            shuffled = random.Random(rollout_id).sample(images, len(images))  # noqa: S311 - no secret
            self.sender = opened.enter_context(ProbeSender(url, key, shuffled, begin_after_s=_KEY_KNOWN_AFTER_S))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """End the sending, then the key."""
        self._opened.close()


class ProbeSender:
    """Sends images in turn, evenly over time, for as long as the context lasts.

    A rate holds for some seconds: whoever sets it and dies or hangs leaves no probes behind.  What could not be sent in
    time, because the answers are slow, is not made up for.

    Attributes:
        is_refused: whether a service does not take the key; nothing more is sent then, as it would count as a
            client's error.
        trouble: why a probe got no answer at all; empty while each gets one.

    Args:
        url: the clients' door.
        key: API key of the prober.
        images: encoded.
        begin_after_s: seconds until the first one.
        rate_holds_s: seconds for which a rate holds.
    """

    def __init__(
        self, url: str, key: str, images: Sequence[bytes], *, begin_after_s: float = 0.0, rate_holds_s: float = 10.0
    ) -> None:
        self._door = urlsplit(url)
        self._headers = {"X-API-Key": key, PROBE_HEADER: "1"}
        self._images: Iterator[bytes] = itertools.cycle(images)
        self._rate_holds_s = rate_holds_s
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._rate, self._until = 0.0, 0.0
        self.is_refused = False
        self.trouble = ""
        self._next = time.monotonic() + begin_after_s
        self._threads = [threading.Thread(target=self._send, daemon=True, name="probe") for _ in range(_SENDERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        deadline = time.monotonic() + _ANSWER_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def send(self, per_s: float) -> None:
        """Send so many per second, for now; 0 pauses."""
        with self._lock:
            self._rate, self._until = per_s, time.monotonic() + self._rate_holds_s

    def _send(self) -> None:
        kind = http.client.HTTPSConnection if self._door.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._door.netloc, timeout=_ANSWER_LIMIT_S)
        while not self._ended.is_set():
            wait_s, image = self._take_turn()
            if image is None:
                self._ended.wait(wait_s)
                continue
            try:
                connection.request("POST", "/v1/predict", image, self._headers)
                response = connection.getresponse()
                response.read()
                # What else it says, the slot has counted.
                self.is_refused |= response.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN)
            except (OSError, http.client.HTTPException) as error:
                self.trouble = f"{self._door.geturl()}: {error!r}"
                connection.close()
        connection.close()

    def _take_turn(self) -> tuple[float, bytes | None]:
        """The image that is due, or none and how long to wait."""
        with self._lock:
            now = time.monotonic()
            if self._rate <= 0 or now > self._until or self.is_refused:
                return 0.1, None
            if self._next > now:
                return min(self._next - now, 0.1), None
            self._next = max(self._next, now - 1 / self._rate) + 1 / self._rate
            return 0.0, next(self._images)
