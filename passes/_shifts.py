"""Rules for slices, pads, shifts, rolls, differences and convolutions along the tokens: each is a re-index.

A rule here is called where the operator's dimension is that of the tokens; see ``_families``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from hsap_compile._torch import expr_of, hint_of
from hsap_compile.graph import arguments
from hsap_compile.kernels import exchange
from hsap_compile.passes._chunks import chunk_of, chunk_written, joined
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._operands import constant_of
from hsap_compile.passes._reindex import (
    Longer,
    View,
    along,
    moved,
    placed,
    slack_of,
    taken,
    view_of,
    viewed,
    where,
    windows_of,
    within,
)
from hsap_compile.passes.infer_tokens import MANY, TokenAxis
from hsap_compile.plan.shifts import Range

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def token_slice(sharder: Sharder, node: Node) -> Any:
    """x[:, a:b]: a part of the tokens is the same rows, of which others are no longer part of the value."""
    given = arguments(node)
    source, axis = given["self"], given["self"].meta["tokens"]
    if expr_of(source.meta["val"].shape[axis.dim]) == expr_of(node.meta["val"].shape[axis.dim]):
        if source in sharder.longer:
            return sharder.longer[source]
        return sharder.home[source] if source in sharder.home else Local(sharder.local(source))
    if given["step"] != 1:
        raise NotLocal("a slice along the tokens that is not a plain range")
    begin = _position(sharder, axis, 0 if given["start"] is None else given["start"])
    return _range(sharder, node, source, begin)


def token_part(sharder: Sharder, node: Node) -> Any:
    """One of split(x), chunk(x): it begins where those in front of it end."""
    parts, which = node.args
    assert isinstance(parts, Node) and isinstance(which, int)
    source = arguments(parts)["self"]
    if node.meta["tokens"] is None:
        raise NotLocal("parts of a fixed number of tokens; a fixed number of parts, as of chunk, would stay")
    dim = sharder.axis(source).dim
    begin = sum((expr_of(part.shape[dim]) for part in parts.meta["val"][:which]), sympy.Integer(0))
    return _range(sharder, node, source, sympy.expand(begin))


def _range(sharder: Sharder, node: Node, source: Node, begin: sympy.Expr) -> Any:
    """``node`` is the tokens of ``source`` from ``begin`` on."""
    axis, out = sharder.axis(source), node.meta["tokens"]
    if isinstance(out, TokenAxis) and not (sharder.length - out.length).is_Integer:
        return chunk_of(sharder, node, source, begin)
    if axis.folded or out is MANY:
        raise NotLocal("a slice along the tokens that is not a plain range")
    if out is None:
        return _few(sharder, source, begin, int(node.meta["val"].shape[axis.dim]))
    if not begin.is_Integer:
        raise NotLocal("a slice of the last tokens")
    longer = sharder.longer.get(source)
    if longer is not None and longer.view is None:
        more = longer
        rows: Callable[[int, Range], Node] = lambda by, into: more.rows(by + int(begin), into)  # noqa: E731
        return placed(sharder, node, rows, longer.column + int(begin))
    return viewed(sharder, node, moved(view_of(sharder, source), int(begin), slack_of(sharder, node)))


def table_rows(sharder: Sharder, node: Node) -> Local:
    """table[a : a + S] of what has no tokens (positions): every token reads the row of its own number."""
    given, axis = arguments(node), node.meta["tokens"]
    table, begin = given["self"], given["start"] or 0
    if not isinstance(axis, TokenAxis) or axis.folded or not isinstance(begin, int) or begin < 0:
        raise NotLocal("a part of a table that is not a row for each token")
    if given["step"] != 1 or given["dim"] % table.meta["val"].dim() != axis.dim:
        raise NotLocal("a part of a table that is not a row for each token")
    start = sharder.start_of(node)
    at = sharder.tokens_at(sharder.tables["columns"], axis, start)
    at = at if begin == 0 else sharder.emit(aten.add.Scalar, at, begin)
    return Local(sharder.emit(aten.index_select.default, sharder.operand(table), axis.dim, at), start)


def token_select(sharder: Sharder, node: Node) -> Any:
    """x[:, a]"""
    given = arguments(node)
    axis = given["self"].meta["tokens"]
    row = _few(sharder, given["self"], _position(sharder, axis, given["index"]), 1)
    return sharder.emit(aten.squeeze.dim, row, axis.dim)


def _position(sharder: Sharder, axis: TokenAxis, index: Any) -> sympy.Expr:
    """The token that ``index`` names, which may count from the end."""
    number = index.meta["val"] if isinstance(index, Node) else index
    token = expr_of(number)
    if hint_of(number) >= 0:  # for all lengths of a graph: torch guards on where a slice begins
        return token
    return sympy.expand(token + axis.outer * axis.length * axis.inner)


def _few(sharder: Sharder, source: Node, token: sympy.Expr, count: int) -> Node:
    """A number of tokens that does not grow with S: whoever holds a row gives it to all, as a sum."""
    home, axis, emit = sharder.home.get(source), sharder.axis(source), sharder.emit
    if home is None or home.routed or axis.folded or source.meta["val"].dtype == torch.bool:
        raise NotLocal("some tokens of a value that are not its rows in order")
    columns = sharder.tables["columns"]
    numbers = emit(aten.arange.default, count, dtype=torch.int64, device=columns.meta["val"].device)
    wanted = emit(aten.add.Scalar, numbers, sharder.size(token + home.start))
    hits = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, columns, 1), wanted)
    held = along(sharder, emit(aten.any.dim, hits, 0), home.node, axis.dim)
    at = emit(aten.argmax.default, emit(aten.to.dtype, hits, torch.int64), 0)
    rows = emit(aten.index_select.default, home.node, axis.dim, at)
    return emit(exchange.SUM_RANKS, where(sharder, held, rows, 0), sharder.group)


def pad(sharder: Sharder, node: Node) -> Any:
    """pad(x, [.., left, right, ..]): token t is token t - left."""
    given = arguments(node)
    source, amounts, fill = given["self"], list(given["pad"]), given["value"] or 0.0
    axis = sharder.axis(source)
    here = 2 * (source.meta["val"].dim() - 1 - axis.dim)
    left, right = amounts[here : here + 2]
    if given.get("mode", "constant") != "constant":
        raise NotLocal("it pads the tokens with other tokens")
    if not (isinstance(left, int) and isinstance(right, int)):
        raise NotLocal("it pads the tokens by a number that depends on S")
    amounts[here : here + 2] = [0, 0]
    made = _padded(sharder, node, source, left, fill)
    if not any(amounts):
        return made
    if isinstance(made, Longer):
        raise NotLocal("it pads the tokens and another dimension")
    return replace(made, node=sharder.emit(aten.constant_pad_nd.default, made.node, amounts, fill))


def _padded(sharder: Sharder, node: Node, source: Node, left: int, fill: float) -> Local | Longer:
    view = view_of(sharder, source)
    if view.fill is not None and view.fill != fill:
        raise NotLocal("it pads the tokens with different numbers")
    return viewed(sharder, node, moved(view, -left, slack_of(sharder, node), fill))


def concatenation(sharder: Sharder, node: Node) -> Any:
    """cat([a, x, b]) along the tokens of x: token t is token t - len(a) of x, then a and b are put there."""
    parts = arguments(node)["tensors"]
    if (row := joined(sharder, node)) is not None:
        return row
    runs = [i for i, part in enumerate(parts) if part.meta["tokens"] is not None]
    if len(runs) != 1 or any(p.meta["val"].dtype != node.meta["val"].dtype for p in parts):
        raise NotLocal("it joins tokens with others")
    main, dim = parts[runs[0]], sharder.axis(node).dim
    sizes = [expr_of(part.meta["val"].shape[dim]) for part in parts]
    left = int(sum(sizes[: runs[0]]))
    pieces = [
        (part, sympy.expand(sum(sizes[:i])), int(sizes[i]))
        for i, part in enumerate(parts)
        if i != runs[0] and sizes[i] != 0
    ]
    numbers = {constant_of(part) for part, _, _ in pieces}
    if len(numbers) == 1 and (number := numbers.pop()) is not None:
        return _padded(sharder, node, main, left, number)
    view = moved(view_of(sharder, main), -left, slack_of(sharder, node))

    def rows(by: int, into: Range) -> Node:
        made = taken(sharder, view, (by,), into)
        for part, token, count in pieces:
            made = _put(sharder, made, sharder.operand(part), dim, sharder.size(token - by), count)
        return made

    return placed(sharder, node, rows, view.by)


def _put(sharder: Sharder, rows: Node, few: Node, dim: int, column: Any, count: int) -> Node:
    """``rows`` with the ``count`` tokens of ``few``, which is whole, from ``column`` on."""
    emit = sharder.emit
    token = emit(aten.sub.Scalar, sharder.tables["columns"], column)
    places = emit(aten.clamp.default, token, 0, count - 1)
    there = emit(aten.eq.Tensor, places, token)
    return where(
        sharder, along(sharder, there, rows, dim), emit(aten.index_select.default, few, dim, places), rows
    )


def token_write(sharder: Sharder, node: Node) -> Any:
    """slice_scatter(x, y): x[:, a:b] = y.  select_scatter(x, y): x[:, a] = y."""
    given = arguments(node)
    target, source = given["self"], given["src"]
    axis, start, slack = sharder.axis(target), sharder.start_of(target), slack_of(sharder, target)
    if any(n in sharder.home and sharder.home[n].routed for n in (target, source)):
        raise NotLocal("rows in the order of a sort")
    if given.get("step", 1) != 1:
        raise NotLocal("it writes to tokens that are not a plain range")
    index = given["index"] if "index" in given else given["start"] or 0
    begin = _position(sharder, axis, index)
    if source in sharder.home and sharder.frame_of(source) is not sharder.frame:
        return chunk_written(sharder, target, source, begin)
    rows = sharder.local(target, start)
    if source.meta["tokens"] is None:
        few = sharder.spread(source)
        few = sharder.emit(aten.unsqueeze.default, few, axis.dim) if "index" in given else few
        count = int(few.meta["val"].shape[axis.dim])
        return Local(_put(sharder, rows, few, axis.dim, sharder.size(begin + start), count), start)
    if sharder.axis(source).dim != axis.dim or not begin.is_Integer:
        raise NotLocal("it writes to the last tokens")
    first = start + int(begin)
    mask = within(sharder, (first, slack_of(sharder, source) - first))
    new = sharder.local(source, first)
    if mask is None or slack == slack_of(sharder, source):
        return Local(new, start)
    return Local(where(sharder, along(sharder, mask, rows, axis.dim), new, rows), start)


def roll(sharder: Sharder, node: Node) -> Any:
    """roll(x, k): token t is token t - k, around the end."""
    given = arguments(node)
    source = given["self"]
    rank, axis, view = source.meta["val"].dim(), sharder.axis(source), view_of(sharder, source)
    moves = list(zip(given["shifts"], (d % rank for d in given["dims"]), strict=True))
    if source in sharder.longer or not all(isinstance(by, int) for by, _ in moves):
        raise NotLocal("it turns the tokens by a number that depends on S")
    turn = sum(by for by, d in moves if d == axis.dim)
    made = taken(sharder, view, (-view.by - turn,), view.seen, wraps=True)
    others = [(by, d) for by, d in moves if d != axis.dim]
    if others:
        made = sharder.emit(aten.roll.default, made, *(list(x) for x in zip(*others, strict=True)))
    return Local(made, view.by)


# --- windows ------------------------------------------------------------------------------------------------


def difference(sharder: Sharder, node: Node) -> Any:
    """diff(x, n): n times token t + 1 minus token t."""
    given = arguments(node)
    times, source = given["n"], given["self"]
    if times < 1 or given["prepend"] is not None or given["append"] is not None:
        raise NotLocal("differences of tokens and others")
    if source.meta["val"].dtype == torch.bool:
        raise NotLocal("differences of truth values")
    view, dim = view_of(sharder, source), sharder.axis(source).dim + 1

    def rows(by: int, into: Range) -> Node:
        made = windows_of(sharder, view, range(by, by + times + 1), into)
        for left in range(times, 0, -1):
            after, before = (sharder.emit(aten.slice.Tensor, made, dim, a, a + left) for a in (1, 0))
            made = sharder.emit(aten.sub.Tensor, after, before)
        return sharder.emit(aten.squeeze.dim, made, dim)

    return placed(sharder, node, rows, view.by)


def unfold(sharder: Sharder, node: Node) -> Any:
    """unfold(x, dim, K, 1): tokens t .. t + K - 1 in a dimension behind all others."""
    given = arguments(node)
    source, size = given["self"], given["size"]
    if given["step"] != 1 or not isinstance(size, int):
        raise NotLocal("windows that are not one for each token")
    view, dim = view_of(sharder, source), sharder.axis(source).dim
    rank = source.meta["val"].dim()

    def rows(by: int, into: Range) -> Node:
        made = windows_of(sharder, view, range(by, by + size), into)
        order = [d for d in range(rank + 1) if d != dim + 1]
        return sharder.emit(aten.permute.default, made, [*order, dim + 1])

    return placed(sharder, node, rows, view.by)


def convolution(sharder: Sharder, node: Node) -> Any:
    """conv1d over the tokens (B, C, S) with stride 1: a product of every token's window and the weight."""
    given = arguments(node)
    source, weight, bias = given["input"], given["weight"], given["bias"]
    axis = sharder.axis(source)
    if any(x is not None and x.meta["tokens"] is not None for x in (weight, bias)):
        raise NotLocal("a convolution with tokens")
    if weight.meta["val"].dim() != 3 or axis.dim != source.meta["val"].dim() - 1 or given.get("transposed"):
        raise NotLocal("a convolution that is not along the tokens alone")
    if _single(given["stride"]) != 1:
        raise NotLocal("a convolution with a stride")
    step, taps, padding = _single(given["dilation"]), int(weight.meta["val"].shape[2]), given["padding"]
    reach = step * (taps - 1)
    left = {"same": reach // 2, "valid": 0}[padding] if isinstance(padding, str) else _single(padding)
    if source in sharder.home or source in sharder.longer:
        view = view_of(sharder, source)
    else:  # whole on every rank
        view = View(source, 0, (0, slack_of(sharder, source)))
    if view.fill not in (None, 0) and (left or padding == "same"):
        raise NotLocal("a convolution that pads what was padded with other numbers")

    def rows(by: int, into: Range) -> Node:
        windows = windows_of(sharder, view, [by - left + k * step for k in range(taps)], into)
        added = None if bias is None else sharder.operand(bias)
        return _product(sharder, windows, sharder.operand(weight), added, given["groups"])

    return placed(sharder, node, rows, view.by - left)


def _single(values: Any) -> Any:
    return values if isinstance(values, int) else values[0]


def _product(sharder: Sharder, windows: Node, weight: Node, bias: Node | None, groups: int) -> Node:
    """(.., C, n, K) windows and a weight (O, C / groups, K): (.., O, n).  The weight itself is an operand of
    what is local, so that its gradient is known to be this rank's share."""
    emit = sharder.emit
    *outer, channels, _, taps = windows.meta["val"].shape
    rank, n = len(outer) + 3, sharder.tables["n"]
    windows = emit(aten.transpose.int, windows, rank - 3, rank - 2)  # (.., n, C, K)
    result = windows.meta["val"].dtype
    if tuple(weight.meta["val"].shape[:2]) == (groups, 1) and groups == channels:  # every channel by itself
        if result in (torch.bfloat16, torch.float16):
            windows = emit(aten.to.dtype, windows, torch.float32)
        terms = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, windows, rank - 1), weight)
        made = emit(aten.squeeze.dim, emit(aten.sum.dim_IntList, terms, [-1]), -1)  # (.., n, C)
        made = made if bias is None else emit(aten.add.Tensor, made, bias)
        made = made if made.meta["val"].dtype == result else emit(aten.to.dtype, made, result)
    else:
        sizes = [sharder.size(size) for size in outer]
        many = emit(operator.mul, n, sizes[0]) if sizes else n
        flat = emit(aten.reshape.default, windows, [many, int(channels), int(taps)])
        made = emit(aten.conv1d.default, flat, weight, bias, [1], [0], [1], groups)
        made = emit(aten.reshape.default, made, [*sizes, n, int(weight.meta["val"].shape[0])])
    return emit(aten.transpose.int, made, rank - 3, rank - 2)


#: By the operator's name, where the dimension that it names holds the tokens.
ALONG_TOKENS = {
    "aten::slice": token_slice, "aten::select": token_select, "aten::roll": roll, "aten::diff": difference,
    "aten::slice_scatter": token_write, "aten::select_scatter": token_write, "aten::unfold": unfold,
}  # fmt: skip
