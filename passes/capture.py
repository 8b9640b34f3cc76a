"""Pass 1: dynamo's graph -> one forward graph of pre-dispatch ATen operators, functional.

before: torch functions and methods as dynamo wrote them, in-place operators included
after:  ATen overloads; attention, cross entropy and linear are still one operator each; nothing is
        written in place, so a value is its node

1. trace the graph again below the Python functions and above autograd, checkpoint bodies and vmaps in
   place, custom functions and flex attention as one call (``_regions``);
2. drop dropout that does nothing, and make types explicit: operands that autocast would have cast are cast,
   and who takes another tensor's type no longer reads that tensor;
3. replace every in-place operator by its functional form (``_in_place``);
4. write attention that a library's operator computes with a mask (``_attention_calls``), also where a custom
   function is wrapped around it (``_attention_functions``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import (
    AUTOCAST_BORDERS,
    CUSTOM_FUNCTION,
    expr_of,
    fake_mode_of,
    is_operator,
    operator_name,
    run_fake,
    size_now,
    trace_pre_dispatch,
    without_autocast,
)
from hsap_compile.errors import Refused, where
from hsap_compile.graph import Builder, placeholders, positional, remove_dead, target
from hsap_compile.passes._attention_calls import RowLength, write_as_masked
from hsap_compile.passes._attention_functions import write_attention_functions
from hsap_compile.passes._distributed import take_apart
from hsap_compile.passes._in_place import functionalize, returned_writes, storage_of
from hsap_compile.passes._regions import Aside, expanded, put_back, set_aside, writes_in_place

aten = torch.ops.aten


def capture(module: GraphModule, symbol: sympy.Expr | None = None, ranks: int = 1) -> GraphModule:
    """Lower ``module``, which dynamo traced.  Placeholders keep their order and get ``meta["source"]``:
    the placeholder of ``module`` they stand for.  Inputs that the model writes into, such as the running
    statistics of a batch norm, are left alone: what they become is put behind the outputs, and
    ``meta["writes"]`` of the graph's module says which inputs these are.  ``symbol``: of which rows are made,
    that ``ranks`` have parts of."""
    plain = expanded(module)
    take_apart(plain)
    asides = set_aside(plain)
    originals = placeholders(plain)
    inputs = [n.meta["example_value"] for n in originals]
    graph = trace_pre_dispatch(plain, inputs)
    for placeholder, original, value in zip(
        placeholders(graph)[: len(inputs)], originals, inputs, strict=True
    ):
        placeholder.meta["val"] = value
        placeholder.meta["source"] = original.name
        placeholder.meta["parameter"] = isinstance(value, torch.nn.Parameter)
        if "gathered" in original.meta:
            placeholder.meta.update(gathered=original.meta["gathered"], parameter=True)
    mode = fake_mode_of(inputs)
    for aside in asides:
        if aside.target is CUSTOM_FUNCTION:
            _explicit_in_forward(aside, mode)
    put_back(graph, asides)
    _mark_overwriting(graph)
    _explicit_types(graph, mode)
    _drop_empty_parts(graph, mode)
    _explicit_autocast(graph, mode)
    returned_writes(graph, mode)
    functionalize(graph, mode)
    _drop_idle_dropout(graph)
    _read_in_order(graph, mode)
    rows = RowLength(None if symbol is None else size_now(mode, symbol), ranks)
    write_attention_functions(graph, mode, rows, partial(capture_body, grad=False))
    write_as_masked(graph, mode, rows)
    return graph


def capture_body(body: GraphModule, inputs: Sequence[Any], *, grad: bool) -> GraphModule:
    """``body``, a part of one of dynamo's graphs, lowered as ``capture`` does, for inputs like ``inputs``;
    ``grad``: whether autograd sees what it does.  What it writes into its inputs is not returned;
    ``meta["writes"]`` says which these are."""
    with torch.set_grad_enabled(grad):
        graph = trace_pre_dispatch(expanded(body), inputs)
    for placeholder, value in zip(placeholders(graph), inputs, strict=True):
        placeholder.meta.update(val=value, parameter=False)
    _explicit_types(graph, fake_mode_of(inputs))
    _drop_empty_parts(graph, fake_mode_of(inputs))
    returned_writes(graph, fake_mode_of(inputs))
    functionalize(graph, fake_mode_of(inputs))
    if written := len(graph.meta["writes"]):
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        output.args = (tuple(positional(output)[0][:-written]),)
    remove_dead(graph)
    return graph


def _mark_overwriting(module: GraphModule) -> None:
    """``meta["overwrites"]`` of a custom function: its forward writes into an operand that is read later."""
    order = list(module.graph.nodes)
    for call in [n for n in order if n.target is CUSTOM_FUNCTION]:
        forward, _, *operands = positional(call)
        if not writes_in_place(forward.meta["val"]):
            continue
        values = [n.meta["val"] if isinstance(n, Node) else n for n in operands]
        values = [x.detach() if isinstance(x, torch.Tensor) else x for x in values]
        with without_autocast():
            written = capture_body(forward.meta["val"], values, grad=False).meta["writes"]
        sources = [next(iter(operands[i].all_input_nodes), operands[i]) for i in written]  # it reads aliases
        places = {storage_of(n) for n in sources}
        given = {storage_of(n) for n in placeholders(module)}
        later = {n for reader in order[order.index(call) + 1 :] for n in reader.all_input_nodes}
        before = set(order[: order.index(call)])
        call.meta["overwrites"] = not places.isdisjoint(given | {storage_of(n) for n in later & before})


def _drop_idle_dropout(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.dropout.default and (positional(node)[1] == 0 or not positional(node)[2]):
            node.replace_all_uses_with(positional(node)[0])
            module.graph.erase_node(node)


def _read_in_order(module: GraphModule, mode: Any) -> None:
    """``as_strided`` reads memory; only of contiguous tensors is it known what lies where on every rank."""
    for node in list(module.graph.nodes):
        if not operator_name(node.target).startswith("aten::as_strided"):
            continue
        for operand in node.all_input_nodes[:1]:
            value, step = operand.meta["val"], sympy.Integer(1)
            for size, stride in reversed(list(zip(value.shape, value.stride(), strict=True))):
                in_order = expr_of(size) == 1 or expr_of(stride) == step
                step *= expr_of(size) if in_order else 0
            if expr_of(value.untyped_storage().nbytes()) != step * value.itemsize:
                raise Refused(
                    "as_strided reads what lies in memory",
                    got="a tensor that is not contiguous, or a part of one",
                    wanted="a contiguous tensor, whose memory is the same however the graph is run",
                    do="use .contiguous() before, or index, transpose and unfold instead",
                    at=where(node),
                )
            with module.graph.inserting_before(node):
                node.replace_input_with(
                    operand, Builder(module.graph, mode, node)(aten.contiguous.default, operand)
                )


def _explicit_types(module: GraphModule, mode: Any) -> None:
    """x.type_as(y) reads the type of y and nothing else of it."""
    for node in list(module.graph.nodes):
        if node.target is not aten.type_as.default:
            continue
        x, value = positional(node)[0], node.meta["val"]
        with module.graph.inserting_before(node):
            new = Builder(module.graph, mode, node)(aten.to.device, x, value.device, value.dtype)
        new.meta["val"] = value
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)


def _drop_empty_parts(module: GraphModule, mode: Any) -> None:
    """``cat`` takes empty vectors among tensors of any rank: a cache starts as one.  Their type counts."""
    for node in list(module.graph.nodes):
        if node.target is not aten.cat.default:
            continue
        parts, value = positional(node)[0], node.meta["val"]
        full = [x for x in parts if x.meta["val"].dim() == value.dim()]
        if 0 < len(full) < len(parts):
            with module.graph.inserting_before(node):
                emit = Builder(module.graph, mode, node)
                new = emit(aten.cat.default, full, *positional(node)[1:], **node.kwargs)
                new = new if new.meta["val"].dtype == value.dtype else emit(aten.to.dtype, new, value.dtype)
            node.replace_all_uses_with(new)
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
        if target(node)._schema.is_mutable:  # autocast leaves in-place operators alone
            continue
        operands = [n for n in node.all_input_nodes if _floating(n.meta.get("val")) is not None]
        types = {_floating(n.meta["val"]) for n in operands}
        if types <= {wanted} or not _was_cast(mode, node, operands, wanted):
            continue
        with module.graph.inserting_before(node):
            for operand in operands:
                if _floating(operand.meta["val"]) != wanted:
                    cast = Builder(module.graph, mode, node)(aten.to.dtype, operand, wanted)
                    node.replace_input_with(operand, cast)


def _explicit_in_forward(aside: Aside, mode: Any) -> None:
    """The same in the forward of a custom function, which runs under the autocast of its call; its backward
    runs under that of whoever calls backward."""
    forward, _, *operands = aside.args
    with ExitStack() as stack:
        for region in aside.autocast:
            stack.enter_context(torch.autocast(*region))
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return
        values = [n.meta["example_value"] if isinstance(n, Node) else n for n in operands]
        stack.enter_context(torch.no_grad())
        graph = trace_pre_dispatch(expanded(aside.bodies[forward]), values)
        for placeholder, value in zip(placeholders(graph), values, strict=True):
            placeholder.meta["val"] = value
        _explicit_autocast(graph, mode)
    graph.recompile()
    aside.bodies[forward] = graph


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value


def _floating(value: Any) -> torch.dtype | None:
    value = _first(value)
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _was_cast(mode: Any, node: Node, operands: list[Node], wanted: torch.dtype) -> bool:
    """Whether only autocast explains the type of the result.  Operators promote: none returns a narrower
    type than a tensor operand of its own accord (a scalar tensor does not count in promotion)."""
    tensors = [n.meta["val"] for n in operands if n.meta["val"].dim() > 0]
    if any(t.itemsize > wanted.itemsize for t in tensors):
        return True
    return _result_dtype(mode, node) != wanted


def _converts(node: Node) -> bool:
    return operator_name(node.target) in ("aten::to", "aten::_to_copy")


def _result_dtype(mode: Any, node: Node) -> torch.dtype | None:
    """What the operator returns without autocast; None when it does not take its operands' types."""
    args, kwargs = torch.fx.node.map_arg((positional(node), node.kwargs), lambda n: n.meta["val"])
    try:
        with without_autocast():
            return _floating(run_fake(mode, target(node), args, kwargs))
    except RuntimeError:
        return None
