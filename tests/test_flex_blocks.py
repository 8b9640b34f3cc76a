"""Block tables against brute force: what every block of every slice table may and must say."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile.kernels import blocks
from hsap_compile.kernels.attention import BAND, CAUSAL, FULL, MOD
from hsap_compile.kernels.blocks import ABSENT, BLOCK_TABLES, block_tables, rank_tables
from hsap_compile.plan import Exchange, MaskTables, RankTables

UNBOUNDED = 2**31


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    at = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=5))})
    return list(zip(at, at[1:], strict=False))


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Slices that allow no pair twice, query rows, key rows."""
    rows_q, rows_k = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    found = [[0, 0, 0, 0, FULL, 0, 0]]
    for k0, k1 in cuts(draw, rows_k):
        for q0, q1 in cuts(draw, rows_q):
            kind = draw(st.sampled_from([None, FULL, CAUSAL, BAND, MOD]))
            sides = st.integers(-30, 30) | st.sampled_from([-UNBOUNDED, UNBOUNDED])
            lo, hi = sorted(draw(st.tuples(sides, sides)))
            n = min(q1 - q0, k1 - k0)
            if kind == CAUSAL:
                found.append([q0, q0 + n, k0, k0 + n, kind, 0, 0])
            elif kind is not None:
                found.append([q0, q1, k0, k1, kind, lo, hi])
    return np.array(sorted(found), np.int64), rows_q, rows_k


def brute(slices: np.ndarray, rows_q: int, rows_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(surely allowed, perhaps allowed) for every pair."""
    sure, perhaps = np.zeros((rows_q, rows_k), bool), np.zeros((rows_q, rows_k), bool)
    for q0, q1, k0, k1, kind, lo, hi in slices.tolist():
        distance = np.arange(q1 - q0)[:, None] - np.arange(k1 - k0)
        allowed = {
            FULL: distance == distance,
            CAUSAL: distance >= 0,
            BAND: (lo <= distance) & (distance <= hi),
            MOD: distance == distance,
        }[kind]
        perhaps[q0:q1, k0:k1] |= allowed
        if kind != MOD:
            sure[q0:q1, k0:k1] |= allowed
    return sure, perhaps


def dense(found: Any, prefix: str, rows: int, columns: int) -> np.ndarray:
    """The blocks that a table lists."""
    number, indices = found[f"{prefix}_num_blocks"], found[f"{prefix}_indices"]
    assert number.dtype == indices.dtype == np.int32
    assert number.shape == (1, 1, rows) and indices.shape[:3] == (1, 1, rows) and indices.shape[3] >= 2
    result = np.zeros((rows, columns), int)
    for row in range(rows):
        listed = indices[0, 0, row, : number[0, 0, row]]
        assert (np.diff(listed) > 0).all() and (indices[0, 0, row, number[0, 0, row] :] == 0).all()
        result[row, listed] = 1
    return result


def check(slices: np.ndarray, rows_q: int, rows_k: int, block_q: int, block_k: int) -> None:
    found = block_tables(slices, rows_q, rows_k, block_q, block_k)
    assert set(found) == set(BLOCK_TABLES)
    n_q, n_k = max(2, -(-rows_q // block_q)), max(2, -(-rows_k // block_k))
    partial, full = (dense(found, p, n_q, n_k) for p in ("kv", "full_kv"))
    assert np.array_equal(partial.T, dense(found, "q", n_k, n_q))
    assert np.array_equal(full.T, dense(found, "full_q", n_k, n_q))
    assert not (partial & full).any()
    sure, perhaps = brute(slices, rows_q, rows_k)

    def blockwise(pairs: np.ndarray, outside: bool) -> np.ndarray:
        padded = np.full((n_q * block_q, n_k * block_k), outside)
        padded[:rows_q, :rows_k] = pairs
        padded[:, rows_k:] = False  # a block that reaches beyond the keys is never full
        return padded.reshape(n_q, block_q, n_k, block_k).transpose(0, 2, 1, 3).reshape(n_q, n_k, -1)

    queries = np.arange(n_q)[:, None] * block_q < rows_q
    whole = blockwise(sure, True).all(2) & queries
    assert np.array_equal(full, whole)
    assert np.array_equal(partial, blockwise(perhaps, False).any(2) & ~whole)


@settings(max_examples=400, deadline=None)
@given(tables(), st.sampled_from([(8, 8), (4, 16), (16, 4), (1, 1), (128, 128)]))
def test_equals_brute_force(drawn: tuple[np.ndarray, int, int], block: tuple[int, int]) -> None:
    check(*drawn, *block)


@settings(max_examples=100, deadline=None)
@given(tables(), tables())
def test_own_received_and_alone_rows(
    drawn: tuple[np.ndarray, int, int], apart: tuple[np.ndarray, int, int]
) -> None:
    slices, own, keys = drawn
    batch, columns, n_a = 2, np.arange(own // 2) * 3, min(apart[1:]) // 2
    own, alone = batch * len(columns), np.arange(n_a) + 100
    # keys of the drawn slices beyond the own rows are received
    slices = slices[((slices[:, 3] <= own) | (slices[:, 2] >= own)) & (slices[:, 1] <= own)]
    alone_slices = apart[0][(apart[0][:, [1, 3]] <= batch * n_a).all(1)]
    received = max(0, keys - own)
    remote = np.stack((np.arange(received) % 2, 100 + np.arange(received)), axis=1)
    nothing = np.zeros((0,), np.int64)
    mask = MaskTables((Exchange(nothing, nothing, remote),), slices, alone_slices)
    rank = RankTables(np.concatenate((alone, columns)), n_a, columns, nothing, nothing, (mask,))
    found = rank_tables(rank, 0, batch)
    mine = slices[:, 2] < own
    theirs = slices[~mine].copy()
    theirs[:, 2:4] -= own
    grid = np.array([(b, c) for b in range(batch) for c in columns]).reshape(-1, 2)
    grid_alone = np.array([(b, c) for b in range(batch) for c in alone]).reshape(-1, 2)
    parts = {
        "own": (slices[mine], own, grid),
        "remote": (theirs, own, remote),
        "alone": (alone_slices, batch * n_a, grid_alone),
    }
    assert set(found) == {f"{p}_{n}" for p in parts for n in ("rows", *BLOCK_TABLES)}
    for part, (of_part, queries, rows) in parts.items():
        for name, table in block_tables(of_part, queries, len(rows)).items():
            assert np.array_equal(found[f"{part}_{name}"], table)
        padded = found[f"{part}_rows"]
        assert len(padded) % blocks.BLOCK == 0 and len(padded) >= 2 * blocks.BLOCK
        assert np.array_equal(padded[: len(rows)], rows)
        assert (padded[len(rows) :] == [ABSENT, 0]).all()


def documents(rows: int, count: int) -> np.ndarray:
    cut = np.sort(np.random.default_rng(0).choice(rows - 1, count - 1, replace=False)) + 1
    edges = np.concatenate(([0], cut, [rows]))
    a, b, zero = edges[:-1], edges[1:], np.zeros(count, np.int64)
    return np.stack((a, b, a, b, zero + CAUSAL, zero, zero), axis=1)


@pytest.mark.parametrize("count", [1, 1500])
def test_is_fast(count: int) -> None:
    slices = documents(2**16, count)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        found = block_tables(slices, 2**16, 2**16)
        seconds.append(time.process_time() - started)
    blocks_listed = int(found["kv_num_blocks"].sum() + found["full_kv_num_blocks"].sum())
    if count == 1:  # the lower triangle of 512 x 512
        assert int(found["full_kv_num_blocks"].sum()) == 512 * 511 // 2 and blocks_listed == 512 * 513 // 2
    else:
        assert blocks_listed < 5000
    assert min(seconds) < (0.1 if count == 1 else 0.02)


def test_messages() -> None:
    twice = np.array([[0, 8, 0, 8, FULL, 0, 0], [0, 8, 0, 8, FULL, 0, 0]])
    with pytest.raises(ValueError, match=r"allow 128 pairs in block \(0, 0\), which has 64; wanted slices"):
        block_tables(twice, 8, 8)
    with pytest.raises(ValueError, match="reach query 8 and key 8; wanted at most 8 and 7 rows"):
        block_tables(twice[:1], 8, 7)


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    count = blocks._count
    monkeypatch.setattr(blocks, "_count", lambda n, m, most: count(n, m, most + 1))
    with pytest.raises((AssertionError, ValueError)):
        check(np.array([[0, 16, 0, 16, BAND, -7, 7]]), 16, 16, 8, 8)
