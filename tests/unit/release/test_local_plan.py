import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import Refusal
from pipelines.release.local_plan import PRODUCTION_PROCESSES, Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot


def ref(version: int) -> ReleaseRef:
    return ReleaseRef("shapes", str(version), f"{version:064x}", f"/releases/{version}.bento")


def released() -> Plan:
    return Plan().deployed(Slot.STABLE, ref(1), 1).routed(Routing()).deployed(Slot.CANARY, ref(2), 2)


def test_plan__first_release__becomes_stable_by_promotion() -> None:
    plan = Plan().deployed(Slot.CANARY, ref(1), 1)
    assert not plan.has_traffic(Slot.STABLE)
    promoted = plan.promoted()
    assert {slot: known.release for slot, known in promoted.slots.items()} == {Slot.STABLE: ref(1)}
    assert promoted.has_traffic(Slot.STABLE)
    assert promoted.promoted() == promoted


def test_promoted__twice__is_as_once() -> None:
    once = released().routed(Routing(100)).promoted()
    assert once.promoted() == once
    assert (once.slots[Slot.STABLE].release, once.slots[Slot.CANARY].release) == (ref(2), ref(1))
    assert once.slots[Slot.STABLE].process == released().slots[Slot.CANARY].process


def test_promoted__after_traffic_went_back__goes_back() -> None:
    back = released().promoted().routed(Routing(100)).promoted()
    assert (back.slots[Slot.STABLE].release, back.slots[Slot.CANARY].release) == (ref(1), ref(2))


def test_promoted__next_release_deployed__takes_the_place_of_the_one_kept_warm() -> None:
    plan = released().promoted().deployed(Slot.CANARY, ref(3), 1).promoted()
    assert (plan.slots[Slot.STABLE].release, plan.slots[Slot.CANARY].release) == (ref(3), ref(2))


def test_promoted__no_canary_and_no_traffic__is_refused() -> None:
    with pytest.raises(Refusal, match="holds no release"):
        Plan().deployed(Slot.STABLE, ref(1), 1).promoted()


@pytest.mark.parametrize(
    ("slot", "routing", "refused"),
    [
        (Slot.STABLE, Routing(0), True),
        (Slot.STABLE, Routing(99), True),
        (Slot.STABLE, Routing(100), False),
        (Slot.CANARY, Routing(0), False),
        (Slot.CANARY, Routing(1), True),
        (Slot.CANARY, Routing(0, mirror=True), True),
        (Slot.STAGING, Routing(50, mirror=True), False),
    ],
)
def test_plan__slot_with_traffic__is_neither_replaced_nor_removed(slot: Slot, routing: Routing, refused: bool) -> None:
    plan = released().routed(routing)
    for change in (lambda: plan.deployed(slot, ref(3), 1), lambda: plan.removed(slot)):
        if refused:
            with pytest.raises(Refusal, match="has traffic"):
                change()
        else:
            change()


@pytest.mark.parametrize("percent", [-1, 101])
def test_routed__no_percentage__is_refused(percent: int) -> None:
    with pytest.raises(Refusal, match="limit: 0 to 100 %"):
        released().routed(Routing(percent))


def test_routed__to_an_empty_slot__is_refused() -> None:
    plan = Plan().deployed(Slot.STABLE, ref(1), 1)
    for routing in (Routing(1), Routing(0, mirror=True)):
        with pytest.raises(Refusal, match="canary: holds no release"):
            plan.routed(routing)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("deployed"), st.sampled_from(Slot), st.integers(1, 4)),
        st.tuples(st.just("removed"), st.sampled_from(Slot)),
        st.tuples(st.just("routed"), st.integers(0, 100), st.booleans()),
        st.tuples(st.just("promoted")),
    ),
    max_size=12,
)


@given(CHANGES)
def test_plan__any_changes__traffic_only_goes_to_filled_slots_in_processes_of_their_own(
    changes: list[tuple[object, ...]],
) -> None:
    plan = Plan()
    for name, *arguments in changes:
        if name == "deployed":
            arguments = [arguments[0], ref(arguments[1]), 1]  # type: ignore[arg-type]
        elif name == "routed":
            arguments = [Routing(*arguments)]  # type: ignore[arg-type]
        try:
            plan = getattr(plan, str(name))(*arguments)
        except Refusal:
            continue
        processes = [deployment.process for deployment in plan.slots.values()]
        assert len(set(processes)) == len(processes)
        assert all(slot in plan.slots for slot in Slot if plan.has_traffic(slot))
        for slot in (Slot.STABLE, Slot.CANARY):
            assert slot not in plan.slots or plan.slots[slot].process in PRODUCTION_PROCESSES
        assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
        if name == "promoted":
            assert plan.promoted() == plan
