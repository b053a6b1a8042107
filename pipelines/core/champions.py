"""What MLflow's aliases have to agree with by the ledger: who serves, who served before, and who waits for that."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.core.hash_chain import Record

CHAMPION = "champion"
PREVIOUS = "previous"


@dataclass(frozen=True)
class Champions:
    """The two versions of a model that a release moves; None where there is none.

    Attributes:
        champion: serves.
        previous: served before it, and is what a rollback goes back to.
    """

    champion: str | None = None
    previous: str | None = None

    def as_aliases(self) -> dict[str, str | None]:
        """Alias to version."""
        return {CHAMPION: self.champion, PREVIOUS: self.previous}


def champions_by_ledger(records: Iterable[Record], model: str) -> Champions:
    """What the last promotion, or the last rollback of one, left behind.

    Their rows say in their evidence who is `champion` and `previous` from then on; a rollback of a canary, which moves
    neither, does not.  A promotion recorded without them makes its own version the champion.
    """
    found = Champions()
    for record in records:
        if record.model != model or record.event not in ("promoted", "rolled_back"):
            continue
        evidence = json.loads(record.evidence)
        if "champion" in evidence:
            found = Champions(evidence["champion"], evidence.get("previous"))
        elif record.event == "promoted":
            found = Champions(record.version, found.champion)
    return found


def candidate_by_ledger(records: Iterable[Record], model: str, present: Collection[int]) -> int | None:
    """The latest registered version that staging has not turned away; None where there is none.

    Not simply the one that was registered last: an old run that is registered again pushes no newer one aside.

    Args:
        records: of the ledger, in their order.
        model: name of the registered model.
        present: versions that the registry still has.
    """
    found: dict[int, bool] = {}
    for record in records:
        if record.model == model and record.event in ("registered", "staged", "staging_failed"):
            found[int(record.version)] = record.event != "staging_failed"
    return max((version for version, passed in found.items() if passed and version in present), default=None)


def aliases_by_ledger(
    records: Sequence[Record], model: str, present: Collection[int], candidate_alias: str
) -> dict[str, str | None]:
    """Alias to version as the ledger has them; None where an alias has to be absent.

    Args:
        records: of the ledger, in their order.
        model: name of the registered model.
        present: versions that the registry still has.
        candidate_alias: the alias of the version that may be released next.
    """
    candidate = candidate_by_ledger(records, model, present)
    return {
        candidate_alias: str(candidate) if candidate is not None else None,
        **champions_by_ledger(records, model).as_aliases(),
    }


def find_alias_disagreements(model: str, aliases: Mapping[str, str], expected: Mapping[str, str | None]) -> list[str]:
    """Where aliases point elsewhere than the ledger says, one sentence each.

    Args:
        model: name of the registered model.
        aliases: alias to version, as MLflow has them.
        expected: of `aliases_by_ledger`.
    """
    return [
        f"alias {alias} of {model} points at {_name(aliases.get(alias))}, the ledger's is {_name(version)}"
        for alias, version in expected.items()
        if aliases.get(alias) != version
    ]


def _name(version: str | None) -> str:
    return f"v{version}" if version is not None else "no version"
