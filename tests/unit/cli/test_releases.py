"""`perch package` and `perch keys`, on a real registry, ledger and BentoML."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.core.release_signing import key_id
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.registration import register
from pipelines.settings import Settings, get_settings

MakeRun = Callable[..., Workspace]


def perch(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_package__registered_version__prints_what_a_server_needs_and_models_show_it(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run())
    assert "no release yet; `perch package 1` makes it" in perch("models", "show", "1")
    perch("keys", "init")
    output = perch("package", "v1")
    digest = re.search(r"[0-9a-f]{64}", output)
    assert digest is not None
    assert f"python -m serving {registry_settings.releases_dir}/{digest[0]}.bento" in output
    assert "row 2 of the ledger" in output
    assert digest[0][:12] in perch("models")
    assert f"release {digest[0]}" in perch("models", "show", "1")
    assert "packaged" in perch("ledger")
    assert perch("package", "1") == output
    assert "✓ 2 rows, chain intact, MLflow agrees" in perch("ledger", "verify")


@pytest.mark.parametrize("version", ["seven", "", "-1", "1.5"])
def test_package__no_number__is_refused(registry_settings: Settings, version: str) -> None:
    with pytest.raises(Refusal, match="the version"):
        perch("package", "--", version)


def test_keys__from_none_to_two__lists_which_one_signs(
    registry_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = registry_settings.keys_dir
    assert "There is no key yet; `perch keys init` makes one." in perch("keys")
    first = perch("keys", "init")
    assert f"key {key_id(folder / 'release.pub')}" in first
    assert "PRIVATE" not in first
    second = perch("keys", "init", "--name", "2026-b")
    assert f"sign with it: PERCH_SIGNING_KEY={folder / '2026-b.pem'}" in second
    assert signer(perch("keys")) == key_id(folder / "release.pub")
    monkeypatch.setenv("PERCH_SIGNING_KEY", str(folder / "2026-b.pem"))
    get_settings.cache_clear()
    assert signer(perch("keys")) == key_id(folder / "2026-b.pub")


def test_keys__signing_key_that_is_missing__is_said_beside_those_there_are(
    registry_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    perch("keys", "init")
    monkeypatch.setenv("PERCH_SIGNING_KEY", str(tmp_path / "absent.pem"))
    get_settings.cache_clear()
    output = perch("keys")
    assert "absent.pem does not exist" in output
    assert key_id(registry_settings.keys_dir / "release.pub") in output
    assert "signs" not in output


def signer(table: str) -> str:
    (row,) = [line.split() for line in table.splitlines() if " signs " in line]
    return row[0]
