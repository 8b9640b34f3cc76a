"""In-place operators -> their functional forms: part of ``capture``.

A write into a view (``x[:, 1:] = y``) becomes a scatter into the base, and views made before the write are
made anew after it.  Which values are views of one another is read from the storages that the trace gave them.
An operator of another library that writes into its operands is called in the form that returns what it wrote,
which is copied to where it wrote.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import (
    KERNEL,
    RETURNING,
    SET_GRAD_ENABLED,
    expr_of,
    is_operator,
    may_return_writes,
    operator_name,
)
from hsap_compile.errors import Refused, where
from hsap_compile.graph import Builder, arguments, placeholders, positional, target
from hsap_compile.passes._operands import cuts_gradient

aten = torch.ops.aten

_SCATTER = {
    "aten::slice": aten.slice_scatter.default,
    "aten::select": aten.select_scatter.default,
    "aten::diagonal": aten.diagonal_scatter.default,
}
#: Views of the same elements in the same order.
_RESHAPES = {
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view view_as reshape_as unsqueeze squeeze flatten unflatten alias detach "
        "contiguous to expand expand_as"
    ).split()
}
_EXCHANGES = {"aten::transpose", "aten::swapaxes", "aten::swapdims"}
_LAST_TWO = {"aten::t", "aten::mT"}


def returned_writes(module: GraphModule, mode: Any) -> None:
    """Operators of other libraries that write into their operands return what they wrote.  Autograd sees
    neither them nor their writes."""
    for node in list(module.graph.nodes):
        if not may_return_writes(node.target):
            continue
        given, schema = arguments(node), target(node)._schema
        returns = max(1, len(schema.returns))
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if not all(isinstance(given[name], Node | None) for name in written):  # lists
            continue
        with module.graph.inserting_before(node):
            emit = Builder(module.graph, mode, node)
            made = emit(RETURNING, node.target, **given)
            for i, name in enumerate(written):
                if given[name] is not None:
                    place = emit(aten.detach.default, given[name])
                    value = emit(operator.getitem, made, returns + i)
                    emit(aten.copy_.default, place, value)
            results = [emit(operator.getitem, made, i) for i in range(len(schema.returns))]
        for part in list(node.users) if returns > 1 else ():
            part.replace_all_uses_with(results[positional(part)[1]])
            module.graph.erase_node(part)
        if node.users:
            node.replace_all_uses_with(results[0])
        module.graph.erase_node(node)


def functionalize(module: GraphModule, mode: Any) -> None:
    graph, views, tracked = module.graph, _views(module), _tracked(module)
    writes: list[Node] = []
    seen = set[Node]()  # inputs into which a write has a gradient
    for node in list(graph.nodes):
        if not is_operator(node.target) or not target(node)._schema.is_mutable:
            continue
        mutated = _mutated_argument(node)
        chain = [mutated]  # from the written view up to its base
        while chain[-1] in views:
            source = _source(chain[-1])
            assert source is not None
            chain.append(source)
        changes_shape = torch.Tag.inplace_view in target(node).tags
        base = chain[-1]
        if not changes_shape:
            _refuse(node, chain, tracked)
        if base.op == "placeholder" and not changes_shape:
            writes.append(base)
            seen.update({base} & tracked if node in tracked else ())
            (output,) = (n for n in graph.nodes if n.op == "output")
            output.args = ([*positional(output)[0], base],)  # the write replaces it, as all later uses
        with graph.inserting_before(node):
            emit = Builder(graph, mode, node)
            value = _value_after(emit, node)
            dtype = mutated.meta["val"].dtype
            if value.meta["val"].dtype != dtype:  # a write keeps the type of what is written to
                value = emit(aten.to.dtype, value, dtype)
            if changes_shape:  # of this one view: neither its base nor other views see it
                replaced = {mutated: value}
                views.add(value)
            else:
                replaced = _write_back(emit, node, chain, value, views)
        if node in tracked:
            tracked.update(replaced.values())
        later = set(_after(node))
        for old, new in replaced.items():
            old.replace_all_uses_with(new, delete_user_cb=later.__contains__)
        node.replace_all_uses_with(replaced[mutated])
        graph.erase_node(node)
    inputs = placeholders(module)
    module.meta["writes"] = tuple(inputs.index(n) for n in writes)
    module.meta["writes_with_gradient"] = frozenset(inputs.index(n) for n in seen)


def _refuse(node: Node, chain: list[Node], tracked: set[Node]) -> None:
    """Writes whose gradient nobody could follow; ``chain``: from the written view up to its base."""
    base, name = chain[-1], operator_name(node.target)
    if base.op != "call_function" and (
        base.op != "placeholder" or base in tracked and base.meta["val"].is_leaf
    ):
        raise Refused(
            f"the model writes into one of its inputs in place ({name})",
            got=f"an in-place write to {base.meta.get('source', base.name)}, a leaf that has a gradient",
            wanted="a forward that leaves parameters and inputs with a gradient of their own as they are",
            do="drop max_norm, or renormalise the weight between steps (torch.renorm)"
            if name == "aten::embedding_renorm_"
            else "write into a copy (x = x.clone()) instead",
            at=where(node),
        )
    if node not in tracked and base in tracked:
        raise Refused(
            f"the model writes in place, unseen by autograd, into a value with a gradient ({name})",
            got="a write that autograd does not see",
            wanted="writes that autograd sees, or into values without a gradient",
            do="write into a copy (x = x.detach().clone()) instead",
            at=where(node),
        )
    if node in tracked and any(n.target is aten.detach.default for n in chain[:-1]):
        raise Refused(
            f"the model writes in place, with a gradient, into what was detached ({name})",
            got="a write through x.detach() or x.data that autograd sees",
            wanted="writes with a gradient into tensors themselves, and others through detached views",
            do="write into a copy (x.detach().clone()) instead, or write what is detached",
            at=where(node),
        )


def _views(module: GraphModule) -> set[Node]:
    """The nodes that are views of their first operand, in-place operators included."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        source = _source(node) if node.op == "call_function" else None
        if source is None:
            continue
        if node.target is operator.getitem:  # of split; what topk returns is its own
            if source in found:
                found.add(node)
        elif (storage := storage_of(node)) is not None and storage == storage_of(source):
            found.add(node)
    return found


def _source(node: Node) -> Node | None:
    """The first operand: of ``einsum`` no argument of its own."""
    first = positional(node)[0] if positional(node) else None
    return first if isinstance(first, Node) else next(iter(node.all_input_nodes), None)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value


def _differentiable(value: Any) -> bool:
    value = _first(value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def storage_of(node: Node) -> int | None:
    value = _first(node.meta.get("val"))
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _tracked(module: GraphModule) -> set[Node]:
    """The nodes that autograd records: their values have gradients."""
    found: set[Node] = set()
    enabled = True
    for node in module.graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(positional(node)[0])
        elif node.op == "placeholder":
            if getattr(node.meta["val"], "requires_grad", False):
                found.add(node)
        elif (
            enabled
            and not cuts_gradient(node)
            and _differentiable(node.meta.get("val"))
            and any(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _mutated_argument(node: Node) -> Node:
    written = [a.name for a in target(node)._schema.arguments if a.alias_info and a.alias_info.is_write]
    position = [a.name for a in target(node)._schema.arguments].index(written[0])
    argument = positional(node)[position] if position < len(positional(node)) else node.kwargs[written[0]]
    if len(written) > 1 or not isinstance(argument, Node):
        raise Refused(
            f"{operator_name(node.target)} writes into several tensors at once",
            got=str(target(node)._schema),
            wanted="operators that return new tensors",
            do="replace the in-place operator in the model",
            at=where(node),
        )
    return argument


def _value_after(emit: Builder, node: Node) -> Node:
    """What the in-place ``node`` leaves in the tensor that it writes to."""
    if node.target is not aten.copy_.default:
        form, args, given = _functional_form(node), positional(node), arguments(node)
        named = [argument.name for argument in form._schema.arguments if not argument.kwarg_only]
        rest = [given[name] for name in named[len(args) :]]  # what may be left out in place may not be here
        known = {argument.name for argument in form._schema.arguments} - set(named)
        value = emit(form, *args, *rest, **{k: v for k, v in node.kwargs.items() if k in known})
        written = _mutated_argument(node).meta["val"].dtype  # of the result's shape, which dynamo sees to
        return value if value.meta["val"].dtype == written else emit(aten.to.dtype, value, written)
    old, value = positional(node)[:2]  # aten::copy has no derivative
    if value.target is operator.getitem and positional(value)[0].target in (KERNEL, RETURNING):
        return value  # like what was written to, and nobody else's
    value = emit(aten.to.dtype, value, old.meta["val"].dtype)
    value = emit(aten.expand.default, value, emit.sizes(old))
    return emit(aten.clone.default, value)  # a copy is no view of its source


#: Functional forms whose name or overload is another.
_NAMED_OTHERWISE: dict[str, Any] = {
    "transpose.default": aten.transpose.int,
    "normal.default": aten.normal_functional.default,
    "bernoulli.float": aten.bernoulli.p,
}


def _functional_form(node: Node) -> Any:
    name = operator_name(node.target).split("::")[1]
    if name.startswith("__i"):  # x &= y
        name = f"__{name.removeprefix('__i')}"
    else:
        name = name.removesuffix("_")
    packet, overload = getattr(aten, name, None), target(node)._overloadname
    found = _NAMED_OTHERWISE.get(f"{name}.{overload}")
    if packet is not None and overload.endswith("out"):
        read = [(a.name, str(a.type)) for a in target(node)._schema.arguments if not a.is_out]
        forms = (getattr(packet, other) for other in packet.overloads())
        found = next((f for f in forms if [(a.name, str(a.type)) for a in f._schema.arguments] == read), None)
    elif found is None and packet is not None and overload in packet.overloads():
        found = getattr(packet, overload)
    if found is None or found._schema.is_mutable or name in ("resize", "set"):
        raise Refused(
            f"{operator_name(node.target)} has no form that returns a new tensor",
            got=str(target(node)._schema),
            wanted="an operator with a functional form",
            do="replace the in-place operator in the model",
            at=where(node),
        )
    return found


def _write_back(
    emit: Builder, node: Node, chain: list[Node], value: Node, views: set[Node]
) -> dict[Node, Node]:
    """What stands for whom after ``chain[0]`` was overwritten by ``value``: a new base, and every view of
    it that was made before the write, made anew."""
    for child, parent in zip(chain, chain[1:], strict=False):
        value = _put(emit, node, child, parent, value)
    replaced = {chain[-1]: value}
    for other in list(emit.graph.nodes):
        if other is node:
            return replaced
        if other in views and _source(other) in replaced:
            args, kwargs = torch.fx.node.map_arg(
                (positional(other), other.kwargs), lambda n: replaced.get(n, n)
            )
            replaced[other] = Builder(emit.graph, emit.mode, other)(other.target, *args, **kwargs)
            views.add(replaced[other])
    raise AssertionError(f"{node} is not in its graph")


def _put(emit: Builder, node: Node, child: Node, parent: Node, value: Node) -> Node:
    """``parent`` with the elements that its view ``child`` shows replaced by ``value``."""
    name = operator_name(child.target)
    old, new = parent.meta["val"], value.meta["val"]
    if name in _SCATTER:
        return emit(_SCATTER[name], parent, value, *positional(child)[1:], **child.kwargs)
    if name in _EXCHANGES:
        return emit(aten.transpose.int, value, *positional(child)[1:3])
    if name in _LAST_TWO:
        return emit(aten.transpose.int, value, -1, -2) if new.dim() > 1 else value
    if name == "aten::narrow":
        dim, start, length = positional(child)[1:]
        stop = emit(operator.add, start, length)
        return emit(aten.slice_scatter.default, parent, value, dim, start, stop)
    if name == "aten::permute":
        order = [d % new.dim() for d in positional(child)[1]]
        return emit(aten.permute.default, value, [order.index(d) for d in range(new.dim())])
    if name in _RESHAPES and old.dtype == new.dtype and expr_of(old.numel()) == expr_of(new.numel()):
        return emit(aten.reshape.default, value, emit.sizes(parent))
    raise Refused(
        f"the model writes in place into a view ({operator_name(node.target)} into {name})",
        got="a write through a view that has no functional form",
        wanted="writes into tensors, or into slices, selections, reshapes and transposes of them",
        do="write into a copy (x = x.clone()) instead",
        at=where(node),
    )


def _after(node: Node) -> list[Node]:
    found, current = [], node.next
    while current.op != "root":
        found.append(current)
        current = current.next
    return found
