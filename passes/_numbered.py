"""Rules where numbers that are no tokens name tokens, or the other way round.

    x[:, numbers], gather(x, 1, numbers)     few tokens, at positions that all ranks know
    x[:, numbers] = rows, index_copy         what such tokens become
    index_add(zeros, 0, numbers, x)          sums of tokens by number: of a document, of a class
    x[mask] = rows, masked_scatter           the mask's tokens get the rows of a whole value, in order

What is read, and sums by number, are sums over ranks: of rows, each of which one rank has, and of every
rank's sums.  What is written stays on the ranks that hold it: each of them reads the rows of a whole value
that its tokens get, by the numbers, or counted from the whole mask.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import hint_of, operator_name
from hsap_compile.graph import arguments
from hsap_compile.kernels import exchange
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._operands import args_of, as_is, output_axis, schema_of, source_of, value_of
from hsap_compile.passes._reindex import where
from hsap_compile.passes.infer_tokens import MANY, TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


# --- few tokens at positions ----------------------------------------------------------------------------


def read_along(sharder: Sharder, node: Node) -> Node:
    """index_select(x, dim, numbers), gather(x, dim, numbers) along the tokens of x."""
    given = arguments(node)
    source, dim = given["self"], given["dim"]
    behind = source.meta["val"].dim() - 1 - dim % source.meta["val"].dim()
    behind = behind if operator_name(node.target) == "aten::index_select" else 0
    return _read(sharder, node, given["index"], behind, lambda rows, at: (rows, dim, at))


def read_at(sharder: Sharder, node: Node) -> Node:
    """x[.., numbers, ..] with numbers in the place of the tokens."""
    source, indices = args_of(node)
    dim = sharder.axis(source).dim
    named = {d: index.meta["val"] for d, index in enumerate(indices) if index is not None}
    if dim not in named or any(value.dtype == torch.bool for value in named.values()):
        raise NotLocal("an index into tokens")
    together = max(named) - min(named) < len(named)
    in_front = min(named) if together else 0
    behind = node.meta["val"].dim() - in_front - max(value.dim() for value in named.values())

    def call(rows: Node, at: Node) -> tuple[Any, ...]:
        return rows, [at if d == dim else map_arg(i, sharder.whole) for d, i in enumerate(indices)]

    return _read(sharder, node, indices[dim], behind, call)


def _read(
    sharder: Sharder, node: Node, numbers: Node, behind: int, call: Callable[[Node, Node], tuple[Any, ...]]
) -> Node:
    """``node`` reads the tokens ``numbers`` of its first operand; its result has ``behind`` dimensions behind
    them; ``call``: its arguments from this rank's rows and their numbers.  Whoever holds a row gives it to
    all, as a sum in which it is the only one that is not zero."""
    source = args_of(node)[0]
    home, emit = sharder.home.get(source), sharder.emit
    if numbers.meta["tokens"] is not None or node.meta["tokens"] is not None:
        raise NotLocal("an index into tokens")
    if home is None or source.meta["val"].dtype == torch.bool:
        raise NotLocal("some tokens of a value that are not its rows in order")
    few, all_of_them = (math.prod(hint_of(size) for size in n.meta["val"].shape) for n in (node, source))
    if 2 * few > all_of_them:  # as it is while compiling
        raise NotLocal("it reads more than half of the tokens, and what follows is the same on every rank")
    at = own_rows_at(sharder, source, sharder.whole(numbers))
    held, at = emit(aten.ge.Scalar, at, 0), emit(aten.clamp.default, at, 0)
    rows = emit(node.target, *call(home.node, at))
    for _ in range(behind):
        held = emit(aten.unsqueeze.default, held, -1)
    return emit(exchange.SUM_RANKS, where(sharder, held, rows, 0), sharder.group)


def own_rows_at(sharder: Sharder, source: Node, numbers: Node) -> Node:
    """Which of this rank's rows of ``source`` the tokens ``numbers`` (whole) are; -1: another rank's."""
    home = sharder.home.get(source)
    if (home is not None and home.routed) or sharder.frame.chunk is not None:
        raise NotLocal("some tokens of a value that are not its rows in order")
    rows = _own_rows(sharder, sharder.axis(source), sharder.start_of(source))
    return sharder.emit(aten.index.Tensor, rows, [numbers])


def _own_rows(sharder: Sharder, axis: TokenAxis, start: int) -> Node:
    """(outer * length * inner,) int64: which of this rank's rows an element of the dimension is, or -1."""
    emit, n, columns = sharder.emit, sharder.tables["n"], sharder.tables["columns"]
    options = {"dtype": torch.int64, "device": columns.meta["val"].device}
    rows = emit(aten.full.default, [sharder.tables["S"]], -1, **options)
    rows = emit(aten.index_put.default, rows, [columns], emit(aten.arange.default, n, **options))
    if axis.length != sharder.length:
        rows = emit(aten.slice.Tensor, rows, 0, start, sharder.size(axis.length + start))
    if not axis.folded:
        return rows
    rows = emit(aten.unsqueeze.default, rows, 1)
    first = emit(aten.arange.default, axis.outer, **options)
    first = emit(aten.reshape.default, emit(aten.mul.Tensor, first, n), [axis.outer, 1, 1])
    each = emit(aten.mul.Tensor, emit(aten.add.Tensor, rows, first), axis.inner)
    each = emit(aten.add.Tensor, each, emit(aten.arange.default, axis.inner, **options))
    return emit(aten.reshape.default, where(sharder, emit(aten.ge.Scalar, rows, 0), each, -1), [-1])


# --- few tokens written -----------------------------------------------------------------------------------


def written_along(sharder: Sharder, node: Node) -> Local:
    """index_copy, index_add, index_fill(x, dim, numbers, y), scatter and its like along the tokens of x."""
    given = arguments(node)
    return _written(sharder, node, given["index"], lambda at: {"index": at})


def written_at(sharder: Sharder, node: Node) -> Local:
    """x[.., numbers, ..] = y, or += y, with numbers in the place of the tokens."""
    given = arguments(node)
    indices, dim = given["indices"], sharder.axis(given["self"]).dim
    if len(indices) <= dim or indices[dim] is None:
        raise NotLocal("a write at places that an index says")
    if any(i is not None and i.meta["val"].dtype == torch.bool for i in indices):
        raise NotLocal("a write at places that an index and a mask say")
    others = [None if i is None or d == dim else sharder.whole(i) for d, i in enumerate(indices)]
    return _written(
        sharder, node, indices[dim], lambda at: {"indices": [*others[:dim], at, *others[dim + 1 :]]}
    )


def _written(sharder: Sharder, node: Node, numbers: Node, named: Callable[[Node], dict[str, Any]]) -> Local:
    """``node`` writes rows of whole values to the tokens ``numbers``; ``named``: the arguments that this
    rank's numbers of them stand in.  Other ranks' tokens are written to a row that is dropped."""
    given, emit = arguments(node), sharder.emit
    target = given["self"]
    axis, start = sharder.axis(target), sharder.start_of(target)
    if any(n is not target and n.meta.get("tokens") is not None for n in node.all_input_nodes):
        raise NotLocal("a write of tokens to other tokens")
    at = own_rows_at(sharder, target, sharder.whole(numbers))
    rows = sharder.local(target, start)
    count = emit(aten.sym_size.int, rows, axis.dim)
    at = emit(
        aten.add.Tensor, at, emit(aten.mul.Scalar, emit(aten.lt.Scalar, at, 0), emit(operator.add, count, 1))
    )
    behind = rows.meta["val"].dim() - 1 - axis.dim
    more = emit(aten.constant_pad_nd.default, rows, [0, 0] * behind + [0, 1])
    chosen = {"self": more, **named(at)}
    values = {n: v if n in chosen else map_arg(v, sharder.spread) for n, v in (given | chosen).items()}
    plain = [values.pop(a.name) for a in schema_of(node) if not a.kwarg_only]
    return Local(emit(aten.narrow.default, emit(node.target, *plain, **values), axis.dim, 0, count), start)


# --- sums by number ---------------------------------------------------------------------------------------


_VALUES = ("source", "src", "values")  # what operators call what they add


def added_along(sharder: Sharder, node: Node) -> Node:
    """index_add(x, dim, numbers, y), scatter_add(x, dim, numbers, y) where x has no tokens: every rank adds
    up its tokens' y."""
    given = arguments(node)
    target, numbers = given["self"], given["index"]
    (values,) = (given[name] for name in _VALUES if name in given)
    dim, axis = given["dim"] % max(target.meta["val"].dim(), 1), values.meta["tokens"]
    here = 0 if operator_name(node.target) == "aten::index_add" else dim
    its = numbers.meta["tokens"]
    if not isinstance(axis, TokenAxis) or not isinstance(its, TokenAxis):
        raise NotLocal("a sum of tokens whose numbers are no tokens")
    if axis.dim != dim or its.dim != here or its.layout != axis.layout:
        raise NotLocal("token dimensions of the operands differ")
    if given.get("reduce", "sum") not in ("sum", "mean"):
        raise NotLocal("the largest of tokens by number")
    if given.get("reduce") == "mean" and not target.meta["val"].is_floating_point():
        raise NotLocal("a mean of whole numbers by number")
    return _added(sharder, node, target, values)


def added_at(sharder: Sharder, node: Node) -> Node:
    """index_put(x, numbers, y, accumulate=True): the same, of numbers in several dimensions."""
    given = arguments(node)
    target, indices, values = given["self"], given["indices"], given["values"]
    places = {
        (i.meta["tokens"].dim - i.meta["val"].dim(), i.meta["tokens"].layout)
        for i in indices
        if i is not None and isinstance(i.meta["tokens"], TokenAxis)
    }
    axis = values.meta["tokens"]
    if not given["accumulate"] or None in indices or len(places) != 1 or not isinstance(axis, TokenAxis):
        raise NotLocal("a write at places that an index says")
    ((from_right, layout),) = places
    behind = target.meta["val"].dim() - len(indices)
    if axis.layout != layout or axis.dim - values.meta["val"].dim() != from_right - behind:
        raise NotLocal("token dimensions of the operands differ")
    return _added(sharder, node, target, values)


def _added(sharder: Sharder, node: Node, target: Node, values: Node) -> Node:
    """x + sum_ranks(the operator on zeros and this rank's rows)"""
    emit, dtype, axis, given = sharder.emit, target.meta["val"].dtype, sharder.axis(values), arguments(node)
    if target.meta["tokens"] is not None or node.meta["tokens"] is not None or dtype == torch.bool:
        raise NotLocal("a write to some tokens")
    tokens = [n for n in node.all_input_nodes if n.meta.get("tokens") is not None]
    if any(n in sharder.home and sharder.home[n].routed for n in tokens):
        raise NotLocal("rows in the order of a sort")
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    start = sharder.start_of(*tokens)
    valid = sharder.valid_rows(axis, start, values.meta["val"].dim())
    base = sharder.whole(target)
    rows = sharder.local(values, start)
    zeros = emit(aten.zeros_like.default, base, dtype=wide)

    def total(rows: Node) -> Node:
        rows = rows if valid is None else where(sharder, valid, rows, 0)
        rows = rows if wide == dtype else emit(aten.to.dtype, rows, wide)
        named = {
            name: zeros if name == "self" else rows if name in _VALUES else map_arg(value, operand)
            for name, value in given.items()
        }
        named.update({"reduce": "sum", "include_self": True} if reduces else {})
        plain = [named.pop(a.name) for a in schema_of(node) if not a.kwarg_only]
        return emit(exchange.SUM_RANKS, emit(node.target, *plain, **named), sharder.group)

    def operand(n: Node) -> Any:
        return sharder.operand(n, start)

    reduces = "reduce" in given
    mean, more = reduces and given["reduce"] == "mean", not reduces or given["include_self"]
    made = total(rows)
    made = emit(aten.add.Tensor, base, made) if more else made
    if mean or not more:
        count = total(emit(aten.ones_like.default, rows))
        if mean:
            by = emit(aten.add.Scalar, count, 1) if more else emit(aten.clamp.default, count, 1)
            made = emit(aten.div.Tensor, made, by)
        made = made if more else emit(aten.where.self, emit(aten.gt.Scalar, count, 0), made, base)
    return made if made.meta["val"].dtype == dtype else emit(aten.to.dtype, made, dtype)


# --- rows in the order of a mask --------------------------------------------------------------------------


def masked_scatter(sharder: Sharder, node: Node) -> Local:
    """masked_scatter(x, mask, y): the mask's elements, in order, are the first numbers of y."""
    given = arguments(node)
    target, mask, source = given["self"], given["mask"], given["source"]
    if target.meta["tokens"] != node.meta["tokens"] or source.meta["tokens"] is not None:
        raise NotLocal("a write at places that an index says")
    sizes = [sharder.size(size) for size in node.meta["val"].shape]
    every = sharder.emit(aten.expand.default, sharder.whole(mask), sizes)
    flat = sharder.emit(aten.reshape.default, sharder.spread(source), [-1])
    return _in_order(sharder, target, every, flat, exact=False)


def masked_rows(sharder: Sharder, node: Node) -> Local:
    """x[mask] = y, or x[mask] += y: the mask's tokens, in order, get the rows of y."""
    given = arguments(node)
    target, (mask,), source = given["self"], given["indices"], given["values"]
    if source.meta["tokens"] is not None:
        raise NotLocal("a write of tokens to other tokens")
    adds = bool(given["accumulate"])
    return _in_order(sharder, target, sharder.whole(mask), sharder.spread(source), exact=True, adds=adds)


def _in_order(
    sharder: Sharder, target: Node, mask: Node, source: Node, exact: bool, adds: bool = False
) -> Local:
    """``target`` with rows of ``source`` in the place of its own, or added, where ``mask`` (whole, of its
    first dimensions) is true.  Too few rows are an index out of range, as are too many if ``exact``."""
    emit, axis, columns = sharder.emit, sharder.axis(target), sharder.tables["columns"]
    home, dim, start = sharder.home.get(target), axis.dim, sharder.start_of(target)
    if home is not None and home.routed:
        raise NotLocal("rows in the order of a sort")
    if axis.length != sharder.length or sharder.frame.chunk is not None:
        last = emit(operator.sub, sharder.size(axis.length), 1)
        columns = emit(aten.clamp.default, emit(aten.sub.Tensor, columns, start), 0, last)
    if axis.folded:
        sizes = [sharder.size(size) for size in value_of(target).shape[: mask.meta["val"].dim()]]
        mask, dim = sharder.unfolded(mask, sizes, axis, sharder.size(axis.length))
    inside = list(range(dim + 1, mask.meta["val"].dim()))
    counts: Node = emit(aten.sum.dim_IntList, mask, inside) if inside else mask
    counts = emit(aten.to.dtype, counts, torch.int64)
    ends = emit(aten.cumsum.default, emit(aten.reshape.default, counts, [-1]), 0)
    ends = emit(aten.view_as.default, ends, counts)
    number = emit(aten.index_select.default, emit(aten.sub.Tensor, ends, counts), dim, columns)
    mask = emit(aten.index_select.default, mask, dim, columns)
    if inside:
        own = emit(aten.flatten.using_ints, emit(aten.to.dtype, mask, torch.int64), dim + 1)
        before = emit(aten.sub.Tensor, emit(aten.cumsum.default, own, -1), own)
        before = emit(aten.add.Tensor, before, emit(aten.unsqueeze.default, number, -1))
        number = emit(aten.view_as.default, before, mask)
    behind = emit(
        aten.add.Scalar, number, 1
    )  # one row of zeros stands in front, for whatever the mask has not
    if exact:
        rows = emit(aten.sym_size.int, source, 0)
        other = emit(aten.ne.Scalar, emit(aten.sum.default, counts), rows)
        wrong = emit(aten.mul.Scalar, emit(aten.to.dtype, other, torch.int64), emit(operator.add, rows, 1))
        behind = emit(aten.add.Tensor, behind, wrong)
    picked = emit(aten.where.ScalarOther, mask, behind, 0)
    if axis.folded:
        mask, picked = (emit(aten.flatten.using_ints, x, axis.dim, dim + 1) for x in (mask, picked))
    padded = emit(aten.constant_pad_nd.default, source, [0, 0] * (source.meta["val"].dim() - 1) + [1, 0])
    values, rows = emit(aten.index.Tensor, padded, [picked]), sharder.local(target, start)
    values = emit(aten.add.Tensor, values, rows) if adds else values
    for _ in range(rows.meta["val"].dim() - mask.meta["val"].dim()):
        mask = emit(aten.unsqueeze.default, mask, -1)
    return Local(emit(aten.where.self, mask, values, rows), start)


# --- x[..] and x[..] = y -----------------------------------------------------------------------------------


def indexed(sharder: Sharder, node: Node) -> Any:
    table, indices = args_of(node)
    if isinstance(axis := table.meta.get("tokens"), TokenAxis):
        numbers = [i for i in indices if i is not None]
        if (axis.dim < len(indices) and indices[axis.dim] is not None) or any(
            i.meta.get("tokens") is not None for i in numbers
        ):
            return read_at(sharder, node)
        return as_is(sharder, node)
    if axis is MANY or any(i is None for i in indices):
        raise NotLocal("an index into tokens")
    out = output_axis(node)
    rank = max(i.meta["val"].dim() for i in indices)
    for i in indices:
        axis = i.meta.get("tokens")
        aligned = isinstance(axis, TokenAxis) and axis.dim - i.meta["val"].dim() == out.dim - rank
        if isinstance(axis, TokenAxis) and not (aligned and axis.layout == out.layout):
            raise NotLocal("token dimensions of the indices differ")
    return as_is(sharder, node)


def put(sharder: Sharder, node: Node) -> Any:
    """``x[mask] = values``: one value, one for each feature, or a row for each, of every token in a mask."""
    given = arguments(node)
    if given["self"].meta["tokens"] is None:
        return added_at(sharder, node)
    source, axis = source_of(node)
    (mask, *more), values = given["indices"], given["values"]
    if source is not given["self"]:
        raise NotLocal("a write at places that an index says")
    if more or mask is None or mask.meta["val"].dtype != torch.bool:
        return written_at(sharder, node)
    if mask.meta.get("tokens") != axis:
        raise NotLocal("token dimensions of the mask and of what it writes to differ")
    features = source.meta["val"].dim() - mask.meta["val"].dim()
    if values.meta["val"].dim() > features and values.meta["val"].shape[0] != 1:
        return masked_rows(sharder, node)
    if values.meta.get("tokens") is not None:
        raise NotLocal("a value for each token that is written")
    return as_is(sharder, node)


def looked_up(sharder: Sharder, node: Node) -> Any:
    """index_select(table, dim, i), gather(table, dim, i): every token reads the table at its own number."""
    given = arguments(node)
    axis, dim = given["index"].meta["tokens"], given["dim"] % max(given["self"].meta["val"].dim(), 1)
    if operator_name(node.target) == "aten::gather" and axis.dim != dim:
        raise NotLocal("a table whose rows are tokens")
    return as_is(sharder, node)
