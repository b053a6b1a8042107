"""A version's approvals and traffic steps as an auditor reads them: a line each; the ledger's rows hold the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def describe_approvals(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who approved, when, with which words, on whose request, having been shown what.

    Args:
        events: evidence of rows `approved`, with `occurred_at`.
    """
    facts = []
    for entry in events:
        facts.append(f"{entry.get('by', 'unknown')} {_minute(entry)}")
        if entry.get("comment"):
            facts.append(f"“{entry['comment']}”")
        if entry.get("requested_by"):
            facts.append(f"requested by {entry['requested_by']}")
        if entry.get("evidence_sha256"):
            facts.append(f"evidence {str(entry['evidence_sha256'])[:12]}")
    return facts


def describe_steps(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each step that was entered, with what the canary had shown in the step before it.

    Args:
        events: evidence of rows `traffic`, `promoted` and `rolled_back`, with `event` and `occurred_at`.
    """
    return [_describe_rollback(entry) if entry["event"] == "rolled_back" else _describe_step(entry) for entry in events]


def _describe_step(entry: Mapping[str, Any]) -> str:
    if entry.get("skipped"):
        return f"no canary {_minute(entry)}: {entry.get('reason') or 'its steps were skipped'}"
    entered = "promoted" if entry["event"] == "promoted" else _name(str(entry.get("step", "")))
    if not entered:
        entered = f"{entry.get('weight_percent', '?')} %"
    shown = _describe_evidence(entry, str(entry.get("after_step", "")))
    return f"{entered} {_minute(entry)}" + (f": {shown}" if shown else "")


def _describe_rollback(entry: Mapping[str, Any]) -> str:
    """The reason stands in full: it is what an auditor of a rollback came for."""
    left = _name(str(entry.get("from_step", "")))
    whence = f" from {left}" if left else ""
    who = f" by {entry['by']}" if entry.get("by") else ""
    moved = f", traffic moved in {entry['traffic_moved_s']} s" if "traffic_moved_s" in entry else ""
    reason = f": {entry['reason']}" if entry.get("reason") else ""
    return f"rolled back{whence} {_minute(entry)}{who}{moved}{reason}"


def _describe_evidence(entry: Mapping[str, Any], step: str) -> str:
    """`shadow 2,032 requests (900 probes), 68 s, 7/7 gates`; empty where nothing was watched."""
    if "requests" not in entry:
        return ""
    probes = f" ({entry['probes']:,} probes)" if entry.get("probes") else ""
    parts = [f"{_name(step)} {entry['requests']:,} requests{probes}".strip()]
    if "watched_s" in entry:
        parts.append(f"{entry['watched_s']:.0f} s")
    if gates := entry.get("gates"):
        passed = sum(str(text).startswith("promote") for text in gates.values())
        parts.append(f"{passed}/{len(gates)} gates")
    return ", ".join(parts)


def _name(step: str) -> str:
    return f"{step.removeprefix('canary@')} %" if step.startswith("canary@") else step


def _minute(entry: Mapping[str, Any]) -> str:
    return f"{datetime.fromisoformat(entry['occurred_at']).astimezone(UTC):%Y-%m-%d %H:%M}"
