"""Pass 3: the mask of every attention, from a dense tensor to a formula.

before: mask = f(arange(S)[:, None], arange(S), positions, ...) of shape (.., S, S); sdpa(q, k, v, mask)
after:  hsap::attention(q, k, v, leaves, "logits(score, b, h, q, k)", scale); the mask's nodes are dead

1. walk from the mask (eager form: from the logits) to its sources, carrying the index of one element:
   a view changes the index, a pointwise operator becomes an expression, ``arange`` is its index;
2. a tensor that is not made of such operators is a leaf: the formula reads its element;
3. normalise (``masks``), put the ``Mask`` on the node, leaves beside it.

A mask that cannot be walked is itself a leaf of two token dimensions: exact, but it stays dense.  An
attention that does more to its scores than act on every one alone is left as it is written.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, fixed_number, operator_name
from hsap_compile.errors import where
from hsap_compile.formula import b, h, k, q, score
from hsap_compile.graph import (
    Builder,
    arguments,
    may_have_gradient,
    placeholders,
    positional,
    remove_dead,
)
from hsap_compile.kernels import dense
from hsap_compile.kernels.attend import compute_dtype
from hsap_compile.kernels.flex import inline
from hsap_compile.masks import normalise
from hsap_compile.passes._elements import (
    COMPARISONS,
    POINTWISE,
    NotLiftable,
    as_boolean,
    as_constant,
    as_dtype,
    as_number,
    of_choices,
    rounds,
)
from hsap_compile.passes._positions import NARROW_INTEGERS, RULES, Index, is_one
from hsap_compile.passes._products import WIDTH, permuted, with_rows
from hsap_compile.passes.capture import capture_body
from hsap_compile.passes.find_attention import Attention, Body, token_dims, without_gradient

aten = torch.ops.aten

log = logging.getLogger("hsap_compile")


def lift_mask(module: GraphModule, attentions: tuple[Attention, ...], mode: Any) -> int:
    """Rewrite each of ``attentions`` into the canonical operator.  Returns how many kept a dense mask."""
    dense_masks, no_grad = 0, without_gradient(module)
    written: dict[Node, Node] = {}
    for attention in attentions:
        attention = _of_written(attention, written)
        lifter = _Lifter(attention, mode, set() if attention.output in no_grad else no_grad)
        try:
            logits = lifter.logits()
        except NotLiftable as reason:
            why = f"there is no formula of each score alone for {reason}"
            log.warning("an attention stays as it is written: %s, at %s", why, where(attention.output))
            attention.output.meta["as_written"] = why
            continue
        mask, scale = normalise(logits)
        used = formula.leaves_of(mask.logits)
        numbers = {old: new for new, old in enumerate(used)}
        mask = _renumbered(mask, numbers)
        valued = formula.valued_leaves_of(mask.logits)  # a comparison has no gradient
        read = [lifter.leaves[i] for i in used]
        leaves = [
            (node, cut or (i not in valued and may_have_gradient(node))) for i, (node, cut) in enumerate(read)
        ]
        dense_masks += any(len(token_dims(leaf)) > 1 for leaf, _ in leaves)
        written.update(_rewrite(module, mode, attention, leaves, mask, attention.scale * scale))
    remove_dead(module)
    return dense_masks


def _of_written(attention: Attention, written: dict[Node, Node]) -> Attention:
    """``attention``, whose operands may be attentions that are written anew."""
    operands = {name: getattr(attention, name).reading(written) for name in ("query", "key", "value")}
    nodes = {name: written.get(node, node) for name in ("mask", "sink") if (node := getattr(attention, name))}
    return replace(attention, **operands, **nodes)


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
        alike=tuple((new(of_q), new(of_k)) for of_q, of_k in mask.alike),
    )


def _rewrite(
    module: GraphModule,
    mode: Any,
    attention: Attention,
    leaves: list[tuple[Node, bool]],
    mask: Any,
    scale: float,
) -> dict[Node, Node]:
    """What stands for the attention's results from now on."""
    graph, output, lse = module.graph, attention.output, attention.lse
    emit = Builder(graph, mode, output)
    dtype = output.meta["val"].dtype
    with graph.inserting_before(output if lse is None else min(output, lse)):
        operands = [x.canonical(emit) for x in (attention.query, attention.key, attention.value)]
        # under autocast the operator casts; the canonical one takes what the result has
        operands = [x if x.meta["val"].dtype == dtype else emit(aten.to.dtype, x, dtype) for x in operands]
        if scale <= 0:  # which flash attention on CPU does not take with causal order
            operands[0], scale = emit(aten.mul.Scalar, operands[0], scale), 1.0
        read = [emit(aten.detach.default, leaf) if cut else leaf for leaf, cut in leaves]
        looks = dense.result(operands[0].meta["val"], operands[2].meta["val"], lse is not None)
        text = formula.dumps(mask.logits)
        node = emit.returning(looks, dense.OP, *operands, read, text, scale, lse is not None)
        node.meta.update(mask=mask, reads=tuple(where(leaf) for leaf, _ in leaves))
        query, shape = attention.query, output.meta["val"].shape
        parts = [*query.rows, query.token, WIDTH]
        rows = [shape[attention.result.index(d)] for d in query.rows]
        if query.batched:
            rows[0] = emit.size(node, 0)
        node = with_rows(emit, node, rows)
        written = {}
        if lse is not None:
            sizes = [int(operands[2].meta["val"].shape[3]), dense.columns_of_lse(dtype)]
            split = emit(aten.split_with_sizes.default, node, sizes, -1)
            node, columns = (emit(operator.getitem, split, i) for i in (0, 1))
            order = [parts.index(d) for d in sorted(parts) if d != WIDTH]
            written[lse] = _log_sum(
                emit, permuted(emit, inline(emit, dense.unpacked, columns), order), attention
            )
        written[output] = permuted(emit, node, [parts.index(d) for d in attention.result])
    for old, new in written.items():
        old.replace_all_uses_with(new)
    return written


def _log_sum(emit: Builder, natural: Node, attention: Attention) -> Node:
    """The log-sum-exp as ``attention.lse`` has it."""
    assert attention.lse is not None
    wanted = attention.lse.meta["val"]
    made = (
        natural if attention.base == math.e else emit(aten.mul.Tensor, natural, 1 / math.log(attention.base))
    )
    if made.meta["val"].dim() < wanted.dim():
        made = emit(aten.unsqueeze.default, made, -1)
    return made if made.meta["val"].dtype == wanted.dtype else emit(aten.to.dtype, made, wanted.dtype)


class _Lifter:
    """The formula of one attention's logits, and the tensors it reads."""

    def __init__(self, attention: Attention, mode: Any, no_grad: set[Node]) -> None:
        self.attention, self.mode, self.no_grad = attention, mode, no_grad
        self.numbers: dict[Node, Node] = {}
        self.cut = False  # whether no gradient passes from the element that is being read to the logits
        self.leaves: list[tuple[Node, bool]] = []  # and whether that is so of all that is read of them
        self.memo: dict[tuple[Node, Index, bool], sympy.Basic] = {}
        self.alias: dict[Node, Any] = {}  # what the inputs of a function of one pair are
        self.inside: set[Node] = set()  # the nodes of such functions

    def logits(self) -> sympy.Expr:
        attention = self.attention
        if attention.logits is not None:
            found = as_number(self.element(attention.logits, self._position(attention.logits)))
            if found.has(sympy.nan):
                raise NotLiftable(attention.logits)
            if attention.sink is None:
                return found
            position = (*self._position(attention.sink)[:-1], sympy.Integer(0))
            return formula.sink(found, as_number(self.element(attention.sink, position)))
        logits: sympy.Expr = score
        if attention.score_mod is not None:
            return self._flex(attention.score_mod)
        if attention.causal:
            logits = sympy.Piecewise((logits, q >= k), (-sympy.oo, True))
        if attention.mask is None:
            return logits
        position = self._position(attention.mask)
        value = self.element(attention.mask, position)
        if value.has(sympy.nan):
            value = self.leaf(attention.mask, position)
        if attention.mask.meta["val"].dtype == torch.bool:
            return sympy.Piecewise((logits, as_boolean(value)), (-sympy.oo, True))
        return logits + as_number(value)

    def _flex(self, score_mod: Body) -> sympy.Expr:
        logits = as_number(self._body(score_mod, (score, b, h, q, k)))
        if self.attention.mask_mod is not None:
            allowed = as_boolean(self._body(self.attention.mask_mod, (b, h, q, k)))
            logits = sympy.Piecewise((logits, allowed), (-sympy.oo, True))
        if logits.has(sympy.nan):
            raise NotLiftable(self.attention.output)
        return logits

    def _body(self, body: Body, indices: tuple[sympy.Expr, ...]) -> sympy.Basic:
        """The value of a function of one pair, traced on tensors of one element: 0-d ones are no indices."""
        number = self.attention.query.nodes[0].meta["val"].new_empty((1,))
        values = [number if i == score else number.new_empty((1,), dtype=torch.int32) for i in indices]
        values += [n.meta["val"] if isinstance(n, Node) else n for n in body.buffers]
        lowered = capture_body(body.module, values, grad=True)
        self.no_grad = self.no_grad | without_gradient(lowered)
        names = placeholders(lowered)
        self.alias.update(zip(names, (*indices, *body.buffers), strict=True))
        self.inside.update(lowered.graph.nodes)
        (output,) = (n for n in lowered.graph.nodes if n.op == "output")
        result = positional(output)[0]
        dims = result.meta["val"].dim() if isinstance(result, Node) else 0
        return self.element(result, (sympy.Integer(0),) * dims)

    def _position(self, node: Node) -> Index:
        """The index of element (b, h, q, k) in a tensor that broadcasts against the logits."""
        attention, shape = self.attention, node.meta["val"].shape
        of_scores = attention.scores is not None and node is attention.scores.node
        layout = attention.scores_layout if of_scores else attention.layout
        return tuple(
            sympy.Integer(0) if is_one(size) else index
            for size, index in zip(shape, layout[len(layout) - len(shape) :], strict=True)
        )

    def element(self, node: Any, index: Index) -> sympy.Basic:
        """The element of ``node`` at ``index``."""
        if isinstance(node, sympy.Basic):
            return node
        if not isinstance(node, Node):
            return as_constant(node)
        if node in self.alias:
            if self.cut and self.alias[node] == score:
                raise NotLiftable(self.attention.output)
            return self.element(self.alias[node], index)
        before = self.cut
        self.cut |= node in self.no_grad or node.target is aten.detach.default
        key = (node, index, self.cut)
        try:
            if key not in self.memo:
                self.memo[key] = self._element(node, index)
        except NotLiftable:
            if node in self.inside or node in self.of_scores:
                raise
            self.memo[key] = self.leaf(node, index)
        finally:
            self.cut = before
        return self.memo[key]

    @functools.cached_property
    def of_scores(self) -> set[Node]:
        """The scores and all that is computed from them, up to the logits.  None of it is a leaf: scores
        that are computed once more round differently, and ``score < topk(scores)`` would not hold."""
        found: set[Node] = set()
        scores, logits = self.attention.scores, self.attention.logits
        if scores is None or logits is None:
            return found
        node = scores.node
        while node.op != "root" and logits not in found:
            if node is scores.node or not found.isdisjoint(_read_by(node)):
                found.add(node)
            node = node.next
        return found

    def leaf(self, node: Node, index: Index) -> sympy.Basic:
        if node in self.of_scores:
            raise NotLiftable(node)
        read = (node, self.cut and node.meta["val"].is_floating_point())
        if read not in self.leaves:
            self.leaves.append(read)
        value = formula.leaf(self.leaves.index(read), *index)
        return sympy.Ne(value, 0) if node.meta["val"].dtype == torch.bool else value

    def indexed(self, source: Node, index: Index) -> sympy.Basic:
        """``source[index]`` where the index may be negative, which counts from the end of what is read."""
        source = self.alias.get(source, source)
        if source in self.inside and source.op == "call_function":
            if source.target is not aten.detach.default:
                raise NotLiftable(source)
            before, self.cut = self.cut, True
            try:
                return self.indexed(positional(source)[0], index)
            finally:
                self.cut = before
        return self.leaf(source, index)

    def broadcast(self, operand: Any, index: Index) -> sympy.Basic:
        """The element of an operand that is broadcast to the result's shape."""
        if not isinstance(operand, Node):
            return as_constant(operand)
        value = operand.meta["val"]
        if not isinstance(value, torch.Tensor):
            return self.number(operand) if isinstance(value, torch.SymFloat) else self.size(value)
        tail = index[len(index) - value.dim() :]
        return self.element(
            operand,
            tuple(sympy.Integer(0) if is_one(s) else i for s, i in zip(value.shape, tail, strict=True)),
        )

    def number(self, node: Node) -> sympy.Basic:
        """A float that is a symbol: a leaf without dimensions, as it may change; a constant inside of a
        function of one pair."""
        node = self.alias.get(node, node)
        if node in self.inside:
            if (number := fixed_number(node.meta["val"])) is None:
                raise NotLiftable(node)
            return as_constant(number)
        if node not in self.numbers:
            query = self.attention.query.nodes[0].meta["val"]
            how = {"dtype": compute_dtype(query.dtype), "device": query.device}
            inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
            with node.graph.inserting_after(inputs[-1] if node in inputs else node):
                emit = Builder(node.graph, self.mode, self.attention.output)
                self.numbers[node] = emit(aten.scalar_tensor.default, node, **how)
        return self.leaf(self.numbers[node], ())

    def size(self, size: Any) -> sympy.Expr:
        """A size as a formula of S, the tokens of this attention's keys; a number (of a window) as itself."""
        expr = expr_of(size)
        keys = expr_of(self.attention.value.tokens)
        symbol = next(iter(keys.free_symbols), None)
        if symbol is not None and (more := keys - symbol).is_Integer:
            expr = sympy.expand(expr.xreplace({symbol: formula.S - more}))
        else:
            expr = expr.xreplace({keys: formula.S})
        if expr.free_symbols - {formula.S} or expr.atoms(sympy.Function):
            if (number := fixed_number(size)) is None:
                raise NotLiftable(size)
            return sympy.Integer(int(number))
        return expr

    def _element(self, node: Node, index: Index) -> sympy.Basic:
        scores = self.attention.scores
        if scores is not None and node is scores.node:
            # no gradient of a part, or the scores of other pairs
            if self.cut or not scores.nodes.isdisjoint(self.no_grad) or index != self._position(node):
                raise NotLiftable(node)
            if operator_name(node.target) != "aten::baddbmm":
                return score
            given = arguments(node)
            bias = as_constant(given["beta"]) * as_number(self.broadcast(given["self"], index))
            return bias + as_constant(given["alpha"]) * score
        if node.op == "get_attr" and not index and node.graph.owning_module is not None:
            constant = getattr(node.graph.owning_module, str(node.target), None)
            if type(constant) is torch.Tensor:  # torch.tensor(-inf) in the model's forward
                return as_constant(constant.item())
        if node.op != "call_function":
            raise NotLiftable(node)
        name = operator_name(node.target).removeprefix("aten::")
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise NotLiftable(node)
        if name in RULES:
            return RULES[name](self, node, index)
        if value.is_floating_point() and len(token_dims(node)) < 2 and node not in self.inside:
            raise NotLiftable(node)  # read the rounded value rather than compute it anew
        if name not in POINTWISE or value.dtype in NARROW_INTEGERS:
            raise NotLiftable(node)
        if name in _OF_BITS and value.dtype != torch.bool:
            raise NotLiftable(node)
        given = {k: a for k, a in arguments(node).items() if isinstance(a, Node | int | float | bool | str)}
        mode = given.pop("rounding_mode", None)
        alpha = given.pop("alpha", None)
        operands = [self.broadcast(a, index) for a in given.values()]
        if mode is not None:
            if mode != "floor":
                raise NotLiftable(node)
            name = "floor_divide"
        if alpha is not None and alpha != 1:
            scaled = 0 if name == "rsub" else 1
            operands[scaled] = of_choices(operator.mul, operands[scaled], self.broadcast(alpha, ()))
        if name in COMPARISONS and rounds(operands[0], operands[1], _dtypes(node)):
            raise NotLiftable(node)
        if name in COMPARISONS and any(isinstance(_value(x), torch.SymFloat) for x in node.args):
            raise NotLiftable(node)  # of integers, in as many digits as torch gives it
        if name == "mul" and value.dtype == torch.int32 and any(_is_large(x) for x in operands):
            raise NotLiftable(node)
        if name in COMPARISONS and operands[0] == operands[1] and formula.leaves_of(operands[0]):
            raise NotLiftable(node)  # which is how NaN is told apart
        result = POINTWISE[name](*operands)
        if value.dtype == torch.bool:
            return as_boolean(result)
        return as_dtype(result, value.dtype) if value.is_floating_point() else result


def _read_by(node: Node) -> list[Node]:
    """The nodes whose elements, and not only whose size, ``node`` reads."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return []
    return node.all_input_nodes[operator_name(node.target) in _LIKE :]


_LIKE = {f"aten::{name}" for x in ("ones", "zeros", "full", "empty") for name in (f"{x}_like", f"new_{x}")}
_OF_BITS = ("__and__", "bitwise_and", "__or__", "bitwise_or", "bitwise_not")


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, Node) else x


def _dtypes(node: Node) -> set[torch.dtype]:
    return {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)}


def _is_large(x: sympy.Basic) -> bool:
    """Whether a product with ``x`` may wrap in 32 bits at lengths that people use."""
    return bool(x.is_Integer) and abs(int(x)) >= 1 << 12
