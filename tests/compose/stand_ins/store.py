"""Stands for SeaweedFS: moto's S3 server behind a check of each request's signature, with its objects in a folder."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple
from werkzeug.wrappers import Request, Response

FOLDER = Path("/data/objects")
PORT = 8333
REFUSED = "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature is not that of the key.</Message></Error>"


class Store:
    """A WSGI application: `/healthz`, and S3 for whoever signs with the one key pair."""

    def __init__(self, access_key: str, secret_key: str) -> None:
        self._credentials = Credentials(access_key, secret_key)
        self._s3 = DomainDispatcherApplication(create_backend_app)
        # It asks itself as any client does: what is kept is what moto has taken, and a start puts it back.
        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{PORT}",
            region_name="us-east-1",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )
        self._ready = threading.Event()

    def restore(self) -> None:
        """Everything that was kept, before others may ask."""
        for bucket in FOLDER.glob("*"):
            self._client.create_bucket(Bucket=bucket.name)
            for file in bucket.glob("*.json"):
                known = json.loads(file.read_text())
                self._client.put_object(Bucket=bucket.name, Body=file.with_suffix("").read_bytes(), **known)
        self._ready.set()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        if request.path == "/healthz":
            return Response("", 200 if self._ready.is_set() else 503)(environ, start_response)
        body = request.get_data()
        environ["wsgi.input"] = io.BytesIO(body)
        if not self._is_signed(request, body):
            return Response(REFUSED, 403, content_type="application/xml")(environ, start_response)
        statuses: list[str] = []

        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            statuses.append(status)
            return start_response(status, headers, *more)

        answer = b"".join(self._s3(environ, begin))
        if self._ready.is_set() and request.method in {"PUT", "POST", "DELETE"} and statuses[0].startswith("2"):
            self._keep_what_changed(request)
        return [answer]

    def _is_signed(self, request: Request, body: bytes) -> bool:
        """By Signature Version 4, computed as boto3 computes it; with the body's digest, where the client gave it."""
        kind, _, rest = request.headers.get("Authorization", "").partition(" ")
        if kind != "AWS4-HMAC-SHA256":
            return False
        parts = dict(part.strip().split("=", 1) for part in rest.split(","))
        access_key, _, region, service, _ = parts["Credential"].split("/")
        digest = request.headers.get("X-Amz-Content-Sha256", "")
        if access_key != self._credentials.access_key:
            return False
        if len(digest) == hashlib.sha256().digest_size * 2 and hashlib.sha256(body).hexdigest() != digest:
            return False
        asked = AWSRequest(
            method=request.method,
            url=f"http://{request.host}{request.environ['REQUEST_URI']}",
            headers={name: request.headers[name] for name in parts["SignedHeaders"].split(";")},
        )
        asked.context["timestamp"] = request.headers["X-Amz-Date"]
        signer = S3SigV4Auth(self._credentials, service, region)
        signature = signer.signature(signer.string_to_sign(asked, signer.canonical_request(asked)), asked)
        return hmac.compare_digest(signature, parts["Signature"])

    def _keep_what_changed(self, request: Request) -> None:
        bucket, _, key = unquote(request.environ["REQUEST_URI"].partition("?")[0]).lstrip("/").partition("/")
        folder = FOLDER / quote(bucket, "")
        folder.mkdir(parents=True, exist_ok=True)
        if "delete" in request.args:
            for file in list(folder.glob("*.json")):
                self._keep(folder, bucket, json.loads(file.read_text())["Key"])
        elif key and not {"partNumber", "uploads"} & set(request.args):
            self._keep(folder, bucket, key)

    def _keep(self, folder: Path, bucket: str, key: str) -> None:
        file = folder / hashlib.sha256(key.encode()).hexdigest()
        try:
            found = self._client.get_object(Bucket=bucket, Key=key)
        except self._client.exceptions.NoSuchKey:
            file.with_suffix(".json").unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            return
        draft = file.with_suffix(f".{threading.get_ident()}")
        draft.write_bytes(found["Body"].read())
        draft.replace(file)
        draft.write_text(json.dumps({"Key": key, "Metadata": found["Metadata"], "ContentType": found["ContentType"]}))
        draft.replace(file.with_suffix(".json"))


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        """Nothing: each health check would be a line."""


if __name__ == "__main__":
    sys.stderr.write(f"stands for: {' '.join(sys.argv)}\n")
    FOLDER.mkdir(parents=True, exist_ok=True)
    store = Store(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    threading.Thread(target=store.restore, daemon=True).start()
    run_simple("0.0.0.0", PORT, store, threaded=True, request_handler=_Quiet)
