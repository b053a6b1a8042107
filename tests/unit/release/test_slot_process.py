import json
from pathlib import Path

import pytest

from pipelines.errors import Refusal
from pipelines.release import slot_process
from pipelines.release.envoy import route_table
from pipelines.release.local_layout import LocalLayout, LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES, Plan
from pipelines.release.slot_process import prepare, read_starts
from pipelines.release.targets import ReleaseRef, Slot

RELEASE = ReleaseRef("shapes", "2", "0a" * 32, "/releases/two.bento")


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    layout = LocalLayout(tmp_path)
    layout.write_ports(LocalPorts(1, 2, {process: SlotPorts(3 + n, 13 + n) for n, process in enumerate(PROCESSES)}))
    layout.routes_folder.mkdir(parents=True)
    write(layout, RELEASE)
    return layout


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(slot_process.time, "sleep", waits.append)
    return waits


def write(layout: LocalLayout, release: ReleaseRef) -> None:
    layout.routes_file.write_text(json.dumps(route_table(Plan().deployed(Slot.STAGING, release, 3), 1)))


def test_prepare__release_in_the_plan__is_served_with_folders_and_ports_of_its_own(
    layout: LocalLayout, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_SERVING_MAX_PIXELS", "1000")
    monkeypatch.setenv("PERCH_SERVING_PORT", "3000")
    command, environment = prepare(layout, "serving-staging")
    assert command[1:] == ["-m", "serving", RELEASE.address]
    given = {name.removeprefix("PERCH_SERVING_"): value for name, value in environment.items()}
    assert (given["RELEASE_DIGEST"], given["WORKERS"]) == (RELEASE.digest, "3")
    assert (given["HOST"], given["PORT"], given["METRICS_PORT"]) == ("127.0.0.1", "5", "15")
    assert given["METRICS_HOST"] == "127.0.0.1"  # these numbers are nobody's outside the machine
    assert given["SPOOL_DIR"] == str(layout.home / "serving" / "serving-staging" / "spool")
    assert given["MAX_PIXELS"] == "1000"
    assert waits == [0]


def test_prepare__service_that_keeps_ending__is_counted_and_waits_longer_each_time(
    layout: LocalLayout, waits: list[float]
) -> None:
    for _ in range(9):
        prepare(layout, "serving-staging")
    assert waits == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert read_starts(layout, "serving-staging")["starts"] == 9


def test_prepare__another_release__is_counted_from_one(layout: LocalLayout, waits: list[float]) -> None:
    prepare(layout, "serving-staging")
    write(layout, ReleaseRef("shapes", "3", "0b" * 32, "/releases/three.bento"))
    prepare(layout, "serving-staging")
    assert read_starts(layout, "serving-staging")["starts"] == 1
    assert waits == [0, 0]


def test_prepare__nothing_for_this_process__is_refused(layout: LocalLayout) -> None:
    with pytest.raises(Refusal, match="has no release to serve"):
        prepare(layout, "serving-a")
