"""Pass 3: the mask of every attention, from a dense tensor to a formula.

before: mask = f(arange(S)[:, None], arange(S), positions, ...) of shape (.., S, S); sdpa(q, k, v, mask)
after:  hsap::attention(q, k, v, leaves, "logits(score, b, h, q, k)", scale); the mask's nodes are dead

1. walk from the mask (eager form: from the logits) to its sources, carrying the index of one element:
   a view changes the index, a pointwise operator becomes an expression, ``arange`` is its index;
2. a tensor that is not made of such operators is a leaf: the formula reads its element;
3. normalise (``masks``), put the ``Mask`` on the node, leaves beside it.

A mask that cannot be walked is itself a leaf of two token dimensions: exact, but it stays dense.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, free_symbols, hint_of, operator_name, run_fake
from hsap_compile.formula import b, h, k, q, score
from hsap_compile.graph import remove_dead
from hsap_compile.kernels import dense
from hsap_compile.masks import normalise
from hsap_compile.passes.find_attention import Attention, arguments, token_dims

aten = torch.ops.aten
Index = tuple[sympy.Expr, ...]


def lift_mask(module: GraphModule, attentions: tuple[Attention, ...], mode: Any) -> int:
    """Rewrite each of ``attentions`` into the canonical operator.  Returns how many kept a dense mask."""
    dense_masks = 0
    for attention in attentions:
        lifter = _Lifter(attention)
        logits = lifter.logits()
        mask, scale = normalise(logits)
        used = formula.leaves_of(mask.logits)
        numbers = {old: new for new, old in enumerate(used)}
        mask = _renumbered(mask, numbers)
        leaves = [lifter.leaves[i] for i in used]
        dense_masks += any(len(token_dims(leaf)) > 1 for leaf in leaves)
        _rewrite(module, mode, attention, leaves, mask, attention.scale * scale)
    remove_dead(module)
    return dense_masks


def _renumbered(mask: Any, numbers: dict[int, int]) -> Any:
    def new(expr: Any) -> Any:
        return formula.renumber(expr, numbers)

    return replace(
        mask,
        logits=new(mask.logits),
        labels=tuple(new(label) for label in mask.labels),
        bands=tuple(replace(band, position=new(band.position)) for band in mask.bands),
        key_valid=new(mask.key_valid),
        query_valid=new(mask.query_valid),
    )


def _rewrite(
    module: GraphModule, mode: Any, attention: Attention, leaves: list[Node], mask: Any, scale: float
) -> None:
    graph, output = module.graph, attention.output

    def emit(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta.update({key: value for key, value in output.meta.items() if key != "val"})
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = run_fake(mode, target, values, {})
        return node

    dtype = output.meta["val"].dtype
    with graph.inserting_before(output):
        operands = [attention.query, attention.key, attention.value]
        flat = attention.query.meta["val"].dim() == 3
        if flat:
            operands = [emit(aten.unsqueeze.default, x, 0) for x in operands]
        # under autocast the operator casts; the canonical one takes what the result has
        operands = [
            x if x.meta["val"].dtype == dtype else emit(aten.to.dtype, x, dtype) for x in operands
        ]
        node = emit(dense.OP, *operands, leaves, formula.dumps(mask.logits), scale)
        node.meta["mask"] = mask
        if flat:
            node = emit(aten.squeeze.dim, node, 0)
    output.replace_all_uses_with(node)


class NotLiftable(Exception):
    """No rule carries an index through this node."""


class _Lifter:
    """The formula of one attention's logits, and the tensors it reads."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.leaves: list[Node] = []
        self.memo: dict[tuple[Node, Index], sympy.Basic] = {}

    def logits(self) -> sympy.Expr:
        attention = self.attention
        if attention.logits is not None:
            return _number(self.element(attention.logits, self._position(attention.logits)))
        logits: sympy.Expr = score
        if attention.causal:
            logits = sympy.Piecewise((logits, q >= k), (-sympy.oo, True))
        if attention.mask is None:
            return logits
        value = self.element(attention.mask, self._position(attention.mask))
        if attention.mask.meta["val"].dtype == torch.bool:
            return sympy.Piecewise((logits, _boolean(value)), (-sympy.oo, True))
        return logits + _number(value)

    def _position(self, node: Node) -> Index:
        """The index of element (b, h, q, k) in a tensor that broadcasts against the scores."""
        shape = node.meta["val"].shape
        full = (sympy.Integer(0), h, q, k) if self.attention.query.meta["val"].dim() == 3 else (b, h, q, k)
        return tuple(
            sympy.Integer(0) if _is_one(size) else index
            for size, index in zip(shape, full[4 - len(shape) :], strict=True)
        )

    def element(self, node: Any, index: Index) -> sympy.Basic:
        """The element of ``node`` at ``index``."""
        if not isinstance(node, Node):
            return _constant(node)
        key = (node, index)
        if key not in self.memo:
            try:
                self.memo[key] = self._element(node, index)
            except NotLiftable:
                if self._reaches_product(node):
                    raise
                self.memo[key] = self.leaf(node, index)
        return self.memo[key]

    def _reaches_product(self, node: Node) -> bool:
        product, stack, seen = self.attention.product, [node], set()
        while product is not None and stack:
            current = stack.pop()
            if current is product:
                return True
            if current not in seen and len(token_dims(current)) > 1:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return False

    def leaf(self, node: Node, index: Index) -> sympy.Basic:
        if node not in self.leaves:
            self.leaves.append(node)
        value = formula.leaf(self.leaves.index(node), *index)
        return sympy.Ne(value, 0) if node.meta["val"].dtype == torch.bool else value

    def broadcast(self, operand: Any, index: Index) -> sympy.Basic:
        """The element of an operand that is broadcast to the result's shape."""
        if not isinstance(operand, Node):
            return _constant(operand)
        value = operand.meta["val"]
        if not isinstance(value, torch.Tensor):
            return _size(value)
        tail = index[len(index) - value.dim() :]
        return self.element(
            operand,
            tuple(sympy.Integer(0) if _is_one(s) else i for s, i in zip(value.shape, tail, strict=True)),
        )

    def _element(self, node: Node, index: Index) -> sympy.Basic:
        if node is self.attention.product:
            if operator_name(node.target) != "aten::baddbmm":
                return score
            given = arguments(node)
            bias = _constant(given["beta"]) * _number(self.broadcast(given["self"], index))
            return bias + _constant(given["alpha"]) * score
        if node.op != "call_function":
            raise NotLiftable(node)
        name = operator_name(node.target).removeprefix("aten::")
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise NotLiftable(node)
        if name in _RULES:
            return _RULES[name](self, node, index)
        if value.is_floating_point() and len(token_dims(node)) < 2:
            raise NotLiftable(node)  # read the rounded value rather than compute it anew
        if name in _POINTWISE:
            operands = [a for a in node.args if isinstance(a, Node | int | float | bool)]
            return _POINTWISE[name](*[self.broadcast(a, index) for a in operands])
        raise NotLiftable(node)


def _is_one(size: Any) -> bool:
    return not free_symbols(size) and hint_of(size) == 1


def _size(size: Any) -> sympy.Expr:
    expr = expr_of(size)
    symbols = expr.free_symbols
    if not symbols:
        return expr
    if expr in symbols:
        return formula.S
    raise NotLiftable(size)


def _constant(value: Any) -> sympy.Basic:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value == int(value) and abs(value) < 2**31 else sympy.Float(value)
    if isinstance(value, torch.SymInt):
        return _size(value)
    raise NotLiftable(value)


def _number(x: sympy.Basic) -> sympy.Expr:
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return sympy.Piecewise((sympy.Integer(1), x), (sympy.Integer(0), True))
    return x


def _boolean(x: sympy.Basic) -> sympy.Basic:
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return x
    if isinstance(x, sympy.Piecewise):  # a truth value that was cast to a number and back
        return sympy.Or(*[sympy.And(c, sympy.Ne(v, 0)) for v, c in _exclusive(x)])
    return sympy.Ne(x, 0)


def _exclusive(x: sympy.Piecewise) -> list[tuple[sympy.Expr, sympy.Basic]]:
    cases, before = [], sympy.false
    for value, condition in x.args:
        cases.append((value, sympy.And(condition, sympy.Not(before))))
        before = sympy.Or(before, condition)
    return cases


def _compare(relation: Any) -> Any:
    return lambda x, y: relation(_number(x), _number(y))


def _logical(on_booleans: Any) -> Any:
    return lambda *xs: on_booleans(*[_boolean(x) for x in xs])


def _where(condition: Any, yes: Any, no: Any) -> sympy.Basic:
    condition = _boolean(condition)
    if all(isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol) for x in (yes, no)):
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.Piecewise((_number(yes), condition), (_number(no), True))


def _scaled(sign: int) -> Any:
    return lambda x, y, alpha=sympy.Integer(1): _number(x) + sign * _number(alpha) * _number(y)


def _equal(x: Any, y: Any) -> sympy.Basic:
    booleans = [isinstance(v, sympy.logic.boolalg.Boolean) and not isinstance(v, sympy.Symbol) for v in (x, y)]
    return sympy.Equivalent(x, y) if all(booleans) else sympy.Eq(_number(x), _number(y))


_POINTWISE: dict[str, Any] = {
    "add": _scaled(1),
    "sub": _scaled(-1),
    "rsub": lambda x, y, alpha=sympy.Integer(1): _number(y) - alpha * _number(x),
    "mul": lambda x, y: _number(x) * _number(y),
    "div": lambda x, y: _number(x) / _number(y),
    "floor_divide": lambda x, y: formula.floordiv(_number(x), _number(y)),
    "remainder": lambda x, y: sympy.Mod(_number(x), _number(y)),
    "neg": lambda x: -_number(x),
    "abs": lambda x: sympy.Abs(_number(x)),
    "tanh": lambda x: sympy.tanh(_number(x)),
    "exp": lambda x: sympy.exp(_number(x)),
    "minimum": lambda x, y: sympy.Min(_number(x), _number(y)),
    "maximum": lambda x, y: sympy.Max(_number(x), _number(y)),
    "eq": _equal,
    "ne": lambda x, y: sympy.Not(_equal(x, y)),
    "lt": _compare(sympy.Lt),
    "le": _compare(sympy.Le),
    "gt": _compare(sympy.Gt),
    "ge": _compare(sympy.Ge),
    "__and__": _logical(sympy.And),
    "bitwise_and": _logical(sympy.And),
    "logical_and": _logical(sympy.And),
    "__or__": _logical(sympy.Or),
    "bitwise_or": _logical(sympy.Or),
    "logical_or": _logical(sympy.Or),
    "bitwise_not": _logical(sympy.Not),
    "logical_not": _logical(sympy.Not),
    "where": _where,
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
}


def _unchanged(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    source = node.args[0]
    if not isinstance(source, Node):
        raise NotLiftable(node)
    if len(token_dims(source)) > 1 or not source.meta["val"].is_floating_point():
        return lifter.broadcast(source, index)
    raise NotLiftable(node)


def _to(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    value = _unchanged(lifter, node, index)
    return _boolean(value) if node.meta["val"].dtype == torch.bool else _number(value)


def _filled(value: int) -> Any:
    def rule(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
        return _constant(bool(value) if node.meta["val"].dtype == torch.bool else value)

    return rule


def _full(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    value = given["fill_value"] if "fill_value" in given else given["s"]
    return lifter.broadcast(value, ())


def _arange(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    start, step = given.get("start", 0), given.get("step", 1)
    start = lifter.broadcast(start if start is not None else 0, ())
    return start + lifter.broadcast(step if step is not None else 1, ()) * index[0]


def _triangle(below: bool) -> Any:
    def rule(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
        given = arguments(node)
        row, column = index[-2], index[-1] - _constant(given["diagonal"])
        kept = sympy.Le(column, row) if below else sympy.Ge(column, row)
        value = lifter.element(given["self"], index)
        if node.meta["val"].dtype == torch.bool:
            return sympy.And(kept, _boolean(value))
        return sympy.Piecewise((_number(value), kept), (sympy.Integer(0), True))

    return rule


def _unsqueeze(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    dim = node.args[1] % len(index)
    return lifter.element(node.args[0], index[:dim] + index[dim + 1 :])


def _reshape(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    """Carries the index through a view that only inserts, removes or keeps dimensions."""
    source = node.args[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    kept_old = [d for d, size in enumerate(old) if not _is_one(size)]
    kept_new = [d for d, size in enumerate(new) if not _is_one(size)]
    if [expr_of(old[d]) for d in kept_old] != [expr_of(new[d]) for d in kept_new]:
        raise NotLiftable(node)
    position: list[sympy.Expr] = [sympy.Integer(0)] * len(old)
    for into, out in zip(kept_old, kept_new, strict=True):
        position[into] = index[out]
    return lifter.element(source, tuple(position))


def _transpose(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    position, (one, other) = list(index), node.args[1:3]
    position[one], position[other] = position[other], position[one]
    return lifter.element(node.args[0], tuple(position))


def _permute(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    position: list[sympy.Expr] = list(index)
    for out, into in enumerate(node.args[1]):
        position[into % len(index)] = index[out]
    return lifter.element(node.args[0], tuple(position))


def _slice(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    given = arguments(node)
    dim, start, step = given["dim"] % len(index), given["start"] or 0, given["step"]
    offset = lifter.broadcast(start, ())
    if isinstance(start, int) and start < 0:
        offset = offset + _size(node.args[0].meta["val"].shape[dim])
    position = list(index)
    position[dim] = position[dim] * _constant(step) + offset
    return lifter.element(node.args[0], tuple(position))


def _select(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    source, dim, at = node.args
    size = source.meta["val"].shape
    dim %= len(size)
    place = lifter.broadcast(at, ())
    if isinstance(at, int) and at < 0:
        place = place + _size(size[dim])
    return lifter.element(source, (*index[:dim], place, *index[dim:]))


def _gather(lifter: _Lifter, node: Node, index: Index) -> sympy.Basic:
    """``source[i, j, ...]`` with broadcast index tensors on the leading dimensions."""
    source, indices = node.args
    if any(i is None for i in indices):
        raise NotLiftable(node)
    rank = max(i.meta["val"].dim() for i in indices)
    lead, rest = index[:rank], index[rank:]
    return lifter.element(source, (*[_number(lifter.broadcast(i, lead)) for i in indices], *rest))


_RULES: dict[str, Any] = {
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
    "type_as": _to,
    "clone": _unchanged,
    "contiguous": _unchanged,
    "alias": _unchanged,
    "detach": _unchanged,
    "expand": _unchanged,
    "expand_as": _unchanged,
    "lift_fresh_copy": _unchanged,
    "unsqueeze": _unsqueeze,
    "squeeze": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "transpose": _transpose,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "index": _gather,
}
