import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import TryLater
from pipelines.release.kubernetes_route import (
    DEPLOYED_AT,
    PLAN,
    RouteRecord,
    effective,
    find_edits,
    is_taken,
    nowhere_name,
    read_record,
    read_routing,
    route_document,
    route_name,
    unresolved,
)
from pipelines.release.local_plan import Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot

OWNERS = [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "perch-serving-a", "uid": "7"}]
PARENTS = [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "perch"}]


def ref(version: int) -> ReleaseRef:
    return ReleaseRef("shapes", str(version), f"{version:064x}", f"s3://releases/{version}.bento")


def laid_out() -> dict[str, Any]:
    """As the chart makes it: gateways, and a rule that leads nowhere."""
    return {
        "metadata": {"name": "perch-serving", "namespace": "ml", "resourceVersion": "1", "generation": 1},
        "spec": {"parentRefs": PARENTS, "hostnames": ["perch.example.org"], "rules": [{}]},
    }


def released() -> Plan:
    return Plan().deployed(Slot.STABLE, ref(1), 0).routed(Routing()).deployed(Slot.CANARY, ref(2), 0)


def written(plan: Plan, live: dict[str, Any] | None = None) -> dict[str, Any]:
    """The route as the API server would keep it, with what it fills in."""
    record = RouteRecord().changed_to(plan, 1000.0)
    document = copy.deepcopy(route_document("perch", record, live or laid_out(), OWNERS))
    for rule in document["spec"]["rules"]:
        for backend in rule.get("backendRefs", ()):
            del backend["group"]
    return document


plans = st.builds(
    lambda percent, mirror: released().routed(Routing(percent, mirror)),
    st.integers(0, 100),
    st.booleans(),
)


@given(plans)
def test_route_document__any_routing__is_read_back_as_it_was(plan: Plan) -> None:
    live = written(plan)
    assert read_record(live).plan == plan
    assert read_routing("perch", plan, live) == plan.routing
    assert find_edits(route_document("perch", read_record(live), live, OWNERS), live) == []
    rule = live["spec"]["rules"][0]
    assert sum(backend["weight"] for backend in rule["backendRefs"]) == 100
    assert rule["filters"][0] == {
        "type": "RequestHeaderModifier",
        "requestHeaderModifier": {"remove": ["x-perch-shadow"]},
    }


def test_route_document__ten_percent_and_copies__names_the_two_services() -> None:
    live = written(released().routed(Routing(10, mirror=True)))
    rule = live["spec"]["rules"][0]
    assert [(known["name"], known["port"], known["weight"]) for known in rule["backendRefs"]] == [
        ("perch-serving-a", 3000, 90),
        ("perch-serving-b", 3000, 10),
    ]
    assert rule["filters"][1]["requestMirror"]["backendRef"]["name"] == "perch-serving-b"
    assert live["spec"]["parentRefs"] == PARENTS
    annotations = live["metadata"]["annotations"]
    assert (annotations["perch/stable"], annotations["perch/canary"]) == ("a", "b")


def test_route_document__promoted__changes_roles_and_weights_in_one_document() -> None:
    live = written(released().promoted())
    annotations = live["metadata"]["annotations"]
    assert (annotations["perch/stable"], annotations["perch/canary"]) == ("b", "a")
    assert [known["name"] for known in live["spec"]["rules"][0]["backendRefs"]] == ["perch-serving-b"]


def test_read_record__nothing_released__is_an_empty_plan_that_leads_nowhere() -> None:
    live = laid_out()
    assert read_record(live) == RouteRecord()
    document = route_document("perch", RouteRecord(), live, ())
    # A Service without pods, for which gateways answer 503; a rule without a backend is answered with 500.
    (backend,) = document["spec"]["rules"][0]["backendRefs"]
    assert backend["name"] == nowhere_name(route_name("perch")) == "perch-serving-none"
    kept = {**live, "spec": document["spec"]}
    assert read_record(kept) == RouteRecord()
    assert document["metadata"]["annotations"]["perch/canary"] == "none"
    assert document["metadata"]["resourceVersion"] == "1"


@pytest.mark.parametrize("broken", [None, "{", "[]", '{"slots": {}}', '{"slots": 3, "routing": {}}'])
def test_read_record__plan_taken_away_or_damaged__is_not_taken_for_nothing_released(broken: str | None) -> None:
    live = written(released())
    live["metadata"]["annotations"][PLAN] = broken
    if broken is None:
        del live["metadata"]["annotations"][PLAN]
    with pytest.raises(TryLater, match="perch/plan cannot be read"):
        read_record(live)


@pytest.mark.parametrize(
    ("weights", "seen"),
    [
        ({"perch-serving-a": 100, "perch-serving-b": 0}, 0),
        ({"perch-serving-a": 0, "perch-serving-b": 1}, 100),
        ({"perch-serving-a": 999, "perch-serving-b": 1}, 1),  # a little is not nothing
        ({"perch-serving-a": 1, "somebody-else": 1}, 50),
        ({}, 100),
    ],
)
def test_read_routing__weights_edited_by_hand__count_as_the_canarys_what_stable_does_not_get(
    weights: dict[str, int], seen: int
) -> None:
    live = written(released().routed(Routing(10)))
    live["spec"]["rules"][0]["backendRefs"] = [{"name": name, "weight": weight} for name, weight in weights.items()]
    assert effective("perch", read_record(live), live).plan.routing == Routing(seen)
    assert find_edits(route_document("perch", read_record(live), live, OWNERS), live) != []


def test_find_edits__others_changes__are_named_and_the_servers_own_defaults_are_not() -> None:
    live = written(released().routed(Routing(10)))
    wanted = route_document("perch", read_record(live), live, OWNERS)
    rule = live["spec"]["rules"][0]
    for backend in rule["backendRefs"]:
        backend |= {"group": "", "kind": "Service"}
    live["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = "{}"
    assert find_edits(wanted, live) == []
    rule["timeouts"] = {"request": "1s"}
    rule["filters"].pop()
    live["metadata"]["annotations"]["perch/stable"] = "b"
    assert find_edits(wanted, live) == ["metadata.annotations", "spec.rules[0].filters", "spec.rules[0].timeouts"]


def test_changed_to__another_release__was_deployed_now_and_the_rest_when_it_was() -> None:
    first = RouteRecord().changed_to(released(), 1000.0)
    assert first.deployed_at == {"serving-a": 1000.0, "serving-b": 1000.0}
    second = first.changed_to(first.plan.deployed(Slot.CANARY, ref(3), 0), 2000.0)
    assert second.deployed_at == {"serving-a": 1000.0, "serving-b": 2000.0}
    assert second.changed_to(second.plan.promoted(), 3000.0).deployed_at == second.deployed_at
    annotations = route_document("perch", second, laid_out(), ())["metadata"]["annotations"]
    assert json.loads(annotations[DEPLOYED_AT]) == second.deployed_at


def test_is_taken__gateways__all_have_to_have_seen_this_generation() -> None:
    def parent(generation: int, status: str = "True") -> dict[str, Any]:
        return {"conditions": [{"type": "Accepted", "status": status, "observedGeneration": generation}]}

    assert not is_taken({}, 1)
    assert not is_taken({"status": {"parents": []}}, 1)
    assert is_taken({"status": {"parents": [parent(3), parent(4)]}}, 3)
    assert not is_taken({"status": {"parents": [parent(3), parent(2)]}}, 3)
    assert not is_taken({"status": {"parents": [parent(3, "False")]}}, 3)


@pytest.mark.parametrize(
    ("status", "generation", "is_found"), [("True", 3, True), ("False", 3, False), ("False", 2, True)]
)
def test_is_taken__gateway_does_not_find_a_service__is_not_in_force_and_says_why(
    status: str, generation: int, is_found: bool
) -> None:
    refs = {"type": "ResolvedRefs", "status": status, "observedGeneration": generation}
    refs |= {"reason": "BackendNotFound", "message": "no Service perch-serving-b"} if status == "False" else {}
    accepted = {"type": "Accepted", "status": "True", "observedGeneration": 3}
    live = {"status": {"parents": [{"conditions": [accepted]}, {"conditions": [accepted, refs]}]}}
    assert is_taken(live, 3) == is_found
    assert unresolved(live, 3) == ("" if is_found else "BackendNotFound: no Service perch-serving-b")
