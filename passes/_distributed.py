"""Parameters of which every rank holds a part (``DTensor``), and how the graph makes them whole.

before: w = p.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]); y = f(x, w)
after:  w is an input; y = f(x, w)               and where it came from is kept as ``meta["gathered"]``

The passes see a parameter as any other; ``gather_parameters`` writes the calls back in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.fx import Graph, GraphModule, Node

from hsap_compile._torch import keywords_of
from hsap_compile.errors import Refused, where
from hsap_compile.graph import ancestors, placeholders
from hsap_compile.passes._regions import new_like


@dataclass(frozen=True)
class Gathered:
    """``graph``: the calls that make a whole value of parts; ``inputs``: which inputs of dynamo's graph these
    are; ``summed``: the ranks of the world over which these calls sum the value's gradient themselves."""

    graph: Graph
    inputs: tuple[int, ...]
    summed: frozenset[int]


def take_apart(module: GraphModule) -> None:
    """Every whole value that ``module`` (a copy of ours) makes of distributed parameters becomes an input,
    behind the others.  Raises ``Refused`` for what else is done with distributed tensors."""
    graph = module.graph
    last = next(reversed(placeholders(module)), None)
    order = {n: i for i, n in enumerate(graph.nodes)}  # placeholders come first
    calls = [n for n in graph.nodes if n.op.startswith("call")]
    made = [n for n in calls if _distributed(n) or any(map(_distributed, n.all_input_nodes))]
    for node in made:
        others = [n for n in node.all_input_nodes if not _distributed(n)]
        if others or not (_distributed(node) or _made_whole(node)):
            raise _not_gathered(node)
        if _distributed(node):
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(f"whole_{node.name}")
        last.meta.update(node.meta, example_value=new_like(node.meta["example_value"]))
        last.meta["gathered"] = _gathered(node, order)
        node.replace_all_uses_with(last)
    (output,) = (n for n in graph.nodes if n.op == "output")
    if kept := [n for n in output.all_input_nodes if _distributed(n)]:
        raise _not_gathered(kept[0])
    for node in reversed(made):
        if not node.users:
            graph.erase_node(node)
    module.recompile()


def _gathered(value: Node, order: dict[Node, int]) -> Gathered:
    graph, copies = Graph(), dict[Node, Node]()
    for node in sorted(ancestors([value]), key=order.__getitem__):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[value])
    inputs = tuple(order[n] for n in copies if n.op == "placeholder")
    return Gathered(graph, inputs, _summed(value))


def _distributed(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), DTensor)


def _made_whole(node: Node) -> bool:
    if not isinstance(node.meta["example_value"], torch.Tensor):
        return False
    return node.target == "full_tensor" or all(
        isinstance(placement, Replicate) or value.device_mesh.size(dim) == 1
        for value in _operands(node)
        for dim, placement in enumerate(value.placements)
    )


def _operands(node: Node) -> list[DTensor]:
    return [n.meta["example_value"] for n in node.all_input_nodes]


def _summed(node: Node) -> frozenset[int]:
    """What ``grad_placements`` say; where they do not, a gradient is taken for whole on every rank."""
    placements = keywords_of(node).get("grad_placements") or ()
    dims = [i for i, placement in enumerate(placements) if isinstance(placement, Partial)]
    mesh = _operands(node)[0].device_mesh
    here = mesh.get_coordinate()
    if not dims or here is None:
        return frozenset()
    of = tuple(slice(None) if i in dims else at for i, at in enumerate(here))
    return frozenset(mesh.mesh[of].flatten().tolist())


def _not_gathered(node: Node) -> Refused:
    return Refused(
        "a tensor that is distributed over ranks takes part in the model's computation",
        got=f"{node.name}, of or with a DTensor",
        wanted="distributed parameters that are made whole where they are used, or plain tensors",
        do="shard parameters with hsap_compile.shard_parameters (or p.full_tensor() in the forward); tensor "
        "parallelism has no place in this backend: its ranks divide the tokens",
        at=where(node),
    )
