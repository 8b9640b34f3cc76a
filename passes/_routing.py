"""Rules for values that routing makes: rows in the order of a sort, row numbers, counts of rows.

    ids                   (T * K,)  expert of every (token, slot)
    sorted, perm = sort(ids)        Bag, and Points into the rows of ids
    x[perm // K]                    a Bag of tokens
    grouped(x, w, cumsum(histc(ids)))   rows i of the Bag by the expert that the counts give them; or the
                            sum over tokens of a map that has a one for every id (one_hot, scatter)
    y[inverse of perm]              rows in the order of columns again

Every rank does this with its own rows alone.  That is exact because each row goes through the same
functions of its token and of its key, whatever other rows there are: a rule holds only where this is so.
What is not covered is computed from whole values, which are made anew (a Bag has no place in the caller's
order to be gathered into).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import expr_of, is_operator, operator_name
from hsap_compile.graph import arguments
from hsap_compile.kernels import exchange
from hsap_compile.passes._forms import Bag, Counts, Local, NotLocal, Points
from hsap_compile.passes._operands import constant_of
from hsap_compile.passes._reindex import where
from hsap_compile.passes.infer_tokens import VIEWS, TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


_CASTS = _names("to _to_copy clone contiguous alias detach")
#: What leaves every number as it is.
_KEEPS_NUMBERS = VIEWS | _CASTS | _names("unsqueeze squeeze expand expand_as")
_EMPTY = _names("empty_like zeros_like ones_like full_like")


def row_sort(sharder: Sharder, node: Node, ordinary: Any = None) -> Any:
    """sort(ids) of one number a row: a Bag, and Points into the rows."""
    source = _first(node)
    axis = source.meta.get("tokens")
    if source.meta["val"].dim() != 1 or not isinstance(axis, TokenAxis):
        raise NotLocal("it works along the tokens")
    was, start = sharder.home.get(source), sharder.start_of(source)
    argsort = operator_name(node.target) == "aten::argsort"
    if arguments(node).get("descending"):  # groups of rows end in ascending order
        raise NotLocal("it sorts the largest first")
    if was is not None and was.routed:
        if not argsort or was.points is None or not was.points.once:
            raise NotLocal("it sorts rows that are sorted already")
        space = was.points.space  # argsort(perm): the inverse of a permutation
        order = space if isinstance(space, Bag) else None
        points = Points(was.order if isinstance(was.order, Bag) else axis.layout, once=True)
        return Local(_call(sharder, node, {source: was.node}), start, order, points)
    bag = Bag(source)
    made = _call(sharder, node, {source: sharder.local(source, start)})
    return Local(made, start, bag, Points(axis.layout, once=True) if argsort else None)


def row_counts(sharder: Sharder, node: Node, ordinary: Any = None) -> Any:
    """histc of ids: this rank's counts; the sum over ranks where somebody reads the whole."""
    source, given = _first(node), arguments(node)
    key = _key(source)
    if not isinstance(key.meta.get("tokens"), TokenAxis):
        raise NotLocal("it counts tokens")
    low, high, bins = given["min"], given["max"], given["bins"]
    if key.meta["val"].is_floating_point() or low != 0 or high not in (bins - 1, bins):
        raise NotLocal("a histogram over tokens whose bins are not one integer each")
    home, start = sharder.home.get(source), sharder.start_of(source)
    if home is not None and home.points is not None:
        raise NotLocal("it counts row numbers")
    return Local(_call(sharder, node, {source: sharder.local(source, start)}), start, Counts(key))


def ids_of_map(node: Node) -> Node | None:
    """The ids of which ``node``, a sum over everything but the last dimension, adds up a map: a one for every
    id, in its place."""
    given, rank = arguments(node), _first(node).meta["val"].dim()
    dims = given.get("dim")
    if operator_name(node.target) != "aten::sum" or not isinstance(dims, list | tuple) or given["keepdim"]:
        return None
    if rank < 2 or {d % rank for d in dims} != set(range(rank - 1)):
        return None
    made = _first(node)
    while operator_name(made.target) in _CASTS:
        made = _first(made)
    if operator_name(made.target) == "aten::one_hot":
        return _key(_first(made))
    if operator_name(made.target) != "aten::scatter" or "value" not in (map := arguments(made)):
        return None
    ids = _key(map["index"])
    last = map["dim"] in (-1, rank - 1)
    once = operator_name(ids.target) == "getitem" and operator_name(_first(ids).target) == "aten::topk"
    return ids if last and once and map["value"] == 1 and constant_of(map["self"]) == 0 else None


def map_counts(sharder: Sharder, node: Node, ids: Node) -> Any:
    """The sum of a map of ``ids``: as ``row_counts``."""
    source = _first(node)
    if is_sorted(sharder, source) or not isinstance(ids.meta.get("tokens"), TokenAxis):
        raise NotLocal("it counts tokens")
    start = sharder.start_of(source)
    return Local(_call(sharder, node, {source: sharder.local(source, start)}), start, Counts(ids))


def whole_counts(sharder: Sharder, node: Node) -> Node:
    """The counts of all ranks' rows, without those that are no tokens."""
    emit, home, source = sharder.emit, sharder.home[node], _first(node)
    assert isinstance(home.order, Counts)
    by_number, made = operator_name(node.target) == "aten::histc", home.node
    with sharder.in_frame(sharder.frame_of(node)):
        rows = sharder.local(home.order.key if by_number else source, home.start)
        axis = sharder.axis(home.order.key if by_number else source)
        valid = sharder.valid_rows(axis, home.start, rows.meta["val"].dim())
    if not by_number:  # added up before they are rounded
        ones = rows if valid is None else where(sharder, valid, rows, 0)
        made = emit(aten.sum.dim_IntList, emit(aten.to.dtype, ones, torch.float64), arguments(node)["dim"])
    elif valid is not None:  # what is less than its least is not counted
        ids = emit(aten.to.dtype, rows, source.meta["val"].dtype)
        made = _call(sharder, node, {source: where(sharder, valid, ids, -1)})
    total = emit(exchange.SUM_RANKS, emit(aten.to.dtype, made, torch.float64), sharder.group)
    return emit(aten.to.dtype, total, node.meta["val"].dtype)


def is_count(node: Node) -> bool:
    return operator_name(node.target) in ("aten::histc", "aten::sum")


def sorts_rows(node: Node) -> bool:
    """Whether values of another order may begin at ``node``."""
    name = operator_name(node.target) if node.op == "call_function" else ""
    return name in _BEGINNINGS or name == "aten::sum" and ids_of_map(node) is not None


def by_rule(sharder: Sharder, node: Node) -> Any:
    """What the node's rule makes.  Sorts and counts of ids that depend on no parameter (of words) are cheap:
    they get homes where a rule needs them, and are plain values where one needs these."""
    try:
        return sharder.by_rule(node)
    except NotLocal as reason:
        read = [n for n in node.all_input_nodes if n in sharder.sorts]
        if not read:
            raise
        placed = {n: sharder.home.pop(n) for n in sharder.sorts if n in sharder.home}
        if placed.keys().isdisjoint(read):
            sharder.home.update(placed)
            placed = {}
            _place_sorts(sharder)
        try:
            return sharder.by_rule(node)
        except NotLocal:
            raise reason from None
        finally:
            sharder.home.update(placed)


def _place_sorts(sharder: Sharder) -> None:
    for node in [n for n in sharder.sorts if n not in sharder.home]:
        try:
            result = sharder.by_rule(node)
        except NotLocal:
            continue
        if isinstance(result, Local) and result.routed:
            sharder.home[node] = result


def routed(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """The rule of ``node``, of whose operands at least one is a Bag, Points or Counts."""
    name = operator_name(node.target)
    if name in _ARITHMETIC and any(home.points is not None for home in _homes(sharder, node)):
        return _ARITHMETIC[name](sharder, node)
    if name in _RULES:
        return _RULES[name](sharder, node, ordinary)
    if is_operator(node.target) and any(a.name == "offs" for a in _target(node)._schema.arguments):
        return _grouped(sharder, node)
    return _row_by_row(sharder, node, ordinary)


def is_sorted(sharder: Sharder, node: Node) -> bool:
    """Whether the rows of ``node`` are in the order of a sort."""
    return node in sharder.home and isinstance(sharder.home[node].order, Bag)


def _row_by_row(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """What acts on every row alone does so in any order, if all operands have the same."""
    from hsap_compile.passes import _families

    homes = _homes(sharder, node)
    orders = {home.order for home in homes}
    carriers = [n for n in node.all_input_nodes if n.meta.get("tokens") is not None]
    if any(isinstance(order, Counts) for order in orders):
        return _counted(sharder, node)
    if len(orders) > 1 or any(n not in sharder.home for n in carriers):
        raise NotLocal("rows in the order of a sort meet rows in another order")
    (order,) = orders
    name = operator_name(node.target)
    points = next((home.points for home in homes if home.points is not None), None)
    if points is not None and name not in _KEEPS_NUMBERS | _EMPTY:
        raise NotLocal("arithmetic on row numbers")
    if ordinary not in _families.ROW_BY_ROW and name not in _EMPTY:
        raise NotLocal("it does more than act on every row alone, and the rows are sorted")
    if order is not None and name in VIEWS and not _same_rows(node):
        raise NotLocal("a view that splits the rows of a sort")
    made = ordinary(sharder, node)
    if not isinstance(made, Local):
        if points is not None or order is None:
            raise NotLocal("a sum of row numbers")
        return made
    return replace(made, order=order, points=None if name in _EMPTY else points)


def _same_rows(node: Node) -> bool:
    """Whether a view leaves the dimension of the rows as it is."""
    source = _first(node)
    old, new = source.meta["tokens"], node.meta.get("tokens")
    return (
        isinstance(new, TokenAxis)
        and expr_of(source.meta["val"].shape[old.dim]) == expr_of(node.meta["val"].shape[new.dim])
        and all(expr_of(s) == 1 for s in source.meta["val"].shape[: old.dim])
    )


def _counted(sharder: Sharder, node: Node) -> Any:
    """cumsum and casts of counts are counts."""
    name, source = operator_name(node.target), node.args[0]
    if not isinstance(source, Node) or node.all_input_nodes != [source] or source.meta["val"].dim() != 1:
        raise NotLocal("arithmetic on counts of rows")
    home = sharder.home[source]
    assert isinstance(home.order, Counts)
    order = home.order
    if name == "aten::cumsum" and not order.cumulative:
        order = replace(order, cumulative=True)
    elif name not in _CASTS:
        raise NotLocal("arithmetic on counts of rows")
    return replace(home, node=_call(sharder, node, {source: home.node}), order=order)


def _part(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """values, indices = sort(..)"""
    source, which = node.args[0], node.args[1]
    assert isinstance(source, Node)
    home = sharder.home[source]
    made = sharder.emit(node.target, home.node, which)
    if operator_name(source.target) == "aten::sort" and which == 1:
        return replace(home, node=made, points=Points(_first(source).meta["tokens"].layout, once=True))
    return replace(home, node=made)


def _slice(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """x[:]"""
    source = _first(node)
    if [expr_of(s) for s in source.meta["val"].shape] == [expr_of(s) for s in node.meta["val"].shape]:
        return sharder.home[source]
    return _row_by_row(sharder, node, ordinary)


def _divide(sharder: Sharder, node: Node) -> Any:
    """perm // K: the token of a (token, slot)."""
    source, home, space, by = _fraction(sharder, node)
    whole = arguments(node).get("rounding_mode", "floor") in ("floor", "trunc")  # none is negative
    if not whole or node.meta["val"].is_floating_point():
        raise NotLocal("arithmetic on row numbers")
    assert home.points is not None
    points = Points((space[0], space[1], space[2] // by), once=home.points.once and by == 1)
    return replace(home, node=_call(sharder, node, {source: home.node}), points=points)


def _remainder(sharder: Sharder, node: Node) -> Any:
    """perm % K: the slot of a (token, slot)."""
    source, home, _, _ = _fraction(sharder, node)
    return replace(home, node=_call(sharder, node, {source: home.node}), points=None)


def _fraction(sharder: Sharder, node: Node) -> tuple[Node, Local, tuple[Any, ...], int]:
    """perm and K, where K divides the rows that one token has behind it."""
    source, by = node.args[:2]
    home = sharder.home.get(source) if isinstance(source, Node) else None
    space = None if home is None or home.points is None else home.points.space
    if not isinstance(space, tuple) or not isinstance(by, int) or by < 1 or space[2] % by:
        raise NotLocal("arithmetic on row numbers")
    assert isinstance(source, Node) and home is not None
    return source, home, space, by


def _look_up(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """x[points]: rows in the order of the points.  A table that is no rows is read by plain numbers."""
    source, indices = node.args[:2]
    assert isinstance(source, Node) and isinstance(indices, list | tuple)
    if source.meta.get("tokens") is None and source not in sharder.home:
        return _row_by_row(sharder, node, ordinary)
    if len(indices) != 1 or not isinstance(indices[0], Node):
        raise NotLocal("an index into tokens")
    return _rows_of(sharder, node, source, indices[0])


def _along_rows(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """index_select(x, 0, points), gather(x, 0, points): as ``_look_up``."""
    given = arguments(node)
    source, index = given["self"], given["index"]
    axis = source.meta.get("tokens")
    if not isinstance(axis, TokenAxis) or given["dim"] % source.meta["val"].dim() != axis.dim:
        return _row_by_row(sharder, node, ordinary)
    return _rows_of(sharder, node, source, index)


def _rows_of(sharder: Sharder, node: Node, source: Node, index: Node) -> Local:
    axis = source.meta.get("tokens")
    pointer = _pointer(sharder, index)
    home = sharder.home.get(source)
    order = None if home is None else home.order
    if not isinstance(axis, TokenAxis) or axis.dim != 0:
        raise NotLocal("an index into tokens")
    assert pointer.points is not None
    if pointer.points.space != (axis.layout if order is None else order):
        raise NotLocal("row numbers of other rows")
    value = sharder.local(source, pointer.start)
    made = _call(sharder, node, {source: value, index: pointer.node})
    points = None if home is None or home.points is None else home.points
    if points is not None:
        points = replace(points, once=points.once and pointer.points.once)
    return Local(made, pointer.start, pointer.order, points)


def _put(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """x[points] = y: every row of x is overwritten, or (accumulate) added to."""
    target, indices, values = node.args[:3]
    assert isinstance(target, Node) and isinstance(indices, list | tuple) and isinstance(values, Node)
    accumulate = bool(arguments(node)["accumulate"])
    if len(indices) != 1 or not isinstance(indices[0], Node):
        raise NotLocal("a write to some tokens")
    return _written(sharder, node, target, indices[0], values, accumulate)


def _add_rows(sharder: Sharder, node: Node, ordinary: Any) -> Any:
    """index_add(x, 0, points, y), scatter_add(x, 0, points, y), and a library's (x, points, y)"""
    given = arguments(node)
    target = given["self"] if "self" in given else given["out"]
    if given.get("dim", 0) % target.meta["val"].dim():
        raise NotLocal("it works along the tokens")
    values = given["source"] if "source" in given else given["src"]
    return _written(sharder, node, target, given["index"], values, True)


def _written(sharder: Sharder, node: Node, target: Node, index: Node, values: Node, adds: bool) -> Local:
    pointer = _pointer(sharder, index)
    assert pointer.points is not None
    space = pointer.points.space
    order = space if isinstance(space, Bag) else None
    axis, home = target.meta.get("tokens"), sharder.home.get(target)
    if not isinstance(axis, TokenAxis) or axis.dim != 0:
        raise NotLocal("a write to some tokens")
    if axis.layout != (space if order is None else order.key.meta["tokens"].layout):
        raise NotLocal("row numbers of other rows")
    if adds and (None if home is None else home.order) is not order:
        raise NotLocal("rows in the order of a sort meet rows in another order")
    if not adds and not pointer.points.once:
        raise NotLocal("a write to some tokens")
    if home is not None and home.points is not None and (adds or home.order is None):
        raise NotLocal("arithmetic on row numbers")
    points: Points | None = None
    if (counting := _counting(sharder, values, pointer.node)) is not None:
        number = counting
        points = Points(pointer.order if isinstance(pointer.order, Bag) else axis.layout, once=True)
    else:
        if values.meta.get("tokens") is None:
            raise NotLocal("a write of the same value to some tokens")
        start = pointer.start
        written = sharder.home.get(values) or Local(sharder.local(values, start), start)
        if written.order is not pointer.order or written.start != start:
            raise NotLocal("rows in the order of a sort meet rows in another order")
        number, points = written.node, written.points
    if adds and points is not None:
        raise NotLocal("arithmetic on row numbers")
    base = sharder.local(target, pointer.start)
    made = _call(sharder, node, {target: base, index: pointer.node, values: number})
    return Local(made, pointer.start, order, points)


def _grouped(sharder: Sharder, node: Node) -> Any:
    """grouped_mm(x, w, offs): group g of the rows of x, offs[g - 1] <= row < offs[g], times w[g].

    Where the rows are sorted by the key that was counted, a row's group is its key's, on every rank."""
    given = arguments(node)
    tensors = [a.name for a in _target(node)._schema.arguments if isinstance(given.get(a.name), Node)]
    rows, weights, offsets = given[tensors[0]], given[tensors[1]], given["offs"]
    x, counts = sharder.home.get(rows), sharder.home.get(offsets)
    if (
        weights.meta.get("tokens") is not None
        or weights.meta["val"].dim() != 3
        or rows.meta["val"].dim() != 2
    ):
        raise NotLocal("a grouped product that is not rows times a weight of each group")
    if x is None or counts is None or not isinstance(x.order, Bag) or x.points is not None:
        raise NotLocal("a grouped product of rows that are not sorted")
    if counts.order != Counts(_key(x.order.key), cumulative=True) or counts.start != x.start:
        raise NotLocal("a grouped product whose groups do not follow the sort")
    replaced = {rows: x.node, offsets: counts.node}
    for other in node.all_input_nodes:
        if other not in replaced:
            replaced[other] = sharder.operand(other)
    return replace(x, node=_call(sharder, node, replaced))


# --- small parts --------------------------------------------------------------------------------------


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _target(node: Node) -> Any:
    return node.target


def _homes(sharder: Sharder, node: Node) -> list[Local]:
    return [sharder.home[n] for n in node.all_input_nodes if n in sharder.home]


def _call(sharder: Sharder, node: Node, replaced: dict[Node, Any]) -> Node:
    """``node`` with these operands, and sizes as they are."""
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda n: replaced[n] if n in replaced else sharder.whole(n)
    )
    return sharder.emit(node.target, *args, **kwargs)


def _pointer(sharder: Sharder, index: Node) -> Local:
    home = sharder.home.get(index)
    if home is None or home.points is None:
        raise NotLocal("an index into tokens")
    return home


def _counting(sharder: Sharder, node: Node, rows: Node) -> Node | None:
    """arange(T * K) as a value: row numbers of this rank, as many as ``rows`` has."""
    if node.op != "call_function" or operator_name(node.target) != "aten::arange":
        return None
    given = arguments(node)
    size = expr_of(node.meta["val"].shape[0])
    if given.get("start", 0) != 0 or given.get("step", 1) != 1 or sharder.symbol not in size.free_symbols:
        return None
    options = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
    return sharder.emit(aten.arange.default, sharder.emit(aten.sym_size.int, rows, 0), **options)


def _key(node: Node) -> Node:
    """The ids that ``node`` holds, whatever their type, shape or order."""
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            break
        name, dtype = operator_name(node.target), _dtype(node)
        if name in _CASTS | VIEWS and (dtype == _dtype(source) or name in _CASTS and dtype in _HOLD_IDS):
            node = source
        elif name == "getitem" and operator_name(source.target) == "aten::sort" and node.args[1] == 0:
            node = _first(source)
        else:
            break
    return node


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


_HOLD_IDS = (torch.int32, torch.int64, torch.float32, torch.float64)
_BEGINNINGS = _names("sort argsort histc")
_ARITHMETIC = {"aten::floor_divide": _divide, "aten::div": _divide, "aten::remainder": _remainder}
_RULES: dict[str, Any] = {
    "getitem": _part,
    "aten::slice": _slice,
    **dict.fromkeys(_names("sort argsort"), row_sort),
    **dict.fromkeys(_names("histc"), row_counts),
    **dict.fromkeys(_names("index"), _look_up),
    **dict.fromkeys(_names("index_select gather"), _along_rows),
    **dict.fromkeys(_names("index_put"), _put),
    **dict.fromkeys(_names("index_add scatter_add"), _add_rows),
    "torchtitan::deterministic_scatter_add": _add_rows,
}
