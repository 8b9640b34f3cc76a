"""Flex attention's graph, run densely on CPU, against what the mask means, on every rank of a mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flex_cases import FLOATS, Case, Sizes, attention, by_ranks, errors, reference, run_graph
from hsap_compile import formula as f
from hsap_compile._torch import compile_with_aot_eager, flex_kernel_options
from hsap_compile.errors import Refused
from hsap_compile.kernels import flex
from strategies import BATCH, LEAVES, TOKENS, conditions, logits_of, pack, styles

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


DRAWN = given(conditions(), styles(), st.integers(1, 3), st.sampled_from([torch.float64, torch.float32]))


@settings(max_examples=6, deadline=None)
@DRAWN
@example(f.q < f.k, "min", 1, torch.float64)  # a row without a key: its gradient is the score's
def test_every_mask(condition: sympy.Basic, style: str, ranks: int, dtype: torch.dtype) -> None:
    check(logits_of(condition, style, f.score), ranks, dtype)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@DRAWN
def test_many_masks(condition: sympy.Basic, style: str, ranks: int, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("otherwise", [-sympy.oo, pytest.param(LOWEST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_score_functions(name: str, otherwise: Any) -> None:
    value, condition = SCORES[name]
    document = sympy.Eq(f.leaf(0, f.b, f.q), f.leaf(0, f.b, f.k))
    logits = sympy.Piecewise((value, sympy.And(condition, document)), (otherwise, True))
    leaves = (*LEAVES, *FLOATS, DENSE_LEAF)
    case = Case(logits, leaves=leaves)
    found = by_ranks(run_graph(attention(case)), case, 2)
    assert max(errors(found, reference(case))) <= 1e-11


# --- one graph for all batches -------------------------------------------------------------------------

DOCUMENTS = logits_of(sympy.And(CAUSAL, sympy.Eq(f.leaf(0, f.b, f.q), f.leaf(0, f.b, f.k))), "where", f.score)
PLAIN = Case(DOCUMENTS, leaves=LEAVES)


def values(graph: torch.fx.GraphModule) -> list[Any]:
    return [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]


def test_other_documents_and_sizes_run_the_same_graph() -> None:
    labels = torch.zeros(1, 520, dtype=torch.int64)  # several blocks, of own and received keys not as many
    case = replace(PLAIN, sizes=Sizes(1, 520, 2, 1, 16, 16), leaves=(labels,)).to(torch.float32)
    graph = attention(case)  # the lse of flex attention claims to be float32 for any input
    given = values(graph)
    sizes = [s for x in given[5:] for s in x.shape if isinstance(s, torch.SymInt)]
    assert len(sizes) == len({s.node.expr for s in sizes}) == 2 * (1 + 4 + 8)  # rows, numbers, indices
    compiled = run_graph(compile_with_aot_eager(graph, given))
    for row in ([520], [1] * 20 + [500], [200, 320]):
        for ranks in (1, 2, 4):
            packed = replace(case, leaves=(pack([row])[0],))
            assert max(errors(by_ranks(compiled, packed, ranks), reference(packed.to(torch.float64)))) <= 1e-5
    assert not given[0].fake_mode.shape_env.guards


def test_a_name_says_what_a_formula_is() -> None:
    def names(logits: sympy.Expr) -> list[str]:
        return [name for name, _ in attention(replace(PLAIN, logits=logits)).named_children()]

    strict = logits_of(f.k < f.q, "where", f.score)
    assert names(DOCUMENTS) == names(DOCUMENTS) and len(names(DOCUMENTS)) == 2  # of own and received keys
    assert set(names(DOCUMENTS)) & set(names(strict)) == {names(strict)[0]}  # score_mod: the score itself


def worst(case: Case, ranks: int) -> float:
    return max(errors(by_ranks(run_graph(attention(case)), case, ranks), reference(case)))


def test_padding_and_other_rows_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = replace(PLAIN, logits=f.score)
    assert worst(everything, 2) <= 1e-11
    inline = flex._Mod.inline
    always = lambda p, *x: torch.ones_like(p, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(flex._Mod, "inline", lambda m, g, *x: inline(m, always if g is torch.eq else g, *x))
    assert worst(everything, 2) > 1e-3  # zero keys, and those of the other batch row, took part


def test_merging_without_rescaling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "merge", lambda o, a, p, b: (o + p, torch.logaddexp(a, b)))
    assert worst(PLAIN, 1) <= 1e-11 and worst(PLAIN, 2) > 1e-3


def test_merge_of_nothing() -> None:
    lse = torch.tensor([-torch.inf, 1.0, -torch.inf], requires_grad=True)
    other = torch.tensor([-torch.inf, -torch.inf, 2.0], requires_grad=True)
    out, together = flex.merge(torch.zeros(3, 1), lse, torch.ones(3, 1), other)
    assert out.flatten().tolist() == [0, 0, 1] and together.tolist() == [-torch.inf, 1, 2]
    (out.sum() + together[1:].sum()).backward()
    assert lse.grad is not None and lse.grad.tolist() == [0, 1, 0]


# --- messages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["BLOCK_X", "ROWS_GUARANTEED_SAFE", "BACKEND", "fwd_OUTPUT_MAX"])
def test_kernel_options_that_are_not_the_users(key: str) -> None:
    with pytest.raises(Refused, match=f'there is no kernel option "{key}"(.|\n)*wanted: one of num_warps'):
        flex_kernel_options({key: 1})
    assert flex_kernel_options({"fwd_BLOCK_M": 64})["fwd_BLOCK_M"] == 64


def test_heads_must_be_given() -> None:
    formula = flex._Formula(None, None, None, (), 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the formula h reads h; pass heads"):
        formula.rowwise(f.h, {"m": None}, torch.float32)  # type: ignore[dict-item]
