"""Rules for chunks of the tokens: parts of a row whose ends depend on its length (``x.chunk(8, 1)``).

A chunk is a row of its own, of which every rank has the rows that it has of those columns: a ``Frame``.
Rules rewrite what is made of a chunk as they do for the batch, in that frame.  A rank may have none of its
tokens; then, and where it has one, rows are made up that are not part of it (``plan.chunks``).

    x[:, a:b]                  index_select(x, rows)
    cat([f(chunk), ..])        all chunks of a row are the row again: index_select(cat, places)
    y[:, a:b] = f(chunk)       index_copy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch.fx import Node

from hsap_compile._torch import expr_of
from hsap_compile.graph import arguments
from hsap_compile.passes._forms import Frame, Local, NoTables, NotLocal
from hsap_compile.passes._reindex import along, where, within
from hsap_compile.passes._tables import Tables
from hsap_compile.passes.infer_tokens import TokenAxis, parts_of_tokens
from hsap_compile.plan.chunks import TOKENS, Chunk, Joined
from hsap_compile.plan.placement import LEAST

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def frame_read(sharder: Sharder, node: Node) -> Frame:
    """Of which row the rows are that ``node`` reads: that of its operands, or of what they are chunks of."""
    found = list(dict.fromkeys(sharder.frame_of(n) for n in operands_of(node) if n in sharder.home))
    if not found:
        return sharder.frame
    axes = [n.meta.get("tokens") for n in operands_of(node) if n not in sharder.home]
    lengths = [axis.length for axis in axes if isinstance(axis, TokenAxis)]
    for frame in (found[0], found[0].outer):
        rows = frame is not None and all(frame in (other, other.outer) for other in found)
        if frame is not None and rows and all((frame.length - x).is_Integer for x in lengths):
            return frame
    raise NotLocal("tokens of chunks meet others")


def operands_of(node: Node) -> list[Node]:
    """What ``node`` reads; of one of the parts of a value, that value."""
    operands = node.all_input_nodes
    return operands[0].all_input_nodes if len(operands) == 1 and parts_of_tokens(operands[0]) else operands


def chunk_of(sharder: Sharder, node: Node, source: Node, first: sympy.Expr) -> Local:
    """``node`` is the elements of the tokens' dimension of ``source`` from ``first`` on."""
    home, axis = sharder.home.get(source), sharder.axis(source)
    if home is not None and home.routed:
        raise NotLocal("rows in the order of a sort")
    start = sharder.start_of(source)
    size = expr_of(node.meta["val"].shape[axis.dim])
    length, begin, end = (_formula(sharder, x) for x in (axis.length, first, first + size))
    if (begin.free_symbols | end.free_symbols) - {TOKENS}:
        raise NotLocal("a chunk that does not follow from the length alone")
    sharder.size(first)  # which whoever gathers asks for
    chunk = Chunk(axis.outer, length, axis.inner, start, begin, end, sharder.frame.chunk)
    if chunk not in sharder.frames:
        sharder.frames[chunk] = _frame(sharder, chunk, size)
    frame = sharder.frames[chunk]
    rows = sharder.local(source, start)
    rows = sharder.emit(aten.index_select.default, rows, axis.dim, frame.tables["places"])
    if rows.meta["val"].dtype in _NUMBERS:  # those of another chunk may name no row of a table
        with sharder.in_frame(frame):
            rows = where(sharder, along(sharder, within(sharder, (0, 0)), rows, axis.dim), rows, 1)
    return Local(rows, frame=frame)


_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _formula(sharder: Sharder, size: sympy.Expr) -> sympy.Expr:
    """``size`` by the columns of the batch."""
    more = sharder.batch.length - sharder.symbol
    return sympy.expand(size.xreplace({sharder.symbol: TOKENS - more}))


def _frame(sharder: Sharder, chunk: Chunk, length: sympy.Expr) -> Frame:
    columns = sharder.tables["columns"].meta["val"]
    table = Tables(sharder.graph, sharder.mode, columns.device)
    places = table((chunk, "rows"), torch.zeros(7, dtype=torch.int64), (0,), LEAST)
    rows = places.meta["val"].shape[0]
    elements = table.add((chunk, "elements"), columns.new_empty(rows))
    tables = NoTables(
        "it needs other tokens of a chunk",
        places=places,
        columns=elements,
        n=sharder.emit(aten.sym_size.int, elements, 0),
        S=sharder.size(length),
    )
    return Frame(length, tables, rows, chunk=chunk, outer=sharder.frame)


def joined(sharder: Sharder, node: Node) -> Local | None:
    """cat of all chunks of a row, in order: the row.  None: they are no such chunks."""
    parts = arguments(node)["tensors"]
    homes = [sharder.home.get(part) for part in parts]
    if any(home is None or home.frame is None or home.frame.chunk is None for home in homes):
        return None
    axis, frames = sharder.axis(node), [sharder.frame_of(part) for part in parts]
    for part, frame in zip(parts, frames, strict=True):
        if frame.outer is not sharder.frame or not _is_all_of(sharder, part, frame, axis.dim):
            return None
    chunks = [frame.chunk for frame in frames if frame.chunk is not None]
    first = chunks[0]
    ends = [sympy.Integer(0), *(chunk.stop for chunk in chunks)]
    whole = first.outer * first.length * first.inner
    if [chunk.first for chunk in chunks] != ends[:-1] or sympy.expand(whole - ends[-1]) != 0:
        return None
    same = {(chunk.outer, chunk.length, chunk.inner, chunk.start) for chunk in chunks}
    if same != {(axis.outer, _formula(sharder, axis.length), axis.inner, first.start)}:
        return None
    columns = sharder.tables["columns"].meta["val"]
    table = Tables(sharder.graph, sharder.mode, columns.device)
    held = columns.new_empty(columns.shape[0] * (axis.outer * axis.inner))
    places = table.add((Joined(tuple(chunks)), "places"), held)
    rows = sharder.emit(aten.cat.default, [home.node for home in homes if home is not None], axis.dim)
    return Local(sharder.emit(aten.index_select.default, rows, axis.dim, places), first.start)


def _is_all_of(sharder: Sharder, part: Node, frame: Frame, dim: int) -> bool:
    """Whether ``part`` has one row for each element of its chunk, in dimension ``dim``."""
    home = sharder.home[part]
    return not home.routed and home.start == 0 and sharder.axis(part) == TokenAxis(dim, 1, frame.length)


def chunk_written(sharder: Sharder, target: Node, source: Node, first: sympy.Expr) -> Local:
    """``target`` with the rows of ``source``, a chunk of such, from its element ``first`` on."""
    axis, frame = sharder.axis(target), sharder.frame_of(source)
    chunk = frame.chunk
    if chunk is None or frame.outer is not sharder.frame or not _is_all_of(sharder, source, frame, axis.dim):
        raise NotLocal("it writes to other tokens than it reads")
    same = (chunk.outer, chunk.length, chunk.inner, chunk.first)
    if same != (axis.outer, _formula(sharder, axis.length), axis.inner, _formula(sharder, first)):
        raise NotLocal("it writes to other tokens than it reads")
    rows = sharder.local(target, chunk.start)
    return Local(put_rows(sharder, rows, sharder.home[source].node, axis.dim, frame), chunk.start)


def put_rows(sharder: Sharder, rows: Node, chunk: Node, dim: int, frame: Frame) -> Node:
    """``rows``, of what ``frame`` is a chunk of, with those of ``chunk``; made-up ones go to a row that is
    dropped."""
    emit, count = sharder.emit, sharder.emit(aten.sym_size.int, rows, dim)
    real = emit(aten.ge.Scalar, frame.tables["columns"], 0)
    at = emit(aten.mul.Tensor, emit(aten.add.Scalar, frame.tables["places"], 1), real)
    behind = rows.meta["val"].dim() - 1 - dim
    more = emit(aten.constant_pad_nd.default, rows, [0, 0] * behind + [1, 0])
    return emit(aten.narrow.default, emit(aten.index_copy.default, more, dim, at, chunk), dim, 1, count)
