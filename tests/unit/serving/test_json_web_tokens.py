"""Which tokens are taken, with real keys and a real issuer on this machine whose keys change and which goes away."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.datastructures import Headers

from pipelines.errors import Refusal
from serving import json_web_tokens
from serving.authentication import Authenticator
from serving.json_web_tokens import FileKeySource, RemoteKeySource, TokenVerifier, scopes_of
from serving.problems import NOT_READY, UNAUTHORIZED, Problem
from serving.settings import ServingSettings

ISSUER, AUDIENCE = "https://issuer.example", "perch"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def _jwk(key: Any, kid: str, **more: str) -> dict[str, Any]:
    kind = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    algorithm: Any = next((found for cls, found in kind.items() if isinstance(key, cls)), OKPAlgorithm)
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, **more}


KEYS = {"keys": [_jwk(RSA_KEY, "r"), _jwk(EC_KEY, "e", alg="ES256", use="sig"), _jwk(ED_KEY, "d")]}


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "someone@hospital.example",
        "iat": now,
        "exp": now + 300,
        "scope": "openid predict explain",
    } | changes
    return {name: value for name, value in claims.items() if value is not None}


def _token(key: Any = RSA_KEY, algorithm: str = "RS256", kid: str | None = "r", **changes: Any) -> str:
    return jwt.encode(_claims(**changes), key, algorithm=algorithm, headers={"kid": kid} if kid is not None else {})


@pytest.fixture
def verifier(tmp_path: Path) -> TokenVerifier:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(KEYS))
    return TokenVerifier(ISSUER, AUDIENCE, FileKeySource(file), rate_per_s=50)


def _refused(verifier: TokenVerifier, token: str) -> Problem:
    with pytest.raises(Problem) as caught:
        verifier.verify(token)
    assert caught.value.kind is UNAUTHORIZED
    assert 'error="invalid_token"' in caught.value.headers["WWW-Authenticate"]
    assert "hospital" not in str(caught.value.as_json())
    return caught.value


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(RSA_KEY, "RS256", "r"), (RSA_KEY, "PS384", "r"), (EC_KEY, "ES256", "e"), (ED_KEY, "EdDSA", "d")],
)
def test_verify__asymmetric_signatures__are_taken(verifier: TokenVerifier, key: Any, algorithm: str, kid: str) -> None:
    caller = verifier.verify(_token(key, algorithm, kid))
    assert caller.scopes == {"predict", "explain"}
    assert caller.rate_per_s == 50
    assert caller.burst == 100


def test_verify__its_caller__is_named_by_a_hash_that_stays_and_tells_people_apart(verifier: TokenVerifier) -> None:
    first, again = verifier.verify(_token()), verifier.verify(_token(exp=int(time.time()) + 999))
    other = verifier.verify(_token(sub="other@hospital.example"))
    assert first.name == again.name == "token-27eb063dc6a3"
    assert other.name != first.name
    assert "hospital" not in first.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": int(time.time()) - 31}, "expired"),
        ({"nbf": int(time.time()) + 86_400}, "not valid yet"),
        ({"aud": "someone-else"}, "another audience"),
        ({"iss": "https://other.example"}, "another issuer"),
        ({"iss": ISSUER + "/"}, "another issuer"),
        ({"exp": None}, "lacks the claim exp"),
        ({"aud": None}, "lacks the claim aud"),
        ({"iss": None}, "lacks the claim iss"),
        ({"sub": None}, "lacks the claim sub"),
        ({"sub": 7}, "no valid token"),
        ({"exp": "soon"}, "no valid token"),
        ({"exp": float("inf")}, "no valid token"),
        ({"exp": [1]}, "no valid token"),
    ],
)
def test_verify__claims_that_do_not_hold__are_refused_in_words(
    verifier: TokenVerifier, changes: dict[str, Any], words: str
) -> None:
    # PyJWT refuses to encode some of these, so that the payload is signed as it is.
    signed = jwt.api_jws.encode(json.dumps(_claims(**changes)).encode(), RSA_KEY, "RS256", headers={"kid": "r"})
    assert words in _refused(verifier, signed).detail


def test_verify__clocks_that_differ_by_less_than_the_leeway__are_forgiven(verifier: TokenVerifier) -> None:
    now = int(time.time())
    verifier.verify(_token(exp=now - 20))
    verifier.verify(_token(nbf=now + 20))
    verifier.verify(_token(aud=["other", AUDIENCE]))


def _forge(header: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(_claims()).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def _confused(public: bytes) -> str:
    """Signed with the public key as if it were a shared secret (RFC 8725, section 2.1)."""
    unsigned = _forge({"alg": "HS256", "kid": "r"})[:-1]
    signature = hmac.digest(public, unsigned.encode(), "sha256")
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def test_verify__forgeries__are_refused(verifier: TokenVerifier) -> None:
    public = json.dumps(_jwk(RSA_KEY, "r")).encode()
    good = _token()
    head, payload, signature = good.split(".")
    other_key = rsa.generate_private_key(65537, 2048)
    for forged in (
        _forge({"alg": "none", "kid": "r"}),
        _forge({"alg": "None", "kid": "r"}),
        _forge({"alg": "HS256", "kid": "r"}, b"x" * 32),
        _confused(public),
        _forge({"alg": "RS256", "kid": "r"}).replace(".", "..", 1),
        base64.urlsafe_b64encode(b"[" * 9_000).decode() + ".e30.",
        _token(other_key),
        _token(EC_KEY, "ES256", "r"),  # another key's id
        f"{head}.{payload}.",
        f"{head}.{payload}.{signature[:-4]}AAAA",
        _forge({"alg": "RS256", "kid": "r", "jwk": _jwk(other_key, "r")}),
        _forge({"alg": "RS256", "kid": ["r"]}),
        _forge({"alg": "RS256", "kid": "r", "crit": ["exp"]}),
        f"{head}.{payload}",
        "..",
        "é.é.é",
        "",
        "a" * 20_000,
    ):
        _refused(verifier, forged)
    verifier.verify(good)


def test_verify__without_a_key_id__needs_a_single_key(verifier: TokenVerifier, tmp_path: Path) -> None:
    _refused(verifier, _token(kid=None))
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"keys": [_jwk(RSA_KEY, "r")]}))
    TokenVerifier(ISSUER, AUDIENCE, FileKeySource(file), rate_per_s=1).verify(_token(kid=None))


def test_verify__a_token_seen_before__costs_less_and_expires_all_the_same(
    verifier: TokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = _token(exp=int(time.time()) + 2)
    caller = verifier.verify(token)
    decode, calls = jwt.decode, []
    monkeypatch.setattr(jwt, "decode", lambda *given, **named: (calls.append(1), decode(*given, **named))[1])
    assert verifier.verify(token) is caller
    assert not calls
    later = time.time() + 40
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(jwt, "decode", decode)
    monkeypatch.setattr("jwt.api_jwt.datetime", _Later)
    assert "expired" in _refused(verifier, token).detail


class _Later:
    @staticmethod
    def now(tz: Any = None) -> Any:
        from datetime import datetime, timedelta

        return datetime.now(tz) + timedelta(seconds=40)


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"scope": "predict  metrics"}, {"predict", "metrics"}),
        ({"scp": ["perch:predict", "explain"]}, {"predict", "explain"}),
        ({"scp": "model feedback"}, {"model", "feedback"}),
        ({"scope": "openid email"}, set()),
        ({"scope": 7, "scp": [None]}, set()),
        ({}, set()),
    ],
)
def test_scopes_of__ways_of_issuers__are_our_scopes_alone(claims: dict[str, Any], scopes: set[str]) -> None:
    assert scopes_of(claims) == scopes


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"keys": []}',
        json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}),
        json.dumps({"keys": [_jwk(RSA_KEY, "r", use="enc")]}),
        json.dumps({"keys": [_jwk(RSA_KEY, "r", alg="HS256")]}),
        json.dumps({"keys": [_jwk(rsa.generate_private_key(65537, 1024), "r")]}),
        json.dumps({"keys": ["text", {"kty": "RSA", "n": "!", "e": "AQAB"}, {"kty": "EC", "crv": "P-999"}]}),
    ],
)
def test_from_settings__keys_that_cannot_be_used__are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(content)
    with pytest.raises(Refusal, match=r"jwks\.json"):
        TokenVerifier.from_settings(ServingSettings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=str(file)))


def test_from_settings__no_audience_or_no_tls__is_refused() -> None:
    with pytest.raises(Refusal, match="JWT_AUDIENCE"):
        TokenVerifier.from_settings(ServingSettings(jwt_issuer=ISSUER))
    for address in ("http://issuer.example/keys", "ftp://issuer.example/keys", "https:///keys"):
        with pytest.raises(Refusal, match="https"):
            TokenVerifier.from_settings(ServingSettings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=address))


def test_authenticator__tokens_beside_keys__takes_both(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(KEYS))
    authenticator = Authenticator.from_settings(
        ServingSettings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=str(file))
    )
    assert authenticator.authenticate(Headers({"Authorization": f"Bearer {_token()}"})).name.startswith("token-")
    with pytest.raises(Problem, match="API key is not known"):
        authenticator.authenticate(Headers({"X-API-Key": _token()}))


class _Issuer:
    """An OpenID Connect issuer: its discovery document, its keys, and what was asked of it."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"keys": [_jwk(RSA_KEY, "first")]}
        self.asked: list[str] = []
        self.broken = False
        self.named = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if outer.broken:
                    self.send_error(500)
                    return
                document = {"issuer": outer.named or outer.url, "jwks_uri": outer.url + "/keys"}
                body = json.dumps(outer.keys if self.path == "/keys" else document).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *given: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def token(self, kid: str) -> str:
        return _token(kid=kid, iss=self.url)


@pytest.fixture
def issuer() -> Iterator[_Issuer]:
    issuer = _Issuer()
    yield issuer
    issuer.server.shutdown()
    issuer.server.server_close()


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_remote_keys__discovered_and_rotated__asks_the_issuer_at_most_once_in_a_while(
    issuer: _Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RemoteKeySource(issuer.url, "")
    verifier = TokenVerifier(issuer.url, AUDIENCE, source, rate_per_s=1)
    _until(lambda: source.current() is not None)
    verifier.verify(issuer.token("first"))
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]

    issuer.keys = {"keys": [_jwk(RSA_KEY, "first"), _jwk(RSA_KEY, "second")]}
    for _ in range(20):
        _refused(verifier, issuer.token("second"))
    assert len(issuer.asked) == 2  # it was asked less than 30 s ago
    monkeypatch.setattr(json_web_tokens, "REFETCH_INTERVAL_S", 0.0)
    _refused(verifier, issuer.token("second"))
    _until(lambda: source.current().by_id.keys() == {"first", "second"})  # type: ignore[union-attr]
    verifier.verify(issuer.token("second"))
    verifier.verify(issuer.token("first"))


def test_remote_keys__issuer_down__goes_on_with_the_last_good_ones(
    issuer: _Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_web_tokens, "REFETCH_INTERVAL_S", 0.0)
    monkeypatch.setattr(json_web_tokens, "LIFETIME_S", 0.0)
    source = RemoteKeySource(issuer.url, issuer.url + "/keys")
    verifier = TokenVerifier(issuer.url, AUDIENCE, source, rate_per_s=1)
    _until(lambda: source.current() is not None)
    issuer.broken = True
    before = len(issuer.asked)
    _until(lambda: source.current() is not None and len(issuer.asked) > before + 2)
    verifier.verify(issuer.token("first"))
    issuer.broken = False
    issuer.keys = {"keys": [_jwk(RSA_KEY, "other")]}  # the issuer withdraws a key: its tokens fall, seen before or not
    _until(lambda: source.current().by_id.keys() == {"other"})  # type: ignore[union-attr]
    _refused(verifier, issuer.token("first"))


def test_remote_keys__issuer_silent__answers_at_once_that_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setattr(json_web_tokens, "FETCH_TIMEOUT_S", 30.0)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        verifier = TokenVerifier(address, AUDIENCE, RemoteKeySource(address, ""), rate_per_s=1)
        with pytest.raises(Problem) as caught:
            verifier.verify(_token())
        assert time.monotonic() - started < 10
        assert caught.value.kind is NOT_READY
        assert caught.value.headers["Retry-After"] == "2"


def test_remote_keys__discovery_document_of_another_issuer__is_not_believed(
    issuer: _Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.named = "https://other.example"
    source = RemoteKeySource(issuer.url, "")
    _until(lambda: "another issuer" in caplog.text)
    assert source.current() is None
