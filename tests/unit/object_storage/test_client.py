"""What a client is made of, without a store to ask."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.errors import Refusal
from pipelines.object_storage.client import connect, explained
from pipelines.object_storage.settings import S3Settings, read_s3_settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in S3Settings.model_fields:
        monkeypatch.delenv(f"PERCH_S3_{name.upper()}", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


def address(settings: S3Settings) -> str:
    """Scheme, host and path of an object's URL."""
    client = connect(settings)
    parts = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": "scans", "Key": "a/b"}))
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


@pytest.mark.parametrize(
    ("endpoint", "addressing", "url"),
    [
        ("http://s3.local:9000", "auto", "http://s3.local:9000/scans/a/b"),
        ("http://s3.local:9000", "path", "http://s3.local:9000/scans/a/b"),
        ("https://s3.local", "virtual", "https://scans.s3.local/a/b"),
        ("", "virtual", "https://scans.s3.eu-central-1.amazonaws.com/a/b"),
        ("", "auto", "https://scans.s3.amazonaws.com/a/b"),
        ("", "path", "https://s3.eu-central-1.amazonaws.com/scans/a/b"),
    ],
)
def test_connect__addressing_and_endpoint__make_the_url(endpoint: str, addressing: str, url: str) -> None:
    settings = S3Settings(endpoint_url=endpoint, addressing=addressing, region="eu-central-1")
    assert address(settings) == url


@pytest.mark.parametrize(
    ("given", "variables", "endpoint"),
    [
        ("http://a", {"PERCH_S3_ENDPOINT_URL": "http://b", "AWS_ENDPOINT_URL": "http://c"}, "http://a"),
        ("", {"PERCH_S3_ENDPOINT_URL": "http://b", "AWS_ENDPOINT_URL_S3": "http://c"}, "http://b"),
        ("", {"AWS_ENDPOINT_URL_S3": "http://c", "AWS_ENDPOINT_URL": "http://d"}, "http://c"),
        ("", {"AWS_ENDPOINT_URL": "http://d"}, "http://d"),
        ("", {}, ""),
    ],
)
def test_read_s3_settings__several_places_name_an_endpoint__the_nearest_counts(
    monkeypatch: pytest.MonkeyPatch, given: str, variables: dict[str, str], endpoint: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = read_s3_settings(given)
    assert settings.endpoint == endpoint
    if endpoint:
        assert address(settings) == f"{endpoint}/scans/a/b"  # in the path, whoever named it


def test_connect__bundle_is_missing_or_endpoint_no_url__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="PERCH_S3_CA_BUNDLE: there is no file"):
        connect(S3Settings(ca_bundle=tmp_path / "no.pem"))
    with pytest.raises(Refusal, match="PERCH_S3_ENDPOINT_URL: Invalid endpoint"):
        connect(S3Settings(endpoint_url="s3.local:9000 oops"))


def test_connect__no_such_region__names_the_region_and_not_the_endpoint() -> None:
    with pytest.raises(Refusal, match="region of S3: Provided region_name 'no region!'") as caught:
        connect(S3Settings(region="no region!"))
    assert "PERCH_S3_REGION" in caught.value.way_out


def test_explained__bucket_that_cannot_be__is_refused_and_not_asked_again() -> None:
    client = connect(S3Settings(region="eu-central-1"))
    with pytest.raises(Refusal, match="cannot be asked: ") as caught, explained("the source s3://My Scans/"):
        client.list_objects_v2(Bucket="My Scans")
    assert caught.value.thing == "the source s3://My Scans/"
    assert "Invalid bucket name" in caught.value.value


def test_explained__boto3_s_configuration_is_broken__is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("region = eu-central-1\n")  # below no section
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(Refusal, match="cannot be asked: Unable to parse config file"):
        connect(S3Settings())


def test_read_s3_settings__no_such_addressing__names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_S3_ADDRESSING", "dns")
    with pytest.raises(Refusal, match="PERCH_S3_ADDRESSING: value 'dns' should be"):
        read_s3_settings()


def test_connect__settings__bound_time_and_attempts() -> None:
    config = connect(S3Settings(timeout_s=3, attempts=2)).meta.config
    assert (config.connect_timeout, config.read_timeout) == (3, 3)
    assert config.retries == {"mode": "standard", "total_max_attempts": 2}
