"""What tests draw: documents, packs, and masks over them, each with its brute-force meaning."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from hypothesis import strategies as st

from hsap_compile._torch import maybe_mark_dynamic
from hsap_compile.formula import b, floordiv, k, leaf, q


@st.composite
def documents(draw: st.DrawFn, tokens: int) -> list[int]:
    """Lengths of documents that fill ``tokens``."""
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6))) if tokens > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)]


@st.composite
def packs(draw: st.DrawFn, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, positions), both (B, S) int64, of documents that lie one after the other in every row."""
    return pack([draw(documents(tokens)) for _ in range(batch)])


def pack(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, positions), both (B, S), of documents of these lengths."""
    labels = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    return torch.stack(labels), torch.stack(positions)


def dynamic(batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` with its last dimension marked as symbolic, so that it is traced once and not twice."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            maybe_mark_dynamic(value, value.dim() - 1)
    return batch


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int]:
    """(query heads, key/value heads), the first a multiple of the second."""
    kv = draw(st.integers(1, 3))
    return kv * draw(st.integers(1, 3)), kv


# --- masks: formulas over two leaves, documents (B, S) and validity (B, S) ---------------------------------

BATCH, TOKENS = 2, 9
LEAVES = (
    torch.tensor([[0, 0, 0, 1, 1, 0, 2, 2, 2], [5, 5, 5, 5, 3, 3, 3, 3, 9]]),
    torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]]),
)


def _atoms() -> st.SearchStrategy[sympy.Basic]:
    document = sympy.Eq(leaf(0, b, q), leaf(0, b, k))
    fixed = [
        document,
        q >= k,
        k <= q,
        q > k,
        sympy.Ne(leaf(1, b, k), 0),
        sympy.Ne(leaf(1, b, q), 0),
        sympy.Eq(leaf(1, b, q), leaf(1, b, k)),
        leaf(0, b, q) >= leaf(0, b, k),
        sympy.Eq(sympy.Mod(q, 3), sympy.Mod(k, 3)),
        k > 2,
    ]
    small = st.integers(0, 4)
    return st.one_of(
        st.sampled_from(fixed),
        small.map(lambda w: q - k <= w),
        small.map(lambda w: q - w < k),
        small.map(lambda w: sympy.Abs(q - k) <= w),
        small.map(lambda w: sympy.Abs(k - q) < w + 1),
        small.map(lambda w: sympy.Eq(floordiv(q, w + 1), floordiv(k, w + 1))),
        small.map(lambda w: sympy.Abs(leaf(0, b, q) - leaf(0, b, k)) <= w),
    )


def conditions() -> st.SearchStrategy[sympy.Basic]:
    """Which pairs are allowed: conjunctions, also as De Morgan writes them, and some disjunctions."""
    return st.recursive(
        _atoms(),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda x: sympy.And(*x)),
            st.tuples(inner, inner).map(lambda x: sympy.Not(sympy.Or(sympy.Not(x[0]), sympy.Not(x[1])))),
            st.tuples(inner, inner).map(lambda x: sympy.Or(*x)),
            inner.map(sympy.Not),
        ),
        max_leaves=4,
    )


def styles() -> st.SearchStrategy[str]:
    return st.sampled_from(["where", "fill", "add", "min", "multiply"])


def logits_of(condition: sympy.Basic, style: str, logits: sympy.Expr) -> sympy.Expr:
    """``logits`` under a mask as models write it: boolean (where, fill) or added (add, min, multiply)."""
    zero, lowest = sympy.Integer(0), sympy.Float(-3.4028234663852886e38)
    if style == "where":
        return sympy.Piecewise((logits, condition), (-sympy.oo, True))
    if style == "fill":
        return sympy.Piecewise((-sympy.oo, sympy.Not(condition)), (logits, True))
    if style == "add":
        return logits + sympy.Piecewise((zero, condition), (-sympy.oo, True))
    if style == "min":
        return logits + sympy.Piecewise((zero, condition), (lowest, True))
    one = sympy.Piecewise((sympy.Integer(1), condition), (zero, True))
    return sympy.Add(logits, sympy.Mul(1 - one, -10000))
