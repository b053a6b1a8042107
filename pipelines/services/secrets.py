"""Passwords and keys of the services on this machine: made once, kept in files that only their owner reads."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path

from pipelines.settings import Settings

ROLES = {"admin": "admin", "scientist": "op", "approver": "user"}  # user name to Airflow's simple-auth role


def passwords_file(settings: Settings) -> Path:
    """Airflow's log-ins, as JSON from user name to password."""
    return settings.home / "passwords.json"


def ensure_passwords(settings: Settings) -> dict[str, str]:
    """The log-ins of the web page, made at the first call."""
    return _ensure(passwords_file(settings), {name: secrets.token_urlsafe(9) for name in ROLES})


def ensure_airflow_keys(settings: Settings) -> dict[str, str]:
    """The keys that Airflow's processes must share, as environment variables."""
    return _ensure(
        settings.home / "airflow" / "keys.json",
        {
            "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(32),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(48),
        },
    )


def _ensure(file: Path, fresh: dict[str, str]) -> dict[str, str]:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(json.dumps(fresh, indent=2) + "\n", encoding="utf-8")
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return known
