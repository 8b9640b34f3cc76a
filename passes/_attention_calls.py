"""Attention that a library's operator computes, written with a mask.

before: y = varlen_attn(q, k, v, ends, ends, .., causal, window)       q (T, H, D)
after:  label = searchsorted(ends, arange(T), right)                   (T,)
        y = sdpa(q, k, v, label[:, None] == label & band)              (1, H, T, D)

The mask is lifted like any other and never computed.  The family is torch's own operator, and, in functions
whose backward says more of them (``_attention_functions``), those whose schema has query, key, value, the
scale of a softmax and either the cumulative lengths of both or a window; where there are more keys than
queries (cross-attention), or the log-sum-exp is read, it stays as it is.

Ends of queries and of keys that are tensors of their own may differ.  Tokens then count from the end of their
sequence, as the family's causal order does, and a batch in which they agree is planned as documents are.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import expr_of, operator_name, schema_of
from hsap_compile.graph import Builder, arguments, positional, remove_dead

aten = torch.ops.aten

_OF_TORCH = "torch_attn::_varlen_attn"
#: The names of cumulative lengths: torch.nn.attention.varlen, and flash_attn.
_LENGTHS = (("cu_seq_q", "cu_seq_k"), ("cu_seqlens_q", "cu_seqlens_k"))
#: What an operator of a library has, and one without lengths.
_OPERANDS = frozenset({"q", "k", "v", "softmax_scale"})
_WINDOW = frozenset({"window_size_left", "window_size_right"})
#: Those of the longest sequences, which the mask says as well.
LONGEST = ("max_q", "max_k", "max_seqlen_q", "max_seqlen_k")
#: Arguments that a mask says, beside q, k and v and the lengths, and those that change no result.
_SAID = frozenset({
    *LONGEST, "scale", "softmax_scale", "causal", "is_causal", "window_size", "window_size_left",
    "window_size_right",
})  # fmt: skip
_IDLE = frozenset({
    "enable_gqa", "deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata",
    "zero_tensors", "return_softmax", "rotary_interleaved", "is_rotary_interleaved",
})  # fmt: skip


class Call(NamedTuple):
    """A call of the family: its arguments by their names, and the names of its cumulative lengths, if any."""

    given: dict[str, Any]
    lengths: tuple[str, str] | None

    @property
    def operands(self) -> tuple[Node, Node, Node]:
        names = ("q", "k", "v") if "q" in self.given else ("query", "key", "value")
        q, k, v = (self.given[name] for name in names)
        return q, k, v

    @property
    def tokens(self) -> int:
        """The dimension of tokens."""
        return 1 if self.lengths is None else 0


class RowLength(NamedTuple):
    """Of what rows are made: ``symbol``, and a constant number of tokens; None: none is known.  Each of
    ``ranks`` has a part of every row."""

    symbol: sympy.Expr | None = None
    ranks: int = 1

    def planned(self, tokens: sympy.Expr) -> bool:
        """Whether an attention over so many has a part for each rank: not over several rows that are folded
        into one, nor in a piece between graph breaks without a row of its own."""
        if self.symbol is None and self.ranks > 1:
            return False
        symbol = sum(tokens.free_symbols) if self.symbol is None else self.symbol
        return bool((tokens - symbol).is_Integer)


def write_as_masked(module: GraphModule, mode: Any, rows: RowLength) -> None:
    """Rewrite every call of torch's operator in ``module`` in place.  Of others, no argument says what they
    compute, nor how they are differentiated."""
    for node in list(module.graph.nodes):
        call = call_of(node) if operator_name(node.target) == _OF_TORCH else None
        if call is None or not can_be_masked(call, rows):
            continue
        read = [user for user in node.users if user.users]
        single = isinstance(node.meta["val"], torch.Tensor)
        if not single and any(u.target is not operator.getitem or positional(u)[1] != 0 for u in read):
            continue
        with module.graph.inserting_before(node):
            result = masked(Builder(module.graph, mode, node), call)
        for part in [node] if single else read:
            part.replace_all_uses_with(result)
    remove_dead(module)


def call_of(node: Node) -> Call | None:
    """``node`` as a call of the family, if it is one; of dynamo's graphs, too."""
    schema = None if node.op != "call_function" else schema_of(node.target)
    if schema is None:
        return None
    names = {a.name for a in schema.arguments}
    if "dout" in names or not (names >= _OPERANDS or operator_name(node.target) == _OF_TORCH):
        return None  # a backward, or something else
    given = {a.name: None for a in schema.arguments} | arguments(node)
    lengths = next((pair for pair in _LENGTHS if names.issuperset(pair)), None)
    if lengths is not None and (lengths == _LENGTHS[0] or given[lengths[0]] is not None):
        return Call(given, lengths)
    return Call(given, None) if names >= _WINDOW else None


def longest_sequences(node: Node) -> list[int]:
    """The numbers that a call was told of its longest sequences."""
    call = call_of(node)
    if call is None:
        return []
    return [size for name, size in call.given.items() if name in LONGEST and isinstance(size, int)]


def can_be_masked(call: Call, rows: RowLength) -> bool:
    """Whether the mask says all that the call does: whatever else it may be told is switched off.  Where it
    will not be planned, it is better left to the operator, which needs no mask."""
    named = {"q", "k", "v", "query", "key", "value", *(call.lengths or ()), *_SAID, *_IDLE}
    if any(value for name, value in call.given.items() if name not in named):
        return False
    numbers: list[Node] = []
    map_arg([call.given.get(name) for name in _SAID - {*LONGEST, "scale", "softmax_scale"}], numbers.append)
    window = call.given.get("window_size") or (-1, -1)
    if numbers or not isinstance(window, list | tuple) or len(window) != 2:  # symbols, or what nobody knows
        return False
    q, k, _ = (expr_of(x.meta["val"].shape[call.tokens]) for x in call.operands)
    return bool(q == k) and rows.planned(q)


def masked(build: Builder, call: Call) -> Node:
    """What the call returns, written with a mask."""
    q, k, v = call.operands
    place = build(aten.arange.default, _tokens(build, q, call.tokens), device=q.meta["val"].device)
    row, column = build(aten.unsqueeze.default, place, 1), build(aten.unsqueeze.default, place, 0)
    parts = []
    if call.lengths is not None:
        of_q, of_k = (call.given[name] for name in call.lengths)
        of_k = of_q if of_k is None else of_k
        labels = [_label(build, place, of_q)]
        labels.append(labels[0] if of_k is of_q else _label(build, place, of_k))
        if of_k is not of_q:
            row, column = (
                build(aten.unsqueeze.default, _from_end(build, place, ends, label), dim)
                for ends, label, dim in zip((of_q, of_k), labels, (1, 0), strict=True)
            )
        sides = [build(aten.unsqueeze.default, label, dim) for label, dim in zip(labels, (1, 0), strict=True)]
        parts.append(build(aten.eq.Tensor, *sides))
    left, right = _window(call.given)
    if right is not None:
        parts.append(build(aten.le.Scalar, build(aten.sub.Tensor, column, row), right))
    if left is not None:
        parts.append(build(aten.le.Scalar, build(aten.sub.Tensor, row, column), left))
    mask = parts[0] if parts else None
    for part in parts[1:]:
        mask = build(aten.logical_and.default, mask, part)
    single = call.lengths is not None
    rows = [build(aten.unsqueeze.default, x, 0) if single else x for x in (q, k, v)]
    operands = [build(aten.transpose.int, x, 1, 2) for x in rows]
    scale = call.given.get("scale", call.given.get("softmax_scale"))
    out = build(
        aten.scaled_dot_product_attention.default, *operands, mask, 0.0, False, scale=scale, enable_gqa=True
    )
    out = build(aten.transpose.int, out, 1, 2)
    return build(aten.squeeze.dim, out, 0) if single else out


def _tokens(build: Builder, q: Node, dim: int) -> Any:
    """How many tokens there are, read from an input if one has as many: the host makes labels of inputs."""
    size = expr_of(q.meta["val"].shape[dim])
    for node in build.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for at, other in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if expr_of(other) == size:
                return build.size(node, at)
    return build.size(q, dim)


def _label(build: Builder, place: Node, ends: Node) -> Node:
    """The number of every token's sequence, from one."""
    places = build(aten.to.dtype, place, ends.meta["val"].dtype)
    return build(aten.searchsorted.Tensor, ends, places, right=True)


def _from_end(build: Builder, place: Node, ends: Node, label: Node) -> Node:
    """Where a token stands, counted from the end of its sequence; tokens behind all of them are one."""
    last = build(aten.clamp.default, label, None, build(operator.sub, build.size(ends, 0), 1))
    return build(aten.sub.Tensor, place, build(aten.index.Tensor, ends, [last]))


def _window(given: dict[str, Any]) -> tuple[int | None, int | None]:
    """The most that a key may lie behind its query, and before it; None: any distance."""
    window = given.get("window_size") or (
        given.get("window_size_left", -1),
        given.get("window_size_right", -1),
    )
    left, right = (None if w is None or w < 0 else int(w) for w in window)
    if given.get("is_causal") or given.get("causal"):
        right = 0
    return left, right
