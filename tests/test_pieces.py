"""Pieces of documents against their definition, token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hsap_compile.plan.pieces import (
    Band,
    Pieces,
    cut,
    least_rows,
    own_pairs,
    pair_matrix,
    pairs,
    rows_needed,
    total_pairs,
)

BANDS = st.one_of(
    st.sampled_from([(0, None), (None, None)]), st.integers(1, 9).map(lambda window: (0, window - 1))
)


def allowed(lengths: list[int], band: Band) -> np.ndarray:
    """(S, S) bool [q, k], from the definition."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    apart = np.arange(len(document))[:, None] - np.arange(len(document))
    result = document[:, None] == document
    if band[0] is not None:
        result &= apart >= band[0]
    if band[1] is not None:
        result &= apart <= band[1]
    return result


def held(pieces: Pieces, lengths: list[int]) -> np.ndarray:
    """(S,) the party of every token; each token is covered once."""
    first = np.cumsum([0, *lengths])
    result = np.full(sum(lengths), -1)
    for d, start, stop, party in zip(pieces.document, pieces.start, pieces.stop, pieces.party, strict=True):
        assert 0 <= start < stop <= lengths[d]
        assert np.all(result[first[d] + start : first[d] + stop] == -1)
        result[first[d] + start : first[d] + stop] = party
    assert result.min() >= 0
    return result


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], Pieces, int]:
    """Documents, their pieces, and how many parties hold them."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    tokens, parties = sum(lengths), draw(st.integers(1, 4))
    inner = draw(st.sets(st.integers(1, tokens - 1), max_size=6)) if tokens > 1 else set()
    edges = np.array([0, *sorted(inner), tokens])
    owner = draw(st.lists(st.integers(0, parties - 1), min_size=len(edges) - 1, max_size=len(edges) - 1))
    pieces = cut(lengths, edges, np.array(owner))
    wanted = np.repeat(owner, np.diff(edges))
    assert np.array_equal(held(pieces, lengths), wanted)
    return lengths, pieces, parties


@settings(max_examples=100, deadline=None)
@given(*[st.integers(0, 12)] * 4, BANDS)
def test_pairs_of_two_intervals(a: int, n: int, c: int, m: int, band: Band) -> None:
    mask = allowed([30], band)
    assert pairs(*(np.array([x]) for x in (a, a + n, c, c + m)), band)[0] == mask[a : a + n, c : c + m].sum()


@settings(max_examples=100, deadline=None)
@given(rows(), BANDS)
def test_counts_against_brute_force(drawn: tuple[list[int], Pieces, int], band: Band) -> None:
    lengths, pieces, parties = drawn
    mask, owner = allowed(lengths, band), held(pieces, lengths)
    matrix, needed = pair_matrix(pieces, parties, band), rows_needed(pieces, parties, band)
    for a, b in itertools.product(range(parties), repeat=2):
        block = mask[owner == a][:, owner == b]
        assert matrix[a, b] == block.sum()
        assert needed[b, a] == (0 if a == b else block.any(axis=0).sum())
    begin = np.cumsum(lengths) - lengths
    for d, start, stop, party, own, total in zip(
        pieces.document, pieces.start, pieces.stop, pieces.party,
        own_pairs(pieces, band), total_pairs(pieces, band), strict=True,
    ):  # fmt: skip
        queries = mask[begin[d] + start : begin[d] + stop]
        assert total == queries.sum()
        assert own == queries[:, owner == party].sum()
    assert list(pieces.lengths) == lengths


@settings(max_examples=100, deadline=None)
@given(rows(), BANDS)
def test_no_placement_sends_less_than_the_bound(drawn: tuple[list[int], Pieces, int], band: Band) -> None:
    lengths, pieces, parties = drawn
    share = int(np.bincount(pieces.party, weights=pieces.size).max())
    most = float(np.bincount(pieces.party, weights=total_pairs(pieces, band)).max())
    sent = rows_needed(pieces, parties, band).sum()
    assert least_rows(lengths, share, band) <= least_rows(lengths, share, band, most) <= sent


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), BANDS)
@example(40, 7, (0, None))
def test_one_document_in_full_shares_reaches_the_bound(tokens: int, share: int, band: Band) -> None:
    """The shares from the end, what is left first: the best there is."""
    edges = np.array([0, *range(tokens % share or share, tokens + 1, share)])
    pieces = cut([tokens], edges, np.arange(len(edges) - 1))
    assert least_rows([tokens], share, band) == rows_needed(pieces, len(edges), band).sum()


def test_one_document_in_parts_of_even_area_reaches_the_bound() -> None:
    """100 * 101 / 2 pairs in three parts that end at 1683 and 3366 of them, next after a whole token."""
    edges = np.array([0, 58, 82, 100])
    pieces = cut([100], edges, np.arange(3))
    most = float(total_pairs(pieces, (0, None)).max())
    assert most == 58 * 59 / 2
    assert rows_needed(pieces, 3, (0, None)).sum() == 58 + 82
    assert least_rows([100], 100, (0, None), most) == 57 + 82
    assert least_rows([100], 100, (0, 9), most) == 0  # said of causal masks only


@pytest.mark.parametrize(
    ("band", "rows"), [((0, None), 4 + 14), ((None, None), 2 * 24), ((0, 5), 4 + 5), ((0, 0), 0)]
)
def test_the_bound_of_one_long_and_many_short_documents(band: Band, rows: int) -> None:
    """24 tokens by tens: 4, 10, 10; the last two parties need 4 and 14 rows before them."""
    assert least_rows([24, 10, 3, 1], 10, band) == rows
    assert least_rows([24, 24], 10, band) == 2 * rows


def test_counts_that_pass_32_bits() -> None:
    tokens = 1 << 24
    pieces = cut([tokens], np.array([0, tokens // 2, tokens]), np.array([0, 1]))
    half = tokens // 2
    triangle = half * (half + 1) // 2
    assert pair_matrix(pieces, 2, (0, None)).tolist() == [[triangle, 0], [half * half, triangle]]
    assert pair_matrix(pieces, 2, (None, None)).tolist() == [[half * half] * 2] * 2
