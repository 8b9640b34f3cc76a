"""Products of two tensors, as attention is written with them: which dimension of an operand is which of the
result, and how operands and result are brought to the canonical form.

A ``Factor`` names the dimensions of an operand by those of the scores, in whatever order the operator
(matmul, bmm, einsum) has them.  All but queries, keys and the width are *rows*: batch and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, free_symbols, operator_name
from hsap_compile.formula import b, h, k, q
from hsap_compile.graph import Builder, positional
from hsap_compile.passes._operands import einsum_letters

aten = torch.ops.aten

#: The dimension that a product of queries and keys sums over, and that only values have.
WIDTH = -1


@dataclass(frozen=True)
class Factor:
    """An operand of a product.  ``dims[i]``: the dimension of the result that dimension i is, ``WIDTH``, or
    None where it has one element for all."""

    node: Node
    dims: tuple[int | None, ...]

    def size(self, dim: int) -> Any:
        return self.node.meta["val"].shape[self.dims.index(dim)]

    def renamed(self, names: Mapping[int, int]) -> Factor:
        return replace(self, dims=tuple(None if d is None else names[d] for d in self.dims))

    def once(self, rows: Sequence[int], opaque: Set[Node]) -> Factor:
        """The same, of what the node repeats for some of ``rows``."""
        if operator_name(self.node.target) != "aten::expand" or self.node in opaque:
            return self
        source = positional(self.node)[0]
        small, large = ([expr_of(s) for s in x.meta["val"].shape] for x in (source, self.node))
        if len(small) < len(large):
            return self
        dims = tuple(d if a == b else None for d, a, b in zip(self.dims, small, large, strict=True))
        return Factor(source, dims) if {*self.dims} - {*dims} <= {*rows} else self

    def ordered(self, wanted: tuple[int, ...], opaque: Set[Node]) -> Factor:
        """The same, of what the node is a transposition of, where its own order is not ``wanted``."""
        if self.node in opaque or [d for d in self.dims if d is not None] == [*wanted]:
            return self
        order = _order(self.node)
        if order is None:
            return self
        dims = dict(zip(order, self.dims, strict=True))
        source = Factor(positional(self.node)[0], tuple(dims[d] for d in range(len(order))))
        return source.ordered(wanted, opaque)


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values.  ``parts``, each times its number, stand side by side in the width.

    ``rows`` and ``token`` are dimensions of the scores, which have ``sizes``; a part has one element for all
    of a row that it lacks.  The first row is the batch if ``batched``, the others together are the heads.
    ``split``: (batches, heads) where the only row is both.
    """

    parts: tuple[tuple[Factor, float], ...]
    rows: tuple[int, ...]
    token: int
    batched: bool
    sizes: tuple[Any, ...]
    split: tuple[int, int] | None

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(factor.node for factor, _ in self.parts)

    @property
    def tokens(self) -> Any:
        """How many."""
        return self.parts[0][0].size(self.token)

    def reading(self, new: Mapping[Node, Node]) -> Operand:
        """The same of other nodes."""
        parts = ((replace(f, node=new.get(f.node, f.node)), number) for f, number in self.parts)
        return replace(self, parts=tuple(parts))

    def canonical(self, emit: Builder) -> Node:
        """(B, heads, S, D)"""
        made = []
        for factor, number in self.parts:
            part = self._part(emit, factor)
            made.append(part if number == 1 else emit(aten.mul.Tensor, part, number))
        joined = made[0] if len(made) == 1 else emit(aten.cat.default, made, -1)
        if self.split is not None:
            return with_rows(emit, joined, self.split)
        batch = [emit.size(joined, 0)] if self.batched else [1]
        heads = joined.meta["val"].shape[int(self.batched) : -2]
        return with_rows(emit, joined, [*batch, math.prod(heads)])

    def _part(self, emit: Builder, factor: Factor) -> Node:
        """(*rows, S, D)"""
        there = [d for d in self.rows if d in factor.dims]
        ones = [i for i, d in enumerate(factor.dims) if d is None]
        order = [factor.dims.index(d) for d in there] + ones
        part = permuted(emit, factor.node, order + [factor.dims.index(d) for d in (self.token, WIDTH)])
        if not ones and len(there) == len(self.rows):
            return part
        sizes = dict(zip(there, emit.sizes(part), strict=False))
        part = with_rows(emit, part, [sizes.get(d, 1) for d in self.rows])
        if len(there) == len(self.rows):
            return part
        more = [-1 if d in there else self.sizes[d] for d in self.rows]
        return emit(aten.expand.default, part, [*more, -1, -1])


@dataclass(frozen=True)
class Scores:
    """``node`` is the sum of products of queries and keys, each times a number.  ``nodes``: all that this is
    made of."""

    node: Node
    terms: tuple[tuple[Node, float], ...]
    nodes: frozenset[Node]

    @property
    def scale(self) -> float:
        """The number of the first product; the others' are multiples of it."""
        return self.terms[0][1]


def permuted(emit: Builder, node: Node, order: list[int]) -> Node:
    return node if order == sorted(order) else emit(aten.permute.default, node, order)


def with_rows(emit: Builder, node: Node, rows: Sequence[Any]) -> Node:
    """(.., S, D) as (*rows, S, D); ``rows`` are numbers, or nodes."""
    shape = node.meta["val"].shape
    wanted = [expr_of(size.meta["val"] if isinstance(size, Node) else size) for size in rows]
    if [expr_of(size) for size in shape[:-2]] == wanted:
        return node
    tail = [emit.size(node, d) for d in (len(shape) - 2, len(shape) - 1)]
    return emit(aten.reshape.default, node, [*rows, *tail])


PRODUCTS = frozenset(("aten::matmul", "aten::bmm", "aten::einsum"))
_BIASED = "aten::baddbmm"


def product_of(node: Node) -> tuple[Factor, Factor] | None:
    """The operands of a product that sums over one dimension of both; None for anything else."""
    if operator_name(node.target) == "aten::einsum":
        return _einsum(node)
    left, right = positional(node)[-2:]  # baddbmm(input, q, k) carries its bias first
    rank = node.meta["val"].dim()
    if left.meta["val"].dim() < 2 or right.meta["val"].dim() < 2:
        return None
    lead = tuple(range(rank - 2))
    return tuple(  # type: ignore[return-value]
        _factor(node, x, (*lead[rank - x.meta["val"].dim() :], *last))
        for x, last in ((left, (rank - 2, WIDTH)), (right, (WIDTH, rank - 1)))
    )


def _einsum(node: Node) -> tuple[Factor, Factor] | None:
    found, operands = einsum_letters(node), positional(node)[1]
    if found is None or len(operands) != 2 or any(len(set(x)) < len(x) for x in found[0]):
        return None
    letters, result = found
    summed = [c for c in letters[0] if c in letters[1] and c not in result]
    if len(summed) != 1 or not (set(letters[0]) | set(letters[1])) == {*result, *summed}:
        return None
    sizes = [x.meta["val"].shape[names.index(summed[0])] for x, names in zip(operands, letters, strict=True)]
    if expr_of(sizes[0]) != expr_of(sizes[1]):
        return None
    return tuple(  # type: ignore[return-value]
        _factor(node, x, tuple(WIDTH if c in summed else result.index(c) for c in names))
        for x, names in zip(operands, letters, strict=True)
    )


def _factor(product: Node, operand: Node, dims: tuple[int, ...]) -> Factor:
    """None for a dimension of one element, of which the product has more."""
    shape, of = operand.meta["val"].shape, product.meta["val"].shape
    once = [d != WIDTH and expr_of(s) == 1 and expr_of(of[d]) != 1 for s, d in zip(shape, dims, strict=True)]
    return Factor(operand, tuple(None if o else d for o, d in zip(once, dims, strict=True)))


def _order(node: Node) -> list[int] | None:
    """p where dimension i of ``node`` is dimension p[i] of its first argument, if that is all it does."""
    name = operator_name(node.target) if node.op == "call_function" else ""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if name in ("aten::transpose", "aten::swapaxes", "aten::swapdims"):
        a, b = positional(node)[1:3]
        order[a], order[b] = order[b], order[a]
    elif name == "aten::mT":
        order[-2:] = rank - 1, rank - 2
    elif name == "aten::permute":
        order = [d % rank for d in positional(node)[1]]
    else:
        return None
    return order


# --- which product the logits are made of ------------------------------------------------------------------


def scores_of(logits: Node, is_scores: Callable[[Node], bool]) -> list[Scores]:
    """What may be the scores of ``logits``, best first.  ``is_scores``: which nodes are looked at (those with
    queries and keys as dimensions)."""
    products, seen = _reached(logits, None, is_scores)
    if len(products) == 1:
        (node,) = products
        return [Scores(node, ((node, 1.0),), products)]
    found = []
    for node in seen:
        sum_ = _sum(node)
        if sum_ is None or {p for p, _ in sum_.terms} != products or len(sum_.terms) != len(products):
            continue
        if not _reached(logits, node, is_scores)[0]:
            found.append(sum_)
    best = sorted(found, key=lambda s: len(s.nodes))[:1]
    # an einsum that is no part of such a sum may be a bias, which is read as it is
    alone = [p for p in products if operator_name(p.target) != "aten::einsum"]
    return best + [Scores(p, ((p, 1.0),), frozenset((p,))) for p in alone if len(alone) == 1]


def _reached(
    logits: Node, stop: Node | None, is_scores: Callable[[Node], bool]
) -> tuple[frozenset[Node], set[Node]]:
    """The products that ``logits`` is computed from other than through ``stop``, and the nodes on the way."""
    products: set[Node] = set()
    seen: set[Node] = set()
    stack = [logits]
    while stack:
        node = stack.pop()
        if node in seen or node is stop or not is_scores(node):
            continue
        seen.add(node)
        if node.op == "call_function" and operator_name(node.target) in (*PRODUCTS, _BIASED):
            products.add(node)
        else:
            stack.extend(node.all_input_nodes)
    return frozenset(products), seen


def _sum(node: Any) -> Scores | None:
    """``node`` as products times numbers, if it is their sum."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    name, args, numbers = operator_name(node.target), positional(node), dict(node.kwargs)
    if name in PRODUCTS:
        return Scores(node, ((node, 1.0),), frozenset((node,)))
    if name in ("aten::add", "aten::sub"):
        alpha: Any = numbers.pop("alpha", 1)
        one = _times(args[0], 1.0, node)
        other = _times(args[1], -alpha if name == "aten::sub" else alpha, node)
        if one is None or other is None or numbers:
            return None
        return Scores(node, one.terms + other.terms, one.nodes | other.nodes | {node})
    if name == "aten::neg":
        return _times(args[0], -1.0, node)
    if name == "aten::mul" and not numbers:
        x, number = args if isinstance(args[0], Node) else reversed(args)
        return _times(x, number, node)
    if name == "aten::div" and not numbers and isinstance(args[1], int | float) and args[1] != 0:
        return _times(args[0], 1.0 / args[1], node)
    return None


def _times(x: Any, number: Any, node: Node) -> Scores | None:
    """``node``, which is ``x`` times ``number``, as a sum of products."""
    found = _sum(x)
    if found is None or not isinstance(number, int | float) or number == 0 or not math.isfinite(number):
        return None
    if x.meta["val"].dtype != node.meta["val"].dtype or not _alike(x, node):
        return None
    return Scores(node, tuple((p, c * number) for p, c in found.terms), found.nodes | {node})


# --- what belongs together ----------------------------------------------------------------------------------


#: Queries, keys and values; how the result lies in the output: the dimensions of the scores, and ``WIDTH``;
#: and the index of the pair (b, h, q, k) in the scores.
Operands = tuple[Operand, Operand, Operand, tuple[int, ...], tuple[sympy.Expr, ...]]


def operands_of(
    scores: Scores, weights: Node, output: Node, split: tuple[int, int] | None, opaque: Set[Node]
) -> Operands | None:
    """What is read by ``output``, the product of ``weights`` = softmax(f(``scores``)) and values.  None if
    they do not fit.

    Keys and values must be the same tokens, queries others.  All of them have the batch.  The rows that keys
    or values have are the key/value heads; rows of queries alone share them, and come behind them in a
    query's head.  ``split``: (batches, heads) where the scores' only row is both.  No ``opaque`` node
    is looked through.
    """
    last = weights.meta["val"].dim() - 1
    found = _values(weights, output)
    if found is None or not all(_alike(product, weights) for product, _ in scores.terms):
        return None
    value, result = found
    queries: list[Factor] = []
    keys: list[Factor] = []
    for product, _ in scores.terms:
        pair = product_of(product)
        if pair is None:
            return None
        of_keys = [last in factor.dims for factor in pair]
        if of_keys not in ([False, True], [True, False]):
            return None
        queries.append(pair[of_keys.index(False)])
        keys.append(pair[of_keys.index(True)])
    sizes = weights.meta["val"].shape
    read = {d for factor in (*keys, value) for d in factor.dims}
    tokens = [d for d in range(last) if free_symbols(sizes[d]) and d not in read]
    if len(tokens) != 1 or not free_symbols(sizes[last]):
        return None
    widths = [factor.size(WIDTH) for factor in (*keys, value)]
    if any(free_symbols(size) for size in widths):
        return None
    numbers = [number / scores.scale for _, number in scores.terms]
    return _operands(queries, keys, value, numbers, tokens[0], result, sizes, split, opaque)


def operands_of_operator(
    output: Node, query: Node, key: Node, value: Node, opaque: Set[Node]
) -> Operands | None:
    """The same of ``output`` = scaled_dot_product_attention(query, key, value), (.., S, D) of any rank."""
    *rows, _, _ = output.meta["val"].shape
    token, last = len(rows), len(rows) + 1

    def factor(node: Node, tokens: int) -> Factor:
        shape = node.meta["val"].shape
        once = [expr_of(a) == 1 and expr_of(b) != 1 for a, b in zip(shape, rows, strict=False)]
        return Factor(node, (*(None if o else d for d, o in enumerate(once)), tokens, WIDTH))

    sizes = (*rows, query.meta["val"].shape[-2], key.meta["val"].shape[-2])
    result = (*range(last), WIDTH)
    parts = factor(query, token), factor(key, last), factor(value, last)
    return _operands([parts[0]], [parts[1]], parts[2], [1.0], token, result, sizes, None, opaque)


def _operands(
    queries: list[Factor],
    keys: list[Factor],
    value: Factor,
    numbers: list[float],
    token: int,
    result: tuple[int, ...],
    sizes: Sequence[Any],
    split: tuple[int, int] | None,
    opaque: Set[Node],
) -> Operands | None:
    last = len(sizes) - 1
    rows = [d for d in range(last) if d != token]
    batch, heads = (rows[:1], rows[1:]) if last > 2 else ([], rows)
    keys, value = [factor.once(heads, opaque) for factor in keys], value.once(heads, opaque)
    everywhere = batch if split is None else rows
    if any(set(everywhere) - set(factor.dims) for factor in (*keys, value)):
        return None
    if any({*rows, token} - set(factor.dims) for factor in queries):
        return None
    if any(free_symbols(sizes[d]) for d in heads):
        return None
    own = [d for d in heads if any(d in factor.dims for factor in (*keys, value))]
    of_keys_and_values = (*batch, *own)
    of_queries = (*batch, *own, *(d for d in heads if d not in own))

    def operand(factors: list[Factor], rows: tuple[int, ...], token: int, numbers: list[float]) -> Operand:
        parts = [factor.ordered((*rows, token, WIDTH), opaque) for factor in factors]
        joined = tuple(zip(parts, numbers, strict=True))
        return Operand(joined, rows, token, bool(batch), tuple(sizes), split)

    return (
        operand(queries, of_queries, token, numbers),
        operand(keys, of_keys_and_values, last, [1.0] * len(keys)),
        operand([value], of_keys_and_values, last, [1.0]),
        result,
        _layout(of_queries, len(batch), token, sizes, split),
    )


def _values(weights: Node, output: Node) -> tuple[Factor, tuple[int, ...]] | None:
    """The values in ``output``, their product with ``weights``, whose last dimension must be what it sums
    over; and the dimensions of ``output``.  Both are named by the dimensions of the weights."""
    pair = product_of(output)
    ours = [factor for factor in pair or () if factor.node is weights]
    if pair is None or len(ours) != 1:
        return None
    value = pair[0] if ours[0] is pair[1] else pair[1]
    names = {of: d for d, of in enumerate(ours[0].dims) if of is not None}
    if ours[0].dims[-1] != WIDTH or len(names) != weights.meta["val"].dim():
        return None
    others = [d for d in range(output.meta["val"].dim()) if d not in names]
    if len(others) != 1:
        return None
    names[others[0]] = WIDTH
    return value.renamed(names), tuple(names[d] for d in range(output.meta["val"].dim()))


def _layout(
    rows: tuple[int, ...], batches: int, token: int, sizes: Sequence[Any], split: tuple[int, int] | None
) -> tuple[sympy.Expr, ...]:
    """The index of the pair (b, h, q, k) in the scores."""
    found: dict[int, sympy.Expr] = {token: q, len(sizes) - 1: k}
    if split is not None:
        found[rows[0]] = h if split[0] == 1 else b * split[1] + h
        return tuple(found[d] for d in range(len(sizes)))
    found.update(dict.fromkeys(rows[:batches], b))
    behind, heads = 1, rows[batches:]
    for d in reversed(heads):
        index: sympy.Expr = h if behind == 1 else formula.floordiv(h, sympy.Integer(behind))
        found[d] = index if d == heads[0] else sympy.Mod(index, int(sizes[d]))
        behind *= int(sizes[d])
    return tuple(found[d] for d in range(len(sizes)))


def _alike(x: Node, y: Node) -> bool:
    return [expr_of(s) for s in x.meta["val"].shape] == [expr_of(s) for s in y.meta["val"].shape]
