"""A rollout as it is kept between two calls of the engine: a document with a revision and a lease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import PerchError


class StaleRolloutError(PerchError):
    """The row changed, or the lease went to somebody else, since it was read: nothing was written."""


@dataclass(frozen=True)
class RolloutRow:
    """A row as it was read.

    Attributes:
        rollout_id: names the rollout.
        model: name of the registered model.
        is_open: whether it still has a step to go.
        sequence: order of creation.
        revision: number of its last write.
        document: a JSON tree.
        lease_owner: who moves it; empty when nobody does.
        lease_expires_at: seconds since the epoch.
        token: of the present or last holder of the lease.
        renewals: how often a lease was taken or renewed; a watcher with a clock of its own sees life by its changes.
        renewed_at: when that was last, seconds since the epoch.
    """

    rollout_id: str
    model: str
    is_open: bool
    sequence: int
    revision: int
    document: Mapping[str, Any]
    lease_owner: str
    lease_expires_at: float
    token: int
    renewals: int
    renewed_at: float
