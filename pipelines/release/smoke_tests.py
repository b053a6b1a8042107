"""What a freshly started service must show before anybody is asked to approve it: twelve tests over its HTTP API.

They see the service as clients do, through `/v1`, and as the gates of a rollout will, through its counters.  Each says
what was found and what would have been accepted, whether or not it passed.
"""

from __future__ import annotations

import http.client
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.release.targets import SlotCounters

if TYPE_CHECKING:
    import httpx

_BATCH_IMAGES, _BATCH_BYTES = 8, 2**24
# A worker's counters reach the endpoint a moment after its answers; on a cluster Prometheus looks at it every 5 s.
_COUNTED_WITHIN_S = 15.0


@dataclass(frozen=True)
class GoldenImage:
    """An image of the test split with what the model answered offline.

    Attributes:
        key: names it in the data set.
        data: its encoded bytes, as they were ingested.
        probabilities: float32 values, one per label, as the evaluation kept them.
    """

    key: str
    data: bytes
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Expected:
    """What is held against the service.

    Attributes:
        manifest: members that `/v1/model` must have.
        labels: in the order of the probabilities.
        digest: SHA-256 of the release.
        golden: at least one image.
        max_probability_difference: of a served probability from the offline one.
        latency_requests: how many are timed.
        max_p95_ms: of these.
        max_body_bytes: of one image, by the service's settings.
    """

    manifest: Mapping[str, Any]
    labels: Sequence[str]
    digest: str
    golden: Sequence[GoldenImage]
    max_probability_difference: float
    latency_requests: int
    max_p95_ms: float
    max_body_bytes: int


@dataclass(frozen=True)
class SmokeTest:
    """One test's outcome.

    Attributes:
        name: what was tested.
        passed: whether the value is within the limit.
        value: what was found.
        limit: what is accepted.
    """

    name: str
    passed: bool
    value: str
    limit: str

    def as_line(self) -> str:
        """E.g. `latency: p95 612 ms (limit: below 500 ms)`."""
        return f"{self.name}: {self.value} (limit: {self.limit})"

    def as_tree(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run_smoke_tests(
    url: str, key: str, expected: Expected, observe: Callable[[], SlotCounters | None]
) -> list[SmokeTest]:
    """Ask a service that says that it is ready.

    Args:
        url: of the service itself, past any division of traffic.
        key: an API key with the scopes `predict` and `model`.
        expected: what is held against it.
        observe: what the service has counted so far; None when it cannot be asked.

    Returns:
        All twelve, in a fixed order; one that could not be asked has failed.
    """
    import httpx

    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=30) as client:
        # A try that was killed may have asked the same service before.
        asked = _Asked(client, expected, _until(observe, lambda found: found is not None))
        tests = [
            ("contract", asked.contract),
            ("golden labels", asked.golden_labels),
            ("golden probabilities", asked.golden_probabilities),
            ("golden batch", asked.golden_batch),
            ("empty body", lambda: asked.refusal(b"", "bad-request")),
            ("truncated image", lambda: asked.refusal(_truncated_png(), "unreadable-image")),
            ("not an image", lambda: asked.refusal(b"This is a letter, not a picture.\n" * 8, "unsupported-media")),
            ("too large", asked.too_large),
            ("no key", asked.no_key),
            ("latency", asked.latency),
            ("release served", lambda: _release_served(url, expected.digest, observe)),
            ("counters", lambda: _counters(asked, observe)),
        ]
        return [_run(name, test) for name, test in tests]


Finding = tuple[bool, str, str]  # passed, value, limit


def _run(name: str, test: Callable[[], Finding]) -> SmokeTest:
    import httpx

    try:
        return SmokeTest(name, *test())
    except (httpx.HTTPError, http.client.HTTPException, OSError, LookupError, TypeError, ValueError) as error:
        return SmokeTest(name, passed=False, value=f"{type(error).__name__}: {error}", limit="an answer as documented")


class _Asked:
    """Asks the service, and remembers how many predictions it must have counted."""

    def __init__(self, client: httpx.Client, expected: Expected, before: SlotCounters | None) -> None:
        self._client, self._expected, self.before = client, expected, before
        self._answers: list[list[float] | None] | None = None
        self.predictions = 0

    def contract(self) -> Finding:
        served = self._client.get("/v1/model").raise_for_status().json()
        wrong = [
            f"{name} {_short(served.get(name))} instead of {_short(value)}"
            for name, value in self._expected.manifest.items()
            if served.get(name) != value
        ]
        count = len(self._expected.manifest)
        return not wrong, "; ".join(wrong) or f"{count} of {count} members as registered", "the registered model"

    def golden_labels(self) -> Finding:
        right = 0
        for image, answer in zip(self._expected.golden, self._golden(), strict=True):
            right += answer is not None and int(np.argmax(answer)) == int(np.argmax(image.probabilities))
        count = len(self._expected.golden)
        return right == count, f"{right} of {count} as offline", f"{count} of {count}"

    def golden_probabilities(self) -> Finding:
        return self._differ(self._expected.golden, self._golden())

    def golden_batch(self) -> Finding:
        some = self._expected.golden[:_BATCH_IMAGES]
        while len(some) > 1 and sum(len(image.data) for image in some) > _BATCH_BYTES:
            some = some[:-1]
        files = [("image", (f"{number}", image.data)) for number, image in enumerate(some)]
        body = self._client.post("/v1/predict/batch", files=files).raise_for_status().json()
        self.predictions += 1  # a batch counts as one request
        answers = [self._row(item) if "probabilities" in item else None for item in body["results"]]
        return self._differ(some, answers)

    def refusal(self, data: bytes, slug: str) -> Finding:
        response = self._client.post("/v1/predict", content=data)
        return _is_problem(response.status_code, response.content, slug)

    def too_large(self) -> Finding:
        """Announce a body that is too large, and send none of it: the announcement alone must be refused."""
        address = self._client.base_url
        connection = http.client.HTTPConnection(address.host, address.port, timeout=30)
        try:
            connection.putrequest("POST", "/v1/predict")
            for name, value in (
                ("X-API-Key", self._client.headers["X-API-Key"]),
                ("Content-Length", str(self._expected.max_body_bytes + 1)),
            ):
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            return _is_problem(response.status, response.read(), "too-large")
        finally:
            connection.close()

    def no_key(self) -> Finding:
        request = self._client.build_request("POST", "/v1/predict", content=self._expected.golden[0].data)
        del request.headers["X-API-Key"]
        response = self._client.send(request)
        return _is_problem(response.status_code, response.content, "unauthorized")

    def latency(self) -> Finding:
        golden, durations = self._expected.golden, []
        for number in range(self._expected.latency_requests):
            data = golden[number % len(golden)].data
            started = time.perf_counter()
            response = self._client.post("/v1/predict", content=data)
            durations.append(time.perf_counter() - started)
            response.raise_for_status()
            self.predictions += 1
        p95_ms = 1000 * float(np.quantile(durations, 0.95))
        limit_ms = self._expected.max_p95_ms
        return p95_ms < limit_ms, f"p95 {p95_ms:.1f} ms over {len(durations)} requests", f"below {limit_ms:g} ms"

    def _golden(self) -> list[list[float] | None]:
        """One answer per golden image; None where the service refused it."""
        if self._answers is None:
            answers: list[list[float] | None] = []
            for image in self._expected.golden:
                response = self._client.post("/v1/predict", content=image.data)
                answered = response.status_code == 200
                self.predictions += answered
                answers.append(self._row(response.json()) if answered else None)
            self._answers = answers
        return self._answers

    def _row(self, answer: Mapping[str, Any]) -> list[float]:
        return [float(answer["probabilities"][label]) for label in self._expected.labels]

    def _differ(self, images: Sequence[GoldenImage], answers: Sequence[list[float] | None]) -> Finding:
        limit = self._expected.max_probability_difference
        served = [answer for answer in answers if answer is not None]
        if len(served) != len(images):
            return False, f"{len(images) - len(served)} of {len(images)} images refused", "none"
        offline = np.array([image.probabilities for image in images])
        largest = float(np.abs(offline - np.array(served)).max())
        # A number that is none must not pass, whichever way it compares.
        return largest <= limit, f"largest difference {largest:.2g} on {len(images)} images", f"at most {limit:g}"


def _release_served(url: str, digest: str, observe: Callable[[], SlotCounters | None]) -> Finding:
    """`observe` asks for the digest among the metrics, and has no answer for another release."""
    counters = _until(observe, lambda found: found is not None)
    if counters is None:
        return False, f"the metrics of {url} do not name it", f"release {digest[:12]}, verified before it was loaded"
    return True, f"release {digest[:12]}", "the signed one, verified before it was loaded"


def _counters(asked: _Asked, observe: Callable[[], SlotCounters | None]) -> Finding:
    before = asked.before
    already = before.requests if before else 0
    counters = _until(observe, lambda found: found is not None and found.requests - already >= asked.predictions)
    limit = f"{asked.predictions} requests, no error, no crash"
    if counters is None:
        return False, "none can be read", limit
    timed = max(counters.latency_buckets.values(), default=0)
    requests, errors = counters.requests - already, counters.errors - (before.errors if before else 0)
    good = requests == asked.predictions and not errors and not counters.crashes
    return (
        good and timed > 0 and sum(counters.labels.values()) > 0,
        f"{requests} requests ({timed} timed), {errors} errors, {counters.crashes} crashes",
        limit,
    )


def _until(
    observe: Callable[[], SlotCounters | None], enough: Callable[[SlotCounters | None], bool]
) -> SlotCounters | None:
    deadline = time.monotonic() + _COUNTED_WITHIN_S
    found = observe()
    while not enough(found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = observe()
    return found


def _is_problem(status: int, body: bytes, slug: str) -> Finding:
    kind = json.loads(body).get("type", "no type") if status >= 400 else "an answer"
    return kind == f"urn:perch:{slug}", f"{status} {kind}", f"urn:perch:{slug}"


def _truncated_png() -> bytes:
    """The first half of a picture, its header whole."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()[: stream.tell() // 2]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}…"
