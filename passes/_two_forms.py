"""From one form of a value to the other: all ranks' rows of it, and this rank's of what is whole."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from hsap_compile._torch import expr_of
from hsap_compile.kernels import exchange
from hsap_compile.passes._chunks import put_rows
from hsap_compile.passes._reindex import sizes_with
from hsap_compile.passes.infer_tokens import TokenAxis, multiple
from hsap_compile.plan.chunks import TOKENS

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def gathered(sharder: Sharder, node: Node) -> Node:
    """The whole form of ``node`` from its local one."""
    home = sharder.home[node]
    with sharder.in_frame(sharder.frame_of(node)):
        return _whole(sharder, home.node, sharder.axis(node), home.start)


def _whole(sharder: Sharder, value: Node, axis: TokenAxis, start: int) -> Node:
    """All ranks' rows, with tokens as ``axis`` says, of ``value``, this rank's, from column ``start`` on."""
    emit, dim = sharder.emit, axis.dim
    if axis.folded:
        parts = [axis.outer, sharder.tables["n"], axis.inner]
        value, dim = emit(aten.reshape.default, value, sizes_with(sharder, value, dim, parts)), dim + 1
    value = _columns(sharder, value, dim)
    if axis.length != sharder.length:
        value = emit(aten.slice.Tensor, value, dim, start, sharder.size(axis.length + start))
    return emit(aten.flatten.using_ints, value, dim - 1, dim + 1) if axis.folded else value


def _columns(sharder: Sharder, value: Node, dim: int) -> Node:
    """Every column of the frame of ``value``, which has this rank's in ``dim``."""
    frame, emit, tables = sharder.frame, sharder.emit, sharder.tables
    chunk, outer = frame.chunk, frame.outer
    if chunk is None or outer is None:
        S, group = tables["S"], sharder.group
        return emit(exchange.GATHER, value, tables["columns"], tables["order"], S, dim, group)
    length, first, stop = (
        x.xreplace({TOKENS: sharder.batch.length}) for x in (chunk.length, chunk.first, chunk.stop)
    )
    rows = emit(operator.mul, outer.tables["n"], chunk.outer * chunk.inner)
    rows = emit(aten.new_zeros.default, value, sizes_with(sharder, value, dim, [rows]))
    rows = put_rows(sharder, rows, value, dim, frame)
    with sharder.in_frame(outer):
        made = _whole(sharder, rows, TokenAxis(dim, chunk.outer, length, chunk.inner), chunk.start)
    return emit(aten.slice.Tensor, made, dim, sharder.size(first), sharder.size(stop))


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
