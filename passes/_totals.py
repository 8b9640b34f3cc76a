"""Rules of what sums tokens away: this rank's part of a sum, a mean, a norm, a product or a loss, and the sum
over ranks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import expr_of, operator_name
from hsap_compile.graph import arguments
from hsap_compile.kernels import exchange
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._numbered import own_rows_at
from hsap_compile.passes._operands import args_of, constant_of, schema_of, source_of, tensor_inputs, value_of
from hsap_compile.passes._reindex import along, where
from hsap_compile.passes.infer_tokens import MANY, TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten

#: f(x, y, ..., reduction) with one loss for every element of the broadcast operands.
LOSSES = frozenset(
    f"aten::{name}"
    for name in (
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits"
        " kl_div soft_margin_loss poisson_nll_loss hinge_embedding_loss margin_ranking_loss"
    ).split()
)


def reduced(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """sum(x) = sum_ranks(sum(x_local)); a mean divides by the whole count."""
    start = sharder.start_of(source)
    value = sharder.local(source, start)
    given = arguments(node)
    asked = given.get("dtype")
    wide = _wide(source.meta["val"].dtype if asked is None else asked) or asked
    keep = bool(given.get("keepdim", False))
    rank = source.meta["val"].dim()
    total = _rank_sum(sharder, value, axis, start, rank, sorted(dims), keep, wide)
    if operator_name(node.target) == "aten::mean":
        total = sharder.emit(aten.div.Tensor, total, sharder.size(_count(source, dims)))
    return _typed(sharder, total, node)


def vector_norm(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """(sum of |x|^p)^(1/p), of which the gradient at zero is zero."""
    given = arguments(node)
    p = given["ord"]
    if not isinstance(p, int | float) or not 1 <= p < math.inf:
        raise NotLocal("a norm that is no root of a sum of powers")
    start, wide = sharder.start_of(source), given["dtype"] or _wide(source.meta["val"].dtype)
    value = sharder.local(source, start)
    value = value if wide is None else sharder.emit(aten.to.dtype, value, wide)
    value = sharder.emit(aten.abs.default, value)
    value = value if p == 1 else sharder.emit(aten.pow.Tensor_Scalar, value, p)
    rank = source.meta["val"].dim()
    total = _rank_sum(sharder, value, axis, start, rank, sorted(dims), given["keepdim"], None)
    return _typed(sharder, total if p == 1 else _root(sharder, total, p), node)


def variance(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """sum_ranks(sum((x - mean)^2)) / (count - correction), or its root.  The mean needs no gradient: that of
    the sum of squares by it is the sum of all differences, which is zero."""
    given = arguments(node)
    correction = given["correction"] if "correction" in given else int(given["unbiased"])
    correction = 1 if correction is None else correction
    if not isinstance(correction, Node) and correction > 1:
        raise NotLocal("a variance whose correction may be as large as the number of tokens")
    if source.meta["val"].is_complex():
        raise NotLocal("a variance of complex numbers")
    start, rank = sharder.start_of(source), source.meta["val"].dim()
    value = sharder.local(source, start)
    wide = _wide(source.meta["val"].dtype)
    value = value if wide is None else sharder.emit(aten.to.dtype, value, wide)
    size = _count(source, dims)
    count = sharder.size(size)
    total = _rank_sum(sharder, value, axis, start, rank, sorted(dims), True, None)
    mean = sharder.emit(aten.div.Tensor, total, count)
    away = sharder.emit(aten.sub.Tensor, value, sharder.emit(aten.detach.default, mean))
    # what rounding left of the mean: equal tokens deviate by nothing at all, where the root has no slope
    total = _rank_sum(
        sharder, sharder.emit(aten.detach.default, away), axis, start, rank, sorted(dims), True, None
    )
    rest = sharder.emit(aten.div.Tensor, total, count)
    away = sharder.emit(aten.pow.Tensor_Scalar, sharder.emit(aten.sub.Tensor, away, rest), 2)
    keep = bool(given.get("keepdim", False))
    total = _rank_sum(sharder, away, axis, start, rank, sorted(dims), keep, None)
    made = sharder.emit(aten.div.Tensor, total, sharder.emit(operator.sub, count, correction))
    name = operator_name(node.target)
    made = _typed(sharder, _root(sharder, made, 2) if "std" in name else made, node)
    if not name.endswith("_mean"):
        return made
    mean = mean if keep else sharder.emit(aten.squeeze.dims, mean, sorted(dims))
    return made, _typed(sharder, mean, node)


def truth(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """any: some are not zero; all: none is zero."""
    some = operator_name(node.target) == "aten::any"
    start, keep = sharder.start_of(source), bool(arguments(node).get("keepdim", False))
    value = sharder.local(source, start)
    counted = sharder.emit(aten.ne.Scalar if some else aten.eq.Scalar, value, 0)
    rank = source.meta["val"].dim()
    total = _rank_sum(sharder, counted, axis, start, rank, sorted(dims), keep, torch.int64)
    return sharder.emit(aten.gt.Scalar if some else aten.eq.Scalar, total, 0)


def largest(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """amax, amin, aminmax, and max and min of everything."""
    name = operator_name(node.target)
    if isinstance(node.meta["val"], tuple | list) and name != "aten::aminmax":
        return first_largest(sharder, node, source, axis, dims)

    def found(least: bool) -> Node:
        made = _extreme(sharder, _numbers(sharder, source, axis, least), dims, least)
        return made if arguments(node).get("keepdim") else sharder.emit(aten.squeeze.dims, made, sorted(dims))

    return (found(True), found(False)) if name == "aten::aminmax" else found(name in _LEAST)


_LEAST = ("aten::amin", "aten::min", "aten::argmin")


def first_largest(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """argmax(x, dim), max(x, dim): of equal tokens the first, which alone gets the gradient; NaN is larger
    than any number."""
    if axis.folded or len(dims) != 1:
        raise NotLocal("which of rows that share a dimension is the largest")
    if source in sharder.home and sharder.home[source].routed:
        raise NotLocal("which of sorted rows is the largest")
    emit, least, dim = sharder.emit, operator_name(node.target) in _LEAST, axis.dim
    value, start = _numbers(sharder, source, axis, least), sharder.start_of(source)
    seen = emit(aten.detach.default, value)
    top = _extreme(sharder, seen, dims, least)
    hits = emit(aten.logical_or.default, emit(aten.eq.Tensor, seen, top), emit(aten.isnan.default, seen))
    if (valid := sharder.valid_rows(axis, start, value.meta["val"].dim())) is not None:
        hits = emit(aten.logical_and.default, hits, valid)
    token = along(sharder, emit(aten.sub.Scalar, sharder.tables["columns"], start), value, dim)
    token = emit(aten.where.ScalarOther, hits, token, torch.iinfo(torch.int64).max)
    first = _extreme(sharder, token, dims, least=True)
    keep = arguments(node)["keepdim"]
    place = first if keep else emit(aten.squeeze.dim, first, dim)
    if not isinstance(node.meta["val"], tuple | list):
        return place
    at = own_rows_at(sharder, source, first)
    rows = emit(aten.gather.default, value, dim, emit(aten.clamp.default, at, 0))
    rows = where(sharder, emit(aten.ge.Scalar, at, 0), rows, 0)
    found = emit(exchange.SUM_RANKS, rows, sharder.group)
    return (found if keep else emit(aten.squeeze.dim, found, dim)), place


def log_sum(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """logsumexp; nothing but -inf adds up to it."""
    _, top, mass = _exponentials(sharder, source, axis, dims, None, finite=True)
    made = sharder.emit(aten.add.Tensor, sharder.emit(aten.log.default, mass), top)
    made = made if arguments(node)["keepdim"] else sharder.emit(aten.squeeze.dims, made, sorted(dims))
    return _typed(sharder, made, node)


def softmax(sharder: Sharder, node: Node, source: Node, axis: TokenAxis, dims: set[int]) -> Any:
    """softmax and log_softmax: every rank's exponentials, over the sum of all."""
    away, _, mass = _exponentials(sharder, source, axis, dims, arguments(node).get("dtype"))
    mass = sharder.emit(exchange.BROADCAST, mass, sharder.group)
    if "log" in operator_name(node.target):
        made = sharder.emit(aten.sub.Tensor, away, sharder.emit(aten.log.default, mass))
        valid = sharder.valid_rows(axis, sharder.start_of(source), made.meta["val"].dim())
        made = made if valid is None else sharder.emit(aten.where.ScalarOther, valid, made, 0)
    else:
        made = sharder.emit(aten.div.Tensor, sharder.emit(aten.exp.default, away), mass)
    return Local(_typed(sharder, made, node), sharder.start_of(source))


def _exponentials(
    sharder: Sharder,
    source: Node,
    axis: TokenAxis,
    dims: set[int],
    dtype: torch.dtype | None,
    finite: bool = False,
) -> tuple[Node, Node, Node]:
    """x - the largest x (this rank's rows), the largest, and sum_ranks(sum(exp(x - the largest))).
    ``finite``: 0 is taken for an infinite largest."""
    value = _numbers(sharder, source, axis, least=False)
    wide = _wide(dtype or source.meta["val"].dtype) or dtype
    value = value if wide is None else sharder.emit(aten.to.dtype, value, wide)
    top = _extreme(sharder, sharder.emit(aten.detach.default, value), dims, least=False)
    if finite:
        top = sharder.emit(aten.masked_fill.Scalar, top, sharder.emit(aten.isinf.default, top), 0)
    away = sharder.emit(aten.sub.Tensor, value, top)
    part = sharder.emit(aten.sum.dim_IntList, sharder.emit(aten.exp.default, away), sorted(dims), True)
    return away, top, sharder.emit(exchange.SUM_RANKS, part, sharder.group)


def _numbers(sharder: Sharder, source: Node, axis: TokenAxis, least: bool) -> Node:
    """This rank's rows, and numbers that are never the largest in rows that are not part of the value."""
    dtype = source.meta["val"].dtype
    if dtype == torch.bool:
        raise NotLocal("the largest of truth values")
    start = sharder.start_of(source)
    value, valid = sharder.local(source, start), sharder.valid_rows(axis, start, source.meta["val"].dim())
    if valid is None:
        return value
    ends = (-math.inf, math.inf)
    if not dtype.is_floating_point:
        ends = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return sharder.emit(aten.where.ScalarOther, valid, value, ends[least])


def _extreme(sharder: Sharder, value: Node, dims: set[int], least: bool) -> Node:
    return sharder.emit(exchange.EXTREME, value, sorted(dims), least, sharder.group)


def _root(sharder: Sharder, total: Node, p: float) -> Node:
    """total^(1 / p), whose gradient at zero is taken as zero."""
    zero = sharder.emit(aten.eq.Scalar, total, 0)
    other = sharder.emit(aten.masked_fill.Scalar, total, zero, 1)
    return sharder.emit(aten.masked_fill.Scalar, sharder.emit(aten.pow.Tensor_Scalar, other, 1 / p), zero, 0)


def _count(source: Node, dims: set[int]) -> Any:
    return functools.reduce(operator.mul, (expr_of(source.meta["val"].shape[dim]) for dim in dims))


def _typed(sharder: Sharder, made: Node, node: Node) -> Node:
    """``made`` in the type of the result that it stands for."""
    dtype = value_of(node).dtype
    return made if made.meta["val"].dtype == dtype else sharder.emit(aten.to.dtype, made, dtype)


def contraction(sharder: Sharder, node: Node, contracted: Mapping[Node, int]) -> Any:
    """A product that sums over the tokens of its operands: sum_ranks(the product of this rank's rows).
    ``contracted``: the dimension of each operand with tokens over which it sums."""
    axes: dict[Node, TokenAxis] = {}
    for operand in tensor_inputs(node):
        axis = operand.meta.get("tokens")
        if axis is None:
            continue
        if axis is MANY or contracted.get(operand) != axis.dim:
            raise NotLocal("a product that sums over some of its tokens")
        if operand in sharder.home and sharder.home[operand].routed:
            raise NotLocal("rows in the order of a sort")
        axes[operand] = axis
    if len({axis.layout for axis in axes.values()}) != 1:
        raise NotLocal("token dimensions of the operands differ")
    start = sharder.start_of(*axes)

    def rows(operand: Node) -> Any:
        value = sharder.operand(operand, start)
        if operand not in axes:
            return value
        valid = sharder.valid_rows(axes[operand], start, operand.meta["val"].dim())
        return value if valid is None else sharder.emit(aten.where.ScalarOther, valid, value, 0)

    args, kwargs = map_arg((node.args, node.kwargs), rows)
    part = sharder.emit(node.target, *args, **kwargs)
    wide = _wide(part.meta["val"].dtype)
    part = part if wide is None else sharder.emit(aten.to.dtype, part, wide)
    return _typed(sharder, sharder.emit(exchange.SUM_RANKS, part, sharder.group), node)


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """What to sum ``dtype`` in: low precision in float32, the rest as torch does."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None


def _rank_sum(
    sharder: Sharder,
    value: Node,
    axis: TokenAxis,
    start: int,
    rank: int,
    dims: list[int],
    keep: bool,
    dtype: torch.dtype | None,
) -> Node:
    valid = sharder.valid_rows(axis, start, rank)
    if valid is not None:
        value = sharder.emit(aten.where.ScalarOther, valid, value, 0)
    part = sharder.emit(aten.sum.dim_IntList, value, dims, keep, dtype=dtype)
    return sharder.emit(exchange.SUM_RANKS, part, sharder.group)


def sum_of_sums(sharder: Sharder, node: Node) -> Node | None:
    """add(sum_ranks(a), sum_ranks(b)) = sum_ranks(a + b), of numbers: a loss that is added up chunk by chunk
    is one sum over ranks, and no rank waits for another between chunks.  None: it is something else."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    operands: list[Any] = [sharder.wholes.get(x) for x in args_of(node) if constant_of(x) != 0]
    parts = [part for made in operands if (part := _part(sharder, made)) is not None]
    if node.meta["val"].dim() or len(parts) < len(operands) or len({p.meta["val"].dtype for p in parts}) != 1:
        return None
    if len(operands) == 1:
        return _typed(sharder, operands[0], node)
    total = functools.reduce(lambda a, b: sharder.emit(aten.add.Tensor, a, b), parts)
    return _typed(sharder, sharder.emit(exchange.SUM_RANKS, total, sharder.group), node)


def _part(sharder: Sharder, made: Any) -> Node | None:
    """What ``made``, a number of the new graph, is the sum over ranks of; so is such a sum over a count."""
    if not isinstance(made, Node) or made.meta["val"].dim() or not made.meta["val"].is_floating_point():
        return None
    if made.target is aten.div.Tensor:
        total, count = args_of(made)
        part = _part(sharder, total) if _is_count(count) else None
        return None if part is None else sharder.emit(aten.div.Tensor, part, count)
    if made.target is aten.to.dtype:
        made = args_of(made)[0]
    return args_of(made)[0] if made.target is exchange.SUM_RANKS else None


def _is_count(value: Any) -> bool:
    number = value.meta["val"] if isinstance(value, Node) else value
    if isinstance(number, torch.Tensor):
        return not (number.is_floating_point() or number.is_complex())
    return isinstance(number, int | torch.SymInt)


def loss(sharder: Sharder, node: Node) -> Any:
    """loss(x, y, reduction): rows without reduction, then a sum or mean over all tokens."""
    given = arguments(node)
    reduction = given["reduction"]
    source, axis = source_of(node)
    behind = source.meta["val"].dim() - axis.dim
    for other in tensor_inputs(node):
        its = other.meta.get("tokens")
        if its is None:
            continue
        same = its is not MANY and its.layout == axis.layout
        if same and other.meta["val"].dim() - its.dim == behind:
            continue
        raise NotLocal("token dimensions of the operands differ")
    start = sharder.start_of(*node.all_input_nodes)
    values = {k: map_arg(v, lambda n: sharder.operand(n, start)) for k, v in given.items()}
    values["reduction"] = 0
    named = {a.name: values[a.name] for a in schema_of(node) if a.kwarg_only}
    rows = sharder.emit(
        node.target, *[values[a.name] for a in schema_of(node) if a.name not in named], **named
    )
    if reduction == 0:
        return Local(rows, start)
    shape = [expr_of(size) for size in rows.meta["val"].shape]
    rows_axis = replace(axis, dim=axis.dim + len(shape) - source.meta["val"].dim())
    shape[rows_axis.dim] = axis.outer * axis.length * axis.inner
    wide = _wide(node.meta["val"].dtype)
    total = _rank_sum(sharder, rows, rows_axis, start, len(shape), list(range(len(shape))), False, wide)
    if reduction == 1:
        count = functools.reduce(operator.mul, shape)
        total = sharder.emit(aten.div.Tensor, total, sharder.size(count))
    return _typed(sharder, total, node)


def cross_entropy(sharder: Sharder, node: Node) -> Any:
    """mean over kept labels = sum_ranks(sum of rows) / sum_ranks(their weights), in one all-reduce.
    nll_loss is the same on log-probabilities."""
    given = arguments(node)
    logits, target, weight = given["self"], given["target"], given["weight"]
    axis = logits.meta.get("tokens")
    target_axis = target.meta.get("tokens")
    rank = logits.meta["val"].dim()
    class_dim = 1 if rank > 1 else 0
    if not isinstance(axis, TokenAxis) or not isinstance(target_axis, TokenAxis) or axis.dim == class_dim:
        raise NotLocal("a cross entropy whose classes are tokens")
    probabilities = target.meta["val"].is_floating_point()
    row_dim = axis.dim if probabilities else axis.dim - (axis.dim > class_dim)
    if target_axis.dim != row_dim or target_axis.layout != axis.layout:
        raise NotLocal("token dimensions of logits and labels differ")
    start = sharder.start_of(logits, target)
    x, y = sharder.operand(logits, start), sharder.operand(target, start)
    w = None if weight is None else sharder.operand(weight)
    if _wide(x.meta["val"].dtype) is not None and given["reduction"] != 0:
        x = sharder.emit(aten.to.dtype, x, torch.float32)
        w = None if w is None else sharder.emit(aten.to.dtype, w, torch.float32)
    ignore = given["ignore_index"]
    more = [given["label_smoothing"]] if "label_smoothing" in given else []
    rows = sharder.emit(node.target, x, y, w, 0, ignore, *more)
    if given["reduction"] == 0:
        return Local(rows, start)
    rows_rank = rows.meta["val"].dim()
    rows_dim = axis.dim - (axis.dim > class_dim)
    rows_axis = replace(axis, dim=rows_dim)
    valid = sharder.valid_rows(rows_axis, start, rows_rank)
    if valid is not None:
        rows = sharder.emit(aten.where.ScalarOther, valid, rows, 0)
    # float64: generated kernels may add up a rank's rows one after the other
    total = sharder.emit(aten.sum.default, rows, dtype=torch.float64)
    if given["reduction"] == 2:
        total = sharder.emit(exchange.SUM_RANKS, total, sharder.group)
        return _typed(sharder, total, node)
    if probabilities:
        count: Any = 1
        for size in (s for d, s in enumerate(logits.meta["val"].shape) if d != class_dim):
            count = count * expr_of(size)
        total = sharder.emit(exchange.SUM_RANKS, total, sharder.group)
        mean = sharder.emit(aten.div.Tensor, total, sharder.size(count))
    else:
        kept = sharder.emit(aten.ne.Scalar, y, ignore)
        if valid is not None:
            kept = sharder.emit(aten.logical_and.default, kept, valid)
        if w is not None:
            label = sharder.emit(aten.where.ScalarOther, kept, y, 0)
            share = sharder.emit(aten.index.Tensor, w, [label])
            kept = sharder.emit(aten.where.ScalarOther, kept, share, 0)
        weights = sharder.emit(aten.sum.default, kept, dtype=total.meta["val"].dtype)
        both = sharder.emit(aten.stack.default, [total, weights])
        both = sharder.emit(exchange.SUM_RANKS, both, sharder.group)
        mean = sharder.emit(
            aten.div.Tensor,
            sharder.emit(aten.select.int, both, 0, 0),
            sharder.emit(aten.select.int, both, 0, 1),
        )
    return _typed(sharder, mean, node)


#: What reduces the tokens away, by the operator's name.
TOTALS = {
    "aten::sum": reduced, "aten::mean": reduced, "aten::linalg_vector_norm": vector_norm,
    **dict.fromkeys(("aten::var", "aten::std", "aten::var_mean", "aten::std_mean"), variance),
    "aten::any": truth, "aten::all": truth,
    **dict.fromkeys(("aten::amax", "aten::amin", "aten::aminmax", "aten::max", "aten::min"), largest),
    "aten::argmax": first_largest, "aten::argmin": first_largest,
    "aten::logsumexp": log_sum,
    **dict.fromkeys(("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax"), softmax),
}  # fmt: skip
