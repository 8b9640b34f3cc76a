"""Pass 7: parameters of which every rank holds a part are made whole where they are used.

before: y = f(x, w)                                   w an input
after:  w = p.redistribute(..).to_local(..); y = f(x, w)     p an input, this rank's part

The gather stands in front of the first operator that reads the value, and is repeated in the backward, so
that no parameter stays whole for longer than it is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import SET_GRAD_ENABLED, checkpoint_tags
from hsap_compile.graph import Builder, placeholders
from hsap_compile.kernels import exchange

_COPIES = (exchange.BROADCAST, exchange.SHARE, exchange.SUMMED_LATER)


def gather_parameters(module: GraphModule, mode: Any) -> int:
    """Rewrite ``module`` in place.  Returns how many values are gathered."""
    inputs = placeholders(module)
    values = [n for n in inputs if "gathered" in n.meta]
    before, tags = _places(module), checkpoint_tags()  # one region: what leaves a region is kept
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    for value in values:
        gathered = value.meta["gathered"]
        copies, readers = _read_by(value)
        if readers:
            given = [n for n in gathered.graph.nodes if n.op == "placeholder"]
            made = dict(zip(given, (inputs[i] for i in gathered.inputs), strict=True))
            first = before[min(readers, key=order.__getitem__)]
            with module.graph.inserting_before(first):
                whole: Any = module.graph.graph_copy(gathered.graph, made)
                for new in [n for n in made.values() if n.op != "placeholder"]:
                    new.meta = {**tags, **new.meta, "val": new.meta["example_value"]}
                if not value.meta["val"].requires_grad:
                    whole = Builder(module.graph, mode, whole)(torch.ops.aten.detach.default, whole)
            value.replace_all_uses_with(whole)
            for copy in copies:
                copy.meta.update(tags)
                first.prepend(copy)
        module.graph.erase_node(value)
    module.recompile()
    return len(values)


def _read_by(value: Node) -> tuple[list[Node], list[Node]]:
    """The copies of ``value``, each behind what it copies, and who reads it or one of them."""
    copies, readers = list[Node](), list[Node]()
    for user in value.users:
        if user.target in _COPIES:
            further, reading = _read_by(user)
            copies += [user, *further]
            readers += reading
        else:
            readers.append(user)
    return copies, readers


def _places(module: GraphModule) -> dict[Node, Node]:
    """In front of which node every one's operands may be made: a no_grad region would take their gradient."""
    grad, border, found = True, None, dict[Node, Node]()
    for node in module.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            border = node if grad and not node.args[0] else border
            grad = bool(node.args[0])
        found[node] = node if grad or border is None else border
    return found
