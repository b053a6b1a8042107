"""What a checkpoint is a function of, as one digest: nothing is resumed on other data, parameters, code or threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

_SPLIT_FILES = ("train.npy", "val.npy", "images.parquet", "contract.json")


def fingerprint_training(parameters: str, splits: Path, features: Path) -> str:
    """SHA-256 over parameters, training and validation data, this package's code, PyTorch's version and its threads.

    Args:
        parameters: everything tunable, in one canonical string.
        splits: the folder `data/splits`.
        features: the folder `data/features`.
    """
    digest = hashlib.sha256(parameters.encode())
    digest.update(
        f"torch {torch.__version__} threads {torch.get_num_threads()} cuda {torch.cuda.is_available()}".encode()
    )
    code = sorted(Path(__file__).parent.glob("*.py"))
    for file in _existing([*(splits / name for name in _SPLIT_FILES), features / "statistics.json", *code]):
        with file.open("rb") as stream:
            digest.update(f"\n{file.name} ".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _existing(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.is_file()]
