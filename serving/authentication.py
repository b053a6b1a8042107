"""Who asks, and what they may do: an API key or a JSON Web Token becomes a `Caller`, or a 401.

A credential is never logged and never echoed; what stands in logs is the caller's name and the key's id.
"""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.api_keys import PREFIX, ApiKey, digest_of, id_of, read_keys
from pipelines.errors import Refusal
from serving.callers import ALL_SCOPES, ANYBODY, CHALLENGE, Caller, require, unauthorized
from serving.problems import UNAUTHORIZED, Problem
from serving.settings import ServingSettings
from serving.watched_file import WatchedFile

if TYPE_CHECKING:
    from serving.json_web_tokens import TokenVerifier

__all__ = ["ALL_SCOPES", "ANYBODY", "Authenticator", "Caller", "require"]

_TOKEN_DOTS = 2  # between a token's three parts (RFC 7515, section 3.1); a key has none
_NO_DIGEST = bytes(32)  # what an unknown id is compared with, so that it takes as long as a known one


@dataclass(frozen=True, slots=True)
class _KnownKey:
    digest: bytes
    expires: float  # seconds since the epoch; infinite: never
    caller: Caller


class Authenticator:
    """Turns the headers of a request into a caller.

    Args:
        keys: the file of API keys, or None.
        tokens: verifies JSON Web Tokens, or None.
        required: whether a credential is needed at all.
    """

    def __init__(
        self,
        keys: WatchedFile[dict[str, _KnownKey]] | None,
        tokens: TokenVerifier | None,
        *,
        required: bool = True,
    ) -> None:
        self._keys, self._tokens, self._required = keys, tokens, required

    @classmethod
    def from_settings(cls, settings: ServingSettings) -> Authenticator:
        """What the settings ask for.

        Raises:
            Refusal: nobody could ever be let in, or a file cannot be read: better said at the start than as a 401
                to everybody.
        """
        if settings.authentication == "off":
            return cls(None, None, required=False)
        tokens = None
        if settings.jwt_issuer:
            from serving.json_web_tokens import TokenVerifier

            tokens = TokenVerifier.from_settings(settings)
        keys = None
        if settings.api_keys_file is not None:
            keys = _watch(settings.api_keys_file)
        if tokens is None and (keys is None or not keys.current()):
            raise Refusal(
                "the service's credentials",
                "there are none" if keys is None else f"{settings.api_keys_file} holds no key",
                limit="at least one API key, or a token issuer",
                way_out="make a key with `perch api-keys add NAME --scope predict` and name its file in "
                "PERCH_SERVING_API_KEYS_FILE, or set PERCH_SERVING_JWT_ISSUER and PERCH_SERVING_JWT_AUDIENCE; "
                "PERCH_SERVING_AUTHENTICATION=off lets everybody in, for a test on one machine",
            )
        return cls(keys, tokens)

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Who sent these headers: `X-API-Key`, or `Authorization: Bearer` with a key or a token.

        Args:
            headers: looked up in lower case, as Starlette's are.

        Raises:
            Problem: UNAUTHORIZED, with `WWW-Authenticate`; NOT_READY while no key of the issuer has arrived yet.
        """
        if not self._required:
            return ANYBODY
        credential = headers.get("x-api-key")
        if credential is None:
            scheme, _, credential = headers.get("authorization", "").partition(" ")
            credential = credential.strip()
            if scheme.lower() != "bearer" or not credential:
                raise Problem(UNAUTHORIZED, self._how_to(), headers={"WWW-Authenticate": CHALLENGE})
            if not credential.startswith(PREFIX):
                if self._tokens is not None:
                    return self._tokens.verify(credential)
                if credential.count(".") == _TOKEN_DOTS:
                    raise unauthorized(f"No tokens are taken here, for this service knows no issuer. {self._how_to()}")
        return self._caller_of_key(credential)

    def _caller_of_key(self, key: str) -> Caller:
        known = self._keys.current().get(id_of(key)) if self._keys is not None else None
        same = hmac.compare_digest(digest_of(key), _NO_DIGEST if known is None else known.digest)
        if known is None or not same:
            raise unauthorized("The API key is not known here. " + self._how_to())
        if time.time() >= known.expires:
            raise unauthorized("The API key has expired: ask for a new one.")
        return known.caller

    def _how_to(self) -> str:
        ways = []
        if self._keys is not None:
            ways.append("an API key as X-API-Key")
        if self._tokens is not None:
            ways.append("a token of the issuer as Authorization: Bearer")
        return f"Send {' or '.join(ways)}."


def _watch(file: Path) -> WatchedFile[dict[str, _KnownKey]]:
    try:
        return WatchedFile(file, _read_known_keys)
    except (OSError, ValueError) as error:
        raise Refusal(
            f"the file of API keys {file}",
            f"cannot be read: {error}",
            way_out="make it with `perch api-keys add NAME --scope predict`, or correct PERCH_SERVING_API_KEYS_FILE",
        ) from error


def _read_known_keys(file: Path) -> dict[str, _KnownKey]:
    return {key.id: _known(key) for key in read_keys(file).keys}


def _known(key: ApiKey) -> _KnownKey:
    expires = math.inf if key.expires is None else key.expires.timestamp()
    scopes = frozenset(scope.value for scope in key.scopes)
    return _KnownKey(bytes.fromhex(key.sha256), expires, Caller(key.name, scopes, key.rate_per_s, key.burst, key.id))
