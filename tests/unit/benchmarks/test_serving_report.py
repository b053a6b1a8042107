from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.serving_contenders import FLOOR, MLFLOW, PERCH
from benchmarks.serving_report import BOTH_CORES, Measurement, Results, draw, judge, rate_ratio, table, write_json
from benchmarks.wrk import Load


def _rounds(*rates: float, p95_ms: float = 10.0, start_s: float = 1.0, errors: int = 0) -> list[Measurement]:
    """One measurement of ten seconds per rate."""
    return [
        Measurement(start_s, 100.0, 0.5, Load(round(10 * rate) + errors, 10.0, 5.0, p95_ms, 20.0, errors))
        for rate in rates
    ]


def _all_good() -> dict[str, list[Measurement]]:
    return {
        FLOOR: _rounds(1800, 900, 1800),
        PERCH: _rounds(1500, 750, 1500),
        "FastAPI": _rounds(1000, 500, 1000),
        MLFLOW: _rounds(300, 150, 300),
        BOTH_CORES: _rounds(1600, 1600, 1600),
    }


def _missed(results: Results) -> set[str]:
    return {target.promise.partition(" ")[0] for target in judge(results) if not target.held}


def test_rate_ratio__one_round_was_slow_for_all__does_not_show() -> None:
    assert rate_ratio(_rounds(80, 40, 8), _rounds(100, 50, 10)) == pytest.approx(0.8)


def test_judge__everything_good__is_met() -> None:
    assert len(judge(_all_good())) == 7
    assert _missed(_all_good()) == set()


@pytest.mark.parametrize(
    ("name", "rounds", "promise"),
    [
        ("FastAPI", _rounds(1600, 800, 1600), "the"),
        (FLOOR, _rounds(2600, 1300, 2600), "at"),
        (MLFLOW, _rounds(600, 300, 600), "at"),
        (BOTH_CORES, _rounds(900, 900, 1600), "on"),
        (BOTH_CORES, _rounds(1600, 1600, 1600, p95_ms=50.0), "at"),
        (BOTH_CORES, _rounds(1600, 1600, 1600, errors=1), "without"),
        (BOTH_CORES, _rounds(1600, 1600, 1600, start_s=3.1), "from"),
    ],
)
def test_judge__one_number_is_bad__that_target_is_missed(name: str, rounds: list[Measurement], promise: str) -> None:
    assert _missed({**_all_good(), name: rounds}) == {promise}


def test_judge__only_some_measured__judges_only_those() -> None:
    assert judge({FLOOR: _rounds(1800)}) == []


def test_table_and_files__all_servers__are_in_them(tmp_path: Path) -> None:
    results = _all_good()
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(table(results, dict.fromkeys(results, "PNG")))
    shown = console.export_text()
    assert shown.index(FLOOR) < shown.index(PERCH + " ") < shown.index("FastAPI") < shown.index(MLFLOW)
    assert "0.83" in shown
    draw(tmp_path / "figure.png", results)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / "raw.json", {"rounds": 3}, results, judge(results))
    assert '"p95_ms": 10.0' in (tmp_path / "raw.json").read_text()
