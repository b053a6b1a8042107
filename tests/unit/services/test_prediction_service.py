import json
import sys

import pytest

from pipelines.errors import Refusal
from pipelines.registry.ledger import Event, Ledger
from pipelines.services.prediction_service import find_packaged_version, require_packaged_version, serving_command
from pipelines.services.secrets import api_keys_file
from pipelines.settings import Settings

MODEL = "shapes-classification"


@pytest.fixture
def ledger(registry_settings: Settings) -> Ledger:
    return Ledger(registry_settings.ledger_url)


def record(ledger: Ledger, event: Event, version: int, digest: str = "") -> None:
    evidence = {"release_sha256": digest} if digest else {}
    ledger.append(event, model=MODEL, version=str(version), evidence=evidence, key=f"{event}:{version}:{digest}")


def test_find_packaged_version__nothing_packaged__is_none(registry_settings: Settings) -> None:
    assert find_packaged_version(registry_settings, MODEL) is None


def test_find_packaged_version__before_any_promotion__is_the_latest_release_of_the_latest_version(
    registry_settings: Settings, ledger: Ledger
) -> None:
    for version, digest in ((1, "a" * 64), (2, "b" * 64), (2, "c" * 64), (1, "d" * 64)):
        record(ledger, "packaged", version, digest)
    record(ledger, "registered", 3)
    found = find_packaged_version(registry_settings, MODEL)
    assert found is not None
    assert (found.version, found.digest) == (2, "c" * 64)


def test_find_packaged_version__after_a_promotion__is_the_champion(registry_settings: Settings, ledger: Ledger) -> None:
    record(ledger, "packaged", 1, "a" * 64)
    record(ledger, "promoted", 1)
    record(ledger, "packaged", 2, "b" * 64)
    found = find_packaged_version(registry_settings, MODEL)
    assert found is not None
    assert found.version == 1


def test_find_packaged_version__promoted_then_rolled_back__is_the_one_before_by_its_own_release(
    registry_settings: Settings, ledger: Ledger
) -> None:
    def happen(event: Event, version: int, **evidence: str | None) -> None:
        ledger.append(event, model=MODEL, version=str(version), evidence=evidence, key=f"{event}:{version}:{evidence}")

    for version, digest in ((1, "a" * 64), (2, "b" * 64)):
        happen("packaged", version, release_sha256=digest)
        happen("promoted", version, release_sha256=digest, champion=str(version), previous=None)
    happen("packaged", 1, release_sha256="c" * 64)
    happen("rolled_back", 2, champion="1", previous=None)
    found = find_packaged_version(registry_settings, MODEL)
    assert found is not None
    assert (found.version, found.digest) == (1, "a" * 64)


def test_require_packaged_version__version_without_a_release__names_the_command(
    registry_settings: Settings, ledger: Ledger
) -> None:
    record(ledger, "packaged", 1, "a" * 64)
    with pytest.raises(Refusal, match="perch package 2"):
        require_packaged_version(registry_settings, MODEL, 2)
    with pytest.raises(Refusal, match="has no packaged version"):
        require_packaged_version(registry_settings, "other-model")


def test_serving_command__for_this_machine__serves_the_digest_with_the_homes_keys(
    registry_settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(ledger, "packaged", 1, "a" * 64)
    monkeypatch.setenv("PERCH_SERVING_HOST", "0.0.0.0")
    command, environment = serving_command(registry_settings, require_packaged_version(registry_settings, MODEL))
    assert command[:3] == [sys.executable, "-m", "serving"]
    assert command[3].endswith("a" * 64 + ".bento")
    assert environment["PERCH_SERVING_HOST"] == "0.0.0.0"  # what is set stays
    assert environment["PERCH_SERVING_API_KEYS_FILE"] == str(api_keys_file(registry_settings))
    assert [key["name"] for key in json.loads(api_keys_file(registry_settings).read_text())["keys"]] == ["demo"]
