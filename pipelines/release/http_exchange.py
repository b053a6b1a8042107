"""One HTTP request and its answer, over a connection of its own, past any proxy that the environment names."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlencode, urlsplit

_KINDS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass(frozen=True)
class Answer:
    """An answer with status 200.

    Attributes:
        body: whole.
        headers: their names in any case.
    """

    body: bytes
    headers: Message


def fetch(url: str, timeout_s: float, *, form: Mapping[str, str] | None = None) -> bytes:
    """The body alone of what `exchange` gets."""
    return exchange(url, timeout_s, form=form).body


def exchange(url: str, timeout_s: float, *, form: Mapping[str, str] | None = None) -> Answer:
    """The answer to a GET, or to a POST of a form; redirects are not followed.

    Args:
        url: http or https.
        timeout_s: from one byte to the next, in seconds.
        form: fields to post.

    Raises:
        OSError: nothing answers there, or not with 200, or not by HTTP; or it is no such address.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in _KINDS or not parts.hostname or parts.username is not None:
            raise ValueError("no address of http or https, without a user")
        target = parts._replace(scheme="", netloc="").geturl() or "/"
        connection = _KINDS[parts.scheme](parts.netloc, timeout=timeout_s)
        try:
            if form is None:
                connection.request("GET", target)
            else:
                connection.request("POST", target, urlencode(form), _FORM)
            response = connection.getresponse()
            answer = Answer(response.read(), response.headers)
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}")
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url.rpartition('@')[2]}: {error!r}") from error  # without a password
    return answer
