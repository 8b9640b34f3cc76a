"""What must hold of the graph between passes.  A pass that breaks it is a bug of ours, found here."""

from __future__ import annotations

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import expr_of, is_operator
from hsap_compile.graph import placeholders, positional
from hsap_compile.kernels import dense, exchange
from hsap_compile.masks import Mask

_CROSSING = (exchange.SHARD, exchange.GATHER, exchange.ALL_TO_ALL)


class BrokenGraph(AssertionError):
    """A pass left an illegal graph."""


def verify(module: GraphModule, after: str, length: sympy.Basic | None = None) -> None:
    """Raise ``BrokenGraph`` when ``module`` is illegal after the pass ``after``; ``length`` is the symbol of
    whole rows' sizes."""
    module.graph.lint()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta and node.users:
            raise BrokenGraph(f"after {after}: {node.format_node()} has no value")
    if after == "capture":
        _functional(module)
    if after in ("lift_mask", "shard_tokens"):
        for node in module.graph.nodes:
            if node.target is dense.OP and not isinstance(node.meta.get("mask"), Mask):
                raise BrokenGraph(f"after {after}: {node} is an attention without a mask")
    if after in ("shard_tokens", "partition_attention"):
        _states_meet(module, after, length)
        _exchanges_match(module, after)


def _functional(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if is_operator(node.target) and node.target._schema.is_mutable:
            raise BrokenGraph(f"after capture: {node.format_node()} writes in place")


def _states_meet(module: GraphModule, after: str, length: sympy.Basic | None) -> None:
    """No operator but an exchange mixes this rank's rows with whole sequences."""
    mine: set[sympy.Basic] = set()
    everyones = set() if length is None else {length}
    for node in placeholders(module):
        if "table" in node.meta:
            symbols = {s for size in node.meta["val"].shape for s in expr_of(size).free_symbols}
            mine.update(symbols)
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target in _CROSSING or not _tensor(node):
            continue
        symbols = {s for size in node.meta["val"].shape for s in expr_of(size).free_symbols}
        keys = node.args[1].meta["val"].shape if node.target is dense.OP else ()
        alone = any(expr_of(size).free_symbols & mine for size in keys)
        if after == "partition_attention" and alone:
            raise BrokenGraph(f"after {after}: {node.format_node()} attends over the rows of one rank alone")
        if symbols & mine and symbols & everyones:
            raise BrokenGraph(
                f"after {after}: {node.format_node()} mixes rows of one rank with whole tokens: "
                f"{tuple(node.meta['val'].shape)}"
            )


def _exchanges_match(module: GraphModule, after: str) -> None:
    """Where rows go and how many arrive belong together: to one mask and stage, or to one shift."""
    for node in module.graph.nodes:
        if node.target is not exchange.ALL_TO_ALL:
            continue
        splits, rows = positional(node)[1:3]
        key = splits.meta.get("table")
        if key == "head_splits":
            continue
        counted = positional(rows)[0].meta.get("table") if isinstance(rows, Node) else None
        if key is None or counted is None or (counted[0], *counted[2:]) != (key[0], *key[2:]):
            raise BrokenGraph(
                f"after {after}: {node.format_node()} sends by the table {key} and receives as many rows as "
                f"the table {counted} has"
            )


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
