"""Seeds for every random choice of a training, so that each depends on where it happens and not on what came before."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *place: str | int) -> int:
    """A seed for one place of a computation, e.g. `derive_seed(7, "shuffle", epoch)`.

    Neighbouring places get unrelated seeds.  Since nothing depends on a generator's history, a training that was
    killed and resumed draws the same numbers as one that was not.

    Args:
        seed: the run's seed.
        place: names and indices of the place.

    Returns:
        An integer in [0, 2^63): the leading bits of a SHA-256 over the arguments.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_at(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator of its own for one place; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *place))
