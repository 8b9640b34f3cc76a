"""Masks of attentions whose queries and keys are a part of the columns, each its own, against the formula."""

from __future__ import annotations

import numpy as np
import sympy
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile.documents import attended
from hsap_compile.formula import b, k, leaf, q, score
from hsap_compile.masks import normalise, placed
from strategies import conditions, logits_of, packs, styles
from test_documents import meant, tensors
from test_plan import wanted


@settings(max_examples=120, deadline=None)
@given(tensors(), conditions(), styles(), st.integers(0, 2), st.integers(0, 2))
def test_every_mask_of_a_part_of_the_columns(
    drawn: tuple[list[Tensor], int, int], condition: sympy.Basic, style: str, first: int, behind: int
) -> None:
    """Pairs of the attention's tokens are those of the mask; none of them attends to another column."""
    leaves, rows, tokens = drawn
    logits, total = logits_of(condition, style, score), first + tokens + behind
    mask = placed(normalise(logits)[0], (first, behind), (first, behind))
    wider = [F.pad(leaf, (0, first + behind)) for leaf in leaves]
    inside = slice(first, first + tokens)
    expected = np.zeros((rows, tokens, total), bool)
    expected[:, :, inside] = meant(logits, leaves, rows, tokens)
    assert np.array_equal(meant(mask.logits, wider, rows, total)[:, inside], expected)
    got = attended(mask, wider, rows, total)
    pairs = wanted(got)[:, inside]
    assert not (expected & ~pairs).any()
    if not got.residual:  # whoever attends to nothing may attend to every column, where the formula decides
        assert np.array_equal(pairs & ~pairs.all(-1, keepdims=True), expected & ~pairs.all(-1, keepdims=True))


@settings(max_examples=120, deadline=None)
@given(tensors(), conditions(), styles(), st.data())
def test_every_mask_of_queries_and_keys_that_are_other_columns(
    drawn: tuple[list[Tensor], int, int], condition: sympy.Basic, style: str, data: st.DataObject
) -> None:
    leaves, rows, tokens = drawn
    logits, total = logits_of(condition, style, score), tokens + 2
    (queries, of_queries), (keys, of_keys) = (data.draw(ranges(total, tokens)) for _ in range(2))
    mask = placed(normalise(logits)[0], of_queries, of_keys)
    wider = [F.pad(leaf, (0, 2)) for leaf in leaves]
    columns_of_queries, columns_of_keys = (
        slice(first, total - behind) for first, behind in (of_queries, of_keys)
    )
    expected = np.zeros((rows, queries, total), bool)
    expected[:, :, columns_of_keys] = meant(logits, leaves, rows, queries, keys)
    assert np.array_equal(meant(mask.logits, wider, rows, total)[:, columns_of_queries], expected)
    assert not (expected & ~wanted(attended(mask, wider, rows, total))[:, columns_of_queries]).any()


def ranges(total: int, most: int) -> st.SearchStrategy[tuple[int, tuple[int, int]]]:
    """Up to ``most`` columns of ``total``, and how many others stand in front of them and behind."""

    def of(count: int) -> st.SearchStrategy[tuple[int, tuple[int, int]]]:
        return st.integers(0, total - count).map(lambda first: (count, (first, total - count - first)))

    return st.integers(1, most).flatmap(of)


def test_bands_move_with_the_columns() -> None:
    """Of queries with so many keys in front: what is causal costs what is causal."""
    mask = normalise(logits_of(k <= q + 3, "where", score))[0]
    got = attended(placed(mask, (3, 0), (0, 0)), [], 1, 12)
    assert (got.lo, got.hi, got.residual) == (0, None, True)
    got = attended(placed(normalise(logits_of(k <= q, "where", score))[0], (3, 0), (0, 0)), [], 1, 12)
    assert (got.lo, got.hi) == (0, None)  # every column has a key, whatever it is


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(2, 9), st.integers(0, 2), st.integers(0, 2))
def test_documents_of_a_part_stay_structure(
    data: st.DataObject, tokens: int, first: int, behind: int
) -> None:
    labels, positions = data.draw(packs(2, tokens))
    same = sympy.Eq(leaf(0, b, q), leaf(0, b, k)) & (leaf(1, b, q) - leaf(1, b, k) >= 0)
    others = (first, behind)
    mask = placed(normalise(logits_of(same, "where", score))[0], others, others)
    leaves = [F.pad(x, (0, first + behind)) for x in (labels, positions)]
    got = attended(mask, leaves, 2, first + tokens + behind)
    assert not got.residual and got.lo == 0
