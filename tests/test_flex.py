"""Flex attention's graph, run densely on CPU, against what the mask means, on every rank of a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hsap_compile import formula as f
from hsap_compile._torch import FakeTensorMode, fake_table
from hsap_compile.documents import attended
from hsap_compile.graph import Builder
from hsap_compile.kernels import blocks, flex
from hsap_compile.kernels.reference import attend_reference
from hsap_compile.masks import normalise
from hsap_compile.plan import MeshShape, make
from strategies import BATCH, LEAVES, TOKENS, conditions, logits_of, styles

HEADS, KV_HEADS, WIDTH, V_WIDTH = 4, 2, 8, 20
LOWEST = float(torch.finfo(torch.float32).min)
FLOATS = (
    torch.linspace(-1, 1, 7).double(),
    torch.linspace(-2, 2, BATCH * TOKENS).double().view(BATCH, TOKENS),
)


def attention(
    logits: sympy.Expr, dtype: torch.dtype = torch.float64, leaves: tuple[Tensor, ...] = LEAVES + FLOATS
) -> torch.fx.GraphModule:
    """A graph of one attention of one rank that receives rows, with sizes that may be anything."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    own, received = (fake_table(mode, torch.zeros(9), (0,)).shape[0] for _ in range(2))
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    build = Builder(module.graph, mode)

    def given(name: str, value: Tensor) -> torch.fx.Node:
        node = module.graph.placeholder(name)
        node.meta["val"] = value
        return node

    with mode:
        shapes = [(own, HEADS, WIDTH), (own, KV_HEADS, WIDTH), (own, KV_HEADS, V_WIDTH)]
        shapes += [(received, KV_HEADS, WIDTH), (received, KV_HEADS, V_WIDTH)]
        rows = [torch.empty(*s, dtype=dtype, requires_grad=True) for s in shapes]
    operands = [given(n, x) for n, x in zip(("q", "k", "v", "k_remote", "v_remote"), rows, strict=True)]
    heads = given("heads", fake_table(mode, torch.arange(HEADS), ()))
    nodes = []
    for i, leaf in enumerate(leaves):
        nodes.append(given(f"leaf{i}", fake_table(mode, leaf, ()).requires_grad_(leaf.is_floating_point())))
    tables = {name: given(name, fake_table(mode, *example)) for name, example in flex.TABLES.items()}
    mask, factor = normalise(logits)
    scale = factor * WIDTH**-0.5
    writer = flex.FlexAttention(tables.__getitem__, {})
    module.graph.output(writer.attend(build, *operands, heads, nodes, mask, TOKENS, scale))
    module.recompile()
    module.graph.lint()
    return module


@dataclass(frozen=True)
class Batch:
    """Whole tensors (B, S, H, D), q to the gradient of the output, and leaves."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    leaves: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Batch:
        leaves = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.leaves)
        return Batch(tuple(x.to(dtype) for x in self.tensors), leaves)  # type: ignore[arg-type]

    def fresh(self) -> tuple[list[Tensor], list[Tensor]]:
        made = [x.detach().clone().requires_grad_() for x in self.tensors[:3]]
        return made, [x.detach().clone().requires_grad_(x.is_floating_point()) for x in self.leaves]


def batch(leaves: tuple[Tensor, ...] = LEAVES + FLOATS, seed: int = 0) -> Batch:
    made = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, V_WIDTH), (HEADS, V_WIDTH))
    q, k, v, grad = (torch.randn(BATCH, TOKENS, *s, generator=made, dtype=torch.float64) for s in sizes)
    return Batch((q, k, v, grad), leaves)


def reference(logits: sympy.Expr, data: Batch) -> list[Tensor]:
    """out and the gradients of q, k, v and floating leaves of dense attention."""
    (q, k, v), leaves = data.fresh()
    at = torch.cartesian_prod(torch.arange(BATCH), torch.arange(TOKENS))
    whole = [[TOKENS * b, TOKENS * (b + 1)] * 2 + [3, 0, 0] for b in range(BATCH)]
    out, _ = attend_reference(
        *(x.flatten(0, 1) for x in (q, k, v)), None, None, torch.tensor(whole), at, None,
        torch.arange(HEADS), leaves, f.dumps(logits), TOKENS, WIDTH**-0.5,
    )  # fmt: skip
    out.backward(data.tensors[3].flatten(0, 1))
    return [out.detach().unflatten(0, (BATCH, TOKENS)), *(_grad(x) for x in (q, k, v, *leaves))]


def _grad(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64) if x.grad is None else x.grad


def by_ranks(run: Any, logits: sympy.Expr, data: Batch, ranks: int) -> list[Tensor]:
    """The same from ``run`` on every one of ``ranks`` ranks; what they send one another is indexed."""
    mask, _ = normalise(logits)
    found = attended(mask, data.leaves, BATCH, TOKENS)
    plan = make([found], MeshShape(tuple((r,) for r in range(ranks))))
    (q, k, v), leaves = data.fresh()
    whole = torch.zeros(BATCH, TOKENS, HEADS, V_WIDTH, dtype=q.dtype)
    for rank in range(ranks):
        tables = plan.tables(rank)
        at = np.stack(np.meshgrid(np.arange(BATCH), tables.group_columns, indexing="ij"), axis=2)
        rows, remote = at.reshape(-1, 2), tables.masks[0].remote
        received = int(tables.masks[0].splits[1].sum())
        inputs = blocks.attention_tables(tables.masks[0].slices, rows, remote, received)
        own, far = (torch.from_numpy(x).T.tolist() for x in (rows, remote))
        arrived = (torch.arange(len(remote)) < received)[:, None, None]
        operands = [x[tuple(own)] for x in (q, k, v)] + [x[tuple(far)] * arrived for x in (k, v)]
        out, lse = run(
            *operands, torch.arange(HEADS), *leaves, *[torch.from_numpy(inputs[n]) for n in flex.TABLES]
        )
        assert out.shape == (len(rows), HEADS, V_WIDTH) and lse.shape == (len(rows), HEADS)
        assert out.dtype == q.dtype
        out.backward(data.tensors[3][tuple(own)])
        whole[tuple(own)] = out.detach()
    return [whole, *(_grad(x) for x in (q, k, v, *leaves))]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The largest difference of each tensor, relative to its largest element (at least 1)."""
    result = []
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape and not x.isnan().any()
        result.append(((x - y).abs().max() / y.abs().max().clamp(min=1)).item())
    return result


def check(logits: sympy.Expr, ranks: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
    data = batch(seed=seed)
    wanted = reference(logits, data)
    found = by_ranks(attention(logits, dtype), logits, data.to(dtype), ranks)
    if dtype == torch.float64:
        assert max(errors(found, wanted)) <= 1e-11
        return
    eager = errors(reference(logits, data.to(dtype)), wanted)
    limits = [2 * max(e, 1e-6) for e in eager]
    assert all(e <= limit for e, limit in zip(errors(found, wanted), limits, strict=True))


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
    data = batch(leaves)
    found = by_ranks(attention(logits, leaves=leaves), logits, data, 2)
    assert max(errors(found, reference(logits, data))) <= 1e-11
