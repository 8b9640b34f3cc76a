"""Pass 6: the gradients of parameters are summed over the ranks.

before: f(p)                   every rank's gradient of p is a share of the whole
after:  f(broadcast(p))        whose transpose is the sum over ranks
        f(summed_later(p))     times their number, where the gather of p's parts sums over them anyhow

``shard_tokens`` marked the parameters (``meta["sum_gradient"]``).  The copy that broadcast makes is dropped,
and the sums are put into buckets, once the graph is differentiated (``overlap``).
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from hsap_compile.graph import Builder, placeholders
from hsap_compile.kernels import exchange
from hsap_compile.mesh import members_of


def sum_gradients(module: GraphModule, mode: Any, group: str, ranks: int) -> int:
    """Rewrite ``module`` in place.  Returns how many parameters it concerns."""
    marked = [n for n in placeholders(module) if n.meta.get("sum_gradient")]
    first = next(n for n in module.graph.nodes if n.op != "placeholder")
    with module.graph.inserting_before(first):
        for node in marked:
            users = set(node.users)
            builder = Builder(module.graph, mode, node)
            if "gathered" in node.meta and node.meta["gathered"].summed.issuperset(members_of(group)):
                copy = builder(exchange.SUMMED_LATER, node, ranks)
            else:
                copy = builder(exchange.BROADCAST, node, group)
            node.replace_all_uses_with(copy, delete_user_cb=users.__contains__)
    module.recompile()
    return len(marked)
