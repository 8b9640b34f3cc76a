"""The planner against brute force on drawn masks and meshes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile.plan import Attended, ReceiveLimit, make, slices
from hsap_compile.plan.attended import area, structure
from test_plan import MESHES, check, mesh_of

BANDS = st.one_of(
    st.sampled_from([(0, None), (None, None), (0, 3), (-2, 2), (1, None), (None, 0)]),
    st.tuples(st.integers(-6, 6), st.integers(0, 9)).map(lambda x: (x[0], x[0] + x[1])),
)


@st.composite
def labels(draw: st.DrawFn, rows: int, tokens: int) -> np.ndarray | None:
    how = draw(st.sampled_from(["none", "documents", "interleaved"]))
    if how == "none":
        return None
    values = np.zeros((rows, tokens), np.int64)
    for row in values:
        if how == "interleaved":
            row[:] = draw(st.lists(st.integers(-1, 2), min_size=tokens, max_size=tokens))
        else:
            cuts = draw(st.lists(st.integers(1, tokens - 1), max_size=6))
            row[:] = np.searchsorted(np.unique(cuts), np.arange(tokens), side="right")
    return values


@st.composite
def valid(draw: st.DrawFn, rows: int, tokens: int) -> np.ndarray | None:
    how = draw(st.sampled_from(["none", "none", "tail", "any"]))
    if how == "none":
        return None
    if how == "tail":
        ends = [draw(st.integers(0, tokens)) for _ in range(rows)]
        return np.arange(tokens) < np.array(ends)[:, None]
    bits = draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    return np.array(bits).reshape(rows, tokens)


@st.composite
def attended(draw: st.DrawFn, batch: int, tokens: int) -> Attended:
    rows = st.sampled_from([1, batch])
    lo, hi = draw(BANDS)
    return Attended(
        batch,
        tokens,
        draw(labels(draw(rows), tokens)),
        draw(valid(draw(rows), tokens)),
        draw(valid(draw(rows), tokens)),
        lo,
        hi,
        residual=draw(st.booleans()) and draw(st.booleans()),
        soft=draw(st.booleans()) and draw(st.booleans()),
    )


@st.composite
def problem(draw: st.DrawFn) -> tuple:
    shape = draw(st.sampled_from(MESHES))
    tokens = draw(st.integers(2 * shape[0] * shape[1], 40))
    masks = [draw(attended(draw(st.integers(1, 3)), tokens)) for _ in range(draw(st.integers(1, 2)))]
    return masks, mesh_of(*shape), draw(st.sampled_from(["balanced", "contiguous"]))


LIMITS = st.one_of(
    st.just(ReceiveLimit()),
    st.tuples(st.integers(1, 5), st.integers(1, 20)).map(lambda x: ReceiveLimit(*x)),
)


@settings(max_examples=250, deadline=None)
@given(problem(), LIMITS)
def test_against_brute_force(drawn, limit):
    masks, mesh, kind = drawn
    plan = make(masks, mesh, kind, limit=limit)
    plan.verify()
    check(masks, mesh, plan)
    for i, m in enumerate(plan.masks):  # a rank's own counts are a row and a column of everybody's
        splits = np.stack([plan.tables(r).masks[i].splits for r in range(mesh.size)], axis=1)
        assert splits[0].tolist() == m.rows_sent.tolist() == splits[1].T.tolist()
        filled = limit.filled(m.capacity)
        for r in range(mesh.size):
            received = [len(e.remote) for e in plan.tables(r).masks[i].exchanges]
            assert len(received) == limit.stages and not any(received[filled:])
            if limit.stages > filled > 1:  # more would not have been needed
                assert max(received) < limit.rows + mesh.inter
            elif filled == 1 < limit.stages:
                assert max(received) <= 2 * limit.rows


@settings(max_examples=100, deadline=None)
@given(attended(2, 23))
def test_columns_by_their_area(mask):
    """`where` undoes `before`; between two columns it finds one of them."""
    found = area([structure(mask)])
    before = found.before(np.arange(24))
    assert found.before(found.where(before.astype(np.float64))).tolist() == before.tolist()
    between = found.before(found.where((before[1:] + before[:-1]) / 2))
    assert ((between == before[1:]) | (between == before[:-1])).all()


@settings(max_examples=100, deadline=None)
@given(problem(), st.sampled_from([1, 3]))
def test_small_blocks_and_few_exact_slices(drawn, block):
    """The limits that only large inputs reach, brought within reach of small ones."""
    masks, mesh, kind = drawn
    old = slices.MIN_BLOCK, slices.MAX_EXACT, slices.MAX_EXACT_PER_PIECE
    try:
        slices.MIN_BLOCK, slices.MAX_EXACT, slices.MAX_EXACT_PER_PIECE = block, 4 * block, 0
        plan = make(masks, mesh, kind)
        plan.verify()
        check(masks, mesh, plan)
    finally:
        slices.MIN_BLOCK, slices.MAX_EXACT, slices.MAX_EXACT_PER_PIECE = old
