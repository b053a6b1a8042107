"""One number for all weights of a network."""

from __future__ import annotations

import hashlib

from torch import nn


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
