"""Attention over documents that are given as cumulative lengths, written with a mask.

before: y = varlen_attn(q, k, v, ends, ends, .., causal, window)       q (T, H, D)
after:  label = searchsorted(ends, arange(T), right)                   (T,)
        y = sdpa(q, k, v, label[:, None] == label & band)              (1, H, T, D)

The mask is lifted like any other and never computed.  An operator belongs to the family when its schema has
query, key, value and cumulative lengths of both; where these differ (cross-attention), or the log-sum-exp is
read, it stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import is_operator
from hsap_compile.graph import Builder, arguments, positional, remove_dead, target

aten = torch.ops.aten

#: The names of cumulative lengths: torch.nn.attention.varlen, and flash_attn.
_LENGTHS = (("cu_seq_q", "cu_seq_k"), ("cu_seqlens_q", "cu_seqlens_k"))
#: Arguments that change what is computed: what they must be for the call to be rewritten.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dropout_p": (0, 0.0), "p_dropout": (0, 0.0), "softcap": (0, 0.0), "alibi_slopes": (None,),
    "block_table": (None,), "page_table": (None,), "seqused_k": (None,), "leftpad_k": (None,),
    "q_descale": (None,), "k_descale": (None,), "v_descale": (None,),
}  # fmt: skip


def write_varlen_as_masked(module: GraphModule, mode: Any) -> None:
    """Rewrite every such call of ``module`` in place."""
    for node in list(module.graph.nodes):
        names = cumulative_lengths(node)
        if names is None:
            continue
        given = arguments(node)
        if given[names[1]] not in (None, given[names[0]]):
            continue
        if any(given.get(name, values[0]) not in values for name, values in _NEUTRAL.items()):
            continue
        read = [user for user in node.users if user.users]
        single = isinstance(node.meta["val"], torch.Tensor)
        if not single and any(u.target is not operator.getitem or positional(u)[1] != 0 for u in read):
            continue
        with module.graph.inserting_before(node):
            result = _masked(Builder(module.graph, mode, node), node, given, given[names[0]])
        for part in [node] if single else read:
            part.replace_all_uses_with(result)
    remove_dead(module)


def cumulative_lengths(node: Node) -> tuple[str, str] | None:
    """The names of the two arguments that hold them, if the operator is one of the family."""
    if not is_operator(node.target):
        return None
    names = {a.name for a in target(node)._schema.arguments}
    return next((pair for pair in _LENGTHS if names.issuperset(pair)), None)


def _masked(build: Builder, node: Node, given: dict[str, Any], ends: Node) -> Node:
    q, k, v = positional(node)[:3]
    tokens = build.size(q, 0)
    place = build(aten.arange.default, tokens, device=q.meta["val"].device)
    label = build(aten.searchsorted.Tensor, ends, build(aten.to.dtype, place, _dtype(ends)), right=True)
    mask = build(aten.eq.Tensor, *_pair(build, label))
    row, column = _pair(build, place)
    left, right = _window(given)
    if right is not None:
        distance = build(aten.sub.Tensor, column, row)
        mask = build(aten.logical_and.default, mask, build(aten.le.Scalar, distance, right))
    if left is not None:
        distance = build(aten.sub.Tensor, row, column)
        mask = build(aten.logical_and.default, mask, build(aten.le.Scalar, distance, left))
    operands = [build(aten.transpose.int, build(aten.unsqueeze.default, x, 0), 1, 2) for x in (q, k, v)]
    scale = given.get("scale", given.get("softmax_scale"))
    out = build(
        aten.scaled_dot_product_attention.default, *operands, mask, 0.0, False, scale=scale, enable_gqa=True
    )
    return build(aten.squeeze.dim, build(aten.transpose.int, out, 1, 2), 0)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _pair(build: Builder, x: Node) -> tuple[Node, Node]:
    return build(aten.unsqueeze.default, x, 1), build(aten.unsqueeze.default, x, 0)


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
