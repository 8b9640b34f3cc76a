"""The re-index: a value's rows as they are read at other columns.

Row i of its result (``taken``) is the number that a value has at column ``columns[i] + k``, for one or more
static k.  A rank receives exactly the rows that it lacks, each once, in one all-to-all (``plan.shifts`` says
which), and picks from its own and these:

    rows = pool(own, all_to_all(own[send]), fill)    (.., n + received + 1, ..)
    result = rows[index]                             (.., n, K, ..)

What all ranks have whole is picked from as it is.  A value of more than S tokens (padded, not yet cut) has no
rows that ranks could hold: its form is ``Longer``, which is made once a slice says which tokens count.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import expr_of, hint_of, operator_name
from hsap_compile.graph import positional
from hsap_compile.kernels import copies, exchange
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._tables import Tables
from hsap_compile.passes.infer_tokens import TokenAxis
from hsap_compile.plan.shifts import Range, Shift

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """Token t of a value is what ``source`` has at column ``t + by`` where that lies in ``seen``, elsewhere
    ``fill`` (None: nobody asks)."""

    source: Node
    by: int
    seen: Range
    fill: float | None = None


@dataclass(frozen=True, eq=False)
class Longer:
    """The local form of a value of more than S tokens.

    ``rows(by, into)``: row i is token ``columns[i] + by``, for columns in ``into``.  ``column``: where the
    first token stands if nothing moves, perhaps outside of the batch.  ``view``: what it is, if it is a view.
    """

    rows: Callable[[int, Range], Node]
    column: int
    view: View | None = None


# --- the re-index -------------------------------------------------------------------------------------


def taken(sharder: Sharder, view: View, offsets: Sequence[int], into: Range, wraps: bool = False) -> Node:
    """(.., n, K, ..), or (.., n, ..) of one offset: row i of column k is token ``columns[i] + offsets[k]`` of
    ``view``.  Rows of columns outside of ``into`` hold numbers of some token, of ``into`` if there is one."""
    shift = Shift(tuple(view.by + k for k in offsets), view.seen, into, wraps)
    source, fill = view.source, view.fill or 0
    axis, home = sharder.axis(source), sharder.home.get(source)
    dim = axis.dim
    if home is None and source not in sharder.differentiable:
        return _picked(sharder, sharder.whole(source), dim, shift, fill)
    value = sharder.local(source, 0 if home is None else home.start)
    if shift.offsets == (0,):
        return _ordinary(sharder, _masked(sharder, value, dim, shift, fill), dim, into)
    if axis.folded:
        value, dim = sharder.unfolded(value, sharder.local_shape(source), axis, sharder.tables["n"])
    made = _ordinary(sharder, _exchanged(sharder, value, dim, shift, fill), dim, into)
    return sharder.emit(aten.reshape.default, made, sharder.local_shape(source)) if axis.folded else made


def _ordinary(sharder: Sharder, rows: Node, dim: int, into: Range) -> Node:
    """``rows`` with the numbers of one that is asked for in those that are not: a function may have no
    derivative at a token that it was never meant for (the logarithm of a row of zeros), a table no row."""
    inside = within(sharder, into) if rows.meta["val"].dtype != torch.bool else None
    if inside is None:
        return rows
    first = sharder.emit(aten.argmax.default, sharder.emit(aten.to.dtype, inside, torch.int64), 0, True)
    other = sharder.emit(aten.index_select.default, sharder.emit(aten.detach.default, rows), dim, first)
    other = where(sharder, sharder.emit(aten.any.default, inside), other, 1)  # perhaps the rank has none
    return where(sharder, along(sharder, inside, rows, dim), rows, other)


def windows_of(sharder: Sharder, view: View, offsets: Sequence[int], into: Range) -> Node:
    """(.., n, K, ..): as ``taken``, for any number of offsets."""
    made = taken(sharder, view, offsets, into)
    if len(offsets) > 1:
        return made
    return sharder.emit(aten.unsqueeze.default, made, sharder.axis(view.source).dim + 1)


def _exchanged(sharder: Sharder, value: Node, dim: int, shift: Shift, fill: float) -> Node:
    ranks, columns = sharder.tables["ranks"], sharder.tables["columns"].meta["val"]
    table, emit = Tables(sharder.graph, sharder.mode, columns.device), sharder.emit
    some = torch.zeros(7, dtype=torch.int64)
    send, arriving = (table((shift, name), some, (0,)) for name in ("send", "arriving"))
    splits = table((shift, "splits"), torch.zeros(2, ranks, dtype=torch.int64), ())
    index = table.add((shift, "index"), columns.new_empty(columns.shape[0], len(shift.offsets)))

    order = [dim, *(d for d in range(value.meta["val"].dim()) if d != dim)]
    sent = emit(aten.permute.default, emit(aten.index_select.default, value, dim, send), order)
    rows = emit(aten.sym_size.int, arriving, 0)
    got = emit(exchange.ALL_TO_ALL, sent, splits, rows, False, sharder.group)
    pool = emit(copies.POOL, value, got, dim, float(fill))
    return _read(sharder, pool, dim, index, len(shift.offsets))


def _read(sharder: Sharder, pool: Any, dim: int, index: Node, offsets: int) -> Node:
    """pool[index] of (n, K) numbers of rows."""
    n = sharder.tables["n"]
    flat = sharder.emit(aten.reshape.default, index, [sharder.emit(operator.mul, n, offsets)])
    made = sharder.emit(aten.index_select.default, pool, dim, flat)
    if offsets == 1:
        return made
    return sharder.emit(aten.reshape.default, made, sizes_with(sharder, pool, dim, [n, offsets]))


def _picked(sharder: Sharder, value: Any, dim: int, shift: Shift, fill: float) -> Node:
    """The same of a value that is whole here, of which token t stands at column t."""
    emit, columns = sharder.emit, sharder.tables["columns"]
    (first, behind), count = shift.source, len(shift.offsets)
    at = emit(aten.stack.default, [emit(aten.add.Scalar, columns, k) for k in shift.offsets], 1)
    stop = sharder.size(sharder.length - behind)
    last = emit(operator.sub, sharder.size(value.meta["val"].shape[dim]), 1)
    made = _read(sharder, value, dim, emit(aten.clamp.default, at, 0, last), count)
    inside = emit(aten.logical_and.default, emit(aten.ge.Scalar, at, first), emit(aten.lt.Scalar, at, stop))
    if (asked := within(sharder, shift.into)) is not None:
        others = emit(aten.unsqueeze.default, emit(aten.logical_not.default, asked), 1)
        inside = emit(aten.logical_or.default, inside, others)
    shape = [1] * made.meta["val"].dim()
    shape[dim : dim + 1 + (count > 1)] = [sharder.tables["n"], *[count] * (count > 1)]
    return where(sharder, emit(aten.reshape.default, inside, shape), made, fill)


def _masked(sharder: Sharder, value: Node, dim: int, shift: Shift, fill: float) -> Node:
    """Nothing moves: ``fill`` where the value is not seen."""
    if all(seen <= asked for seen, asked in zip(shift.source, shift.into, strict=True)):
        return value
    inside: Any = within(sharder, shift.source)
    if (asked := within(sharder, shift.into)) is not None:
        inside = sharder.emit(aten.logical_or.default, inside, sharder.emit(aten.logical_not.default, asked))
    return where(sharder, along(sharder, inside, value, dim), value, fill)


def where(sharder: Sharder, mask: Node, value: Node, other: Any) -> Node:
    """``other``: a number, in the type of ``value``, or a node."""
    if isinstance(other, Node):
        return sharder.emit(aten.where.self, mask, value, other)
    dtype = value.meta["val"].dtype
    number = other if dtype.is_floating_point else bool(other) if dtype == torch.bool else int(other)
    return sharder.emit(aten.where.ScalarOther, mask, value, number)


def within(sharder: Sharder, of: Range) -> Node | None:
    """(n,) bool: which rows are columns in ``of``; None: all."""
    columns, (first, behind) = sharder.tables["columns"], of
    inside: Node | None = None
    if first > 0 or sharder.frame.chunk is not None:  # of which some rows are made up
        inside = sharder.emit(aten.ge.Scalar, columns, first)
    if behind > 0:
        before = sharder.emit(aten.lt.Scalar, columns, sharder.size(sharder.length - behind))
        inside = before if inside is None else sharder.emit(aten.logical_and.default, inside, before)
    return inside


def along(sharder: Sharder, rows: Any, value: Node, dim: int) -> Node:
    """(n,) as (1, .., n, .., 1) beside ``value``."""
    shape = [1] * value.meta["val"].dim()
    shape[dim] = -1
    return sharder.emit(aten.reshape.default, rows, shape)


def sizes_with(sharder: Sharder, value: Node, dim: int, instead: list[Any]) -> list[Any]:
    """The sizes of ``value`` with others in the place of dimension ``dim``."""
    sizes = [
        size if isinstance(size, int) else sharder.emit(aten.sym_size.int, value, d) if d != dim else None
        for d, size in enumerate(value.meta["val"].shape)
    ]
    return [*sizes[:dim], *instead, *sizes[dim + 1 :]]


# --- views: where the tokens of a value are -----------------------------------------------------------


def slack_of(sharder: Sharder, node: Node) -> int:
    """How many tokens fewer than the batch a value has."""
    axis = sharder.axis(node)
    if axis.folded:
        raise NotLocal("tokens that share a dimension with others")
    return sharder.slack(axis)


def view_of(sharder: Sharder, source: Node) -> View:
    """Rows that ranks hold, or that are padded of such, as a view."""
    if source in sharder.longer:
        view = sharder.longer[source].view
        if view is None:
            raise NotLocal("a value of more tokens than the batch has")
        return view
    home = sharder.home.get(source)
    if home is None or home.routed:
        raise NotLocal("a value that is whole" if home is None else "rows in the order of a sort")
    return View(source, home.start, (home.start, slack_of(sharder, source) - home.start))


def moved(view: View, by: int, slack: int, fill: float | None = None) -> View:
    """The view of a value whose token t is token ``t + by``, or padded; it has ``S - slack`` tokens."""
    by += view.by
    seen = max(view.seen[0], by), max(view.seen[1], slack - by)
    return View(view.source, by, seen, view.fill if fill is None else fill)


def placed(
    sharder: Sharder, node: Node, rows: Callable[[int, Range], Node], column: int, view: View | None = None
) -> Local | Longer:
    """The form of ``node`` that ``rows`` makes: of the columns where it may start, nearest to ``column``."""
    slack = slack_of(sharder, node)
    if slack < 0:
        if node in sharder.no_grad and node in sharder.differentiable:
            raise NotLocal("a value of more tokens than the batch has, without its gradient")
        return Longer(rows, column, view)
    start = min(max(column, 0), slack)
    return Local(rows(-start, (start, slack - start)), start)


def viewed(sharder: Sharder, node: Node, view: View) -> Local | Longer:
    return placed(sharder, node, lambda by, into: taken(sharder, view, (by,), into), view.by, view)


def aligned(sharder: Sharder, node: Node, start: int) -> Node:
    """The rows of ``node`` where a value that starts at column ``start`` has them."""
    home, slack = sharder.home[node], sharder.slack(sharder.axis(node))
    if home.routed:
        raise NotLocal("rows in the order of a sort")
    view = View(node, home.start, (home.start, slack - home.start))
    return taken(sharder, view, (-start,), (start, slack - start))


def usual_start(module: GraphModule, length: sympy.Expr) -> int:
    """Where most of the rows that are made longer, up to S, have their tokens: what starts there from the
    beginning need not be moved when a prompt is put in front."""
    found = Counter[int]()
    for node in module.graph.nodes:
        axis = node.meta.get("tokens")
        if (
            operator_name(node.target) != "aten::cat"
            or not isinstance(axis, TokenAxis)
            or axis.length != length
        ):
            continue
        left = 0
        for part in positional(node)[0]:
            size = expr_of(part.meta["val"].shape[axis.dim])
            if not size.is_Integer:
                found[left] += 1
                break
            left += int(size)
    return max(found, key=lambda start: found[start], default=0)


def common_start(sharder: Sharder, nodes: Sequence[Node]) -> int:
    """Where values that meet shall start: the fewest bytes move."""
    homes = [n for n in nodes if n in sharder.home]
    starts = sorted({sharder.home[n].start for n in homes})
    if not starts:
        axes = [n.meta["tokens"] for n in nodes if isinstance(n.meta.get("tokens"), TokenAxis)]
        slacks = [max(0, sharder.slack(axis)) for axis in axes]
        return min(sharder.frame.usual_start, *slacks) if slacks else 0
    if len(starts) < 2:
        return starts[0]
    if len({sharder.axis(n).length for n in homes}) > 1:
        raise NotLocal("token ranges of different lengths meet")

    def price(start: int) -> int:
        values = [n.meta["val"] for n in homes if sharder.home[n].start != start]
        return sum(math.prod(hint_of(s) for s in v.shape) * v.itemsize for v in values)

    return min(starts, key=price)
