"""What moves traffic on a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import TryLater
from pipelines.release.local_layout import LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES, Plan
from pipelines.release.local_target import LocalTarget
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.settings import Settings
from tests.conftest import MountSmallDisk

PROJECT = Path(__file__).parents[2]
_PORTS = LocalPorts(1, 2, {process: SlotPorts(3, 4) for process in PROCESSES})


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    file = folder / "filling"
    with file.open("ab", buffering=0) as stream:
        for size in (65_536, 4096, 1):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError:
                continue
    return file


def test_routes__disk_is_full__are_replaced_from_the_reserve_and_it_is_kept_anew(
    mount_small_disk: MountSmallDisk,
) -> None:
    small_disk = mount_small_disk(1024)
    target = LocalTarget(Settings(project_dir=PROJECT, home=small_disk))
    target.lay_out(_PORTS)
    reserve = small_disk / "release" / "reserve"
    assert reserve.stat().st_size >= 64 * 1024
    release = ReleaseRef("digits", "1", "0" * 64, "/nowhere")
    plan = Plan().deployed(Slot.STABLE, release, 1).deployed(Slot.CANARY, release, 1)
    target._write(plan.routed(Routing(50)))
    filling = fill(small_disk)
    target._write(plan.routed(Routing()))
    assert target._read_plan().routing == Routing()
    assert not reserve.exists()

    # Full once more, and the reserve is spent: it says so, and leaves the old routes whole.
    fill(small_disk)
    with pytest.raises(TryLater, match="free some space"):
        target._write(plan.routed(Routing(10)))
    assert target._read_plan().routing == Routing()

    filling.unlink()
    target._write(plan.routed(Routing(10)))
    assert target._read_plan().routing == Routing(10)
    assert reserve.stat().st_size >= 64 * 1024
