"""Graphs of one flex attention, and how every rank of a mesh runs them; what ranks send is indexed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hsap_compile import formula as f
from hsap_compile._torch import FakeTensorMode, fake_table
from hsap_compile.documents import attended
from hsap_compile.graph import Builder
from hsap_compile.kernels import flex
from hsap_compile.kernels.blocks import rank_tables
from hsap_compile.kernels.reference import attend_reference
from hsap_compile.masks import normalise
from hsap_compile.plan import MeshShape, make
from strategies import BATCH, LEAVES, TOKENS

FLOATS = (
    torch.linspace(-1, 1, 7).double(),
    torch.linspace(-2, 2, BATCH * TOKENS).double().view(BATCH, TOKENS),
)


@dataclass(frozen=True)
class Sizes:
    """B, S, Hq, Hkv, D, Dv."""

    batch: int = BATCH
    tokens: int = TOKENS
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    v_width: int = 20


@dataclass(frozen=True)
class Case:
    """An attention: logits, sizes, leaves, and whole q, k, v and the gradient of the output (B, S, H, D)."""

    logits: sympy.Expr
    sizes: Sizes = Sizes()
    leaves: tuple[Tensor, ...] = LEAVES + FLOATS
    dtype: torch.dtype = torch.float64

    def to(self, dtype: torch.dtype) -> Case:
        leaves = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.leaves)
        return replace(self, leaves=leaves, dtype=dtype)

    @property
    def tensors(self) -> list[Tensor]:
        s, made = self.sizes, torch.Generator().manual_seed(0)
        shapes = (s.heads, s.width), (s.kv_heads, s.width), (s.kv_heads, s.v_width), (s.heads, s.v_width)
        return [
            torch.randn(s.batch, s.tokens, *x, generator=made, dtype=torch.float64).to(self.dtype)
            for x in shapes
        ]

    def fresh(self) -> tuple[list[Tensor], list[Tensor]]:
        """q, k, v and leaves, the floating ones with gradients."""
        made = [x.requires_grad_() for x in self.tensors[:3]]
        return made, [x.detach().clone().requires_grad_(x.is_floating_point()) for x in self.leaves]


def attention(
    case: Case, *, remote: bool = True, static: bool = False, device: str = "cpu", **kernel_options: Any
) -> torch.fx.GraphModule:
    """The graph of one rank.  Its sizes may be anything; ``static``: 1200 own rows in ten blocks."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    s = case.sizes
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    build = Builder(module.graph, mode)

    def given(name: str, value: Tensor) -> torch.fx.Node:
        node = module.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def number() -> Any:
        return fake_table(mode, torch.zeros(9), (0,)).shape[0]

    own = 1200 if static else number()
    kv = s.kv_heads
    shapes = {"q": (own, s.heads, s.width), "k": (own, kv, s.width), "v": (own, kv, s.v_width)}
    if remote:
        received = number()
        shapes |= {f"{name}_remote": (received, *shapes[name][1:]) for name in ("k", "v")}
    with mode:
        values = {
            n: torch.empty(*x, dtype=case.dtype, device=device, requires_grad=True) for n, x in shapes.items()
        }
    operands = {n: given(n, x) for n, x in values.items()}
    heads = given("heads", fake_table(mode, torch.arange(s.heads, device=device), ()))
    nodes = []
    for i, leaf in enumerate(case.leaves):
        nodes.append(
            given(f"leaf{i}", fake_table(mode, leaf.to(device), ()).requires_grad_(leaf.is_floating_point()))
        )
    tables = {}
    for name in table_names(remote):
        example, dims, least = flex.TABLES[name]
        if static:
            size = 1280 if name == "own_rows" else 10
            shape = [size if d in dims else n for d, n in enumerate(example.shape)]
            example, dims = example.new_zeros(shape), ()
        tables[name] = given(name, fake_table(mode, example.to(device), dims, least))
    mask, factor = normalise(case.logits)
    writer = flex.FlexAttention(tables.__getitem__, mask, nodes, kernel_options)
    parts = [flex.Keys("own", operands["k"], operands["v"])]
    if remote:
        parts.append(flex.Keys("remote", operands["k_remote"], operands["v_remote"]))
    scale = factor * s.width**-0.5
    module.graph.output(writer.attend(build, operands["q"], parts, heads, s.tokens, scale))
    module.recompile()
    module.graph.lint()
    return module


def table_names(remote: bool) -> list[str]:
    return [name for name in flex.TABLES if name.startswith(("own", "remote") if remote else "own")]


def reference(case: Case) -> list[Tensor]:
    """out (B, S, Hq, Dv) and the gradients of q, k, v and leaves of dense attention."""
    s = case.sizes
    (q, k, v), leaves = case.fresh()
    at = torch.cartesian_prod(torch.arange(s.batch), torch.arange(s.tokens))
    whole = [[s.tokens * b, s.tokens * (b + 1)] * 2 + [3, 0, 0] for b in range(s.batch)]
    out, _ = attend_reference(
        *(x.flatten(0, 1) for x in (q, k, v)), None, None, torch.tensor(whole), at, None,
        torch.arange(s.heads), leaves, f.dumps(case.logits), s.tokens, s.width**-0.5,
    )  # fmt: skip
    out.backward(case.tensors[3].flatten(0, 1))
    return [out.detach().unflatten(0, (s.batch, s.tokens)), *(_grad(x) for x in (q, k, v, *leaves))]


def _grad(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64) if x.grad is None else x.grad


#: From the inputs of ``attention`` and the gradient of out: out, and the gradients of the inputs.
Run = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor | None]]]


def run_graph(graph: Callable[..., Any]) -> Run:
    """Run a graph, or what it was compiled to, with autograd."""

    def run(inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        fresh = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        out, lse = graph(*fresh)
        assert out.dtype == grad.dtype and lse.shape == out.shape[:2]
        out.backward(grad)
        return out.detach(), [x.grad for x in fresh]

    return run


def by_ranks(run: Run, case: Case, ranks: int) -> list[Tensor]:
    """What ``reference`` returns, from ``run`` on every rank of ``ranks`` x 1."""
    s = case.sizes
    mask, _ = normalise(case.logits)
    found = attended(mask, case.leaves, s.batch, s.tokens)
    plan = make([found], MeshShape(tuple((r,) for r in range(ranks))))
    *(q, k, v), grad = case.tensors
    whole = torch.zeros_like(grad)
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    leaf_sums = [torch.zeros(x.shape, dtype=torch.float64) for x in case.leaves]
    for rank in range(ranks):
        tables = plan.tables(rank)
        made = rank_tables(tables, 0, s.batch)
        own = tuple(torch.cartesian_prod(torch.arange(s.batch), torch.from_numpy(tables.group_columns)).T)
        far = tuple(torch.from_numpy(tables.masks[0].remote).T)
        inputs = [x[own] for x in (q, k, v)] + [x[far] for x in (k, v)]
        inputs += [torch.arange(s.heads), *case.leaves]
        inputs += [torch.from_numpy(made[name]) for name in table_names(True)]
        out, grads = run(inputs, grad[own])
        whole[own] = out
        for total, part in zip(sums, grads[:3], strict=True):
            assert part is not None
            total[own] += part
        for total, part in zip(sums[1:], grads[3:5], strict=True):
            assert part is not None
            total.index_put_(far, part, accumulate=True)
        for total, part in zip(leaf_sums, grads[6:], strict=False):
            if part is not None:
                total += part
    return [whole, *sums, *leaf_sums]


def errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The largest difference of each tensor, relative to its largest element (at least 1)."""
    result = []
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape and not x.isnan().any()
        result.append(((x - y).abs().max() / y.abs().max().clamp(min=1)).item())
    return result
