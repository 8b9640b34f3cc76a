"""Flex attention's graph, run densely on CPU, against what the mask means, on every rank of a mesh."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flex_cases import FLOATS, Case, Sizes, attention, by_ranks, errors, reference, run_graph
from hsap_compile import formula as f
from strategies import BATCH, LEAVES, TOKENS, conditions, logits_of, styles

LOWEST = float(torch.finfo(torch.float32).min)
HEADS = Sizes().heads


def check(logits: sympy.Expr, ranks: int, dtype: torch.dtype = torch.float64) -> None:
    case = Case(logits)
    wanted = reference(case)
    low = case.to(dtype)
    found = errors(by_ranks(run_graph(attention(low)), low, ranks), wanted)
    if dtype == torch.float64:
        assert max(found) <= 1e-11
        return
    # a row whose logits are all near -10000 has few digits in eager, too
    limits = [4 * max(e, 1e-6) for e in errors(reference(low), wanted)]
    assert all(e <= limit for e, limit in zip(found, limits, strict=True))


@settings(max_examples=15, deadline=None)
@given(conditions(), styles(), st.integers(1, 3), st.sampled_from([torch.float64, torch.float32]))
def test_every_mask(condition: sympy.Basic, style: str, ranks: int, dtype: torch.dtype) -> None:
    check(logits_of(condition, style, f.score), ranks, dtype)


CAUSAL = f.k <= f.q
SLOPE, BIAS, DENSE = (f.leaf(i, *at) for i, at in ((2, (f.h,)), (3, (f.b, f.k)), (4, (f.b, f.h, f.q, f.k))))
DENSE_LEAF = (
    torch.linspace(-1, 2, BATCH * HEADS * TOKENS**2).double().sin().view(BATCH, HEADS, TOKENS, TOKENS)
)
SCORES = {
    "alibi": (f.score - SLOPE * (f.q - f.k), CAUSAL),
    "bias": (f.score + BIAS * SLOPE + f.leaf(3, f.b, f.q), sympy.true),
    "softcap": (5 * sympy.tanh(f.score / 5) + f.q / f.S, CAUSAL),
    "dense bias": (f.score * SLOPE + DENSE, sympy.true),
    "relative": (f.score + f.leaf(3, f.b, sympy.Max(f.q - f.k, 0)), CAUSAL),
    "twice": (f.score + DENSE * sympy.Min(f.q, 4) + f.leaf(2, f.h) ** 2, sympy.true),
    "no score": (BIAS + f.h, CAUSAL),
    "threshold": (f.score, f.score > 0),
    "numbers": (f.score + sympy.Piecewise((sympy.Rational(1, 3), CAUSAL), (-2, True)), sympy.true),
}


@pytest.mark.parametrize("otherwise", [-sympy.oo, LOWEST])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_score_functions(name: str, otherwise: Any) -> None:
    value, condition = SCORES[name]
    document = sympy.Eq(f.leaf(0, f.b, f.q), f.leaf(0, f.b, f.k))
    logits = sympy.Piecewise((value, sympy.And(condition, document)), (otherwise, True))
    leaves = (*LEAVES, *FLOATS, DENSE_LEAF)
    case = Case(logits, leaves=leaves)
    found = by_ranks(run_graph(attention(case)), case, 2)
    assert max(errors(found, reference(case))) <= 1e-11
