"""A real S3 server, and clients that are impatient with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import botocore.retries.standard
import pytest
from moto.server import ThreadedMotoServer

from pipelines.object_storage import transfers
from pipelines.services.stack import any_free_port

TIMEOUT_S = 1.0  # an answer without a fault takes some ms on an idle machine


@contextmanager
def serve_s3() -> Iterator[str]:
    """The address of one that is empty, for the block."""
    server = ThreadedMotoServer("127.0.0.1", port := any_free_port(), verbose=False)
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, a short timeout and no pauses, whatever the machine's own environment says."""
    settings = {"PERCH_S3_TIMEOUT_S": str(TIMEOUT_S), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "PERCH_S3_ENDPOINT_URL", "PERCH_S3_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    # The pauses between two attempts are libraries' and our own seconds.
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: 0.02)
    monkeypatch.setattr(transfers, "_LONGEST_PAUSE_S", 0.02)
