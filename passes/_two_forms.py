"""From one form of a value to the other: all ranks' rows of it, and this rank's of what is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from hsap_compile._torch import expr_of
from hsap_compile.kernels import exchange
from hsap_compile.passes._chunks import rows_of_all
from hsap_compile.passes.infer_tokens import multiple

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def gathered(sharder: Sharder, node: Node) -> Node:
    """The whole form of ``node`` from its local one."""
    emit, home = sharder.emit, sharder.home[node]
    with sharder.in_frame(sharder.frame_of(node)):
        axis = sharder.axis(node)
        value, dim = home.node, axis.dim
        if axis.folded:
            shape = sharder.local_shape(node)
            value, dim = sharder.unfolded(value, shape, axis, sharder.tables["n"])
        value = rows_of_all(sharder, value, dim)
        if axis.length != sharder.length:
            stop = sharder.size(axis.length + home.start)
            value = emit(aten.slice.Tensor, value, dim, home.start, stop)
        if axis.folded:
            shape = [sharder.size(s) for s in node.meta["val"].shape]
            value = emit(aten.reshape.default, value, shape)
        return value


def rows_of_whole(sharder: Sharder, node: Node, start: int) -> Node:
    """The local form of ``node``, whose tokens start at column ``start``, from its whole one."""
    emit, axis = sharder.emit, sharder.axis(node)
    slack, learned = sharder.slack(axis), node in sharder.differentiable
    of_chunk = sharder.frame.chunk is not None
    value = sharder.spread(node) if learned and of_chunk else sharder.whole(node)
    dim, rows = axis.dim, sharder.tables["columns"]
    if axis.folded:
        shape = [sharder.size(s) for s in node.meta["val"].shape]
        value, dim = sharder.unfolded(value, shape, axis, sharder.size(axis.length))
    if learned and not of_chunk:
        if slack:  # the nearest token where there is none: zeros may divide
            every = emit(aten.arange.default, sharder.tables["S"], device=value.meta["val"].device)
            value = emit(aten.index_select.default, value, dim, sharder.tokens_at(every, axis, start))
        value = emit(exchange.SHARD, value, rows, sharder.tables["order"], dim, sharder.group)
    else:
        if slack or start or of_chunk:
            rows = sharder.tokens_at(rows, axis, start)
        value = emit(aten.index_select.default, value, dim, rows)
    if axis.folded:
        value = emit(aten.reshape.default, value, sharder.local_shape(node))
    return value


def fits(sharder: Sharder, old: Any, new: Any, local: bool) -> bool:
    """Whether ``new`` has the shape that this rank's rows of ``old`` have, or (not local) its shape."""
    if isinstance(old, tuple | list):
        return len(old) <= len(new) and all(
            fits(sharder, a, b, local) for a, b in zip(old, new, strict=False)
        )
    if not isinstance(old, torch.Tensor):
        return True
    was = [expr_of(size) for size in old.shape]
    dims = [d for d, size in enumerate(was) if sharder.symbol in size.free_symbols]
    if local and len(dims) != 1:
        return False
    if local:
        times = multiple(was[dims[0]], sharder.length)
        if times is None:
            return False
        was[dims[0]] = times[0] * expr_of(sharder.frame.rows)
    return was == [expr_of(size) for size in new.shape] and old.dtype == new.dtype
