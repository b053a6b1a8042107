"""Who asks, once their credential was accepted, and what they may do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.core.scopes import Scope
from serving.problems import FORBIDDEN, UNAUTHORIZED, Problem

CHALLENGE = 'Bearer realm="perch"'
_INVALID = f'{CHALLENGE}, error="invalid_token"'  # RFC 6750, section 3.1


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose credential was accepted.

    Attributes:
        name: for logs and metrics: the key's name, or `token-` and a hash for the subject of a token.
        scopes: of predict, explain, feedback, model, metrics.
        rate_per_s: units per second; infinite: no limit.
        burst: units at once.
        bucket: whose rate is used up: the key's id, so that each key has its own; empty: the name.
    """

    name: str
    scopes: frozenset[str]
    rate_per_s: float
    burst: int
    bucket: str = ""


ALL_SCOPES = frozenset(scope.value for scope in Scope)
# Without authentication there is nobody to tell apart, so that neither scopes nor rates mean anything.
ANYBODY = Caller("anonymous", ALL_SCOPES, math.inf, 1)


def require(caller: Caller, scope: str) -> None:
    """Let a caller on only with a scope.

    Raises:
        Problem: FORBIDDEN; names what was missing, as RFC 6750 does.
    """
    if scope not in caller.scopes:
        raise Problem(
            FORBIDDEN,
            f"This needs the scope {scope}; the credential has {', '.join(sorted(caller.scopes)) or 'none'}.",
            headers={"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{scope}"'},
        )


def unauthorized(detail: str) -> Problem:
    """A 401 for a credential that was sent and is not accepted."""
    return Problem(UNAUTHORIZED, detail, headers={"WWW-Authenticate": _INVALID})
