"""Who sends which rows where tokens read others at fixed distances: the tables against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hsap_compile.plan import Attended, MeshShape, Placement, place
from hsap_compile.plan.shifts import Shift, shift_tables, shifted
from test_plan import mesh_of, packed

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 2)]


def wanted(shift: Shift, column: int, tokens: int) -> list[int]:
    """The columns that one column reads, -1 for none."""
    first, stop = shift.source[0], tokens - shift.source[1]
    if not shift.into[0] <= column < tokens - shift.into[1]:
        return [column] * len(shift.offsets)
    if shift.wraps:
        ring = list(range(first, stop))
        return [ring[(ring.index(column) + k) % len(ring)] for k in shift.offsets]
    return [column + k if first <= column + k < stop else -1 for k in shift.offsets]


def check(placement: Placement, shift: Shift) -> None:
    ranks, tokens = placement.mesh.size, placement.tokens
    tables = [shift_tables(placement, shift, r) for r in range(ranks)]
    rows = shifted(placement, shift).rows(ranks)
    for rank, mine in enumerate(tables):
        own = placement.columns_of(rank).tolist()
        reads = [wanted(shift, c, tokens) for c in own]
        held = [*own, *mine.arriving.tolist(), -1]
        assert [[held[i] for i in row] for row in mine.index.tolist()] == reads
        lacking = {c for row in reads for c in row} - {*own, -1}
        assert sorted(mine.arriving.tolist()) == sorted(lacking), "each row that it lacks, once"
        assert len(mine.send) == mine.splits[0].sum()
        assert len(mine.arriving) == mine.splits[1].sum()
        for other, theirs in enumerate(tables):
            assert mine.splits[0, other] == theirs.splits[1, rank] == rows[rank, other]
            sent = np.split(mine.send, np.cumsum(mine.splits[0])[:-1])[other]
            got = np.split(theirs.arriving, np.cumsum(theirs.splits[1])[:-1])[rank]
            assert [own[i] for i in sent] == got.tolist() == sorted(got.tolist())


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    tokens = draw(st.integers(16, 40))
    cuts = draw(st.sets(st.integers(1, tokens - 1), max_size=8))
    labels = np.searchsorted(sorted(cuts), np.arange(tokens), side="right")[None]
    mask = Attended(1, tokens, labels, lo=0)
    return place(
        [mask], mesh_of(*draw(st.sampled_from(MESHES))), draw(st.sampled_from(["balanced", "contiguous"]))
    )


@st.composite
def shifts(draw: st.DrawFn) -> Shift:
    """Distances beyond every share and beyond S among them."""
    far = st.one_of(st.integers(-4, 4), st.integers(-45, 45))
    offsets = tuple(draw(st.lists(far, min_size=1, max_size=5)))
    ends = st.tuples(st.integers(0, 5), st.integers(0, 5))
    source = draw(ends)
    if draw(st.booleans()):
        return Shift(offsets, source, source, wraps=True)
    return Shift(offsets, source, draw(ends))


@settings(max_examples=300, deadline=None)
@given(placements(), shifts())
@example(place([packed(16)], mesh_of(2, 1)), Shift((0,), (0, 0), (0, 0)))
@example(place([packed(17)], mesh_of(4, 2)), Shift((-16, 16, 17, -17, 100), (0, 0), (0, 0)))
@example(place([packed(16)], mesh_of(2, 1)), Shift((3,), (12, 8), (0, 0)))  # nothing is seen
def test_against_brute_force(placement: Placement, shift: Shift) -> None:
    check(placement, shift)


def test_a_permuted_mesh() -> None:
    mesh = MeshShape(((5, 0), (1, 4), (2, 3)))
    check(place([packed(7, 13, 20)], mesh), Shift((-3, -1, 2), (0, 1), (1, 0)))


@pytest.mark.parametrize(("ranks", "rows"), [(1, 0), (2, 3), (4, 9)])
def test_a_causal_window_of_contiguous_ranks_sends_its_width(ranks: int, rows: int) -> None:
    """Three rows to every rank but the first."""
    placement = place([packed(64)], mesh_of(ranks, 1), "contiguous")
    assert shifted(placement, Shift((-3, -2, -1, 0), (0, 0), (0, 0))).rows(ranks).sum() == rows
    ring = shifted(placement, Shift((-1,), (0, 0), (0, 0), wraps=True)).rows(ranks)
    assert ring.sum() == (ranks if ranks > 1 else 0)


def test_names_tell_shifts_apart() -> None:
    some = [
        Shift((1,), (0, 0), (0, 0)),
        Shift((-1,), (0, 0), (0, 0)),
        Shift((1,), (1, 0), (0, 0)),
        Shift((1,), (0, 0), (1, 0)),
        Shift((1,), (0, 0), (0, 0), wraps=True),
        Shift((1, -1), (0, 0), (0, 0)),
    ]
    assert len({shift.name for shift in some}) == len(some)
    assert all(shift.name.isidentifier() for shift in some)
