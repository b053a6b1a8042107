"""The entry of the service: what it says of a machine that does not take a sound release, and tells its server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER
from serving.__main__ import main, server_environment
from serving.settings import ServingSettings

CONTENT = b"a release"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A release and a trusted key."""
    release, key = tmp_path / f"{DIGEST}.bento", tmp_path / "release.pub"
    release.write_bytes(CONTENT)
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    key.write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return [str(release), "--public-key", str(key)]


def test_main__folder_that_cannot_be_made__says_nothing_against_the_release(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--fetch-only", str(tmp_path / "file" / "folder")])
    assert ended.value.code == EXIT_TRY_LATER
    said = capsys.readouterr().err
    assert said.startswith("failed: ")
    assert str(tmp_path / "file" / "folder") in said
    assert "what to do: " in said


def test_main__release_without_a_signature__is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--fetch-only", str(tmp_path / "folder")])
    assert ended.value.code == EXIT_REFUSED
    assert "has no signature" in capsys.readouterr().err


def test_server_environment__endpoint_of_the_service__is_for_s3_alone(tmp_path: Path) -> None:
    environment = server_environment(ServingSettings(s3_endpoint_url="http://minio:9000"), tmp_path)
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://minio:9000"
    # Credentials of a role come from another service, which is where it always was.
    assert environment.get("AWS_ENDPOINT_URL") == os.environ.get("AWS_ENDPOINT_URL")
