"""What training needs is missed when a run opens, not when its images have been read."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.errors import Refusal, TryLater
from pipelines.modeling.preconditions import (
    check_checkpoint,
    check_training_preconditions,
    find_checkpoint_folder,
    refuse_missing_gpu,
)
from pipelines.params import HuggingFaceParams, ModelTrainingParams
from pipelines.settings import get_settings


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


@pytest.fixture
def hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that has known/model and nothing else, in place of the hub; the paths it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            codes = {"known": 200, "broken": 503}
            self.send_response(codes.get(self.path.split("/")[1], 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_refuse_missing_gpu__no_drivers_device__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="accelerator gpu: this machine has no GPU"):
        refuse_missing_gpu((tmp_path / "nvidiactl",))
    (tmp_path / "nvidiactl").touch()
    refuse_missing_gpu((tmp_path / "nvidiactl",))


@pytest.mark.usefixtures("project")
def test_check_training_preconditions__in_kubernetes__leaves_it_to_the_pod_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = ModelTrainingParams(network="huggingface", huggingface=HuggingFaceParams(checkpoint="../x"))
    with pytest.raises(Refusal, match="neither a local folder nor a name on the hub"):
        check_training_preconditions(params)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    check_training_preconditions(params)


def test_check_checkpoint__relative_folder__starts_at_the_project(project: Path, hub: list[str]) -> None:
    (project / "models" / "b4").mkdir(parents=True)
    assert find_checkpoint_folder("models/b4") == project / "models" / "b4"
    with pytest.raises(Refusal, match=r"holds no config\.json"):
        check_checkpoint(HuggingFaceParams(checkpoint="models/b4"))
    (project / "models" / "b4" / "config.json").write_text("{}")
    check_checkpoint(HuggingFaceParams(checkpoint="models/b4"))
    assert hub == []


def test_check_checkpoint__name_on_the_hub__is_asked_for_there(hub: list[str]) -> None:
    check_checkpoint(HuggingFaceParams(checkpoint="known/model"))
    assert hub == ["/known/model/resolve/main/config.json"]
    with pytest.raises(Refusal, match="the hub answers 404"):
        check_checkpoint(HuggingFaceParams(checkpoint="unknown/model"))
    with pytest.raises(TryLater, match="503"):
        check_checkpoint(HuggingFaceParams(checkpoint="broken/model"))


@pytest.mark.parametrize("checkpoint", ["vit", "google/efficientnet-b4"])
def test_check_checkpoint__architecture_with_random_weights__needs_no_hub(hub: list[str], checkpoint: str) -> None:
    check_checkpoint(HuggingFaceParams(checkpoint=checkpoint, pretrained=False))
    assert hub == []


@pytest.mark.usefixtures("project")
def test_check_checkpoint__hub_away__may_work_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(TryLater, match="the hub cannot be reached"):
        check_checkpoint(HuggingFaceParams(checkpoint="some/model"))
