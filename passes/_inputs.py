"""What the graph of this rank's tokens takes: the old graph's inputs, then the tables that name its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from hsap_compile._torch import expr_of
from hsap_compile.graph import placeholders
from hsap_compile.passes.infer_tokens import are_vectors

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def write_inputs(sharder: Sharder, columns: torch.Tensor, order: torch.Tensor) -> None:
    """The old inputs, then the tables; S and n as nodes."""
    for node in placeholders(sharder.old):
        new = sharder.graph.placeholder(node.name)
        new.meta.update(node.meta)
        sharder.wholes[node] = new
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        if value.requires_grad:
            sharder.differentiable.add(node)
        wide = node.meta["tokens"] is not None and are_vectors(value)
        if node.meta["parameter"] or value.requires_grad or wide:
            sharder.heavy.add(node)
    for name, value in (("columns", columns), ("order", order)):
        table = sharder.graph.placeholder(name)
        table.meta.update(val=value, table=name, parameter=False)
        sharder.tables[name] = table
    sharder.tables["n"] = sharder.emit(aten.sym_size.int, sharder.tables["columns"], 0)
    for node in placeholders(sharder.old):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sharder.symbols.setdefault(expr_of(value), sharder.wholes[node])
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if expr_of(size).is_Symbol and expr_of(size) not in sharder.symbols:
                sharder.symbols[expr_of(size)] = sharder.emit(aten.sym_size.int, sharder.wholes[node], dim)
    if sharder.symbol in sharder.symbols:  # else no value has tokens
        sharder.tables["S"] = sharder.size(sharder.length)
        sharder.tables["order"] = _unfolded_order(sharder)


def _unfolded_order(sharder: Sharder) -> Node:
    """(S,) the place of every column among all ranks' rows; as ``plan.placement.unfold``."""
    emit, order = sharder.emit, sharder.tables["order"]
    first, jump = (emit(aten.select.int, order, 0, i) for i in (0, 1))
    device = order.meta["val"].device
    steps = emit(aten.ones.default, [sharder.tables["S"]], dtype=torch.int64, device=device)
    return emit(aten.cumsum.default, emit(aten.index_put.default, steps, [first], jump), 0)
