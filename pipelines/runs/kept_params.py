"""What a run keeps of `params.yaml` from its opening, though the file says otherwise by now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import flatten, load_params
from pipelines.runs.workspaces import resolve_params
from pipelines.settings import Settings

_SHOWN = 5


def describe_kept_params(settings: Settings, workspace: Workspace) -> str:
    """Say which parameters of an opened run the project's `params.yaml` has otherwise now, and what to do.

    Returns:
        Empty where none differs, or where the file cannot be read: then it did not make the reader think it was.
    """
    run = json.loads(workspace.run_file.read_text(encoding="utf-8"))
    try:
        kept_params = load_params(workspace.params_file)
        # With the run's own values and its date, which the file need not name.
        now_params = resolve_params(settings, run["overrides"], as_of=kept_params.data_ingestion.as_of)
    except Refusal:
        return ""
    kept, now = (flatten(params.model_dump(mode="json")) for params in (kept_params, now_params))
    changed = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
    if not changed:
        return ""
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (
        f"run {run['run_id']} keeps {_list(kept, changed)}{more} from its opening; "
        f"params.yaml has {_list(now, changed)}{more} now: "
        "to use that, start a new run (`perch run` without --run, or with another id)"
    )


def _list(flat: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={flat[key]}" if key in flat else f"no {key}" for key in keys[:_SHOWN])
