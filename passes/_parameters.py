"""Whose gradient a parameter has: this rank's share, or all of it.

before: w is read by local operators, and by whole ones, which are alike on every rank
after:  whole ones read share(w), and w is marked to be summed over ranks (``meta["sum_gradient"]``)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from hsap_compile._torch import operator_name
from hsap_compile.graph import placeholders
from hsap_compile.kernels import exchange

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

_DETACH = torch.ops.aten.detach.default


def settle_parameters(sharder: Sharder) -> None:
    """Every rank has its share of a parameter's gradient, to be summed: local uses give their rows' part,
    whole ones (alike on every rank) count on one rank only."""
    varying = _varying(sharder)
    last = [n for n in sharder.graph.nodes if n.op == "placeholder"][-1]
    for old in placeholders(sharder.old):
        if not (old in sharder.locally_used or old.meta["parameter"]):
            continue
        new = sharder.wholes[old]
        whole_users = {u for u in new.users if u not in varying and u.target is not _DETACH}
        whole_users |= {u for u in new.users if u.op == "output"}  # which returns rows beside it
        new.meta["sum_gradient"] = old in sharder.differentiable and bool(new.users)
        if whole_users and old in sharder.differentiable:
            with sharder.graph.inserting_after(last):
                share = sharder.emit(exchange.SHARE, new, sharder.group)
            new.replace_all_uses_with(share, delete_user_cb=lambda u, users=whole_users: u in users)


def _varying(sharder: Sharder) -> set[Node]:
    """The nodes of the new graph that differ between ranks.

    Raises ``AssertionError`` where a value with a gradient that was taken for whole is one of them.
    """
    found: set[Node] = set()
    same = {exchange.GATHER, exchange.SUM_RANKS, exchange.EXTREME}
    inputs = [n for n in sharder.graph.nodes if n.op == "placeholder"]
    seeds = {n for n in inputs if n.meta.get("table", "order") != "order"} | {sharder.tables["n"]}
    for node in sharder.graph.nodes:
        read = node.all_input_nodes
        if read and operator_name(node.target).startswith(
            "aten::new_"
        ):  # rows say what it is like, not what it is
            read = [n for n in read if n is not node.args[0]]
        if node in seeds or (node.target not in same and any(n in found for n in read)):
            found.add(node)
    for old, new in sharder.wholes.items():
        if old in sharder.differentiable and any(
            n in found for n in (new if isinstance(new, tuple) else (new,))
        ):
            raise AssertionError(f"{old.format_node()} is taken for the same on every rank, and is not")
    return found
