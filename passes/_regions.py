"""Parts of dynamo's graph that are not plain calls, made so that ``capture`` can trace the rest.

* the body of an activation checkpoint is inlined; its nodes carry the tags by which AOTAutograd's partitioner
  recomputes them in the backward (``recompute``, ``ac_graph_id``);
* a vmap is traced below its batching, on its own;
* ``x.data`` is a detach; hooks on gradients and derivatives inside of a forward are refused;
* a Triton kernel that the model launches returns what it writes, which is copied to where it wrote; what it
  reads keeps its place in memory, which it is told as numbers;
* an operator that has a gradient or a meaning of its own (a custom ``autograd.Function``, flex attention) is
  set aside: while the rest is traced, its operands are outputs and its results are inputs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import (
    AUTOCAST_BORDERS,
    CHECKPOINT,
    CUSTOM_FUNCTION,
    DATA,
    DERIVATIVES,
    FLEX_ATTENTION,
    INFERENCE_BORDERS,
    KERNEL,
    LAUNCH,
    SET_GRAD_ENABLED,
    VMAP_BORDERS,
    VMAP_PREAMBLE,
    checkpoint_tags,
    control_flow_of,
    expr_of,
    is_operator,
    opaque,
    opaque_function,
    trace_below_autograd,
    written_by,
)
from hsap_compile.errors import Refused, where
from hsap_compile.graph import positional, target
from hsap_compile.kernels.copies import LAID_OUT

SET_ASIDE = (CUSTOM_FUNCTION, FLEX_ATTENTION)


def expanded(module: GraphModule) -> GraphModule:
    """A copy of ``module`` without checkpoints and vmaps."""
    graph, attributes = Graph(), _Attributes(module)
    copies: dict[Node, Any] = {}
    output = _copy_into(graph, module, copies, attributes, {})
    graph.output(output)
    result = GraphModule(attributes.found, graph)
    _lower_inference_modes(result)
    _lower_vmaps(result)
    return result


class _Attributes:
    """Attributes of the copy, under names that no two bodies share."""

    def __init__(self, module: GraphModule) -> None:
        self.found: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> str:
        flat = name.replace(".", "_")
        number = 0
        while flat in self.found and self.found[flat] is not value:
            number += 1
            flat = f"{name.replace('.', '_')}_{number}"
        self.found[flat] = value
        return flat


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _copy_into(
    graph: Graph, module: GraphModule, copies: dict[Node, Any], attributes: _Attributes, tags: dict[str, Any]
) -> Any:
    """Append ``module`` to ``graph``; placeholders that are in ``copies`` already are not made anew.
    Returns the copy of its output."""
    for node in module.graph.nodes:
        if node.op == "output":
            return map_arg(positional(node)[0], lambda n: copies[n])
        if node.op == "placeholder" and node in copies:
            continue
        _refuse(node)
        if node.target is DATA:
            copies[node] = new = graph.call_method("detach", (copies[positional(node)[0]],))
            new.meta = {**node.meta, **tags}
        elif node.target is LAUNCH:
            _launched(graph, node, copies, tags)
        elif node.target is CHECKPOINT:
            copies[node] = _inlined(graph, module, node, copies, attributes, tags)
        elif node.target is operator.getitem and isinstance(copies[positional(node)[0]], tuple | list):
            copies[node] = copies[positional(node)[0]][positional(node)[1]]
        else:
            copies[node] = new = graph.node_copy(node, lambda n: copies[n])
            new.meta = {**node.meta, **tags}
            if node.op == "get_attr":
                value = _attribute(module, str(node.target))
                if isinstance(value, GraphModule) and _launches(value):
                    value = expanded(value)
                new.target = attributes.add(str(node.target), value)
    raise AssertionError("a graph without output")


def _launched(graph: Graph, node: Node, copies: dict[Node, Any], tags: dict[str, Any]) -> None:
    """Autograd sees neither the kernel nor its writes."""
    operands: Any = node.kwargs["kwargs"]
    written = written_by(node, map_arg(operands, lambda n: n.meta["example_value"]))
    given = map_arg(node.kwargs, lambda n: copies[n])
    first = len(graph.nodes)
    read = {name: _laid_out(graph, copies.get(x, x)) for name, x in operands.items()}
    made = graph.call_function(KERNEL, kwargs={**given, "kwargs": read, "tensors_to_clone": written})
    for name in written:
        place = graph.call_method("detach", (copies[operands[name]],))
        graph.call_method("copy_", (place, graph.call_function(operator.getitem, (made, name))))
    for new in list(graph.nodes)[first:]:
        new.meta = {**node.meta, **tags, **new.meta}


def _laid_out(graph: Graph, operand: Any) -> Any:
    """``operand`` of a kernel, where its elements lie: the kernel was given their strides."""
    value: Any = operand.meta["example_value"] if isinstance(operand, Node) else None
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return operand
    strides: list[Any] = list(value.stride())
    for dim, stride in enumerate(strides):
        if isinstance(stride, torch.SymInt):
            strides[dim] = graph.call_method("stride", (operand, dim))
    made = graph.call_function(LAID_OUT, (operand, strides))
    made.meta["example_value"] = value
    return made


def _refuse(node: Node) -> None:
    """What tracing would lose, or stumble over."""
    if getattr(node.target, "__name__", node.target) == "register_hook":
        raise Refused(
            "the model registers a hook on a gradient",
            got="tensor.register_hook in the forward",
            wanted="gradients that autograd computes on its own",
            do="write a torch.autograd.Function with that backward, or register the hook outside of the "
            "compiled model",
            at=where(node),
        )
    if name := opaque_function(node.target):
        raise opaque(name, node)
    if (kind := control_flow_of(node.target)) is not None:
        raise Refused(
            "the model has a branch or a loop inside of its graph",
            got=f"torch.ops.higher_order.{kind}",
            wanted="operators on values",
            do="write it with torch.where, or as a Python loop of a fixed number of steps, or call it outside"
            " of the compiled model",
            at=where(node),
        )
    if node.target in DERIVATIVES:
        raise Refused(
            "the model takes a derivative in its forward",
            got="torch.func.grad, vjp or jvp",
            wanted="operators on values",
            do="compute it outside of the compiled model, or write the derivative out",
            at=where(node),
        )


def _inlined(
    graph: Graph,
    module: GraphModule,
    node: Node,
    copies: dict[Node, Any],
    attributes: _Attributes,
    tags: dict[str, Any],
) -> Any:
    body_node, *operands = positional(node)
    body = _attribute(module, str(body_node.target))
    inside: dict[Node, Any] = {}
    names = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(names, operands, strict=True):
        inside[placeholder] = copies[operand] if isinstance(operand, Node) else operand
    return _copy_into(graph, body, inside, attributes, tags or checkpoint_tags())


# --- vmap ---------------------------------------------------------------------------------------------


def _lower_vmaps(module: GraphModule) -> None:
    enter, leave = VMAP_BORDERS
    depth, region = 0, list[Node]()
    for node in list(module.graph.nodes):
        if node.target in VMAP_PREAMBLE:
            module.graph.erase_node(node)
            continue
        depth += node.target is enter
        if depth:
            region.append(node)
        if node.target is leave:
            depth -= 1
            if not depth:
                _lower_vmap(module, region)
                for dead in reversed(region):
                    module.graph.erase_node(dead)
                region = []
    module.recompile()


def _lower_inference_modes(module: GraphModule) -> None:
    """As far as gradients go, an inference mode is a no_grad."""
    enter, leave = INFERENCE_BORDERS
    grad, before = torch.is_grad_enabled(), list[bool]()
    for node in list(module.graph.nodes):
        if node.target is SET_GRAD_ENABLED:
            grad = bool(positional(node)[0])
        elif node.target in (enter, leave):
            if node.target is enter:
                before.append(grad)
                grad = grad and not positional(node)[0]
            else:
                grad = before.pop()
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_function(SET_GRAD_ENABLED, (grad,)))
    for node in [n for n in reversed(module.graph.nodes) if n.target in (enter, leave)]:
        module.graph.erase_node(node)


def _lower_vmap(module: GraphModule, region: list[Node]) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(n for r in region for n in r.all_input_nodes if n not in inside))
    learned = any(getattr(n.meta.get("example_value"), "requires_grad", False) for n in inputs)
    if learned and any(r.target is SET_GRAD_ENABLED for r in region):
        raise Refused(
            "the model switches gradients off inside of a vmap",
            got="torch.no_grad or enable_grad in the function that torch.vmap maps",
            wanted="a function whose gradients are on, or off, from outside",
            do="write x.detach() in it, or no_grad around torch.vmap",
            at=where(region[0]),
        )
    results = [r for r in region if any(u not in inside for u in r.users)]
    if not results:
        return
    graph, copies = Graph(), dict[Node, Node]()
    for number, node in enumerate(inputs):
        if node.op == "get_attr":
            copies[node] = graph.get_attr(str(node.target))
        else:
            copies[node] = graph.placeholder(f"input_{number}")
    for node in region:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([copies[n] for n in results])
    operands = [n for n in inputs if n.op != "get_attr"]
    lowered = trace_below_autograd(GraphModule(module, graph), [n.meta["example_value"] for n in operands])
    names = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    made: dict[Node, Any] = dict(zip(names, operands, strict=True))
    origin = {k: v for k, v in results[0].meta.items() if k != "example_value"}
    with module.graph.inserting_before(region[0]):
        for node in lowered.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                for old, new in zip(results, positional(node)[0], strict=True):
                    old.replace_all_uses_with(made[new], delete_user_cb=lambda u: u not in inside)
                continue
            made[node] = new = module.graph.node_copy(node, lambda n: made[n])
            new.meta = {**origin, "example_value": node.meta.get("val")}
            if node.op == "get_attr":
                new.target = f"{region[0].name}_{node.target}"
                setattr(module, new.target, _attribute(lowered, str(node.target)))


def drop_idle_layouts(module: GraphModule) -> None:
    """What lies as a kernel was told, whatever became of the graph and of bodies in it, is not copied."""
    for part in [m for m in module.modules() if isinstance(m, GraphModule)]:
        for node in [n for n in part.graph.nodes if n.target is LAID_OUT]:
            source = positional(node)[0]
            was, wanted = ([expr_of(x) for x in _value(n).stride()] for n in (source, node))
            if was == wanted:
                node.replace_all_uses_with(source)
                part.graph.erase_node(node)
        part.recompile()


def _value(node: Node) -> Any:
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


# --- set aside ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aside:
    """One call that is not traced.  ``args`` and ``kwargs`` as they were; ``operands``: which output of the
    traced graph every node among them is; ``bodies``: the modules among them; ``inputs``: which input of
    the traced graph is which of its results; ``autocast``: the regions of the graph's that it stands in."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    operands: dict[Node, int]
    bodies: dict[Node, GraphModule]
    inputs: dict[int, int]
    autocast: tuple[Any, ...]


def set_aside(module: GraphModule) -> tuple[Aside, ...]:
    """Take the calls that stay whole out of ``module`` (a copy of ours)."""
    graph = module.graph
    found: list[Aside] = []
    (output,) = (n for n in graph.nodes if n.op == "output")
    names = [n for n in graph.nodes if n.op == "placeholder"]
    regions = _regions_of_autocast(graph)
    for call in [n for n in graph.nodes if n.op == "call_function" and n.target in SET_ASIDE]:
        outputs = positional(output)[0]
        bodies = {n: _attribute(module, str(n.target)) for n in call.all_input_nodes if n.op == "get_attr"}
        launches = any(_launches(body) for body in bodies.values())
        operands = []
        for operand in [n for n in call.all_input_nodes if n.op != "get_attr"]:
            operands.append(_as_it_is(graph, call, operand, launches))
        inputs: dict[int, int] = {}
        for part in list(call.users):
            assert part.target is operator.getitem, f"{call} returns several values"
            with graph.inserting_after(names[-1]):
                made = graph.placeholder(f"{call.name}_{positional(part)[1]}")
            made.meta.update(part.meta)
            if isinstance(value := part.meta["example_value"], torch.Tensor):
                made.meta["example_value"] = new_like(_as_computed(call, value))
            inputs[len(names)] = positional(part)[1]
            names.append(made)
            part.replace_all_uses_with(made)
            graph.erase_node(part)
        numbers = {n: len(outputs) + i for i, n in enumerate(operands)}
        found.append(
            Aside(
                call.target,
                positional(call),
                dict(call.kwargs),
                {**call.meta, "aside": call.name},
                numbers,
                bodies,
                inputs,
                regions[call],
            )
        )
        output.args = ((*positional(output)[0], *operands),)
        graph.erase_node(call)
    module.recompile()
    return tuple(found)


def _as_computed(call: Node, result: torch.Tensor) -> torch.Tensor:
    """Of float64, flex attention computes everything in float64; torch's fake log-sum-exp is float32."""
    operand = positional(call)[0]
    wide = call.target is FLEX_ATTENTION and operand.meta["example_value"].dtype == torch.float64
    return result.double() if wide else result


def new_like(value: torch.Tensor) -> torch.Tensor:
    """No view, and not written into, but as far from a leaf as ``value`` is."""
    made = value.detach()
    with torch.enable_grad():
        return made.requires_grad_().clone() if value.requires_grad else made


def _regions_of_autocast(graph: Graph) -> dict[Node, tuple[Any, ...]]:
    """The arguments of ``torch.autocast`` of the regions that every node stands in."""
    enter, leave = AUTOCAST_BORDERS
    inside: list[Node] = []
    found = {}
    for node in graph.nodes:
        if node.target is leave:
            inside.remove(positional(node)[0])
        found[node] = tuple(positional(region) for region in inside)
        if node.target is enter:
            inside.append(node)
    return found


def _calls(body: GraphModule) -> list[Node]:
    graphs = [m.graph for m in body.modules() if isinstance(m, GraphModule)]
    return [n for graph in graphs for n in graph.nodes if n.op.startswith("call")]


def _launches(body: GraphModule) -> bool:
    return any(n.target in (LAUNCH, KERNEL) for n in _calls(body))


def writes_in_place(body: GraphModule) -> bool:
    """Whether ``body`` may write into something."""
    return any(map(_may_write, _calls(body)))


def _may_write(node: Node) -> bool:
    """Operators say so in their schemas; methods and functions by their names, and by an argument."""
    if is_operator(node.target):
        return bool(target(node)._schema.is_mutable)
    name = getattr(node.target, "__name__", str(node.target))
    named = name == "setitem" or name.endswith("_") and not name.endswith("__")
    return named or "out" in node.kwargs or node.target in (LAUNCH, KERNEL)


def _as_it_is(graph: Graph, call: Node, operand: Node, launches: bool) -> Node:
    """``operand`` as ``call`` reads it: what is written into it later is not seen, and the place is kept."""
    value = operand.meta["example_value"]
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return operand
    with graph.inserting_before(call):
        alias = torch.ops.aten.alias.default
        made = _laid_out(graph, operand) if launches else graph.call_function(alias, (operand,))
    made.meta.update(operand.meta)
    call.replace_input_with(operand, made)
    return made


def put_back(module: GraphModule, asides: tuple[Aside, ...]) -> None:
    """Write the calls into ``module``, which was traced without them."""
    if not asides:
        return
    graph = module.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    kept = min(number for aside in asides for number in aside.operands.values())
    for aside in asides:
        operands = {n: positional(output)[0][number] for n, number in aside.operands.items()}
        order = {n: i for i, n in enumerate(graph.nodes)}
        last = max((n for n in operands.values() if isinstance(n, Node)), key=lambda n: order[n])
        last = inputs[-1] if last.op == "placeholder" else last
        for node, body in aside.bodies.items():
            setattr(module, name := f"{aside.meta['aside']}_{node.name}", body)
            with graph.inserting_after(last):
                operands[node] = last = graph.get_attr(name)
            last.meta["val"] = body
        with graph.inserting_after(last):
            args, kwargs = map_arg((aside.args, aside.kwargs), operands.__getitem__)
            call = graph.call_function(aside.target, args, kwargs)
        call.meta.update({k: v for k, v in aside.meta.items() if k != "example_value"})
        results = {part: inputs[number] for number, part in aside.inputs.items()}
        values = {part: node.meta["val"] for part, node in results.items()}
        call.meta["val"] = tuple(values.get(i) for i in range(max(values, default=-1) + 1))
        for part, node in results.items():
            with graph.inserting_after(call):
                made = graph.call_function(operator.getitem, (call, part))
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
    output.args = (positional(output)[0][:kept],)
    for aside in asides:
        for number in aside.inputs:
            graph.erase_node(inputs[number])
    module.recompile()
