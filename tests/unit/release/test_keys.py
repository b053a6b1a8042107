"""Keys that sign releases: made once, readable by their owner alone, never overwritten."""

import stat
from pathlib import Path

import pytest

from pipelines.core.release_signing import key_id
from pipelines.errors import Refusal
from pipelines.release.keys import create_key, list_keys, signing_key
from pipelines.settings import Settings


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return Settings(project_dir=tmp_path, home=tmp_path / "home")


def test_create_key__first__is_readable_by_its_owner_alone(home: Settings) -> None:
    pair = create_key(home)
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert stat.S_IMODE(pair.private.parent.stat().st_mode) == 0o700
    assert b"PRIVATE" not in pair.public.read_bytes()
    assert pair.key_id == key_id(pair.public)
    assert sorted(path.name for path in home.keys_dir.iterdir()) == ["release.pem", "release.pub"]


def test_create_key__same_name_again__is_refused_and_changes_nothing(home: Settings) -> None:
    pair = create_key(home)
    before = pair.private.read_bytes(), pair.public.read_bytes()
    with pytest.raises(Refusal, match="a key is never overwritten"):
        create_key(home)
    assert (pair.private.read_bytes(), pair.public.read_bytes()) == before
    assert sorted(path.name for path in home.keys_dir.iterdir()) == ["release.pem", "release.pub"]


def test_create_key__another_name__stands_beside_the_first(home: Settings) -> None:
    first, second = create_key(home), create_key(home, "2026.b")
    assert list_keys(home) == [second, first]
    assert signing_key(home) == (first, False)


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "a" * 65])
def test_create_key__name_that_no_file_should_have__is_refused(home: Settings, name: str) -> None:
    with pytest.raises(Refusal, match="the key's name"):
        create_key(home, name)
    assert not home.keys_dir.exists()


def test_list_keys__public_half_lost__is_written_again(home: Settings) -> None:
    """As after a kill between the two files."""
    pair = create_key(home)
    pair.public.unlink()
    assert list_keys(home) == [pair]
    assert signing_key(home) == (pair, False)


def test_signing_key__none_there__names_the_command_that_makes_one(home: Settings) -> None:
    with pytest.raises(Refusal, match="perch keys init"):
        signing_key(home)
    assert not home.keys_dir.exists()


def test_signing_key__asked_to_make_the_default__makes_it_once(home: Settings) -> None:
    pair, made = signing_key(home, make=True)
    assert made
    assert signing_key(home, make=True) == (pair, False)


def test_signing_key__named_and_missing__is_never_made(home: Settings, tmp_path: Path) -> None:
    named = home.model_copy(update={"signing_key": tmp_path / "vault" / "key.pem"})
    with pytest.raises(Refusal, match="does not exist"):
        signing_key(named, make=True)
    assert not home.keys_dir.exists()


def test_signing_key__named_alone_in_its_folder__gets_its_public_half_in_the_home(
    home: Settings, tmp_path: Path
) -> None:
    """A secret that is mounted comes without it, and its folder cannot be written."""
    pair = create_key(home.model_copy(update={"home": tmp_path / "elsewhere"}))
    vault = tmp_path / "vault"
    vault.mkdir()
    private = pair.private.rename(vault / "key.pem")
    found, made = signing_key(home.model_copy(update={"signing_key": private}))
    assert (found.key_id, made) == (pair.key_id, False)
    assert found.public.parent == home.keys_dir
    assert found.public.read_bytes() == pair.public.read_bytes()
    assert [path.name for path in vault.iterdir()] == ["key.pem"]


def test_signing_key__no_key_in_the_file__is_refused(home: Settings, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("nonsense")
    with pytest.raises(Refusal, match="cannot be read"):
        signing_key(home.model_copy(update={"signing_key": tmp_path / "key.pem"}))
