"""Each fault is in the release, begins where it says, and leaves this installation's code and store as they were."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.data.sources.digits import DigitsSource
from pipelines.release.service_code import find_service_code
from pipelines.services.demo_faults import _STAGING, LIMITS, REQUESTS_PER_S, WORKERS
from pipelines.services.demo_release import recorded_digits
from pipelines.services.faulty_releases import (
    CRASHES,
    ERRORS,
    FAULTS,
    LABELS,
    SLOW,
    SOUND_IMAGES,
    SWAPPED,
    TAMPERED,
    Fault,
    faulty_code,
    flip_byte,
    write_swapped_digits,
)
from pipelines.settings import Settings
from serving.predictor import Predictor
from tests.conftest import MakeRun

IMAGES = recorded_digits()
PROJECT = Path(__file__).parents[3]
ASK = f"""
import sys
from pathlib import Path
from tests.unit.services.test_faulty_releases import answers
print(answers(Path(sys.argv[1]), Path(sys.argv[2]), {SOUND_IMAGES}), flush=True)
answers(Path(sys.argv[1]), Path(sys.argv[2]), {SOUND_IMAGES} + 1)
print("still there")
"""


def answers(root: Path, model: Path, count: int) -> list[str]:
    """What became of so many images in one process with the code: `quick`, `slow` or `failed`."""
    spec = importlib.util.spec_from_file_location("faulty_classification", root / "serving/classification.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    classifier = module.Classifier(
        Predictor(model),
        model_s=0.0,
        max_pixels=10_000,
        max_bytes=10_000,
        timeout_s=10.0,
        threads=1,
        observe=lambda *_: None,
    )

    async def ask(data: bytes) -> str:
        began = time.perf_counter()
        try:
            await classifier.classify(data)
        except RuntimeError:
            return "failed"
        return "slow" if time.perf_counter() - began >= 0.6 else "quick"

    async def ask_all() -> list[str]:
        return [await ask(data) for data in IMAGES[:count]]

    try:
        return asyncio.run(ask_all())
    finally:
        classifier.close()


@pytest.fixture
def model(make_run: MakeRun) -> Path:
    return make_run().model / "model.onnx"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faulty_code__of_each_fault__is_the_service_s_but_for_one_file(fault: Fault) -> None:
    sound = find_service_code()
    before = (sound.root / "serving/classification.py").read_bytes()
    with faulty_code(fault) as code:
        assert code.files == sound.files
        changed = {name for name in code.files if (code.root / name).read_bytes() != (sound.root / name).read_bytes()}
        assert changed == {"serving/classification.py"}
        assert code.git_sha == f"{sound.git_sha}+{fault.name}"
    assert (sound.root / "serving/classification.py").read_bytes() == before


def test_faulty_code__slow__holds_up_every_third_answer_after_the_sound_images(model: Path) -> None:
    with faulty_code(SLOW) as code:
        found = answers(code.root, model, SOUND_IMAGES + 6)
    assert found == ["quick"] * SOUND_IMAGES + ["quick", "quick", "slow"] * 2


def test_faulty_code__errors__fails_every_fifth_answer_after_the_sound_images(model: Path) -> None:
    with faulty_code(ERRORS) as code:
        found = answers(code.root, model, SOUND_IMAGES + 20)
    assert found == ["quick"] * SOUND_IMAGES + ["quick", "quick", "quick", "quick", "failed"] * 4


def test_faulty_code__crashes__ends_the_process_after_the_sound_images(model: Path) -> None:
    with faulty_code(CRASHES) as code:
        command = [sys.executable, "-c", ASK, str(code.root), str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert (done.stdout, done.returncode) == (f"{['quick'] * SOUND_IMAGES}\n", 1), done.stderr


@pytest.mark.parametrize("fault", [LABELS, TAMPERED], ids=lambda fault: fault.name)
def test_faulty_code__of_a_fault_that_is_not_the_service_s__answers_as_the_sound_one(fault: Fault, model: Path) -> None:
    with faulty_code(fault) as code:
        assert answers(code.root, model, SOUND_IMAGES + 20) == ["quick"] * (SOUND_IMAGES + 20)


def test_sound_images__their_number__lies_between_what_staging_asks_and_the_shortest_step_brings() -> None:
    # Golden images one by one, the timed ones, and a few that are refused.
    staging = _STAGING["deploy_to_staging.golden_images"] + _STAGING["deploy_to_staging.latency_requests"] + 20
    assert staging < SOUND_IMAGES
    # A worker may get half of what would be its share.
    assert LIMITS["model_release.min_step_s"] * REQUESTS_PER_S / WORKERS / 2 >= SOUND_IMAGES


def test_flip_byte__of_a_release__changes_one_byte_and_forgets_what_was_fetched(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    data = bytes(range(256)) * 40
    digest = hashlib.sha256(data).hexdigest()
    file = settings.releases_dir / f"{digest}.bento"
    fetched = tmp_path / "serving" / "cache" / "fetched" / digest
    for path in (file, fetched):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    file.chmod(0o400)
    flip_byte(settings, digest)
    changed = file.read_bytes()
    assert len(changed) == len(data)
    assert sum(before != after for before, after in zip(data, changed, strict=True)) == 1
    assert not fetched.exists()


def test_write_swapped_digits__all_digits__are_held_some_under_another_name(tmp_path: Path) -> None:
    write_swapped_digits(tmp_path)
    source = DigitsSource()
    found = 0
    for item in source.list_items():
        folder = tmp_path / SWAPPED.get(item.label, item.label)
        assert (folder / Path(item.key).name).read_bytes() == source.read(item, 2**20)
        found += 1
    assert found == len(list(tmp_path.glob("*/*"))) == 1797
    assert {SWAPPED[SWAPPED[label]] for label in SWAPPED} == set(SWAPPED)
