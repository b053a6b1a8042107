"""`perch demo --faults` on the real parts: each bad release stopped by its gate, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.registry.ledger import Ledger
from pipelines.services.faulty_releases import FAULTS
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]
PERCH = str(Path(sys.executable).parent / "perch")
ROW = re.compile(
    r"(\w+) +(\w+) +(shadow|before any) +([\d,]+) \w+ +(?:([\d.]+) s|not needed) +(\d+) of ([\d,]+) failed"
)

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(600)]


def processes_of(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in process.environ().get("PERCH_HOME", ""):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_demo_faults__of_five_bad_releases__stops_each_by_its_gate_before_a_client_sees_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "ledger.db").write_text("somebody's")
    environment = {**os.environ, "PERCH_HOME": str(home), "PERCH_PROJECT_DIR": str(PROJECT), "COLUMNS": "80"}
    done = subprocess.run(
        [PERCH, "demo", "--faults"], env=environment, capture_output=True, text=True, check=False, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = {row[1]: row for row in map(ROW.fullmatch, map(str.strip, done.stdout.splitlines())) if row}
    assert [*rows] == [fault.name for fault in FAULTS]
    assert all(rows[fault.name][2] in (fault.gate, *fault.beside) for fault in FAULTS)
    for name, row in rows.items():
        assert row[6] == "0", name
        assert int(row[7].replace(",", "")) > 100, name
        assert (row[3] == "before any") == (row[5] is None) == (name == "tampered")

    assert processes_of(home) == []
    assert (home / "ledger.db").read_text() == "somebody's"
    assert {entry.name for entry in home.iterdir()} == {"faults", "faults.lock", "ledger.db"}
    ledger = Ledger(Settings(home=home / "faults").ledger_url)
    records = ledger.entries()
    assert ledger.verify() == []
    ledger.close()
    assert sum(record.event == "rolled_back" for record in records) == len(FAULTS)
    assert [record.version for record in records if record.event == "promoted"] == ["1"]
    # No share of the clients' requests was ever given to another one.
    shares = [json.loads(record.evidence)["weight_percent"] for record in records if record.event == "traffic"]
    assert shares == [100, *[0] * (len(FAULTS) - 1)]
