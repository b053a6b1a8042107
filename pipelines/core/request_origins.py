"""Whose a request was, and the headers that say so between gateway, prober and service."""

from __future__ import annotations

import re
from collections.abc import Mapping

# A client's; the mirror's, whose answer nobody got; or the prober's, copies of those included.
# Files of predictions without the column `origin` hold clients'.
CLIENT, MIRROR, PROBE = "client", "mirror", "probe"

PROBE_HEADER = "x-perch-probe"  # heeded from the prober alone
PROBER = "prober"  # the name of its key, which no other key gets
SHADOW_HEADER = "x-perch-shadow"  # on copies alone: the gateway takes it from what clients send
_COPIED_HOST = re.compile(r"-shadow(:\d+)?$")  # by Envoy, in whichever gateway it works


def is_copy(headers: Mapping[str, str]) -> bool:
    """Whether a gateway made it of another: one may be told to say so by the header; those on Envoy do by the host."""
    return SHADOW_HEADER in headers or _COPIED_HOST.search(headers.get("host", "")) is not None
