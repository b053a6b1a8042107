"""The supervisor of the slots' services alone, by itself; `tests/integration/test_one_server.py` has it serve."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.errors import Refusal
from pipelines.release.local_layout import LocalLayout
from pipelines.services.slots import run_slots
from pipelines.services.stack import Stack
from pipelines.settings import Settings


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("handlers")
def test_slots__plan_that_cannot_be_read__end_with_their_supervisor_and_say_why(tmp_path: Path) -> None:
    layout = LocalLayout(tmp_path)
    layout.routes_folder.mkdir(parents=True)
    layout.routes_file.write_text("{torn")
    before = set(psutil.Process().children())  # of tests before this one
    with pytest.raises(ValueError, match="line 1"):
        run_slots(Settings(home=tmp_path))
    assert set(psutil.Process().children()) <= before


def test_slots__home_whose_services_run_already__are_refused_and_its_ports_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stack, "is_answering", lambda _: True)
    with pytest.raises(Refusal, match="run already"):
        run_slots(Settings(home=tmp_path))
    assert list(tmp_path.iterdir()) == []
