"""Errors as RFC 9457 problem details: every one has a stable `type`, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class ProblemType:
    """A kind of error; `slug` ends its URN and never changes.

    Attributes:
        slug: e.g. `unsupported-media`; the `type` member is `urn:perch:` and this.
        status: HTTP status code.
        title: one sentence, the same for every occurrence.
    """

    slug: str
    status: int
    title: str

    @property
    def urn(self) -> str:
        """The value of the `type` member."""
        return f"urn:perch:{self.slug}"


BAD_REQUEST = ProblemType("bad-request", 400, "The request cannot be understood")
UNAUTHORIZED = ProblemType("unauthorized", 401, "No valid credential came with the request")
FORBIDDEN = ProblemType("forbidden", 403, "This credential may not do that")
NOT_FOUND = ProblemType("not-found", 404, "There is nothing at this address")
METHOD_NOT_ALLOWED = ProblemType("method-not-allowed", 405, "This address does not take that method")
REQUEST_TIMEOUT = ProblemType("request-timeout", 408, "The request did not arrive in time")
TOO_LARGE = ProblemType("too-large", 413, "The request is larger than the service takes")
UNSUPPORTED_MEDIA = ProblemType("unsupported-media", 415, "Not an image we read")
UNREADABLE_IMAGE = ProblemType("unreadable-image", 422, "The image is broken")
TOO_MANY_PIXELS = ProblemType("too-many-pixels", 422, "The image has more pixels than the service takes")
INVALID_FIELD = ProblemType("invalid-field", 422, "A field of the request is missing or wrong")
RATE_LIMITED = ProblemType("rate-limited", 429, "This credential has used up its rate")
OVERLOADED = ProblemType("overloaded", 503, "The service has all the requests it can handle")
NOT_READY = ProblemType("not-ready", 503, "The service is starting or stopping")
OUT_OF_TIME = ProblemType("out-of-time", 503, "The answer was not ready in time")
INTERNAL = ProblemType("internal", 500, "The service failed")

ALL = (
    BAD_REQUEST,
    UNAUTHORIZED,
    FORBIDDEN,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    REQUEST_TIMEOUT,
    TOO_LARGE,
    UNSUPPORTED_MEDIA,
    UNREADABLE_IMAGE,
    TOO_MANY_PIXELS,
    INVALID_FIELD,
    RATE_LIMITED,
    OVERLOADED,
    NOT_READY,
    OUT_OF_TIME,
    INTERNAL,
)


class Problem(Exception):
    """Raised anywhere in a request, answered as problem+json.

    Args:
        kind: which problem.
        detail: what is wrong with this request, with the value, the limit and the way out.
        headers: e.g. `Retry-After`.
        members: extension members of the JSON object.
    """

    def __init__(
        self,
        kind: ProblemType,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(f"{kind.slug}: {detail}")
        self.kind, self.detail = kind, detail
        self.headers = dict(headers or {})
        self.members = members

    def as_json(self, request_id: str = "") -> dict[str, Any]:
        """The problem's members; `request_id` is left out when empty."""
        body: dict[str, Any] = {
            "type": self.kind.urn,
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            **self.members,
        }
        if request_id:
            body["request_id"] = request_id
        return body

    def as_response(self, request_id: str) -> Response:
        """The answer to the client."""
        body = orjson.dumps(self.as_json(request_id))
        return Response(body, self.kind.status, headers=self.headers, media_type=MEDIA_TYPE)
