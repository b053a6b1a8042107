"""The HTTPRoute as data: the one record of what the slots hold and how traffic is divided; pure.

The plan stands in an annotation of the route, the division in its rules: one write changes both, as one rename does on
a single machine.  Two more annotations say for a person which server is stable and which the canary.
https://gateway-api.sigs.k8s.io/reference/spec/#httproute
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.core.request_origins import SHADOW_HEADER
from pipelines.errors import TryLater
from pipelines.release.local_plan import Plan
from pipelines.release.targets import Routing, Slot

Tree = dict[str, Any]

PLAN = "perch/plan"
DEPLOYED_AT = "perch/deployed-at"
API_VERSION = "gateway.networking.k8s.io/v1"
SERVICE_PORT = 3000
_ROLES = {Slot.STABLE: "perch/stable", Slot.CANARY: "perch/canary"}
_NOBODY = "none"
# What the API server writes where a document says nothing: no difference.
_DEFAULTS = {"group": "", "kind": "Service", "weight": 1}


@dataclass(frozen=True)
class RouteRecord:
    """What the route says.

    Attributes:
        plan: slots and traffic, the process names being those of one machine (`serving-a`).
        deployed_at: process to the time when its release was deployed, in seconds since the epoch.
    """

    plan: Plan = field(default_factory=Plan)
    deployed_at: Mapping[str, float] = field(default_factory=dict)

    def changed_to(self, plan: Plan, now: float) -> RouteRecord:
        """With another plan; a process whose release is another one was deployed now."""
        before = {known.process: known.release for known in self.plan.slots.values()}
        times = {
            known.process: self.deployed_at.get(known.process, now)
            if before.get(known.process) == known.release
            else now
            for known in plan.slots.values()
        }
        return RouteRecord(plan, times)


def object_name(release: str, process: str) -> str:
    """Name of a process's Deployment and Service, e.g. `perch-serving-a`."""
    return f"{release}-{process}"


def route_name(release: str) -> str:
    """Name of the HTTPRoute."""
    return f"{release}-serving"


def nowhere_name(route: str) -> str:
    """Name of the Service without pods that a route leads to before anything is released.

    The Gateway API has a gateway answer 500 where a rule has no backend, and 503 where its Service has no endpoint.
    """
    return f"{route}-none"


def route_document(release: str, record: RouteRecord, live: Mapping[str, Any], owners: Iterable[Tree]) -> Tree:
    """The whole HTTPRoute for a record.

    Args:
        release: Helm's name of the installation.
        record: to write.
        live: the route as it is: gateways and host names are the installation's, and its version is what a write
            must find, or it is a conflict.
        owners: references to what the route goes away with.
    """
    plan, spec = record.plan, live.get("spec", {})
    servers = {slot: known.process.rpartition("-")[2] for slot, known in plan.slots.items()}
    metadata = live["metadata"]
    return {
        "apiVersion": API_VERSION,
        "kind": "HTTPRoute",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "resourceVersion": metadata["resourceVersion"],
            "annotations": {
                PLAN: json.dumps(plan.as_json(), sort_keys=True),
                DEPLOYED_AT: json.dumps(dict(record.deployed_at), sort_keys=True),
                **{key: servers.get(slot, _NOBODY) for slot, key in _ROLES.items()},
            },
            "ownerReferences": list(owners),
        },
        "spec": {
            **{key: spec[key] for key in ("parentRefs", "hostnames") if spec.get(key)},
            "rules": [_rule(release, plan)],
        },
    }


def read_record(live: Mapping[str, Any]) -> RouteRecord:
    """The record in a route; an empty one where nothing was ever released.

    Raises:
        TryLater: somebody has taken it away, or changed it so that it cannot be read.
    """
    annotations = live["metadata"].get("annotations") or {}
    written = annotations.get(PLAN)
    try:
        if written is None:
            nowhere = nowhere_name(live["metadata"].get("name", ""))
            rules = live.get("spec", {}).get("rules", ())
            if any(backend.get("name") != nowhere for rule in rules for backend in rule.get("backendRefs") or ()):
                raise ValueError("it is missing, though the route leads to services")
            return RouteRecord()
        times = {str(key): float(value) for key, value in json.loads(annotations.get(DEPLOYED_AT, "{}")).items()}
        return RouteRecord(Plan.from_json(json.loads(written)), times)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = live["metadata"].get("name", "")
        raise TryLater(
            f"the HTTPRoute {name}: its annotation {PLAN} cannot be read: {error}\n"
            f"  what to do: put back what it held (`kubectl get httproute {name} -o yaml`, or a backup); "
            "traffic goes where it went"
        ) from error


def read_routing(release: str, plan: Plan, live: Mapping[str, Any]) -> Routing:
    """How the route's rules really divide traffic.

    Whatever does not go to stable counts as the canary's, also where somebody else has sent it: then it is more than
    the rollout gives, and the watchdog takes it back.
    """
    if not plan.live:
        return plan.routing
    stable = object_name(release, plan.slots[Slot.STABLE].process) if Slot.STABLE in plan.slots else ""
    everything = to_stable = 0
    mirror = False
    for rule in live.get("spec", {}).get("rules") or ():
        for backend in rule.get("backendRefs") or ():
            weight = int(backend.get("weight", 1))
            everything += weight
            to_stable += weight if backend.get("name") == stable else 0
        mirror = mirror or any(known.get("type") == "RequestMirror" for known in rule.get("filters") or ())
    away = math.ceil(100 * (everything - to_stable) / everything) if everything else 100
    return Routing(away, mirror)


def find_edits(document: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Where a live route says something else than the document, which are somebody else's edits or an old record."""
    edits: list[str] = []
    for part in ("annotations", "ownerReferences"):
        wanted, found = document["metadata"][part], live["metadata"].get(part)
        if isinstance(wanted, dict):
            found = {key: value for key, value in (found or {}).items() if key.startswith("perch/")}
        if wanted != (found or type(wanted)()):
            edits.append(f"metadata.{part}")
    _compare(document["spec"], live.get("spec", {}), "spec", edits)
    return edits


def effective(release: str, record: RouteRecord, live: Mapping[str, Any]) -> RouteRecord:
    """The record with the division of traffic that the rules really make."""
    return replace(record, plan=replace(record.plan, routing=read_routing(release, record.plan, live)))


def is_taken(live: Mapping[str, Any], generation: int) -> bool:
    """Whether every gateway that the route names has said that it takes this generation of it, and finds its Services.

    A gateway that accepts a route but does not find what it leads to answers that share of the requests with 500.  One
    that says nothing of its Services (`ResolvedRefs`) is taken at its word.
    """
    accepted = [
        any(
            condition.get("type") == "Accepted" and _says(condition, "True", generation)
            for condition in parent.get("conditions") or ()
        )
        for parent in live.get("status", {}).get("parents") or ()
    ]
    return bool(accepted) and all(accepted) and not unresolved(live, generation)


def unresolved(live: Mapping[str, Any], generation: int) -> str:
    """What a gateway says of Services that it does not find; empty where it finds them."""
    for parent in live.get("status", {}).get("parents") or ():
        for condition in parent.get("conditions") or ():
            if condition.get("type") == "ResolvedRefs" and _says(condition, "False", generation):
                return f"{condition.get('reason', 'ResolvedRefs')}: {condition.get('message', '')}"
    return ""


def _says(condition: Mapping[str, Any], status: str, generation: int) -> bool:
    return condition.get("status") == status and int(condition.get("observedGeneration", 0)) >= generation


def _rule(release: str, plan: Plan) -> Tree:
    rule: Tree = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}]}
    if not plan.live:
        nowhere = {"group": "", "kind": "Service", "name": nowhere_name(route_name(release)), "port": SERVICE_PORT}
        return {**rule, "backendRefs": [{**nowhere, "weight": 1}]}
    percent = plan.routing.canary_percent
    shares = {Slot.STABLE: 100 - percent, Slot.CANARY: percent}
    # A client must not pass its requests off as copies.
    filters: list[Tree] = [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"remove": [SHADOW_HEADER]}}]
    if plan.routing.mirror:
        filters.append({"type": "RequestMirror", "requestMirror": {"backendRef": _backend(release, plan, Slot.CANARY)}})
    backends = [{**_backend(release, plan, slot), "weight": share} for slot, share in shares.items() if share]
    return {**rule, "filters": filters, "backendRefs": backends}


def _backend(release: str, plan: Plan, slot: Slot) -> Tree:
    name = object_name(release, plan.slots[slot].process)
    return {"group": "", "kind": "Service", "name": name, "port": SERVICE_PORT}


def _compare(wanted: Any, found: Any, place: str, edits: list[str]) -> None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            _compare(wanted.get(key, _DEFAULTS.get(key)), found.get(key, _DEFAULTS.get(key)), f"{place}.{key}", edits)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            _compare(one, other, f"{place}[{index}]", edits)
    elif wanted != found:
        edits.append(place)
