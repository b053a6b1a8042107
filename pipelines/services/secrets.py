"""Passwords and keys of the services on this machine: made once, kept in files that only their owner reads."""

from __future__ import annotations

import base64
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path

from pipelines.core.api_keys import DEFAULT_FILE_NAME, digest_of, editing, id_of, new_key
from pipelines.core.scopes import Scope
from pipelines.settings import Settings

ROLES = {"admin": "admin", "scientist": "op", "approver": "user"}  # user name to Airflow's simple-auth role


def passwords_file(settings: Settings) -> Path:
    """Airflow's log-ins, as JSON from user name to password."""
    return settings.require_home() / "passwords.json"


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


def api_keys_file(settings: Settings) -> Path:
    """The hashes of the API keys that the prediction service of this machine takes."""
    return settings.require_home() / DEFAULT_FILE_NAME


def ensure_demo_key(settings: Settings) -> str:
    """An API key named `demo` for the prediction service of this machine, made at the first call.

    It may do everything, and unlike other keys it is kept, beside the passwords: the demo prints it in its examples.
    A revoked or expired one is replaced.
    """
    file = settings.require_home() / "demo-api-key.json"
    with editing(api_keys_file(settings)) as keys:
        kept = _read_demo_key(file)
        record = next((key for key in keys if key.id == id_of(kept)), None)
        if record and record.sha256 == digest_of(kept).hex() and not record.expired(datetime.now(UTC)):
            return kept
        fresh, record = new_key("demo", tuple(Scope), rate_per_s=1000.0)
        file.unlink(missing_ok=True)
        _ensure(file, {"demo": fresh})
        keys.append(record)
    return fresh


def _read_demo_key(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["demo"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return ""


def _ensure(file: Path, fresh: dict[str, str]) -> dict[str, str]:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(json.dumps(fresh, indent=2) + "\n", encoding="utf-8")
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return known
