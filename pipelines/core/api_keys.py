"""API keys: how they look, and the file that keeps what the service must know of them, never the keys themselves.

A key is `perch_<id>_<secret>`: the prefix lets scanners for leaked secrets find it, the id (8 characters) names it in
lists and logs, and the secret is 256 random bits in base 62.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import string
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.core.scopes import Scope
from pipelines.errors import Refusal

DEFAULT_FILE_NAME = "api-keys.json"  # in PERCH_HOME
PREFIX = "perch_"
ID_LENGTH = 8
SECRET_LENGTH = 43  # the fewest digits of base 62 that hold 256 bits: 43 log2(62) = 256.03
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SMALLEST_DEFAULT_BURST = 64  # a full batch of the default size goes through at once


class ApiKey(BaseModel):
    """What is kept of one key.

    Attributes:
        id: 8 letters and digits, part of the key itself; not secret.
        name: whose key it is; several keys may share a name while one replaces the other.
        sha256: hex digest of the whole key.
        scopes: what it may do.
        rate_per_s: images (or other requests) per second that it may ask for.
        burst: how many of them at once.
        created: when it was made.
        expires: from when on it is refused; None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=rf"^[0-9A-Za-z]{{{ID_LENGTH}}}$")]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    rate_per_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    burst: Annotated[int, Field(ge=1, le=10_000_000)]
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether it is refused at `now`."""
        return self.expires is not None and now >= self.expires


class ApiKeyFile(BaseModel):
    """All keys of a service, as they lie in its JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _each_id_once(self) -> ApiKeyFile:
        if len({key.id for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def digest_of(key: str) -> bytes:
    """SHA-256 of a whole key, 32 bytes.

    A fast hash is right here, unlike for passwords: nobody guesses one of 2^256 secrets, however fast each guess is,
    and a slow one would be paid by every request.
    """
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def id_of(key: str) -> str:
    """The id inside a key; empty when the text does not look like a key."""
    start, end = len(PREFIX), len(PREFIX) + ID_LENGTH
    if len(key) != end + 1 + SECRET_LENGTH or not key.startswith(PREFIX) or key[end] != "_":
        return ""
    return key[start:end]


def default_burst(rate_per_s: float) -> int:
    """Two seconds' worth, and at least one full batch."""
    return max(_SMALLEST_DEFAULT_BURST, round(2 * rate_per_s))


def new_key(
    name: str,
    scopes: tuple[Scope, ...],
    *,
    rate_per_s: float,
    burst: int | None = None,
    expires: datetime | None = None,
) -> tuple[str, ApiKey]:
    """Make a key: the text for the client, which is kept nowhere, and the record for the file.

    Raises:
        Refusal: a name, scope, rate or burst that no key may have.
    """
    id_ = "".join(secrets.choice(_DIGITS) for _ in range(ID_LENGTH))
    key = f"{PREFIX}{id_}_{_base62(secrets.token_bytes(32))}"
    try:
        record = ApiKey(
            id=id_,
            name=name,
            sha256=digest_of(key).hex(),
            scopes=tuple(dict.fromkeys(scopes)),
            rate_per_s=rate_per_s,
            burst=default_burst(rate_per_s) if burst is None else burst,
            created=datetime.now(UTC).replace(microsecond=0),
            expires=expires,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise Refusal(f"the new key's {field}", first["input"], limit=first["msg"]) from None
    return key, record


def read_keys(file: Path) -> ApiKeyFile:
    """Read a key file.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is no such file; says where, without the content.
    """
    try:
        return ApiKeyFile.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{place}: {first['msg']}") from None


def write_keys(file: Path, content: ApiKeyFile) -> None:
    """Replace a key file in one step; only its owner may read it.  Readers see the old file or the new, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content.model_dump(mode="json"), stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def editing(file: Path) -> Iterator[list[ApiKey]]:
    """The keys as a list to change; written back at the end, one editor at a time.

    Raises:
        Refusal: the file is there and cannot be read; it is left alone.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_or_refuse(file).keys)
        before = tuple(keys)
        yield keys
        if tuple(keys) != before:
            write_keys(file, ApiKeyFile(keys=tuple(keys)))


def read_or_refuse(file: Path) -> ApiKeyFile:
    """The keys for a command; a file that is not there holds none.

    Raises:
        Refusal: the file cannot be read.
    """
    try:
        return read_keys(file)
    except FileNotFoundError:
        return ApiKeyFile()
    except (OSError, ValueError) as error:
        raise Refusal(
            f"the file of API keys {file}", error, way_out="restore it from a backup, or remove it and make new keys"
        ) from error


def _base62(data: bytes) -> str:
    number, digits = int.from_bytes(data, "big"), ""
    for _ in range(SECRET_LENGTH):
        number, digit = divmod(number, 62)
        digits = _DIGITS[digit] + digits
    return digits
