"""What carries a run between machines, against a real S3 server behind a proxy that fails: 503, slow, cut off, TLS."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import yaml

from pipelines.errors import TryLater
from pipelines.runs import run_store
from pipelines.runs.run_store import Lease, RunStore
from pipelines.runs.sharing import SharedRun
from pipelines.runs.stages import dvc_command, run_tool
from pipelines.runs.workspaces import open_workspace
from pipelines.settings import Settings
from tests.integration.s3_fault_proxy import Fault, FaultProxy, make_authority
from tests.integration.s3_server import TIMEOUT_S, make_impatient

pytestmark = pytest.mark.services

PROJECT = Path(__file__).parents[2]
BUCKET = "perch"
LARGE = 2_500_000
SLOW = pytest.param("slow", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)


@pytest.fixture
def proxy(s3_server: str, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """All of it over TLS of a private authority."""
    authority, tls = make_authority(tmp_path)
    monkeypatch.setenv("PERCH_S3_CA_BUNDLE", str(authority))
    proxy = FaultProxy(s3_server, tls, slow_s=2 * TIMEOUT_S)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(s3_server: str) -> Any:
    """An empty bucket, asked without the proxy."""
    bucket: Any = boto3.resource("s3", endpoint_url=s3_server).Bucket(BUCKET)
    bucket.create()
    bucket.objects.all().delete()
    return bucket


@pytest.fixture
def store(proxy: FaultProxy) -> RunStore:
    return RunStore(Settings(runs_url=f"s3://{BUCKET}/team", s3_endpoint_url=proxy.url), "r")


@pytest.mark.parametrize("fault", ["503", "reset", SLOW, "unanswered", "truncated", "damaged"])
def test_store__fails_twice_at_each_request__has_every_byte_once(
    store: RunStore, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    content, file, copy = np.random.default_rng(1).bytes(LARGE), tmp_path / "a.ckpt", tmp_path / "copy"
    file.write_bytes(content)

    def failing(methods: str, call: Callable[[], Any]) -> Any:
        proxy.set(fault, 2, methods)
        answer = call()
        assert proxy.left == 0 or not content_is_answered(methods, fault)
        return answer

    tag = failing("PUT", lambda: store.put("progress.tar", b"first", replaces=None))
    tag = failing("PUT", lambda: store.put("progress.tar", content, replaces=tag))
    for methods in ("HEAD", "GET"):
        found = failing(methods, lambda: store.read("progress.tar"))
        assert (found.content, found.tag) == (content, tag)
    failing("PUT", lambda: store.upload("checkpoints/a.ckpt", file))
    failing("GET", lambda: store.download("checkpoints/a.ckpt", copy))
    assert copy.read_bytes() == content
    assert failing("GET", lambda: store.names("checkpoints/")) == ["checkpoints/a.ckpt"]
    failing("DELETE", lambda: store.remove("checkpoints/a.ckpt"))
    proxy.set("503", 0)
    assert store.names("checkpoints/") == []


def content_is_answered(methods: str, fault: Fault) -> bool:
    """Whether there is a body to damage in what these requests are answered."""
    return methods == "GET" or fault not in {"truncated", "damaged"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "reset", "unanswered"])
def test_lease__store_fails_while_it_is_held__is_neither_lost_nor_held_twice(
    store: RunStore, s3_server: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(run_store, "_LOOKS_PER_LEASE", 8)
    direct = RunStore(Settings(runs_url=f"s3://{BUCKET}/team", s3_endpoint_url=s3_server), "r")
    with Lease(store, "pod a", lease_s=4).held(wait_s=0):
        proxy.set(fault, 6)  # more than one renewal tries
        deadline = time.monotonic() + 5.2
        while time.monotonic() < deadline:
            found = direct.read("lease.json")
            assert found is not None
            assert json.loads(found.content)["holder"] == "pod a"
            with pytest.raises(TryLater, match="worked on by pod a"):
                Lease(direct, "pod b", lease_s=4)._take(wait_s=0)
            time.sleep(0.2)
        assert proxy.left == 0
    with Lease(direct, "pod b", lease_s=4).held(wait_s=0):
        proxy.set(fault, 2)
        with pytest.raises(TryLater, match="worked on by pod b"):
            Lease(store, "pod a", lease_s=4)._take(wait_s=0)


class Machine:
    """A folder that stands for a pod's disk, with a run that makes one large file of a small one."""

    def __init__(self, folder: Path, name: str, endpoint: str) -> None:
        self.project = folder / "project"
        self.settings = Settings(
            project_dir=self.project, home=folder / name, runs_url=f"s3://{BUCKET}/runs", s3_endpoint_url=endpoint
        )
        self.shared = SharedRun(self.settings, "r")
        self.large = self.shared.workspace.root / "large" / "numbers"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.large.read_bytes()).hexdigest()

    def fetch(self) -> None:
        """As a step after the stage does."""
        with self.shared.lease("reading"):
            self.shared.fetch()
            self.shared.fetch_inputs("model_packaging_of_tests")

    def assert_nothing_damaged(self, digest: str) -> None:
        """What is there of the output, here or in the cache, is what it was."""
        if self.large.is_file():
            assert self.digest == digest
        for file in self.settings.dvc_cache_dir.rglob("files/md5/*/*"):
            found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
            assert (file.parent.name + file.name).removesuffix(".dir") == found


@pytest.fixture
def machine(tmp_path: Path, proxy: FaultProxy) -> Callable[[str], Machine]:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("params.yaml", "expectations"):
        (project / name).symlink_to(PROJECT / name)
    command = f"mkdir large && head -c {LARGE} /dev/urandom > large/numbers"
    tree = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
    tree["stages"]["numbers"] = {"cmd": command, "outs": ["large"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump(tree))
    return lambda name: Machine(tmp_path, name, proxy.url)


def share_numbers(here: Machine) -> None:
    """What a step does when its stage has ended."""
    with here.shared.lease("numbers"):
        here.shared.share("numbers", outputs=True)


@pytest.fixture
def made(machine: Callable[[str], Machine]) -> Machine:
    """A machine on which the stage has ended, and that has shared nothing of it yet."""
    here = machine("a")
    workspace = open_workspace(here.settings, "r", {})
    here.shared.share_opened()
    run_tool(dvc_command("repro", "--quiet", "--single-item", "numbers"), workspace, here.settings)
    return here


@pytest.mark.slow
def test_remote__object_is_damaged_in_the_store__is_not_believed_and_fetched_once_it_is_mended(
    made: Machine, machine: Callable[[str], Machine], bucket: Any
) -> None:
    share_numbers(made)
    (key,) = [entry.key for entry in bucket.objects.filter(Prefix="runs/dvc/files") if entry.size == LARGE]
    content = bucket.Object(key).get()["Body"].read()
    bucket.Object(key).put(Body=content[:-1] + bytes([content[-1] ^ 1]))
    other = machine("b")
    with pytest.raises(TryLater, match="dvc pull"):
        other.fetch()
    other.assert_nothing_damaged(made.digest)
    bucket.Object(key).put(Body=content)
    other.fetch()
    assert other.digest == made.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "times"),
    [
        *((fault, 2) for fault in ("503", "reset", "slow", "unanswered", "truncated", "damaged")),
        *((fault, 10**6) for fault in ("503", "truncated", "damaged")),  # until it is mended
    ],
)
def test_shared_run__store_fails__is_whole_or_tried_later(
    made: Machine, machine: Callable[[str], Machine], proxy: FaultProxy, bucket: Any, fault: Fault, times: int
) -> None:
    other, digest = machine("b"), made.digest

    def try_until_mended(step: Callable[[], None]) -> None:
        proxy.set(fault, times)
        try:
            step()
        except TryLater:
            other.assert_nothing_damaged(digest)
            proxy.set(fault, 0)
            bucket.Object("runs/runs/r/lease.json").delete()  # one that could not be given back ends by itself
            step()
        proxy.set(fault, 0)

    try_until_mended(lambda: share_numbers(made))
    try_until_mended(other.fetch)
    assert other.digest == digest
    other.assert_nothing_damaged(digest)
