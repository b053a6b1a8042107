"""The chain shows every edit, deletion, insertion and move before its last record."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.hash_chain import (
    GENESIS,
    Record,
    canonical_json,
    find_breaks,
    link,
    missing_anchors,
    sha256_text,
)

json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
events = st.tuples(st.text(min_size=1), st.text(), st.integers(1, 10**6).map(str), json_trees)


def build(steps: list[tuple[str, str, str, object]]) -> list[Record]:
    records: list[Record] = []
    for number, (event, model, version, evidence) in enumerate(steps):
        records.append(
            link(
                records[-1] if records else None,
                occurred_at=f"2026-11-01T00:00:{number:02d}.000000+00:00",
                key=f"{event}:{number}",
                model=model,
                version=version,
                event=event,
                evidence=evidence,
            )
        )
    return records


chains = st.lists(events, max_size=6).map(build)
long_chains = st.lists(events, min_size=2, max_size=6).map(build)


@given(chains)
def test_find_breaks__untouched_chain__has_none(records: list[Record]) -> None:
    assert find_breaks(records) == []


@given(long_chains, st.data())
def test_find_breaks__any_field_edited__is_found(records: list[Record], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(records) - 1))
    field = data.draw(st.sampled_from(list(Record.__dataclass_fields__)))
    old = getattr(records[index], field)
    new = data.draw((st.integers(1, 100) if isinstance(old, int) else st.text()).filter(lambda value: value != old))
    records[index] = replace(records[index], **{field: new})
    assert find_breaks(records)


@given(long_chains, st.data())
def test_find_breaks__edited_row_hashed_again__is_found_by_the_next(records: list[Record], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(records) - 2))
    forged = replace(records[index], version=records[index].version + "0")
    records[index] = replace(forged, row_sha256=forged.compute_sha256())
    assert find_breaks(records)


@given(long_chains, st.data())
def test_find_breaks__row_deleted_before_the_last__is_found(records: list[Record], data: st.DataObject) -> None:
    del records[data.draw(st.integers(0, len(records) - 2))]
    assert find_breaks(records)


@given(long_chains, st.data())
def test_find_breaks__rows_swapped__is_found(records: list[Record], data: st.DataObject) -> None:
    first, second = data.draw(st.lists(st.integers(0, len(records) - 1), min_size=2, max_size=2, unique=True))
    records[first], records[second] = records[second], records[first]
    assert find_breaks(records)


@given(long_chains, st.data())
def test_find_breaks__well_formed_row_inserted__is_found(records: list[Record], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(records) - 1))
    forged = link(
        records[index - 1] if index else None,
        occurred_at="2026-11-01T00:00:00.000000+00:00",
        key="forged",
        model="m",
        version="1",
        event="approved",
        evidence={},
    )
    records.insert(index, forged)
    assert find_breaks(records)


@given(long_chains, st.integers(1, 3))
def test_missing_anchors__tail_cut_off__names_the_noted_hash(records: list[Record], cut: int) -> None:
    noted = records[-1].row_sha256
    shortened = records[:-cut]
    assert find_breaks(shortened) == []  # the chain alone cannot know
    assert missing_anchors(shortened, [noted]) == [noted]
    assert missing_anchors(records, [noted]) == []


@given(json_trees)
def test_canonical_json__equal_trees__give_equal_text(tree: object) -> None:
    def turn_around(node: object) -> object:
        if isinstance(node, dict):
            return {key: turn_around(node[key]) for key in reversed(node)}
        return [turn_around(child) for child in node] if isinstance(node, list) else node

    assert canonical_json(tree) == canonical_json(turn_around(tree))


def test_canonical_json__not_a_number__is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"p": float("nan")})


def test_link__first_record__has_hashes_that_never_change() -> None:
    # A ledger written today must verify with tomorrow's code: these are the values, not a second computation of them.
    record = link(
        None,
        occurred_at="2026-11-01T02:00:00.000000+00:00",
        key="registered:m:1",
        model="m",
        version="1",
        event="registered",
        evidence={"b": 1, "a": "é"},
    )
    assert record.previous_sha256 == GENESIS
    assert record.evidence == '{"a":"\\u00e9","b":1}'
    assert record.evidence_sha256 == sha256_text(record.evidence)
    assert record.row_sha256 == "7e3d357d4f92243aede20ec9d24cb3745aac1544e92364744dde894fae6c9d30"


def test_find_breaks__rows_missing__are_named_by_number() -> None:
    records = build([("registered", "m", str(n), {}) for n in range(5)])
    assert "rows 2-3 missing" in find_breaks([records[0], *records[3:]])[0]
