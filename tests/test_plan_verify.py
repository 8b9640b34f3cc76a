"""`Plan.verify` finds every kind of corruption and says which; brute force (`test_plan.check`) does too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile.plan import (
    BAND,
    CAUSAL,
    FULL,
    MOD,
    Attended,
    BrokenPlan,
    Exchange,
    Plan,
    RankTables,
    ReceiveLimit,
    make,
)
from test_plan import check, mesh_of, packed, wanted
from test_plan_properties import problem

MASKS = [packed(40, 4, 4, 4, 4), packed(40, 4, 4, 4, 4, hi=2)]
MESH = mesh_of(2, 2)
RANK = 1  # whose tables are changed
Change = Callable[[Any], Any]


def of_mask(**changes: Change) -> Callable[[RankTables], RankTables]:
    """Change fields of a rank's first mask or of its first exchange: each function gets a copy."""

    def change(t: RankTables) -> RankTables:
        first = t.masks[0]
        sent, *others = first.exchanges
        of_sent = {f.name for f in dataclasses.fields(Exchange)}
        new: dict[bool, dict[str, Any]] = {True: {}, False: {}}
        for name, f in changes.items():
            owner = sent if name in of_sent else first
            new[name in of_sent][name] = f(getattr(owner, name).copy())
        exchanges = (dataclasses.replace(sent, **new[True]), *others)
        changed = dataclasses.replace(first, exchanges=exchanges, **new[False])
        return dataclasses.replace(t, masks=(changed, *t.masks[1:]))

    return change


def of_rank(**changes: Change) -> Callable[[RankTables], RankTables]:
    def change(t: RankTables) -> RankTables:
        copies = {name: f(np.copy(getattr(t, name))) for name, f in changes.items()}
        return dataclasses.replace(t, **copies)

    return change


def put(at: Any, value: Any) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


def add(at: Any, value: Any) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] += value
        return array

    return change


def first_of(kind: int, *replacement: Change) -> Change:
    """Apply changes to the first slice of a kind."""

    def change(slices: np.ndarray) -> np.ndarray:
        i = int(np.flatnonzero((slices[:, 4] == kind) & (slices[:, 1] > slices[:, 0]))[0])
        for f in replacement:
            slices[i] = f(slices[i])
        return slices

    return change


BROKEN: dict[str, tuple[Callable[[RankTables], RankTables], str]] = {
    "a column twice": (of_rank(columns=put(0, 20)), "a column is on no rank or on several"),
    "a column fewer": (of_rank(columns=lambda x: x[:-1]), "holds too few or too many columns"),
    "columns out of order": (of_rank(columns=lambda x: x[::-1]), "rank 1: columns are out of order"),
    "order": (of_rank(order=add((1, 1), 1)), "rank 1: order does not lead back to the row"),
    "alone": (of_rank(alone=lambda x: int(x) + 1), "rank 1: columns are out of order"),
    "alone, far off": (of_rank(alone=lambda x: 99), "rank 1 holds too many alone columns"),
    "group columns": (
        of_rank(group_columns=lambda x: x[::-1]),
        "the group's columns differ from its members'",
    ),
    "head splits": (of_rank(head_splits=add((0, 0), 1)), "the head exchange has other counts than columns"),
    "splits": (of_mask(splits=add((0, 3), -1)), "rank 1 and rank 3 disagree on how many rows go there"),
    "rows to no peer": (
        of_mask(splits=add((0, 2), 1)),
        "rank 1 and rank 2 disagree on how many rows go there",
    ),
    "send length": (of_mask(send_rows=lambda x: np.append(x, 0)), "send_rows has another length than splits"),
    "remote length": (of_mask(remote=lambda x: x[:-1]), "remote has another length than splits"),
    "send order": (of_mask(send_rows=lambda x: x[::-1]), "rank 3 takes rows of rank 1 for others"),
    "send a row not held": (of_mask(send_rows=put(0, 99)), "rank 1 sends rows that it does not hold"),
    "a received row": (of_mask(remote=add((0, 1), 1)), "rank 1 takes rows of rank 3 for others"),
    "a received row beyond the row": (
        of_mask(remote=add(0, (-1, MASKS[0].tokens))),
        "rank 1 receives rows that are none",
    ),
    "a slice out of bounds": (
        of_mask(slices=add((0, 1), 99)),
        "rank 1, shared rows: a slice is out of",
    ),
    "an unknown kind": (of_mask(slices=put((0, 4), 7)), "a slice is out of bounds"),
    "not square": (of_mask(slices=first_of(CAUSAL, add(1, -1))), "a slice is out of bounds"),
    "a smaller slice": (of_mask(slices=first_of(FULL, add(1, -1))), "hold more or fewer pairs than the mask"),
    "no slice": (of_mask(slices=lambda x: x[1:]), "hold more or fewer pairs than the mask allows"),
    "a slice twice": (
        of_mask(slices=lambda x: np.append(x, x[:1], axis=0)),
        "two slices hold the same pairs",
    ),
    "overlapping slices": (
        of_mask(slices=lambda x: np.append(x, [[*x[0, :2], x[0, 2], x[0, 2] + 1, FULL, 0, 0]], axis=0)),
        "two slices hold the same pairs",
    ),
    "full for causal": (of_mask(slices=first_of(CAUSAL, put(4, FULL))), "holds pairs that the mask forbids"),
    "causal for full": (
        of_mask(slices=first_of(FULL, lambda x: [x[0], x[0] + 1, x[2], x[2] + 1, CAUSAL, 0, 0])),
        "hold more or fewer pairs than the mask allows",
    ),
    "an empty band": (of_mask(slices=first_of(CAUSAL, put(slice(4, 7), (BAND, 50, 60)))), "forbids"),
    "a formula for causal": (of_mask(slices=first_of(CAUSAL, put(4, MOD))), ""),
    "alone slice": (of_mask(alone_slices=add((0, 1), 1)), "rank 1, alone rows: a slice is out of bounds"),
    "no alone slice": (of_mask(alone_slices=lambda x: x[1:]), "alone rows: slices hold more or fewer pairs"),
    "alone slice full": (
        of_mask(alone_slices=put((0, 4), FULL)),
        "alone rows: a slice holds pairs that the mask forbids",
    ),
}


STAGED = {
    "a stage fewer": (
        lambda m: dataclasses.replace(m, exchanges=m.exchanges[:-1]),
        "rank 1 exchanges rows more or less often than others",
    ),
    "stages of one rank in another order": (
        lambda m: dataclasses.replace(m, exchanges=m.exchanges[::-1]),
        "mask 0, stage 0: rank 1 takes rows of rank 0 for others",
    ),
    "a slice over two stages": (
        lambda m: dataclasses.replace(m, slices=across(m.slices, 20 + len(m.exchanges[0].remote))),
        "rank 1, shared rows: a slice is out of bounds",
    ),
}


def across(slices: np.ndarray, boundary: int) -> np.ndarray:
    """The first slice whose keys end at the boundary has one key more."""
    i = int(np.flatnonzero(slices[:, 3] == boundary)[0])
    slices = slices.copy()
    slices[i, 3] += 1
    return slices


@pytest.mark.parametrize("name", STAGED)
def test_verify_of_stages(name: str) -> None:
    change, message = STAGED[name]
    plan = make([packed(40)], mesh_of(2, 1), "contiguous", limit=ReceiveLimit(4, 5))
    plan.verify()
    tables = tables_of(plan)
    assert [len(e.remote) for e in tables[1].masks[0].exchanges] == [5, 5, 5, 5]
    tables[1] = dataclasses.replace(tables[1], masks=(change(tables[1].masks[0]),))
    with pytest.raises(BrokenPlan, match=message):
        plan.verify(tables)


def tables_of(plan: Plan) -> list[RankTables]:
    return [plan.tables(r) for r in range(plan.placement.mesh.size)]


def test_the_example_has_all_levels():
    plan = make(MASKS, MESH)
    tables = tables_of(plan)
    assert all(t.alone == 4 for t in tables)
    assert plan.masks[0].rows_sent[1, 3] > 0 and plan.masks[0].rows_sent[3, 1] > 0
    assert {FULL, CAUSAL} <= set(tables[RANK].masks[0].slices[:, 4])
    plan.verify()
    check(MASKS, MESH, plan, tables)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_found(name):
    change, text = BROKEN[name]
    plan = make(MASKS, MESH)
    tables = tables_of(plan)
    tables[RANK] = change(tables[RANK])
    if not text:  # a formula decides the same: nothing is wrong
        return plan.verify(tables)
    with pytest.raises(BrokenPlan, match=text) as error:
        plan.verify(tables)
    assert all(line in str(error.value) for line in ("plan: ", "\n  got: ", "\n  wanted: ", "\n  do: "))
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        check(MASKS, MESH, plan, tables)


def test_a_query_without_keys_may_not_be_in_a_slice():
    mask = Attended(1, 24, lo=0, key_valid=np.arange(24)[None] >= 6, residual=True)
    plan = make([mask], mesh_of(1, 1))
    tables = tables_of(plan)
    assert tables[0].masks[0].slices[0, :5].tolist() == [6, 24, 6, 24, MOD]
    tables[0] = of_mask(slices=put((0, 0), 0))(tables[0])
    with pytest.raises(BrokenPlan, match="a query that attends to nothing is in a slice"):
        plan.verify(tables)
    tables[0] = of_mask(slices=put((0, slice(0, 5)), (6, 24, 6, 24, FULL)))(tables[0])
    with pytest.raises(BrokenPlan, match="a slice has no formula, but the mask has"):
        plan.verify(tables)


@settings(max_examples=200, deadline=None)
@given(problem(), st.data())
def test_any_changed_number_of_a_slice_is_found(drawn, data):
    """Whatever number of whatever slice is changed: verify finds it whenever brute force does."""
    masks, mesh, kind = drawn
    plan = make(masks, mesh, kind)
    tables = tables_of(plan)
    rank = data.draw(st.integers(0, mesh.size - 1))
    name = data.draw(st.sampled_from(["slices", "alone_slices"]))
    real = getattr(tables[rank].masks[0], name)
    real = real[real[:, 1] > real[:, 0]]
    if len(real) == 0:
        return
    at = data.draw(st.integers(0, len(real) - 1)), data.draw(st.integers(0, 6))
    tables[rank] = of_mask(**{name: add(at, data.draw(st.sampled_from([-3, -1, 1, 2])))})(tables[rank])
    try:
        plan.verify(tables)
    except BrokenPlan:
        return
    slices = getattr(tables[rank].masks[0], name)
    assert covered(tables[rank], name, masks[0], slices) == covered(plan.tables(rank), name, masks[0], real)


def covered(t: RankTables, name: str, mask: Attended, slices: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of rows that slices hold, counted one by one: those of a formula as the labels decide."""
    columns = t.columns[: t.alone] if name == "alone_slices" else t.group_columns
    rows = [(b, int(c)) for b in range(mask.batch) for c in columns]
    keys = rows + [tuple(x) for x in t.masks[0].remote.tolist()]
    allowed, pairs = wanted(mask), []
    for q0, q1, k0, k1, kind, lo, hi in slices.tolist():
        for i in range(q1 - q0):
            for j in range(k1 - k0):
                (b, q), (_, k) = rows[q0 + i], keys[k0 + j]
                inside = {FULL: True, CAUSAL: j <= i, BAND: lo <= i - j <= hi, MOD: bool(allowed[b, q, k])}
                if inside[kind]:
                    pairs.append((q0 + i, k0 + j))
    return sorted(pairs)


def test_digest():
    """Equal for equal input; another for other documents, masks, meshes and placements."""
    mask = packed(40, 4, 4, 4, 4)
    other = [
        make([packed(40, 4, 4, 4, 5)], MESH),
        make([packed(40, 4, 4, 5, 3)], MESH),
        make([packed(40, 4, 4, 4, 4, hi=30)], MESH),
        make([packed(40, 4, 4, 4, 4, soft=True)], MESH),
        make([mask, mask], MESH),
        make([mask], MESH, limit=ReceiveLimit(2, 1)),
        make([mask], mesh_of(4, 1)),
        make([mask], MESH, "contiguous"),
    ]
    digests = [make([mask], MESH).digest(), *(plan.digest() for plan in other)]
    assert len(set(digests)) == len(digests)
    assert digests[0] == make([mask], MESH).digest() and 0 <= digests[0] < 2**32


def test_capacity():
    plan = make(MASKS, MESH)
    received = [[int(t.masks[i].splits[1].sum()) for t in tables_of(plan)] for i in range(2)]
    assert [m.capacity for m in plan.masks] == [max(x) for x in received] and min(received[0]) > 0
