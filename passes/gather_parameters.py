"""Pass 7: parameters of which every rank holds a part are made whole where they are used.

before: y = f(x, w)                                   w an input
after:  w = p.redistribute(..).to_local(..); y = f(x, w)     p an input, this rank's part

The gather stands in front of the first operator that reads the value, and is repeated in the backward, so
that no parameter stays whole for longer than it is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from hsap_compile._torch import checkpoint_tags
from hsap_compile.graph import Builder, placeholders
from hsap_compile.kernels import exchange

_COPIES = (exchange.BROADCAST, exchange.SHARE, exchange.SUMMED_LATER)


def gather_parameters(module: GraphModule, mode: Any) -> int:
    """Rewrite ``module`` in place.  Returns how many values are gathered."""
    inputs = placeholders(module)
    values = [n for n in inputs if "gathered" in n.meta]
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    for value in values:
        gathered, tags = value.meta["gathered"], checkpoint_tags()
        for copy in [n for n in value.users if n.target in _COPIES]:
            first = min(copy.users, key=order.__getitem__)
            order[copy] = order[first]
            copy.meta.update(tags)
            first.prepend(copy)
        if value.users:
            given = [n for n in gathered.graph.nodes if n.op == "placeholder"]
            parts = dict(zip(given, (inputs[i] for i in gathered.inputs), strict=True))
            with module.graph.inserting_before(min(value.users, key=order.__getitem__)):
                made: Any = module.graph.graph_copy(gathered.graph, parts)
                for new in [n for n in parts.values() if n not in inputs]:
                    new.meta = {**tags, **new.meta, "val": new.meta["example_value"]}
                if not value.meta["val"].requires_grad:
                    made = Builder(module.graph, mode, made)(torch.ops.aten.detach.default, made)
            value.replace_all_uses_with(made)
        module.graph.erase_node(value)
    module.recompile()
    return len(values)
