"""The candidate's alias: the latest version that staging has not turned away, as the ledger says."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.core.workspace import Workspace
from pipelines.params import Params
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import find_disagreements, list_versions
from pipelines.registry.registration import register
from pipelines.registry.staged_version import record_staging
from pipelines.settings import Settings

MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"


def stage(settings: Settings, version: int, *failed: str) -> None:
    record_staging(
        settings,
        MODEL,
        str(version),
        f"{version}" * 64,
        run_id=f"run-{version}",
        smoke_tests=12,
        golden_images=100,
        failed=failed,
        candidate_alias="candidate",
    )


def candidate(settings: Settings) -> int | None:
    """By MLflow; and the ledger agrees."""
    versions = list_versions(settings, MODEL)
    ledger = Ledger(settings.ledger_url)
    assert find_disagreements(MODEL, versions, ledger.entries(), candidate_alias="candidate") == []
    ledger.close()
    return next((version.version for version in versions if "candidate" in version.aliases), None)


def test_candidate__turned_away_in_staging__is_the_version_before_until_it_passes(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    found = []
    for version, failed in ((2, ("latency",)), (1, ("golden labels",)), (1, ()), (2, ()), (2, ("latency",))):
        stage(registry_settings, version, *failed)
        found.append(candidate(registry_settings))
    assert found == [1, None, 1, 2, 1]


def test_record_staging__same_outcome_twice__adds_one_row(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    for failed in ((), (), ("latency",), ("latency",), ()):
        stage(registry_settings, 1, *failed)
    ledger = Ledger(registry_settings.ledger_url)
    events = [row.event for row in ledger.entries(MODEL)]
    ledger.close()
    assert events == ["registered", "staged", "staging_failed", "staged"]


def test_register__again_after_staging_turned_it_away__leaves_the_alias_where_it_is(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    run = make_run("run-1", seed=1)
    register(registry_settings, registry_params, run)
    stage(registry_settings, 1, "latency")
    assert register(registry_settings, registry_params, run).alias_version is None
    assert candidate(registry_settings) is None
