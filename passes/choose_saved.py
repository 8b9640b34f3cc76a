"""Pass 9: what the backward keeps of the forward, and what it does once more.

before: AOTAutograd's partitioner knows neither exchanges nor attentions: asked to keep less, it repeats them
after:  what exchanges and attentions return is kept
        with received="again": k', v' = all_to_all(k, v [rows]) once more in the backward, which has k and v

Only tags are written, which the partitioner obeys.  The attention of a checkpoint is repeated, as the user
asked; what came to it from other ranks is kept all the same, because sending costs more than memory.

Heads are never exchanged again: what their exchange returns is q, k and v, which would be kept in its place.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import FLEX_ATTENTION, SAVED, checkpoint_tags
from hsap_compile.graph import positional
from hsap_compile.kernels import attention, copies, exchange

_CROSSING = (exchange.ALL_TO_ALL, exchange.GATHER, exchange.SUM_RANKS, exchange.EXTREME)
_ATTENTIONS = (attention.OP, FLEX_ATTENTION)


def choose_saved(module: GraphModule, *, again: bool) -> int:
    """Tag the nodes of ``module``; returns how many exchanges the backward repeats (with ``again``)."""
    repeated = 0
    for node in module.graph.nodes:
        if again and sends_rows(node):
            _repeat(node)
            repeated += 1
        elif again and node.target is copies.TOGETHER and "recompute" not in node.meta:
            node.meta.update(checkpoint_tags())  # the columns of all stages' rows
        elif node.target in _CROSSING or (node.target in _ATTENTIONS and "recompute" not in node.meta):
            node.meta["recompute"] = SAVED
    return repeated


def sends_rows(node: Node) -> bool:
    """Whether the node exchanges key/value rows between groups: its table is one of a mask, by its number."""
    return node.target is exchange.ALL_TO_ALL and isinstance(positional(node)[1].meta["table"][0], int)


def choices(module: GraphModule) -> str:
    """The tags of ``module``, which its code does not show: equal for graphs that keep the same."""
    numbers: dict[int, int] = {}
    found = []
    for i, node in enumerate(module.graph.nodes):
        if "recompute" in node.meta:
            region = node.meta.get("ac_graph_id", 0)
            found.append((i, node.meta["recompute"].name, numbers.setdefault(region, len(numbers))))
    return repr(found)


def _repeat(exchanged: Node) -> None:
    """Tag the exchange, what is made for it alone, and what is made of it on the way to the attention."""
    found = {exchanged}
    before = list(exchanged.all_input_nodes)
    while before:
        node = before.pop()
        if node not in found and _is_made(node) and found.issuperset(node.users):
            found.add(node)
            before += node.all_input_nodes
    after = list(exchanged.users)
    while after:
        node = after.pop()
        if node not in found and _is_made(node) and node.target not in _ATTENTIONS:
            found.add(node)
            after += node.users
    tags = checkpoint_tags()
    for node in found:
        if "recompute" not in node.meta:  # a checkpoint repeats it anyhow
            node.meta.update(tags)


def _is_made(node: Node) -> bool:
    """Whether the node computes tensors."""
    return node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor | tuple | list)
