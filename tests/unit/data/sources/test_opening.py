import pytest

from pipelines.data.sources.digits import DigitsSource
from pipelines.data.sources.folder import FolderSource
from pipelines.data.sources.opening import open_source, without_secrets
from pipelines.data.sources.table import TableSource
from pipelines.errors import Refusal
from pipelines.params import DataIngestionParams
from pipelines.settings import Settings


def opened(tmp_path, source: str):
    return open_source(DataIngestionParams(source=source), Settings(project_dir=tmp_path, home=tmp_path / "home"))


def test_open_source__each_kind__opens_what_it_names(tmp_path, monkeypatch):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans.csv").write_text("path,label\n")
    monkeypatch.chdir("/")  # a run's own folder is not the project's
    assert isinstance(opened(tmp_path, "digits"), DigitsSource)
    assert isinstance(opened(tmp_path, "scans"), FolderSource)
    assert isinstance(opened(tmp_path, str(tmp_path / "scans")), FolderSource)
    assert isinstance(opened(tmp_path, "scans.csv"), TableSource)


def test_open_source__folder_called_digits__wants_a_path(tmp_path):
    (tmp_path / "digits").mkdir()
    assert isinstance(opened(tmp_path, "./digits"), FolderSource)


@pytest.mark.parametrize(
    "source", ["nowhere", "scans.xlsx", "ftp://example.org/scans.npz", "https://example.org/scans"]
)
def test_open_source__nothing_that_is_read__is_refused_with_what_is(tmp_path, source):
    (tmp_path / "scans.xlsx").write_bytes(b"x")
    with pytest.raises(Refusal, match=r"npz") as caught:
        opened(tmp_path, source)
    assert "data_ingestion.source" in str(caught.value)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://user:word@example.org/a.npz?X-Signature=abc#f", "https://example.org/a.npz"),
        ("s3://bucket/scans/", "s3://bucket/scans/"),
        ("scans", "scans"),
    ],
)
def test_without_secrets__address__loses_user_and_query(location, expected):
    assert without_secrets(location) == expected
