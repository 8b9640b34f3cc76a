"""Pass 2: find every attention of the graph, however it is written.

1. ``scaled_dot_product_attention`` in every calling style;
2. the eager form: ``softmax(f(q @ k.T)) @ v`` where f is any element-wise chain (scale, masks, soft-cap), its
   products written as matmul, bmm or einsum with their dimensions in any order, heads in groups, or scores
   that are a sum: q1 k1ᵀ + q2 k2ᵀ = cat(q1, q2) cat(k1, k2)ᵀ;
3. peel what repeats key/value heads (``repeat_kv``, ``repeat_interleave``), so that only real heads travel.

Finding changes nothing; ``lift_mask`` rewrites what is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import (
    FLEX_ATTENTION,
    SET_GRAD_ENABLED,
    expr_of,
    fixed,
    free_symbols,
    hint_of,
    operator_name,
)
from hsap_compile.errors import Refused, where
from hsap_compile.formula import b, h, k, q
from hsap_compile.graph import arguments, positional
from hsap_compile.passes._products import (
    PRODUCTS,
    Operand,
    Scores,
    operands_of,
    operands_of_operator,
    scores_of,
)

aten = torch.ops.aten

#: What stands between softmax(...) and the product with the values without changing the weights' meaning.
_TRANSPARENT = {
    "aten::to",
    "aten::_to_copy",
    "aten::clone",
    "aten::contiguous",
    "aten::alias",
}
_LAYOUT = {f"aten::{name}" for name in ("view", "reshape", "_unsafe_view", "expand", "flatten", "unflatten")}


@dataclass(frozen=True)
class Body:
    """A function of (score, b, h, q, k) or (b, h, q, k) as a graph of 0-d tensors, which also reads
    ``buffers`` of the graph around it."""

    module: GraphModule
    buffers: tuple[Any, ...]


@dataclass(frozen=True)
class Attention:
    """One attention: what the canonical operator takes, and where it stands.

    ``result``: how its result lies in ``output`` (see ``Operands``).
    ``sink`` (B, H, S, 1): one more logit, whose weight is dropped.
    ``lse``: the node of the logits' log-sum-exp over keys, where it is read, to the base ``base``.
    ``score_mod`` and ``mask_mod``: what flex attention does to its scores.
    ``logits``: the node that softmax is taken of (eager form), or None for the operator, whose ``mask``
    (a node, or None), ``causal`` and ``scale`` say the same.  ``scores``: the q @ k.T of the eager form.
    ``layout``: the index of the pair (b, h, q, k) in the logits or the mask, ``scores_layout`` in the scores.
    """

    output: Node
    query: Operand
    key: Operand
    value: Operand
    scale: float
    result: tuple[int, ...]
    layout: tuple[sympy.Expr, ...]
    causal: bool = False
    mask: Node | None = None
    logits: Node | None = None
    scores: Scores | None = None
    scores_layout: tuple[sympy.Expr, ...] = ()
    sink: Node | None = None
    lse: Node | None = None
    base: float = math.e
    score_mod: Body | None = None
    mask_mod: Body | None = None


def find_attention(module: GraphModule) -> tuple[Attention, ...]:
    """Every attention of ``module``, in graph order."""
    found, no_grad = [], without_gradient(module)
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        attention, opaque = None, set() if node in no_grad else no_grad
        if node.target is aten.scaled_dot_product_attention.default:
            attention = _operator(node, opaque)
        elif operator_name(node.target) in ("aten::softmax", "aten::_softmax"):
            attention = _eager(node, no_grad)
        elif node.target is FLEX_ATTENTION:
            attention = _flex(node, opaque)
        if attention is not None:
            found.append(attention)
    return tuple(found)


def token_dims(node: Node) -> tuple[int, ...]:
    """The dimensions whose size has a symbol."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(d for d, size in enumerate(value.shape) if free_symbols(size))


def without_gradient(module: GraphModule) -> set[Node]:
    """The nodes inside of no_grad regions."""
    found, grad = set(), True
    for node in module.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            grad = bool(node.args[0])
        elif not grad:
            found.add(node)
    return found


def _operator(node: Node, opaque: set[Node]) -> Attention | None:
    given = arguments(node)
    _refuse_dropout(node, given["dropout_p"])
    query, key, value = given["query"], given["key"], given["value"]
    scale, causal = given["scale"], given["is_causal"]
    if isinstance(causal, Node) or not _fit(query, key, value):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(hint_of(query.meta["val"].shape[-1]))
    found = _plain(node, query, key, value, scale, opaque)
    if found is None:
        return None
    return replace(found, causal=causal, mask=given["attn_mask"])


def _plain(
    output: Node, query: Node, key: Node, value: Node, scale: Any, opaque: set[Node]
) -> Attention | None:
    operands = operands_of_operator(output, query, key, value, opaque)
    scale = fixed(scale.meta["val"] if isinstance(scale, Node) else scale)
    if operands is None or scale is None:
        return None
    q, k, v, result, layout = operands
    k, v = _peeled(k, v, opaque)
    return Attention(output=output, query=q, key=k, value=v, scale=scale, result=result, layout=layout)


def _flex(node: Node, opaque: set[Node]) -> Attention | None:
    """flex_attention(q, k, v, score_mod, (.., mask_mod), scale, options, buffers of the two): only the
    attention's output and its log-sum-exp may be read, and its blocks must be what ``mask_mod`` says."""
    query, key, value, score_mod, blocks, scale, options, score_buffers, mask_buffers = positional(node)
    read = {positional(user)[1]: user for user in node.users if user.users}
    if 0 not in read or not read.keys() <= {0, 1} or not _fit(query, key, value):
        return None
    mask: Body | None = Body(_module(blocks[-1]), tuple(mask_buffers))
    if _says_nothing(_module(blocks[-1])):
        if any(isinstance(size, int) and size < _EVERYTHING for size in blocks[-3:-1]):
            return None  # the blocks alone are the mask
        mask = None
    of_scores = Body(_module(score_mod), tuple(score_buffers))
    found = _plain(read[0], query, key, value, scale, opaque)
    if found is None:
        return None
    base = math.e if options.get("BACKEND") == "FLASH" else 2.0
    return replace(found, score_mod=of_scores, mask_mod=mask, lse=read.get(1), base=base)


_EVERYTHING = 1 << 30  # the size of the one block that torch makes where no block mask is given


def _module(node: Node) -> GraphModule:
    module: GraphModule = node.meta["val"]
    return module


def _says_nothing(mask: GraphModule) -> bool:
    """Whether a mask function reads none of its indices."""
    return not any(n.users for n in mask.graph.nodes if n.op == "placeholder")


def _refuse_dropout(node: Node, probability: Any) -> None:
    if isinstance(probability, Node) or probability > 0:
        raise Refused(
            "dropout inside attention is not supported",
            got=f"dropout_p={probability}",
            wanted="dropout_p=0 (every rank would have to draw the same weights' mask)",
            do="set the attention dropout to 0, or call model.eval()",
            at=where(node),
        )


def _eager(softmax: Node, no_grad: set[Node]) -> Attention | None:
    """softmax(logits) @ value, if that is what ``softmax`` is part of, and a gradient passes through all of
    it or through nothing."""
    given = arguments(softmax)
    logits = softmax.args[0]
    assert isinstance(logits, Node)
    logits, sink = _without_sink(_without_shift(logits))
    rank = logits.meta["val"].dim()
    if rank < 3 or given["dim"] not in (-1, rank - 1):
        return None
    user: Node = softmax
    path = [softmax]
    before = softmax.args[0]
    while before is not logits:
        assert isinstance(before, Node)
        path.append(before)
        first = positional(before)[0]
        before = first if isinstance(first, Node) else first[0]
    dropouts: list[Node] = []
    dropped = False
    while True:
        if len(user.users) != 1:
            return None  # the weights are read elsewhere too
        (following,) = user.users
        name = operator_name(following.target) if following.op == "call_function" else ""
        if name == "aten::dropout":
            dropouts.append(following)
        elif name in PRODUCTS:
            break
        elif name == "aten::slice" and (sink is None) == _same_shape(user, following):
            if sink is not None and not _drops_last(following, sink[1]):
                return None
            dropped = True
        elif name in _LAYOUT:
            if not _same_shape(user, following) and not _folds_heads(user, following):
                return None
        elif name not in _TRANSPARENT:
            return None
        path.append(following)
        user = following
    if sink is not None and not dropped:
        return None
    folded = None
    if user.meta["val"].dim() < rank:
        folded = (hint_of(logits.meta["val"].shape[0]), hint_of(logits.meta["val"].shape[1]))
    opaque = set() if following in no_grad else no_grad
    if not opaque.isdisjoint(path):
        return None
    for scores in scores_of(logits, lambda n: len(token_dims(n)) > 1):
        operands = operands_of(scores, user, following, folded, opaque)
        if operands is None:
            continue
        for dropout in dropouts:
            given = arguments(dropout)
            _refuse_dropout(dropout, given["p"] if given["train"] else 0.0)
        query, key, value, result, layout = operands
        key, value = _peeled(key, value, opaque)
        return Attention(
            output=following,
            query=query,
            key=key,
            value=value,
            scale=scores.scale,
            result=result,
            layout=(b, h, q, k) if folded else layout,
            logits=logits,
            scores=scores,
            scores_layout=layout,
            sink=None if sink is None else sink[0],
            lse=None if folded or sink else _log_sum(logits, value, following in no_grad, no_grad),
        )
    return None


def _log_sum(logits: Node, value: Operand, without: bool, no_grad: set[Node]) -> Node | None:
    """The log-sum-exp over keys of ``logits``, ``without`` a gradient or with one, behind ``value``."""
    rank = logits.meta["val"].dim()
    for user in logits.users:
        if operator_name(user.target) == "aten::logsumexp" and (user in no_grad) == without:
            over = {d % rank for d in arguments(user)["dim"]}
            if over == {rank - 1} and all(node < user for node in value.nodes):
                return user
    return None


def _without_shift(logits: Node) -> Node:
    """x where ``logits`` is x minus one number a row, which softmax does not see."""
    while operator_name(logits.target) == "aten::sub" and arguments(logits)["alpha"] == 1:
        x, shift = positional(logits)
        if not isinstance(x, Node) or not isinstance(shift, Node) or not _same_shape(x, logits):
            break
        if shift.meta["val"].dim() == 0 or expr_of(shift.meta["val"].shape[-1]) != 1:
            break
        logits = x
    return logits


def _without_sink(logits: Node) -> tuple[Node, tuple[Node, Node] | None]:
    """(x, (sink, x)) where ``logits`` is x (.., S, S) with one more column ``sink``."""
    if operator_name(logits.target) != "aten::cat" or len(positional(logits)[0]) != 2:
        return logits, None
    x, sink = positional(logits)[0]
    last = arguments(logits)["dim"] in (-1, logits.meta["val"].dim() - 1)
    if not last or expr_of(sink.meta["val"].shape[-1]) != 1:
        return logits, None
    return x, (sink, x)


def _drops_last(weights: Node, logits: Node) -> bool:
    """Whether ``weights``, a slice, are those of ``logits`` alone."""
    given = arguments(weights)
    return given["start"] in (None, 0) and given["step"] == 1 and _same_shape(weights, logits)


def _fit(query: Node, key: Node, value: Node) -> bool:
    """Whether the canonical operator takes them: one batch size, key/value heads that divide the heads; of
    more than four dimensions, one key/value head for all or one for each."""
    q, k, v = ([expr_of(size) for size in n.meta["val"].shape] for n in (query, key, value))
    if not 3 <= len(q) == len(k) == len(v) or k[-2] != v[-2] or q[-1] != k[-1]:
        return False
    if len(q) > 3 and not q[0] == k[0] == v[0]:
        return False
    if len(q) > 4:
        return all(a in (one, 1) and b in (one, 1) for one, a, b in zip(q[:-2], k, v, strict=False))
    heads = [x[-3] for x in (q, k, v)]
    return heads[1] == heads[2] and all(h.is_Integer for h in heads) and heads[0] % heads[1] == 0


def _folds_heads(x: Node, y: Node) -> bool:
    """Whether ``y`` is ``x`` (B, H, S, S) as (B * H, S, S)."""
    a, b = x.meta["val"].shape, y.meta["val"].shape
    return (
        len(a) == 4
        and len(b) == 3
        and all(expr_of(i) == expr_of(j) for i, j in zip(a[2:], b[1:], strict=True))
    )


def _same_shape(x: Node, y: Node) -> bool:
    a, b = x.meta["val"].shape, y.meta["val"].shape
    return len(a) == len(b) and all(expr_of(i) == expr_of(j) for i, j in zip(a, b, strict=True))


def _peeled(key: Operand, value: Operand, opaque: set[Node]) -> tuple[Operand, Operand]:
    """Keys and values with their real heads, when all of them repeat them alike."""
    if not key.batched or len(key.rows) != 2:
        return key, value
    peeled, counts = [], set()
    for operand in (key, value):
        parts = []
        for factor, number in operand.parts:
            if operand.rows[1] not in factor.dims:
                return key, value
            node = _real_heads(factor.node, factor.dims.index(operand.rows[1]), opaque)
            parts.append((replace(factor, node=node), number))
            counts.add(expr_of(parts[-1][0].size(operand.rows[1])))
        peeled.append(replace(operand, parts=tuple(parts)))
    return (peeled[0], peeled[1]) if len(counts) == 1 else (key, value)


def _real_heads(node: Node, dim: int, opaque: set[Node]) -> Node:
    """The source of ``node``, which repeats every head (of dimension ``dim``) a number of times."""
    if node.op != "call_function" or node in opaque:
        return node
    name, size = operator_name(node.target), node.meta["val"].shape
    if name in _TRANSPARENT and expr_of(positional(node)[0].meta["val"].shape[dim]) == expr_of(size[dim]):
        inner = _real_heads(positional(node)[0], dim, opaque)
        return node if inner is positional(node)[0] else inner
    if node.target is aten.repeat_interleave.self_int:
        along = arguments(node)["dim"]
        return positional(node)[0] if along in (dim, dim - len(size)) else node
    if name not in ("aten::reshape", "aten::view", "aten::_unsafe_view", "aten::flatten"):
        return node
    expanded = positional(node)[0]
    if expanded.op != "call_function" or operator_name(expanded.target) != "aten::expand":
        return node
    source = positional(expanded)[0]
    while (
        source.op == "call_function"
        and operator_name(source.target) == "aten::slice"
        and _same_shape(source, positional(source)[0])
    ):
        source = positional(source)[0]
    if source.op != "call_function" or operator_name(source.target) != "aten::unsqueeze":
        return node
    inner = positional(source)[0]
    if not opaque.isdisjoint((expanded, source)):
        return node
    small, grown = ([expr_of(s) for s in x.meta["val"].shape] for x in (inner, expanded))
    added = grown[dim + 1 : dim + 2]
    repeats_heads = (
        positional(source)[1] in (dim + 1, dim - len(size))
        and grown == [*small[: dim + 1], *added, *small[dim + 1 :]]
        and [expr_of(s) for s in size] == [*small[:dim], small[dim] * added[0], *small[dim + 1 :]]
    )
    return inner if repeats_heads else node
