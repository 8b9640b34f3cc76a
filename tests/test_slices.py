"""From slices to runs: every logit is computed once, and what runs say about who writes a row is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import drawn, packs
from hsap_compile.kernels import slices
from hsap_compile.kernels.slices import BAND, CAUSAL, FULL, MOD, Plan, Run, Span

HEADS, WIDTH = 4, 64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut happens within a few rows."""
    for name, value in (("STEP", 4), ("STAIR_TOKENS", (6, 40)), ("_STAIR_WORK", 0)):
        monkeypatch.setattr(slices, name, value)
    monkeypatch.setattr(slices, "_CALL_ELEMENTS", 24 * WIDTH)
    monkeypatch.setattr(slices, "_MOD_LOGITS", 2**7)
    monkeypatch.setattr(slices, "_MOD_MIN_QUERIES", 4)
    monkeypatch.setattr(slices, "_BAND_MIN_QUERIES", 4)


def planned(table: list[list[int]], own: int, remote: int) -> Plan:
    rows = torch.tensor(table, dtype=torch.int64).reshape(-1, 7)
    return slices.plan(rows, own, remote, HEADS, WIDTH)


def allowed(kind: int, nq: int, nk: int, lo: int, hi: int, first: int = 0) -> np.ndarray[Any, Any]:
    distance = np.arange(nq)[:, None] + first - np.arange(nk)
    if kind == CAUSAL:
        return distance >= 0
    return (lo <= distance) & (distance <= hi) if kind == BAND else np.ones((nq, nk), np.bool_)


def of_slices(table: list[list[int]], own: int, remote: int) -> np.ndarray[Any, Any]:
    """How often each logit is asked for."""
    pairs = np.zeros((own, own + remote), np.int64)
    for q0, q1, k0, k1, kind, lo, hi in table:
        pairs[q0:q1, k0:k1] += allowed(kind, q1 - q0, k1 - k0, lo, hi)
    return pairs


def of_runs(plan: Plan, own: int, remote: int) -> np.ndarray[Any, Any]:
    """How often each logit is computed."""
    pairs = np.zeros((own, own + remote), np.int64)
    for run in plan.runs:
        assert run.q.blocks == run.k.blocks
        assert next(iter(run.calls()))[2] == run.k.length, "the first call has all keys"
        for block in range(run.q.blocks):
            q, k = (s.start + block * s.step for s in (run.q, run.k))
            k += own if run.remote else 0
            for first, nq, nk in run.calls():
                pairs[q + first : q + first + nq, k : k + nk] += allowed(
                    run.kind, nq, nk, run.lo, run.hi, first
                )
    return pairs


def writers(runs: list[tuple[Run, Span]], rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """How many blocks write each row, and how many that say they are alone."""
    every, alone = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for _, span in runs:
        for block in range(span.blocks):
            at = slice(span.start + block * span.step, span.start + block * span.step + span.length)
            every[at] += 1
            alone[at] += span.alone
    return every, alone


@settings(max_examples=300, deadline=None)
@given(drawn() | packs())
@pytest.mark.usefixtures("small_blocks")
def test_every_logit_is_computed_as_often_as_it_is_asked_for(arguments: dict[str, Any]) -> None:
    table, own, remote = arguments["slices"], arguments["own"], arguments["remote"]
    plan = planned(table, own, remote)
    np.testing.assert_array_equal(of_runs(plan, own, remote), of_slices(table, own, remote))
    sides = [
        (plan.queries, [(run, run.q) for run in plan.runs], own),
        (plan.keys, [(run, run.k) for run in plan.runs if not run.remote], own),
        (plan.remote, [(run, run.k) for run in plan.runs if run.remote], remote),
    ]
    for cover, runs, rows in sides:
        every, alone = writers(runs, rows)
        zero = np.zeros(rows, np.int64)
        for start, stop in cover.holes:
            assert start < stop
            zero[start:stop] += 1
        assert cover.rows == rows
        assert ((alone == 0) | (every == 1)).all(), "alone, but written twice"
        np.testing.assert_array_equal(zero, alone == 0)  # each row has a value to start with, once
        assert cover.shared == any(not span.alone for _, span in runs)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_groups_of_blocks_do_not_overlap(length: int, step: int, blocks: int) -> None:
    span = Span(0, length, step, blocks, False)
    order = []
    for which, part in span.disjoint():
        assert part.blocks == 1 or part.step >= part.length
        order += [part.start + i * part.step for i in range(part.blocks)]
        assert len(range(*which.indices(blocks))) == part.blocks
        assert which.start * step == part.start
    assert sorted(order) == [i * step for i in range(blocks)]


def test_equal_documents_are_one_run() -> None:
    def runs(table: list[list[int]]) -> list[int]:
        return sorted(run.q.blocks for run in planned(table, 512, 512).runs)

    equal = [[s, s + 16, s, s + 16, CAUSAL, 0, 0] for s in range(0, 512, 16)]
    received = [[s, s + 16, 512 + s, 512 + s + 16, FULL, 0, 0] for s in range(0, 512, 32)]
    assert runs(equal) == [32]
    # every other document has remote keys: alone and merged documents are runs of their own
    assert runs(equal + received) == [16, 16, 16]
    assert runs([[0, 512, 0, 512, BAND, 0, 63]]) == [1, 7]  # the first block sees fewer keys
    assert runs([[0, 512, 0, 512, BAND, -(2**31), 2**31]]) == [1]
    assert runs([[0, 512, 0, 512, MOD, 0, 0]]) == [1]


@pytest.mark.parametrize(
    ("length", "documents", "width", "calls"),
    [
        (64, 8, 512, [(8, 1)]),
        (64, 20, 512, [(4, 1), (8, 1), (8, 1)]),  # 512 rows of 512 elements are a megabyte
        (127, 1, 512, [(1, 1)]),
        (128, 1, 512, [(1, 2)]),
        (500, 2, 512, [(1, 8), (1, 8)]),
        (1024, 1, 512, [(1, 16)]),
        (1025, 1, 512, [(1, 1)]),
        (300, 1, 64, [(1, 1)]),  # one head: calls cost more than they leave out
        (512, 1, 64, [(1, 8)]),
    ],
)
def test_calls_of_causal_documents(
    length: int, documents: int, width: int, calls: list[tuple[int, int]]
) -> None:
    table = [[s, s + length, s, s + length, CAUSAL, 0, 0] for s in range(0, length * documents, length)]
    plan = slices.plan(torch.tensor(table), length * documents, 0, 8, width)
    assert sorted((run.q.blocks, len(list(run.calls()))) for run in plan.runs) == calls


@pytest.mark.parametrize(
    "row",
    [
        [-1, 3, 0, 4, FULL, 0, 0],
        [0, 11, 0, 4, FULL, 0, 0],
        [0, 3, 8, 12, FULL, 0, 0],  # own and received keys in one slice
        [0, 3, 12, 16, FULL, 0, 0],
        [0, 3, -2, 2, CAUSAL, 0, 0],
        [0, 3, 0, 3, 4, 0, 0],
    ],
)
def test_a_slice_outside_of_the_rows_is_refused(row: list[int]) -> None:
    table = [[0, 0, 99, 99, FULL, 0, 0], [0, 10, 0, 10, CAUSAL, 0, 0], row]
    with pytest.raises(ValueError) as caught:
        planned(table, 10, 5)
    assert str(caught.value) == (
        f"hsap::attend: slice 2 is {row}, expected queries in [0, 10), "
        "keys in [0, 10) or [10, 15), kind 0 to 3; pass the table of these rows"
    )
