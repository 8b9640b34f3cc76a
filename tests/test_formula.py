"""Formulas: text and back, and their value against torch."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import formula
from hsap_compile.formula import b, floordiv, h, k, leaf, q, score

TOKENS, BATCH, HEADS = 6, 2, 3
INDEX = {
    "b": torch.arange(BATCH)[:, None, None, None],
    "h": torch.arange(HEADS)[:, None, None],
    "q": torch.arange(TOKENS)[:, None],
    "k": torch.arange(TOKENS),
    "S": TOKENS,
}
GENERATOR = torch.Generator().manual_seed(3)
SCORE = torch.randn(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64, generator=GENERATOR)
LEAVES = (
    torch.randint(-3, 4, (BATCH, TOKENS), generator=GENERATOR),
    torch.randint(0, 4, (BATCH, TOKENS), generator=GENERATOR, dtype=torch.int32),
    torch.randn(HEADS, dtype=torch.float64, generator=GENERATOR),
)
Pair = tuple[Any, Any]  # a formula, and the same thing computed by torch
VALUES = {**INDEX, "score": SCORE}

ATOMS: list[Pair] = [
    (q, INDEX["q"]),
    (k, INDEX["k"]),
    (b, INDEX["b"]),
    (h, INDEX["h"]),
    (leaf(0, b, q), LEAVES[0][:, None, :, None]),
    (leaf(0, b, k), LEAVES[0][:, None, None, :]),
    (leaf(1, b, k), LEAVES[1][:, None, None, :].long()),
]
INTEGERS = st.one_of(
    st.integers(0, len(ATOMS) - 1).map(lambda i: ATOMS[i]),
    # times 7 again and again this passes 2**24, which float32 does not hold, and stays within int32
    st.integers(-(2**18), 2**18).map(lambda n: (sympy.Integer(n), torch.tensor(n))),
)


def _apply(on_formula: Any, on_tensor: Any) -> Any:
    return lambda pairs: (on_formula(*[p[0] for p in pairs]), on_tensor(*[p[1] for p in pairs]))


def _grown(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    positive = st.integers(1, 7).map(lambda n: (sympy.Integer(n), torch.tensor(n)))
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(_apply(operator.add, operator.add)),
        two.map(_apply(operator.sub, operator.sub)),
        st.tuples(inner, positive).map(_apply(operator.mul, operator.mul)),
        st.tuples(inner, positive).map(_apply(floordiv, torch.floor_divide)),
        st.tuples(inner, positive).map(_apply(sympy.Mod, torch.remainder)),
        two.map(_apply(sympy.Max, torch.maximum)),
        two.map(_apply(sympy.Min, torch.minimum)),
        inner.map(lambda p: (sympy.Abs(p[0]), p[1].abs())),
        st.tuples(_conditions(inner), inner, inner).map(
            _apply(lambda c, x, y: sympy.Piecewise((x, c), (y, True)), torch.where)
        ),
    )


def _conditions(numbers: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    two = st.tuples(numbers, numbers)
    relations = ["Eq", "Ne", "Lt", "Le", "Gt", "Ge"]
    atoms = st.one_of([two.map(_apply(getattr(sympy, r), getattr(torch, r.lower()))) for r in relations])
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(_apply(sympy.And, torch.logical_and)),
            st.tuples(inner, inner).map(_apply(sympy.Or, torch.logical_or)),
            inner.map(lambda p: (sympy.Not(p[0]), ~p[1])),
        ),
        max_leaves=3,
    )


NUMBERS = st.recursive(INTEGERS, _grown, max_leaves=5)


def evaluated(expr: sympy.Basic) -> torch.Tensor:
    return torch.as_tensor(formula.evaluate(expr, VALUES, LEAVES))


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=120, deadline=None)
@given(st.one_of(NUMBERS, _conditions(NUMBERS)))
def test_a_formula_is_what_torch_computes_and_survives_being_text(pair: Pair) -> None:
    expr, wanted = pair
    again = formula.loads(formula.dumps(expr))  # 2 * Abs(Abs(x)) may have become 2 * Abs(x)
    assert formula.loads(formula.dumps(again)) == again
    got = evaluated(again)
    assert got.dtype in (
        wanted.dtype,
        torch.int32,
    )  # integers stay integers: positions beyond 2**24 are exact
    assert torch.equal(*torch.broadcast_tensors(got, wanted))


@pytest.mark.parametrize(
    "masked", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min]
)
def test_masked_values_are_kept_exactly(masked: float) -> None:
    number = -sympy.oo if masked == -torch.inf else sympy.Float(masked)
    expr = sympy.Piecewise((score, q >= k), (number, True))
    wanted = torch.where(INDEX["q"] >= INDEX["k"], SCORE, masked)
    assert torch.equal(evaluated(formula.loads(formula.dumps(expr))), wanted)
    additive = sympy.Piecewise((sympy.Integer(0), q >= k), (number, True))
    assert evaluated(additive).dtype == torch.float64
    bias = torch.where(INDEX["q"] >= INDEX["k"], torch.zeros_like(SCORE), masked)
    assert torch.equal(evaluated(score + additive), SCORE + bias)


@pytest.mark.parametrize("masked", [1e4, 1e9, torch.finfo(torch.float64).max])
def test_an_additive_mask_takes_no_digit_of_the_score(masked: float) -> None:
    """eager adds (1 - mask) * -masked, which is 0 where mask is 1; sympy writes it as a sum of three."""
    mask = sympy.Piecewise((1, q >= k), (0, True))
    expr = score / 7 + leaf(2, h) + sympy.Float(masked) * (mask * leaf(3, q) - 1)
    ones = [*LEAVES, torch.ones(TOKENS)]
    got = formula.evaluate(formula.loads(formula.dumps(expr)), VALUES, ones)
    wanted = SCORE / 7 + LEAVES[2][:, None, None]
    seen = (INDEX["q"] >= INDEX["k"]).expand(SCORE.shape)
    torch.testing.assert_close(got[seen], wanted[seen].to(got.dtype), rtol=1e-14, atol=0)
    assert (got[~seen] <= -0.9 * masked).all()


def test_a_choice_between_conditions() -> None:
    expr = sympy.ITE(q > k, sympy.Eq(q, 3), leaf(0, b, k) < 0)
    wanted = torch.where(INDEX["q"] > INDEX["k"], INDEX["q"] == 3, LEAVES[0][:, None, None, :] < 0)
    assert torch.equal(evaluated(expr), wanted)
    assert formula.readable(expr, ["m"]) == "(q == 3 if q > k else m[b, k] < 0)"


@pytest.mark.parametrize(
    ("expr", "wanted"),
    [
        (5 * sympy.tanh(score / 5), 5 * torch.tanh(SCORE / 5)),
        (score + leaf(2, h) * (k - q), SCORE + LEAVES[2][:, None, None] * (INDEX["k"] - INDEX["q"])),
        (sympy.exp(score) + sympy.log(k + 1), SCORE.exp() + (INDEX["k"] + 1.0).double().log()),
        (score / (q + 1), SCORE / (INDEX["q"] + 1)),
        (score * leaf(0, b, q) ** 2, SCORE * LEAVES[0][:, None, :, None] ** 2),
        (score / formula.S, SCORE / TOKENS),
        (q / 3, INDEX["q"].double() / 3),
    ],
)
def test_score_functions(expr: sympy.Expr, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(evaluated(expr), wanted, rtol=1e-6, atol=1e-12, check_dtype=False)


def test_gradients_reach_the_score_and_floating_leaves() -> None:
    scores, slopes = SCORE.clone().requires_grad_(), LEAVES[2].clone().requires_grad_()
    expr = sympy.Piecewise((score * 2 + leaf(2, h) * (q - k), q >= k), (-sympy.oo, True))
    value = formula.evaluate(expr, {**INDEX, "score": scores}, (*LEAVES[:2], slopes))
    value.masked_fill(value == -torch.inf, 0.0).sum().backward()
    inside = INDEX["q"] >= INDEX["k"]
    assert torch.equal(scores.grad, 2.0 * inside.expand_as(scores))  # type: ignore[arg-type]
    distance = ((INDEX["q"] - INDEX["k"]) * inside).sum()
    assert torch.equal(slopes.grad, (BATCH * distance).double().expand(HEADS))  # type: ignore[arg-type]


def test_leaves_are_listed_and_renumbered() -> None:
    expr = leaf(4, b, q) + leaf(2) * leaf(4, b, k)
    assert formula.leaves_of(expr) == (2, 4)
    assert formula.renumber(expr, {2: 0, 4: 1}) == leaf(1, b, q) + leaf(0) * leaf(1, b, k)
    assert formula.leaf_index(sympy.Function("leaflet")(q)) is None


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"cannot evaluate sin in the index formula sin\(q\); known: Abs, Add"
    ):
        evaluated(sympy.sin(q))
    with pytest.raises(TypeError, match="says nothing where"):
        evaluated(sympy.Piecewise((score, q > k)))
