"""Small tools for writing FX graphs whose every node knows its value's shape."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import SET_GRAD_ENABLED, described, is_operator, run_fake, schema_of

#: What a new node takes over from the node it stands for: where it came from, not what it is.
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "custom")


class Builder:
    """Appends calls to ``graph`` (at its current insertion point) and infers their values.

    ``origin`` is the node that new ones stand for: they get its place in the user's source.  ``inferred``
    is shared by builders that meet operators on operands of the same shapes, as layers repeat: several nodes
    then have one value.  None: every node has its own.
    """

    def __init__(
        self,
        graph: Graph,
        mode: Any,
        origin: Node | None = None,
        inferred: dict[Hashable, Any] | None = None,
    ) -> None:
        self.graph, self.mode, self.origin = graph, mode, origin
        self.inferred = inferred

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        operands, options = map_arg((args, kwargs), lambda n: n.meta["val"])
        return self.returning(self._inferred(target, operands, options), target, *args, **kwargs)

    def returning(self, value: Any, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        """A call that is known to return what looks like ``value``."""
        node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in _ORIGIN if k in self.origin.meta})
        node.meta["val"] = value
        return node

    def _inferred(self, target: Any, operands: Any, options: Any) -> Any:
        if self.inferred is None or not is_operator(target):
            return run_fake(self.mode, target, operands, options)
        given = described((operands, options))
        key = (target, given.key)
        if key not in self.inferred:
            value = run_fake(self.mode, target, operands, options)
            if not _is_shape_alone(value) or not described(value).symbols <= given.symbols:
                return value
            self.inferred[key] = value
        return self.inferred[key]

    def size(self, tensor: Node, dim: int) -> Any:
        """The size of a dimension: an int, or a node."""
        size = tensor.meta["val"].shape[dim]
        return size if isinstance(size, int) else self(torch.ops.aten.sym_size.int, tensor, dim)

    def sizes(self, tensor: Node) -> list[Any]:
        """All of them."""
        return [self.size(tensor, dim) for dim in range(tensor.meta["val"].dim())]


def _is_shape_alone(value: Any) -> bool:
    """Whether nothing but shapes can follow from a value.  Of masks and numbers torch remembers, on the fake
    tensor, the sizes that depend on them: those of two nodes differ."""
    parts = value if isinstance(value, list | tuple) else (value,)
    return all(not isinstance(x, torch.Tensor) or (x.is_floating_point() and x.dim() > 0) for x in parts)


def positional(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call; torch types them too widely to work with."""
    return node.args


def target(node: Node) -> Any:
    """What a node calls."""
    return node.target


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by their schema's names, defaults filled in."""
    schema = schema_of(node.target)
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in schema.arguments), positional(node), strict=False))
    values.update(node.kwargs)
    return values


def placeholders(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """``nodes`` and everything they are computed from."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def may_have_gradient(node: Node) -> bool:
    """Whether floating numbers are made of what has a gradient."""
    return node.meta["val"].is_floating_point() and any(
        n.op == "placeholder" and getattr(n.meta["val"], "requires_grad", False) for n in ancestors([node])
    )


def extract(module: GraphModule, nodes: list[Node], inputs: int) -> GraphModule:
    """The part of ``module`` that computes ``nodes`` from its first ``inputs`` placeholders."""
    needed = ancestors(nodes)
    graph, copies = Graph(), {}
    for position, node in enumerate(placeholders(module)[:inputs]):
        copies[node] = graph.placeholder(f"input_{position}")
    for node in module.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([copies[n] for n in nodes])
    return GraphModule(module, graph)


def remove_dead(module: GraphModule) -> None:
    """Erase what nobody reads, random operators included; no_grad regions keep their borders.  Bodies are
    left alone: they may write in place, which FX takes for dead."""
    for node in reversed(list(module.graph.nodes)):
        kept = node.op in ("placeholder", "output") or node.target is SET_GRAD_ENABLED
        if not kept and not node.users:
            module.graph.erase_node(node)
    module.recompile()
