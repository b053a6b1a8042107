"""A run's folder in a bucket of an S3-speaking server: what is replaced, by whom, and whose turn it is."""

from __future__ import annotations

import json
import threading
import time

import pytest

from pipelines.errors import Refusal, TryLater
from pipelines.runs import run_store
from pipelines.runs.run_store import Conflict, Lease, RunStore
from pipelines.settings import Settings


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunStore:
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    settings = Settings(runs_url="s3://perch/team", s3_endpoint_url=endpoint)
    return RunStore(settings, request.node.name.replace("[", "-").replace("]", ""))


def test_store__object_put_once__is_put_by_one_alone(store: RunStore) -> None:
    tag = store.put("opened.tar", b"mine", replaces=None)
    with pytest.raises(Conflict):
        store.put("opened.tar", b"theirs", replaces=None)
    found = store.read("opened.tar")
    assert found is not None
    assert (found.content, found.tag) == (b"mine", tag)


def test_store__object_replaced_by_another_meanwhile__is_not_overwritten(store: RunStore) -> None:
    first = store.put("progress.tar", b"one", replaces=None)
    store.put("progress.tar", b"two", replaces=first)
    with pytest.raises(Conflict):
        store.put("progress.tar", b"three, by who knows only one", replaces=first)
    with pytest.raises(Conflict):
        store.put("never-there.tar", b"", replaces=first)


def test_store__answer_to_a_write_lost__is_taken_for_put_when_sent_again(store: RunStore) -> None:
    tag = store.put("progress.tar", b"one", replaces=None)
    assert store.put("progress.tar", b"one", replaces=None) == tag


def test_store__names_and_files__are_the_runs_own(store: RunStore, tmp_path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"weights")
    store.upload("checkpoints/a.ckpt", tmp_path / "a.ckpt")
    store.download("checkpoints/a.ckpt", tmp_path / "b.ckpt")
    assert (tmp_path / "b.ckpt").read_bytes() == b"weights"
    assert store.names("checkpoints/") == ["checkpoints/a.ckpt"]
    store.remove("checkpoints/a.ckpt")
    assert store.names("checkpoints/") == []
    assert store.read("checkpoints/a.ckpt") is None
    assert store.age_s("checkpoints/a.ckpt") == float("inf")


def test_store__with_conditional_writes__is_accepted_twice(store: RunStore) -> None:
    store.refuse_without_conditions()
    store.refuse_without_conditions()


def test_store__that_ignores_conditions__is_refused(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "put", lambda name, content, replaces: store.replace(name, content) or "tag")
        with pytest.raises(Refusal, match="conditional writes"):
            store.refuse_without_conditions()
    store.refuse_without_conditions()  # a newer version of it, which the refusal asks for, is believed


@pytest.mark.parametrize("url", ["/mnt/runs", "s3:///runs", "https://example.org/runs"])
def test_store__address_of_no_bucket__is_refused(url: str) -> None:
    with pytest.raises(Refusal, match="PERCH_RUNS_URL"):
        RunStore(Settings(runs_url=url), "run")


def test_store__no_server__may_be_tried_later(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")  # seconds pass between two
    away = RunStore(Settings(runs_url="s3://perch", s3_endpoint_url="http://127.0.0.1:9"), "run")
    with pytest.raises(TryLater, match="cannot be reached"):
        away.read("opened.tar")


def test_store__no_such_bucket__is_refused(store: RunStore, endpoint: str) -> None:
    with pytest.raises(Refusal, match="NoSuchBucket"):
        RunStore(Settings(runs_url="s3://nowhere", s3_endpoint_url=endpoint), "run").put("a", b"", replaces=None)


def test_lease__held__is_waited_for_and_then_said_to_be(store: RunStore) -> None:
    with Lease(store, "pod a").held(wait_s=0), pytest.raises(TryLater, match="worked on by pod a"):
        Lease(store, "pod b")._take(wait_s=0)


def test_lease__given_back__is_taken_at_once(store: RunStore) -> None:
    with Lease(store, "pod a").held(wait_s=0):
        pass
    with Lease(store, "pod b").held(wait_s=0):
        found = store.read("lease.json")
        assert found is not None
        assert json.loads(found.content)["holder"] == "pod b"


def test_lease__of_a_killed_holder__is_taken_once_it_has_ended(store: RunStore) -> None:
    started = time.monotonic()
    Lease(store, "pod a", lease_s=2)._take(wait_s=0)  # and never renewed
    with Lease(store, "pod b", lease_s=2).held(wait_s=30):
        assert time.monotonic() - started >= 0.9  # the store's clock has whole seconds


def test_lease__renewed__outlives_its_seconds(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_store, "_LOOKS_PER_LEASE", 8)  # in time on a busy machine, too
    with Lease(store, "pod a", lease_s=3).held(wait_s=0):
        time.sleep(4.2)
        with pytest.raises(TryLater, match="pod a"):
            Lease(store, "pod b", lease_s=3)._take(wait_s=0)


def test_lease__taken_by_another_while_held_up__is_not_taken_back(store: RunStore) -> None:
    held_up = Lease(store, "pod a", lease_s=1)
    held_up._take(wait_s=0)
    time.sleep(2.1)
    with Lease(store, "pod b", lease_s=1).held(wait_s=5):
        over = threading.Event()
        held_up._renew(over)  # returns, as it is lost
        found = store.read("lease.json")
        assert found is not None
        assert json.loads(found.content)["holder"] == "pod b"


class LosesAnswers:
    """A store that does what it is told, and of which no answer arrives while the network is away."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self.is_lost = threading.Event()
        self.lost = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put(self, name: str, content: bytes, *, replaces: str | None) -> str:
        tag = self._store.put(name, content, replaces=replaces)
        if self.is_lost.is_set():
            self.lost += 1
            raise TryLater("no answer")
        return tag


def test_lease__answer_to_a_renewal_lost__is_renewed_further_and_given_back(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "_LOOKS_PER_LEASE", 8)
    losing = LosesAnswers(store)
    with Lease(losing, "pod a", lease_s=3).held(wait_s=0):  # type: ignore[arg-type]
        losing.is_lost.set()
        while not losing.lost:
            time.sleep(0.05)
        losing.is_lost.clear()
        time.sleep(4.2)
        with pytest.raises(TryLater, match="pod a"):
            Lease(store, "pod b", lease_s=3)._take(wait_s=0)
    Lease(store, "pod b", lease_s=3)._take(wait_s=0)
