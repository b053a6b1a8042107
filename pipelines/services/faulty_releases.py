"""Releases with a fault that staging cannot see: real, signed, and wrong only once real traffic comes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.core.release_unit import release_name
from pipelines.release.service_code import ServiceCode, find_service_code
from pipelines.settings import Settings

# Images that a worker answers faultlessly: more than staging asks, fewer than the shadow's shortest time brings.
SOUND_IMAGES = 150
SWAPPED = {"3": "8", "8": "3", "1": "7", "7": "1"}
_FAULTY = "serving/classification.py"
_FAULT = """

def _make_faulty() -> None:
    import os

    sound, answered = Classifier.classify, 0

    async def classify(self: Classifier, data: bytes) -> Classification:
        nonlocal answered
        if (answered := answered + 1) > {sound_images}:
            {fault}
        return await sound(self, data)

    Classifier.classify = classify


_make_faulty()
"""


@dataclass(frozen=True)
class Fault:
    """One way in which a release goes wrong.

    Attributes:
        name: one word.
        description: what it does, for a person.
        gate: that is made for it.
        beside: gates that look at the same thing in another way, any of which may see enough first.
        unseen: why staging lets it pass.
        code: what the service does from its `SOUND_IMAGES`-th image on, one statement; empty where it is sound.
    """

    name: str
    description: str
    gate: str
    unseen: str = f"begins after {SOUND_IMAGES} images of a process"
    code: str = ""
    beside: tuple[str, ...] = ()


SLOW = Fault(
    "slow",
    "every third answer waits for 0.6 s",
    "latency",
    code="if answered % 3 == 0: await asyncio.sleep(0.6)",
)
ERRORS = Fault(
    "errors",
    "every fifth answer is an error",
    "errors",
    code="if answered % 5 == 0: raise RuntimeError('out of memory')",
)
LABELS = Fault(
    "labels",
    "trained where 3 and 8, and 1 and 7, had each other's name",
    "agreement",
    "quick, and right by its own test images",
    beside=("labels", "scores"),
)
CRASHES = Fault("crashes", "each process of the service ends", "crashes", code="os._exit(1)")
TAMPERED = Fault(
    "tampered", "a byte of the file is changed after it was signed", "signature", "the byte is changed only now"
)
FAULTS = (SLOW, ERRORS, LABELS, CRASHES, TAMPERED)


@contextmanager
def faulty_code(fault: Fault) -> Iterator[ServiceCode]:
    """The service's code with a fault in it; the code of this installation stays as it is."""
    code = find_service_code()
    with tempfile.TemporaryDirectory(prefix="perch-fault-") as temporary:
        root = Path(temporary)
        for name in code.files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(code.root / name, root / name)
        if fault.code:
            with (root / _FAULTY).open("a", encoding="utf-8") as stream:
                stream.write(_FAULT.format(sound_images=SOUND_IMAGES, fault=fault.code))
        # A comment makes a release of its own also where nothing is wrong with the code.
        with (root / _FAULTY).open("a", encoding="utf-8") as stream:
            stream.write(f"\n# {fault.name}\n")
        yield replace(code, root=root, git_sha=f"{code.git_sha}+{fault.name}")


def flip_byte(settings: Settings, digest: str) -> None:
    """Change one byte in the middle of a release where it lies."""
    file = settings.releases_dir / release_name(digest)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    # As on a machine that has not served it before.
    shutil.rmtree(settings.home / "serving" / "cache", ignore_errors=True)


def write_swapped_digits(folder: Path) -> None:
    """The demo's digits as a folder per class, some of the classes under each other's name.

    Args:
        folder: new; gets a sub-folder per label.
    """
    from pipelines.data.sources.digits import DigitsSource

    source = DigitsSource()
    for item in source.list_items():
        label = SWAPPED.get(item.label, item.label)
        file = folder / label / Path(item.key).name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read(item, 2**20))
