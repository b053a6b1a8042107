"""JSON Web Tokens of one OpenID Connect issuer, verified with its public keys (RFC 7519, 8725).

The cryptography is PyJWT's.  Here: which tokens are taken, how the issuer's keys come and change, and that none of it
ever holds up the event loop: keys are fetched by a thread of their own, and the last good ones stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import jwt

from pipelines.core.api_keys import default_burst
from pipelines.errors import Refusal
from serving.callers import ALL_SCOPES, Caller, unauthorized
from serving.problems import NOT_READY, Problem
from serving.settings import ServingSettings
from serving.watched_file import WatchedFile

# Only what is signed with a key that the issuer alone holds; with HS* the service could make tokens itself, and a
# public key taken for a shared secret is the oldest trick against verifiers (RFC 8725, section 2.1).
ALGORITHMS = {
    "RSA": frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    "EC": frozenset({"ES256", "ES384", "ES512", "ES256K"}),
    "OKP": frozenset({"EdDSA"}),
}
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "ES256K": "secp256k1"}
_SMALLEST_RSA_BITS = 2048

LEEWAY_S = 30  # clocks of issuer and service may differ by so much
MAX_TOKEN_CHARACTERS = 16_384
FETCH_TIMEOUT_S = 5.0
REFETCH_INTERVAL_S = 30.0  # at most so often for a key id that nobody knows, or every forged token would ask the issuer
FIRST_FETCH_INTERVAL_S = 2.0  # while there is no key at all
LIFETIME_S = 600.0  # after so long keys are fetched anew, so that one the issuer withdrew is forgotten
_CACHED_TOKENS = 10_000

_logger = logging.getLogger(__name__)


class SigningKey:
    """One public key of the issuer.

    Args:
        jwk: its JSON object (RFC 7517).

    Raises:
        ValueError: not a key that may verify signatures here; says why.
    """

    def __init__(self, jwk: Mapping[str, Any]) -> None:
        self.kid = str(jwk.get("kid", ""))
        kind = str(jwk.get("kty", ""))
        if jwk.get("use", "sig") != "sig":
            raise ValueError("it is not for signatures")
        self.algorithms = ALGORITHMS.get(kind, frozenset())
        if "alg" in jwk:
            self.algorithms &= {str(jwk["alg"])}
        elif kind == "EC":
            self.algorithms = frozenset(name for name, curve in _CURVES.items() if curve == jwk.get("crv"))
        if not self.algorithms:
            raise ValueError(f"{kind} {jwk.get('alg', '')} is no asymmetric signature".replace("  ", " "))
        try:
            parsed = jwt.PyJWK(dict(jwk), algorithm=min(self.algorithms))
        except (jwt.PyJWTError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it cannot be read: {error}") from error
        self.public_key = parsed.key
        if hasattr(self.public_key, "private_numbers") or hasattr(self.public_key, "private_bytes"):
            self.public_key = self.public_key.public_key()
        if kind == "RSA" and self.public_key.key_size < _SMALLEST_RSA_BITS:
            raise ValueError(f"{self.public_key.key_size} bits are too few (limit: {_SMALLEST_RSA_BITS})")


class KeySet:
    """The issuer's keys at one time.

    Args:
        document: a JWK set: `{"keys": [...]}`.

    Raises:
        ValueError: it holds no key that can be used.
    """

    def __init__(self, document: Any) -> None:
        listed = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(listed, list):
            raise ValueError("it is no JWK set: it has no list `keys`")
        self.by_id: dict[str, SigningKey] = {}
        reasons = []
        for jwk in listed:
            try:
                key = SigningKey(jwk if isinstance(jwk, dict) else {})
            except ValueError as error:
                reasons.append(str(error))
            else:
                self.by_id[key.kid] = key
        if not self.by_id:
            raise ValueError("it holds no key that can be used: " + ("; ".join(reasons) or "it is empty"))

    def find(self, kid: str | None) -> SigningKey | None:
        """The key with this id; a token without one is for an issuer with a single key."""
        if kid is None:
            return next(iter(self.by_id.values())) if len(self.by_id) == 1 else None
        return self.by_id.get(kid)


class KeySource(Protocol):
    """Where the issuer's keys come from; no method waits."""

    def current(self) -> KeySet | None:
        """The newest good keys; None while none has ever arrived."""

    def refresh(self) -> None:
        """Somebody named a key that is not among them."""


class FileKeySource:
    """Keys from a file, e.g. a mounted ConfigMap."""

    def __init__(self, file: Path) -> None:
        self._file = WatchedFile(file, _read_key_set)

    def current(self) -> KeySet:
        """The newest good content of the file."""
        return self._file.current()

    def refresh(self) -> None:
        """Nothing to do: the file is looked at once a second."""


class RemoteKeySource:
    """Keys from the issuer, fetched by a thread of their own.

    Args:
        issuer: its URL, as in the tokens' `iss`.
        url: of the key set; empty asks the issuer's discovery document for it.
    """

    def __init__(self, issuer: str, url: str) -> None:
        self._issuer, self._url = issuer, url
        self._keys: KeySet | None = None
        self._lock = threading.Lock()
        self._fetching = False
        self._attempted = -math.inf
        self._succeeded = -math.inf
        self._start(0.0)

    def current(self) -> KeySet | None:
        """The last keys that arrived; asks for new ones in the background when they are old."""
        now = time.monotonic()
        if self._keys is None:
            self._start(FIRST_FETCH_INTERVAL_S)
        elif now - self._succeeded > LIFETIME_S:
            self._start(REFETCH_INTERVAL_S)
        return self._keys

    def refresh(self) -> None:
        """Ask the issuer again, unless that was done a moment ago."""
        self._start(REFETCH_INTERVAL_S)

    def _start(self, interval_s: float) -> None:
        with self._lock:
            now = time.monotonic()
            if self._fetching or now - self._attempted < interval_s:
                return
            self._fetching, self._attempted = True, now
        threading.Thread(target=self._fetch, name="issuer-keys", daemon=True).start()

    def _fetch(self) -> None:
        try:
            url = self._url or _discover(self._issuer)
            keys = KeySet(_get_json(url))
            if self._keys is None or keys.by_id.keys() != self._keys.by_id.keys():
                _logger.info("the issuer's keys arrived from %s: %d", url, len(keys.by_id))
            self._keys = keys
            self._succeeded = time.monotonic()
        except (jwt.PyJWTError, OSError, ValueError) as error:
            going_on = "going on with the last ones" if self._keys is not None else "no token can be taken"
            _logger.warning("cannot fetch the issuer's keys, %s: %s", going_on, error)
        finally:
            self._fetching = False


class TokenVerifier:
    """Takes the tokens of one issuer for one audience.

    Args:
        issuer: what `iss` must be.
        audience: what `aud` must be or hold.
        source: of the issuer's keys.
        rate_per_s: units per second for each subject.
    """

    def __init__(self, issuer: str, audience: str, source: KeySource, *, rate_per_s: float) -> None:
        self._issuer, self._audience, self._source = issuer, audience, source
        self._rate_per_s, self._burst = rate_per_s, default_burst(rate_per_s)
        # RS256 costs 90 µs, ES256 130, a lookup 1: tokens that were good, by their hash, while the keys are the same.
        self._verified: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()
        self._verified_with: KeySet | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_settings(cls, settings: ServingSettings) -> TokenVerifier:
        """What the settings ask for.

        Raises:
            Refusal: no audience, an address without TLS, or a file of keys that cannot be read.
        """
        if not settings.jwt_audience:
            raise Refusal(
                "PERCH_SERVING_JWT_AUDIENCE",
                "empty",
                limit="the audience that tokens for this service name",
                way_out="set it; without it a token made for any other service of the issuer would do",
            )
        address = settings.jwt_jwks
        source: KeySource
        if address and "://" not in address:
            try:
                source = FileKeySource(Path(address))
            except (OSError, ValueError) as error:
                raise Refusal(
                    f"the file of the issuer's keys {address}",
                    f"cannot be read: {error}",
                    way_out="put the issuer's JWK set there, or correct PERCH_SERVING_JWT_JWKS",
                ) from error
        else:
            _check_address(address or settings.jwt_issuer)
            source = RemoteKeySource(settings.jwt_issuer, address)
        return cls(settings.jwt_issuer, settings.jwt_audience, source, rate_per_s=settings.jwt_rate_per_s)

    def verify(self, token: str) -> Caller:
        """Who a token speaks for; does not wait for anything.

        Raises:
            Problem: UNAUTHORIZED; or NOT_READY with `Retry-After` while no key of the issuer has ever arrived.
        """
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise unauthorized(f"The token has {len(token):,} characters (limit: {MAX_TOKEN_CHARACTERS:,}).")
        keys = self._source.current()
        if keys is None:
            raise Problem(
                NOT_READY,
                "The issuer's keys have not arrived yet, so that no token can be verified; an API key can.",
                headers={"Retry-After": "2"},
            )
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        if keys is not self._verified_with:
            with self._lock:
                self._verified.clear()
                self._verified_with = keys
        found = self._verified.get(digest)
        if found is not None and time.time() < found[0]:
            return found[1]
        claims = self._claims(token, keys)
        caller = self._caller(claims)
        with self._lock:
            self._verified[digest] = (float(claims["exp"]), caller)
            self._verified.move_to_end(digest)
            if len(self._verified) > _CACHED_TOKENS:
                self._verified.popitem(last=False)
        return caller

    def _claims(self, token: str, keys: KeySet) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            kid, algorithm = header.get("kid"), str(header.get("alg"))
            key = keys.find(kid)
            if key is None:
                self._source.refresh()
                raise unauthorized(
                    "The token's `kid` names no key of the issuer that is known here; a new one is known within "
                    f"{REFETCH_INTERVAL_S:g} s."
                )
            if algorithm not in key.algorithms:
                raise unauthorized(
                    f"The token is not signed with one of its key's algorithms: {', '.join(sorted(key.algorithms))}."
                )
            claims: dict[str, Any] = jwt.decode(
                token,
                key=key.public_key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise unauthorized(f"The token is not accepted: {_in_words(error)}.") from None
        return claims

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        # The subject is often a person's address or number, which has no business in logs; its hash tells people
        # apart and stays the same between restarts and machines.
        person = f"{claims['iss']}\0{claims['sub']}".encode()
        name = "token-" + hashlib.sha256(person).hexdigest()[:12]
        return Caller(name, scopes_of(claims), self._rate_per_s, self._burst, name)


def scopes_of(claims: Mapping[str, Any]) -> frozenset[str]:
    """The scopes in `scope` (RFC 9068: words in one string) or `scp` (a list, or such a string), ours alone.

    `perch:predict` means the same as `predict`, for issuers whose scopes serve several services.
    """
    named: set[str] = set()
    for claim in ("scope", "scp"):
        value = claims.get(claim, ())
        words = value.split() if isinstance(value, str) else value
        if isinstance(words, list | tuple):
            named.update(str(word).removeprefix("perch:") for word in words)
    return ALL_SCOPES & named


def _in_words(error: jwt.PyJWTError) -> str:
    """PyJWT's messages name claims and never their values, but for a few: those are not passed on."""
    known = {
        jwt.ExpiredSignatureError: "it has expired",
        jwt.ImmatureSignatureError: "it is not valid yet",
        jwt.InvalidAudienceError: "it is for another audience",
        jwt.InvalidIssuerError: "it is from another issuer",
        jwt.InvalidSignatureError: "its signature is wrong",
    }
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it lacks the claim {error.claim}"
    return next((words for kind, words in known.items() if isinstance(error, kind)), "it is no valid token")


def _read_key_set(file: Path) -> KeySet:
    return KeySet(json.loads(file.read_bytes()))


def _get_json(url: str) -> Any:
    # PyJWT's client fetches one JSON object, follows no redirect, and waits no longer than it is told.
    client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=FETCH_TIMEOUT_S)
    return client.fetch_data()


def _discover(issuer: str) -> str:
    """The address of the key set in the issuer's own description (OpenID Connect Discovery 1.0, section 4)."""
    document = _get_json(issuer.rstrip("/") + "/.well-known/openid-configuration")
    if document.get("issuer") != issuer:
        raise ValueError(f"the discovery document is of another issuer: {document.get('issuer')!r}")
    address = str(document.get("jwks_uri", ""))
    _check_address(address)
    return address


def _check_address(url: str) -> None:
    """Keys that come without TLS could be anybody's; on the machine itself there is nobody in between."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return
    raise Refusal(
        "the address of the issuer's keys",
        repr(url),
        limit="https://…, or http:// on this machine",
        way_out="use the issuer's https address, or put its JWK set into a file that PERCH_SERVING_JWT_JWKS names",
    )
