"""Our attention over one rank's rows, as ``partition_attention`` writes it: by flex attention, and by flash
attention over sequences.

Both take q (R, Hq, D), k, v (R, Hkv, D) and, where rows of other groups are received, k, v (C, Hkv, D); the
mask is causal inside of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hsap_compile import formula as f
from hsap_compile._torch import (
    FakeTensorMode,
    compile_with_aot_eager,
    compile_with_inductor,
    fake_table,
)
from hsap_compile.graph import Builder
from hsap_compile.kernels import attention, flex
from hsap_compile.kernels.blocks import rank_tables
from hsap_compile.masks import normalise
from hsap_compile.plan.tables import RankTables


def by_varlen(tables: RankTables, labels: Tensor, *, remote: bool, device: str) -> Callable[..., Tensor]:
    """By ``hsap::attend``: on CUDA calls of flash attention over sequences, on CPU the kernel of slices."""
    slices = torch.from_numpy(tables.masks[0].slices)

    def run(q: Tensor, k: Tensor, v: Tensor, *received: Tensor) -> Tensor:
        far = received if remote else (None, None)
        rest = (slices, None, None, None, [], "", 0, q.shape[2] ** -0.5)
        return attention.OP(q, k, v, *far, *rest)[0]

    return run


def by_flex(tables: RankTables, labels: Tensor, *, remote: bool, device: str) -> Callable[..., Tensor]:
    """By flex attention.  ``labels`` (S,): the documents of all columns, on the device."""
    made = rank_tables(tables, 0, 1)
    compiled: dict[Any, Any] = {}
    names = [n for n in flex.TABLES if n.startswith(("own", "remote") if remote else "own")]
    given = [torch.from_numpy(made[name]).to(device) for name in names]

    def attention(*operands: Tensor) -> Tensor:
        key = tuple(x.requires_grad for x in operands) if torch.is_grad_enabled() else None
        if key not in compiled:
            compiled[key] = _compiled(operands, labels, names, key is not None, device)
        return compiled[key](*operands, labels[None], *given)[0]

    return attention


def _compiled(operands: Sequence[Tensor], labels: Tensor, names: list[str], grads: bool, device: str) -> Any:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    build = Builder(module.graph, mode)
    inputs: list[Tensor] = []

    def node(name: str, value: Tensor) -> torch.fx.Node:
        placeholder = module.graph.placeholder(name)
        placeholder.meta["val"] = value
        inputs.append(value)
        return placeholder

    counts = [fake_table(mode, torch.zeros(9), (0,)).shape[0] for _ in range(2)]
    nodes = []
    for i, x in enumerate(operands):
        with mode:
            rows = counts[0] if i < 3 else counts[1]
            fake = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=x.device, requires_grad=grads)
        nodes.append(node(f"x{i}", fake))
    leaf = node("labels", fake_table(mode, labels[None], ()))
    inputs_of = {}
    for name in names:
        example, dims, least = flex.TABLES[name]
        inputs_of[name] = node(name, fake_table(mode, example.to(device), dims, least))
    same = sympy.Eq(f.leaf(0, f.b, f.q), f.leaf(0, f.b, f.k))
    mask, _ = normalise(sympy.Piecewise((f.score, same & (f.k <= f.q)), (-sympy.oo, True)))
    parts = [flex.Keys("own", *nodes[1:3])] + ([flex.Keys("remote", *nodes[3:5])] if nodes[3:] else [])
    writer = flex.FlexAttention(inputs_of.__getitem__, mask, [leaf], {})
    scale = operands[0].shape[2] ** -0.5
    module.graph.output(writer.attend(build, nodes[0], parts, None, labels.shape[0], scale))
    module.recompile()
    if device == "cpu":  # Inductor has no backward of flex attention there
        return compile_with_aot_eager(module, inputs) if grads else module
    return compile_with_inductor(module, inputs, {})
