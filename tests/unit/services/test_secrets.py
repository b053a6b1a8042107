"""Log-ins are made once, are all different, and only their owner can read them."""

from __future__ import annotations

import stat
from pathlib import Path

from pipelines.core.api_keys import editing, id_of, read_keys
from pipelines.core.scopes import Scope
from pipelines.services.secrets import (
    ROLES,
    api_keys_file,
    ensure_airflow_keys,
    ensure_demo_key,
    ensure_passwords,
    passwords_file,
)
from pipelines.settings import Settings


def test_ensure_passwords__called_twice__keeps_the_first(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home")
    first = ensure_passwords(settings)
    assert first.keys() == ROLES.keys()
    assert len(set(first.values())) == len(first)
    assert ensure_passwords(settings) == first
    assert stat.S_IMODE(passwords_file(settings).stat().st_mode) == 0o600


def test_ensure_airflow_keys__two_homes__differ(tmp_path: Path) -> None:
    keys = [ensure_airflow_keys(Settings(project_dir=tmp_path, home=tmp_path / name)) for name in ("a", "b")]
    assert all(keys[0][name] != keys[1][name] for name in keys[0])


def test_ensure_demo_key__called_twice_then_revoked__is_kept_then_replaced(tmp_path: Path) -> None:
    settings = Settings(project_dir=tmp_path, home=tmp_path / "home")
    key = ensure_demo_key(settings)
    assert ensure_demo_key(settings) == key
    (record,) = read_keys(api_keys_file(settings)).keys
    assert (record.id, record.name, set(record.scopes)) == (id_of(key), "demo", set(Scope))
    assert stat.S_IMODE((settings.home / "demo-api-key.json").stat().st_mode) == 0o600
    with editing(api_keys_file(settings)) as keys:
        keys.clear()
    assert ensure_demo_key(settings) != key
    assert len(read_keys(api_keys_file(settings)).keys) == 1
