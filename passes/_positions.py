"""Which element of its operand an element of a mask is: a rule for each operator that moves, repeats or makes
elements.  A rule gets the lifter, the node and the index of an element, and returns the element as a formula;
it raises ``NotLiftable`` where the element is better read than computed.  See ``lift_mask``.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, free_symbols, hint_of
from hsap_compile.graph import arguments, positional
from hsap_compile.passes._elements import (
    NotLiftable,
    as_boolean,
    as_constant,
    as_dtype,
    as_number,
    cases_of,
    of_choices,
)
from hsap_compile.passes.find_attention import token_dims

if TYPE_CHECKING:
    from hsap_compile.passes.lift_mask import _Lifter

Index = tuple[sympy.Expr, ...]

NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16)  # their arithmetic may wrap


#: Binary digits of the integers that a type tells apart.
_DIGITS = {
    torch.int64: 63, torch.int32: 31, torch.float64: 53, torch.float32: 24, torch.float16: 11,
    torch.bfloat16: 8,
}  # fmt: skip


def is_one(size: Any) -> bool:
    return not free_symbols(size) and hint_of(size) == 1


def _unchanged(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    source = positional(node)[0]
    if not isinstance(source, Node):
        raise NotLiftable(node)
    return lifter.broadcast(source, index)


def _to(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    old, new = positional(node)[0].meta["val"], node.meta["val"]
    if old.is_floating_point() and new.dtype != torch.bool and old.dtype != new.dtype:
        if not new.is_floating_point() or len(token_dims(node)) < 2:
            raise NotLiftable(node)  # it rounds: read the rounded value
    value = _unchanged(lifter, node, index)
    loses = _DIGITS.get(old.dtype, 0) > _DIGITS.get(new.dtype, 64)
    if loses and len(token_dims(node)) < 2 and (formula.leaves_of(value) or new.dtype.itemsize == 2):
        raise NotLiftable(node)  # the same
    if new.dtype == torch.bool:
        return as_boolean(value)
    if new.dtype in NARROW_INTEGERS and old.dtype != torch.bool:
        raise NotLiftable(node)
    return as_dtype(as_number(value), new.dtype) if new.is_floating_point() else as_number(value)


def _filled(value: int) -> Any:
    def rule(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
        return as_constant(bool(value) if node.meta["val"].dtype == torch.bool else value)

    return rule


def _full(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    value = given["fill_value"] if "fill_value" in given else given["s"]
    found = lifter.broadcast(value, ())
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return as_boolean(found)
    return as_dtype(found, dtype) if dtype.is_floating_point else found


def _arange(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    if node.meta["val"].dtype in (torch.float16, torch.bfloat16):
        raise NotLiftable(node)  # these round
    given = arguments(node)
    start, step = given.get("start", 0), given.get("step", 1)
    start = lifter.broadcast(start if start is not None else 0, ())
    return start + lifter.broadcast(step if step is not None else 1, ()) * index[0]


def _triangle(below: bool) -> Any:
    def rule(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
        given = arguments(node)
        row, column = index[-2], index[-1] - as_constant(given["diagonal"])
        kept = sympy.Le(column, row) if below else sympy.Ge(column, row)
        value = lifter.element(given["self"], index)
        if node.meta["val"].dtype == torch.bool:
            return sympy.And(kept, as_boolean(value))
        return (
            of_choices(operator.mul, as_number(kept), value)
            if cases_of(as_number(value)) == [(value, sympy.true)] and value not in (sympy.oo, -sympy.oo)
            else sympy.Piecewise((as_number(value), kept), (sympy.Integer(0), True))
        )

    return rule


def _unsqueeze(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    dim = positional(node)[1] % len(index)
    return lifter.element(positional(node)[0], index[:dim] + index[dim + 1 :])


def _reshape(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    """Carries the index through a view that inserts, removes or keeps dimensions, or parts the first."""
    source = positional(node)[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    if len(new) == len(old) + 1 and [expr_of(s) for s in old[1:]] == [expr_of(s) for s in new[2:]]:
        if not free_symbols(new[1]) and not is_one(new[0]) and not is_one(new[1]):
            return lifter.element(source, (index[0] * hint_of(new[1]) + index[1], *index[2:]))
    kept_old = [d for d, size in enumerate(old) if not is_one(size)]
    kept_new = [d for d, size in enumerate(new) if not is_one(size)]
    if [expr_of(old[d]) for d in kept_old] != [expr_of(new[d]) for d in kept_new]:
        raise NotLiftable(node)
    position: list[sympy.Expr] = [sympy.Integer(0)] * len(old)
    for into, out in zip(kept_old, kept_new, strict=True):
        position[into] = index[out]
    return lifter.element(source, tuple(position))


def _transpose(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    position, (one, other) = list(index), positional(node)[1:3] or (-1, -2)  # mT
    position[one], position[other] = position[other], position[one]
    return lifter.element(positional(node)[0], tuple(position))


def _reverse(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    return lifter.element(positional(node)[0], index[::-1])


def _permute(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    position: list[sympy.Expr] = list(index)
    for out, into in enumerate(positional(node)[1]):
        position[into % len(index)] = index[out]
    return lifter.element(positional(node)[0], tuple(position))


def _slice(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    dim, start, step = given["dim"] % len(index), given["start"] or 0, given["step"]
    offset = lifter.broadcast(start, ())
    if isinstance(start, int) and start < 0:
        size = positional(node)[0].meta["val"].shape[dim]
        if free_symbols(node.meta["val"].shape[dim]) or (isinstance(size, int) and size + start < 0):
            raise NotLiftable(node)  # it may reach beyond the first element, where the slice then starts
        offset = offset + lifter.size(size)
    position = list(index)
    position[dim] = position[dim] * as_constant(step) + offset
    return lifter.element(positional(node)[0], tuple(position))


def _select(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    source, dim, at = positional(node)
    size = source.meta["val"].shape
    dim %= len(size)
    place = lifter.broadcast(at, ())
    if isinstance(at, int) and at < 0:
        place = place + lifter.size(size[dim])
    return lifter.element(source, (*index[:dim], place, *index[dim:]))


def _gather(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    """``source[:, i, j, ...]`` with broadcast index tensors on adjacent dimensions."""
    source, indices = positional(node)
    given = [d for d, i in enumerate(indices) if i is not None]
    if given != list(range(given[0], given[-1] + 1)) or any(
        indices[d].meta["val"].dtype == torch.bool for d in given
    ):
        raise NotLiftable(node)
    rank = max(indices[d].meta["val"].dim() for d in given)
    before, lead, rest = index[: given[0]], index[given[0] : given[0] + rank], index[given[0] + rank :]
    position = [as_number(lifter.broadcast(indices[d], lead)) for d in given]
    place = (*before, *position, *rest)
    if all(x.is_nonnegative for x in position):
        return lifter.element(source, place)
    return lifter.indexed(source, place)


def _repeat(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    source, repeats = positional(node)
    sizes = source.meta["val"].shape
    for size, count in zip(sizes, repeats[len(repeats) - len(sizes) :], strict=True):
        if not is_one(size) and count != 1:
            raise NotLiftable(node)
    return lifter.broadcast(source, index)


def _embedding(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    """``weight[indices]``; a padding index changes the gradient, and is not lifted."""
    given = arguments(node)
    if given["padding_idx"] != -1 or given["scale_grad_by_freq"] or given["sparse"]:
        raise NotLiftable(node)
    row = as_number(lifter.broadcast(given["indices"], index[:-1]))
    return lifter.element(given["weight"], (row, index[-1]))


def _clamp(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    if node.meta["val"].is_floating_point():
        raise NotLiftable(node)  # at a limit, the gradients of max and clamp differ
    value = lifter.broadcast(given["self"], index)
    if given.get("min") is not None:
        value = of_choices(sympy.Max, value, lifter.broadcast(given["min"], index))
    if given.get("max") is not None:
        value = of_choices(sympy.Min, value, lifter.broadcast(given["max"], index))
    return value


#: By the operator's name without its namespace.
RULES: dict[str, Any] = {
    "arange": _arange,
    "ones": _filled(1),
    "new_ones": _filled(1),
    "ones_like": _filled(1),
    "zeros": _filled(0),
    "new_zeros": _filled(0),
    "zeros_like": _filled(0),
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    "scalar_tensor": _full,
    "tril": _triangle(below=True),
    "triu": _triangle(below=False),
    "to": _to,
    "_to_copy": _to,
    "clone": _unchanged,
    "contiguous": _unchanged,
    "alias": _unchanged,
    "detach": _unchanged,
    "expand": _unchanged,
    "expand_as": _unchanged,
    "repeat": _repeat,
    "lift_fresh_copy": _unchanged,
    "unsqueeze": _unsqueeze,
    "squeeze": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "_unsafe_view": _reshape,
    "transpose": _transpose,
    "mT": _transpose,
    "t": _reverse,
    "numpy_T": _reverse,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "index": _gather,
    "embedding": _embedding,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
}
