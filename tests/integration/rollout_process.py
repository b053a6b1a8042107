"""`python -m tests.integration.rollout_process engine|watchdog FILE`: one of the two in a process that a test kills.

FILE lies in a folder in which the test talks to it further: `hold` keeps the engine at the door of the promotion, which
it says by `held`; `clock` holds the seconds by which this process's clock is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_real_time = time.time


def main(role: str, file: Path) -> None:
    """Be an engine until the rollout is over, or a watchdog."""
    told = json.loads(file.read_text())
    clock = file.with_name("clock")

    def wrong_time() -> float:
        with suppress(FileNotFoundError, ValueError):
            return _real_time() + float(clock.read_text())
        return _real_time()

    time.time = wrong_time  # before anything else is imported that takes the function itself
    from pipelines.errors import TryLater
    from pipelines.release.engine import ReleaseEngine
    from pipelines.release.targets import ReleaseTarget
    from pipelines.release.watchdog import Watchdog

    class Door:
        """The target, with a door before its promotion."""

        def __init__(self, target: ReleaseTarget) -> None:
            self._target = target

        def __getattr__(self, name: str) -> Any:
            return getattr(self._target, name)

        def promote(self) -> None:
            while file.with_name("hold").exists():
                file.with_name("held").touch()
                time.sleep(0.02)
            self._target.promote()

    world = build_world(told, Door, patient=role == "engine")
    if role == "watchdog":
        Watchdog(world, lambda title, text: print(title, text, sep="\n", flush=True)).run(threading.Event(), 0.5)
    engine = ReleaseEngine(world, f"engine-{os.getpid()}")
    while True:
        try:
            if engine.advance(told["rollout"]).is_finished:
                return
        except TryLater as error:
            print(error, flush=True)
        time.sleep(0.3)


def build_world(told: Mapping[str, Any], door: Any, *, patient: bool) -> Any:
    """The world of the test: real target, database, aliases and gates; an approval that was given already."""
    from pipelines.predictions.mirrored import compare_answers
    from pipelines.predictions.stores import open_store
    from pipelines.registry.aliases import RegistryAliases
    from pipelines.registry.ledger import Ledger
    from pipelines.registry.rollout_table import RolloutTable
    from pipelines.release.approvals import Response
    from pipelines.release.gates import Gates
    from pipelines.release.local_target import LocalTarget
    from pipelines.release.policy import PromotionPolicy
    from pipelines.release.world import World
    from pipelines.settings import Settings
    from tests.unit.release.simulated_release import RecordedAnswers

    settings = Settings(project_dir=told["project"], home=told["home"], mlflow_uri=told["mlflow"])
    answers = RecordedAnswers()
    answers.answers.append(
        Response("approver", datetime.fromisoformat(told["answered_at"]), True, told["evidence"], "fine")
    )

    def compare(state: Any) -> Any:
        since = datetime.fromtimestamp(state.entered_at, UTC)
        return compare_answers(open_store(settings), state.release.model, "1", "2", since)

    glance = RolloutTable(settings.ledger_url, patient=False)
    return World(
        target=door(LocalTarget(settings)),
        rollouts=RolloutTable(settings.ledger_url) if patient else glance,
        glance=glance,
        ledger=Ledger(settings.ledger_url),
        aliases=RegistryAliases(settings),
        approvals=answers,
        policy=PromotionPolicy(),
        evidence=lambda release, plan: told["evidence"],
        judge=Gates(compare),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
