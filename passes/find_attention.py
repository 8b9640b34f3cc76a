"""Pass 2: find every attention of the graph, however it is written.

1. ``scaled_dot_product_attention`` in every calling style;
2. the eager form: ``softmax(f(q @ k.T)) @ v`` where f is any element-wise chain (scale, masks, soft-cap);
3. peel what repeats key/value heads (``repeat_kv``, ``repeat_interleave``), so that only real heads travel.

Finding changes nothing; ``lift_mask`` rewrites what is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import FLEX_ATTENTION, expr_of, free_symbols, hint_of, operator_name
from hsap_compile.errors import Refused, where
from hsap_compile.graph import positional, target

aten = torch.ops.aten

#: What stands between softmax(...) and the product with the values without changing the weights' meaning.
_TRANSPARENT = {
    "aten::to",
    "aten::_to_copy",
    "aten::type_as",
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
    """One attention.  ``query`` (B, H, S, D), ``key`` and ``value`` (B, H or Hkv, S, D or Dv); or without B,
    or, where ``logits`` are (B, H, S, S), with (B * H, S, D).

    ``flipped``: ``key`` is (B, Hkv, D, S).  ``sink`` (B, H, S, 1): one more logit, whose weight is dropped.
    ``score_mod`` and ``mask_mod``: what flex attention does to its scores.
    ``logits``: the node that softmax is taken of (eager form), or None for the operator, whose ``mask``
    (a node, or None), ``causal`` and ``scale`` say the same.  ``product``: the q @ k.T of the eager form.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    scale: float
    causal: bool = False
    mask: Node | None = None
    logits: Node | None = None
    product: Node | None = None
    flipped: bool = False
    sink: Node | None = None
    score_mod: Body | None = None
    mask_mod: Body | None = None

    @property
    def folded(self) -> tuple[int, int] | None:
        """(B, H) where queries are (B * H, S, D)."""
        if self.logits is None or self.query.meta["val"].dim() != 3 or self.logits.meta["val"].dim() != 4:
            return None
        batch, heads = (hint_of(size) for size in self.logits.meta["val"].shape[:2])
        return batch, heads


def find_attention(module: GraphModule) -> tuple[Attention, ...]:
    """Every attention of ``module``, in graph order."""
    found = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        attention = None
        if node.target is aten.scaled_dot_product_attention.default:
            attention = _operator(node)
        elif operator_name(node.target) in ("aten::softmax", "aten::_softmax"):
            attention = _eager(node)
        elif node.target is FLEX_ATTENTION:
            attention = _flex(node)
        if attention is not None:
            found.append(attention)
    return tuple(found)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by their schema's names, defaults filled in."""
    schema = target(node)._schema
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in schema.arguments), positional(node), strict=False))
    values.update(node.kwargs)
    return values


def token_dims(node: Node) -> tuple[int, ...]:
    """The dimensions whose size has a symbol."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(d for d, size in enumerate(value.shape) if free_symbols(size))


def _operator(node: Node) -> Attention | None:
    given = arguments(node)
    _refuse_dropout(node, given["dropout_p"])
    query, key, value = given["query"], given["key"], given["value"]
    scale, causal = given["scale"], given["is_causal"]
    if isinstance(scale, Node) or isinstance(causal, Node) or not _fit(query, key, value):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(hint_of(query.meta["val"].shape[-1]))
    key, value = _peeled(query, key, value)
    return Attention(
        output=node,
        query=query,
        key=key,
        value=value,
        scale=float(scale),
        causal=causal,
        mask=given["attn_mask"],
    )


def _flex(node: Node) -> Attention | None:
    """flex_attention(q, k, v, score_mod, (.., mask_mod), scale, options, buffers of the two): only the
    attention's output may be read, and its blocks must be what ``mask_mod`` says."""
    query, key, value, score_mod, blocks, scale, _, score_buffers, mask_buffers = positional(node)
    read = [user for user in node.users if user.users]
    if len(read) != 1 or positional(read[0])[1] != 0 or not _fit(query, key, value):
        return None
    mask: Body | None = Body(_module(blocks[-1]), tuple(mask_buffers))
    if _says_nothing(_module(blocks[-1])):
        if any(isinstance(size, int) and size < _EVERYTHING for size in blocks[-3:-1]):
            return None  # the blocks alone are the mask
        mask = None
    return Attention(
        output=read[0],
        query=query,
        key=key,
        value=value,
        scale=float(scale),
        score_mod=Body(_module(score_mod), tuple(score_buffers)),
        mask_mod=mask,
    )


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


def _eager(softmax: Node) -> Attention | None:
    """softmax(logits) @ value, if that is what ``softmax`` is part of."""
    given = arguments(softmax)
    logits = softmax.args[0]
    assert isinstance(logits, Node)
    logits, sink = _without_sink(_without_shift(logits))
    rank = logits.meta["val"].dim()
    if rank not in (3, 4) or given["dim"] not in (-1, rank - 1):
        return None
    if not {rank - 2, rank - 1} <= set(token_dims(logits)):
        return None
    user: Node = softmax
    dropouts: list[Node] = []
    dropped = False
    while True:
        if len(user.users) != 1:
            return None  # the weights are read elsewhere too
        (following,) = user.users
        name = operator_name(following.target) if following.op == "call_function" else ""
        if name == "aten::dropout":
            dropouts.append(following)
        elif name in ("aten::matmul", "aten::bmm"):
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
        user = following
    value = positional(following)[1]
    product = _product(logits)
    if positional(following)[0] is not user or product is None or not isinstance(value, Node):
        return None
    if sink is not None and not dropped:
        return None
    query, transposed = positional(product)[-2:]  # baddbmm(input, q, k) carries its bias first
    assert isinstance(query, Node) and isinstance(transposed, Node)
    key = _transposed(transposed)
    flipped = key is None
    if key is None:
        key = transposed
    if not _fit(query, key, value, flipped):
        return None
    for dropout in dropouts:
        _refuse_dropout(dropout, arguments(dropout)["p"] if arguments(dropout)["train"] else 0.0)
    if not flipped:
        key, value = _peeled(query, key, value)
    return Attention(
        output=following,
        query=query,
        key=key,
        value=value,
        scale=1.0,
        logits=logits,
        product=product,
        flipped=flipped,
        sink=None if sink is None else sink[0],
    )


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


def _fit(query: Node, key: Node, value: Node, flipped: bool = False) -> bool:
    """Whether the canonical operator takes them: one batch size, key/value heads that divide the heads."""
    q, k, v = (n.meta["val"].shape for n in (query, key, value))
    if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        return False
    if flipped:
        k = (*k[:-2], k[-1], k[-2])
    if expr_of(k[-2]) != expr_of(v[-2]) or expr_of(q[-1]) != expr_of(k[-1]):
        return False
    if len(q) == 4 and not expr_of(q[0]) == expr_of(k[0]) == expr_of(v[0]):
        return False
    heads = [expr_of(x[-3]) for x in (q, k, v)]
    return heads[1] == heads[2] and all(h.is_Integer for h in heads) and heads[0] % heads[1] == 0


def _product(logits: Node) -> Node | None:
    """The q @ k.T that ``logits`` is computed from, if it is exactly one."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [logits]
    while stack:
        node = stack.pop()
        if node in seen or len(token_dims(node)) < 2:
            continue
        seen.add(node)
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name in ("aten::matmul", "aten::bmm", "aten::baddbmm"):
            found.add(node)
        else:
            stack.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 else None


def _transposed(node: Node) -> Node | None:
    """x where ``node`` is x with its last two dimensions exchanged."""
    name = operator_name(node.target) if node.op == "call_function" else ""
    rank, source = node.meta["val"].dim(), positional(node)[0] if positional(node) else None
    if not isinstance(source, Node):
        return None
    exchanged = False
    if name in ("aten::transpose", "aten::swapaxes", "aten::swapdims"):
        exchanged = {d % rank for d in positional(node)[1:3]} == {rank - 1, rank - 2}
    elif name == "aten::permute":
        order = [d % rank for d in positional(node)[1]]
        exchanged = order == [*range(rank - 2), rank - 1, rank - 2]
    return source if exchanged or name == "aten::mT" else None


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


def _peeled(query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Keys and values with their real heads, when both repeat them alike."""
    if query.meta["val"].dim() != 4:
        return key, value
    k, v = _real_heads(key), _real_heads(value)
    return (k, v) if expr_of(k.meta["val"].shape[1]) == expr_of(v.meta["val"].shape[1]) else (key, value)


def _real_heads(node: Node) -> Node:
    """(B, Hkv, S, D) where ``node`` is (B, H, S, D) with every head repeated H / Hkv times."""
    if node.op != "call_function":
        return node
    name = operator_name(node.target)
    if name in _TRANSPARENT and expr_of(positional(node)[0].meta["val"].shape[1]) == expr_of(
        node.meta["val"].shape[1]
    ):
        inner = _real_heads(positional(node)[0])
        return node if inner is positional(node)[0] else inner
    if node.target is aten.repeat_interleave.self_int:
        return positional(node)[0] if arguments(node)["dim"] in (1, -3) else node
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
    grown, flat, inner = expanded.meta["val"].shape, node.meta["val"].shape, positional(source)[0]
    small = inner.meta["val"].shape
    repeats_heads = (
        positional(source)[1] in (2, -3)
        and len(grown) == 5
        and len(flat) == 4
        and expr_of(grown[1]) == expr_of(small[1])
        and expr_of(flat[1]) == expr_of(grown[1]) * expr_of(grown[2])
        and expr_of(flat[3]) == expr_of(grown[4])
    )
    return inner if repeats_heads else node
