"""Pass 1: dynamo's graph -> one forward graph of pre-dispatch ATen operators, functional.

before: torch functions and methods as dynamo wrote them, in-place operators included
after:  ATen overloads; attention, cross entropy and linear are still one operator each; nothing is
        written in place, so a value is its node

1. trace the graph again below the Python functions and above autograd;
2. drop dropout that does nothing, and make autocast explicit: operands that it would have cast are cast;
3. replace every in-place operator by its functional form; a write into a view (``x[:, 1:] = y``) becomes
   a scatter into the base, and views made before the write are made anew after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from hsap_compile._torch import (
    AUTOCAST_BORDERS,
    fake_mode_of,
    is_operator,
    operator_name,
    run_fake,
    trace_pre_dispatch,
    without_autocast,
)
from hsap_compile.errors import Refused, where
from hsap_compile.graph import remove_dead

aten = torch.ops.aten

_SCATTER = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_RESHAPES = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default}


def capture(module: GraphModule) -> GraphModule:
    """Lower ``module``, which dynamo traced.  Placeholders keep their order and get ``meta["source"]``:
    the placeholder of ``module`` they stand for."""
    originals = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [n.meta["example_value"] for n in originals]
    graph = trace_pre_dispatch(module, inputs)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for placeholder, original, value in zip(placeholders, originals, inputs, strict=True):
        placeholder.meta["val"] = value
        placeholder.meta["source"] = original.name
        placeholder.meta["parameter"] = isinstance(value, torch.nn.Parameter)
    mode = fake_mode_of(inputs)
    _drop_idle_dropout(graph)
    _explicit_autocast(graph, mode)
    _functionalize(graph, mode)
    remove_dead(graph)
    return graph


def _drop_idle_dropout(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _explicit_autocast(module: GraphModule, mode: Any) -> None:
    """Operators whose result has another type without autocast get their operands cast to it.

    The traced graph stands above autocast: it records what autocast makes of an operator, not the casts.
    """
    borders = [n for n in module.graph.nodes if n.target in AUTOCAST_BORDERS]
    for node in reversed(borders):
        module.graph.erase_node(node)
    if not borders and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return
    for node in list(module.graph.nodes):
        wanted = _floating(node.meta.get("val"))
        if not is_operator(node.target) or wanted is None or _converts(node):
            continue
        operands = [n for n in node.all_input_nodes if _floating(n.meta.get("val")) is not None]
        types = {_floating(n.meta["val"]) for n in operands}
        if types <= {wanted} or not _was_cast(mode, node, operands, wanted):
            continue
        with module.graph.inserting_before(node):
            for operand in operands:
                if _floating(operand.meta["val"]) != wanted:
                    cast = _emit(module.graph, mode, node, aten.to.dtype, (operand, wanted), {})
                    node.replace_input_with(operand, cast)


def _floating(value: Any) -> torch.dtype | None:
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _was_cast(mode: Any, node: Node, operands: list[Node], wanted: torch.dtype) -> bool:
    """Whether only autocast explains the type of the result.  Operators promote: none returns a narrower
    type than a tensor operand of its own accord (a scalar tensor does not count in promotion)."""
    tensors = [n.meta["val"] for n in operands if n.meta["val"].dim() > 0]
    if any(t.itemsize > wanted.itemsize for t in tensors):
        return True
    return _result_dtype(mode, node) != wanted


def _converts(node: Node) -> bool:
    return operator_name(node.target) in ("aten::to", "aten::_to_copy", "aten::type_as")


def _result_dtype(mode: Any, node: Node) -> torch.dtype | None:
    """What the operator returns without autocast; None when it does not take its operands' types."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with without_autocast():
            return _floating(run_fake(mode, node.target, args, kwargs))
    except RuntimeError:
        return None


def _functionalize(module: GraphModule, mode: Any) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if not is_operator(node.target) or not node.target._schema.is_mutable:
            continue
        mutated = _mutated_argument(node)
        if mutated.op == "placeholder":
            raise Refused(
                f"the model writes into one of its inputs in place ({operator_name(node.target)})",
                got=f"an in-place write to {mutated.meta['source']}",
                wanted="a forward that leaves parameters, buffers and inputs as they are",
                do="write into a copy (x = x.clone()) instead",
                at=where(node),
            )
        with graph.inserting_before(node):
            value = _emit(graph, mode, node, _functional_form(node), node.args, node.kwargs)
            _write_back(graph, mode, node, mutated, value)
        graph.erase_node(node)


def _mutated_argument(node: Node) -> Node:
    written = [a.name for a in node.target._schema.arguments if a.alias_info and a.alias_info.is_write]
    position = [a.name for a in node.target._schema.arguments].index(written[0])
    argument = node.args[position] if position < len(node.args) else node.kwargs[written[0]]
    if len(written) > 1 or not isinstance(argument, Node):
        raise Refused(
            f"{operator_name(node.target)} writes into several tensors at once",
            got=str(node.target._schema),
            wanted="operators that return new tensors",
            do="replace the in-place operator in the model",
            at=where(node),
        )
    return argument


def _functional_form(node: Node) -> Any:
    name = operator_name(node.target).split("::")[1].removesuffix("_")
    packet = getattr(aten, name, None)
    overload = node.target._overloadname
    if packet is None or overload not in packet.overloads():
        raise Refused(
            f"{operator_name(node.target)} has no form that returns a new tensor",
            got=str(node.target._schema),
            wanted="an operator with a functional form",
            do="replace the in-place operator in the model",
            at=where(node),
        )
    return getattr(packet, overload)


def _emit(graph: Graph, mode: Any, origin: Node, target: Any, args: Any, kwargs: Any) -> Node:
    new = graph.call_function(target, args, kwargs)
    new.meta.update({k: v for k, v in origin.meta.items() if k != "val"})
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    new.meta["val"] = run_fake(mode, target, *values)
    return new


def _write_back(graph: Graph, mode: Any, node: Node, view: Node, value: Node) -> None:
    """After ``view`` was overwritten by ``value``: every later use of its base, or of another view of
    it, sees the new contents."""
    chain = [view]  # from the written view up to its base
    while (base := _base_of(chain[-1])) is not None:
        chain.append(base)
    new = value
    replaced = {view: value}
    for child, parent in zip(chain, chain[1:], strict=False):
        if child.target in _SCATTER:
            new = _emit(graph, mode, node, _SCATTER[child.target], (parent, new, *child.args[1:]), child.kwargs)
        else:
            sizes = [_size(graph, mode, node, parent, d) for d in range(parent.meta["val"].dim())]
            new = _emit(graph, mode, node, aten.reshape.default, (new, sizes), {})
        replaced[parent] = new
    later = {n for n in _after(node)}
    for other in list(graph.nodes):  # views of the base that were made before the write and are read after it
        if other is node:
            break
        if other in replaced or other.op != "call_function" or not any(u in later for u in other.users):
            continue
        above = _base_of(other)
        if above is not None and above in replaced:
            args = torch.fx.node.map_arg(other.args, lambda n: replaced.get(n, n))
            replaced[other] = _emit(graph, mode, other, other.target, args, other.kwargs)
    for old, fresh in replaced.items():
        old.replace_all_uses_with(fresh, delete_user_cb=lambda u: u in later)
    node.replace_all_uses_with(replaced[view])


def _base_of(node: Node) -> Node | None:
    if node.op == "call_function" and (node.target in _SCATTER or node.target in _RESHAPES):
        return node.args[0]
    return None


def _size(graph: Graph, mode: Any, origin: Node, tensor: Node, dim: int) -> Any:
    size = tensor.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return _emit(graph, mode, origin, aten.sym_size.int, (tensor, dim), {})


def _after(node: Node) -> list[Node]:
    found, current = [], node.next
    while current.op != "root":
        found.append(current)
        current = current.next
    return found
