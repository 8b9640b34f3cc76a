"""Custom autograd functions around an attention operator of a library, as its Python interface wraps it.

before: y = apply(forward, backward, q, k, v, ends)     forward: out, lse = attend(pad(q), ..); out[..., :D]
after:  y = sdpa(pad(q), .., mask of ends)[..., :D]     as ``_attention_calls`` writes the operator

The forward is written in place of the call, and differentiated like the rest.  That is the same only where
the backward is the derivative, so nothing is taken for granted: the forward calls one operator of the family
and does nothing else but pad, slice and copy; the backward calls one that is given the same operands, what
the forward kept, and the gradient of its result, and does nothing else; and what it writes for an operand is
what the function returns for it.  Any other function stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import CUSTOM_FUNCTION, RETURNING, SET_GRAD_ENABLED, expr_of, schema_of
from hsap_compile.graph import Builder, arguments, may_have_gradient, placeholders, positional
from hsap_compile.passes._attention_calls import LONGEST, Call, RowLength, call_of, can_be_masked, masked

aten = torch.ops.aten

_PADS = (aten.pad.default, aten.constant_pad_nd.default)
#: What may stand around the operator: of the last dimension zeros behind, or less; all else is unchanged.
_LAYOUT = (
    *_PADS, aten.slice.Tensor, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.reshape.default, aten.view.default,
)  # fmt: skip
#: What else may: sizes, and memory that the operator writes all of.
_NEITHER = (aten.empty_like.default, aten.sym_size.int, operator.getitem, SET_GRAD_ENABLED)
#: Operands and results of a backward, by the names of the forward's operands.
_GRADIENTS = {"q": "dq", "k": "dk", "v": "dv"}
#: What a backward may be told differently: dropout is switched off.
_OF_NO_CONSEQUENCE = frozenset({*LONGEST, "deterministic", "sm_margin", "zero_tensors", "rng_state"})

Lower = Callable[[GraphModule, Sequence[Any]], GraphModule]


def write_attention_functions(module: GraphModule, mode: Any, rows: RowLength, lower: Lower) -> None:
    """Rewrite every such call of ``module`` in place.  ``lower``: a body for values, in ATen operators."""
    for node in [n for n in module.graph.nodes if n.target is CUSTOM_FUNCTION]:
        forward, backward, *operands = positional(node)
        if not any(map(call_of, forward.meta["val"].graph.nodes)):
            continue
        values = [_value(x) for x in operands]
        body = lower(forward.meta["val"], [x.detach() if isinstance(x, torch.Tensor) else x for x in values])
        call = _only(body, call_of)
        if call is None or not can_be_masked(call[1], rows):
            continue
        (result, *others), saved = _returned(body)
        read = {positional(user)[1] for user in node.users if user.users}
        if read != {0} or _source(result, aten.slice.Tensor) is not _part(call[0], 0):
            continue
        derivative = lower(backward.meta["val"], [_value(x) for x in (result, *others, *saved)])
        kept = dict(zip(placeholders(derivative)[1 + len(others) :], saved, strict=True))
        if _is_derivative(derivative, kept, call, dict(zip(placeholders(body), operands, strict=True))):
            with module.graph.inserting_before(node):
                new = _written(Builder(module.graph, mode, node), body, call, operands, result)
            for user in [u for u in node.users if u.users]:
                user.replace_all_uses_with(new)


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, Node) else x


def _returned(body: GraphModule) -> Any:
    (output,) = (n for n in body.graph.nodes if n.op == "output")
    return positional(output)[0]


def _only(body: GraphModule, known: Callable[[Node], Any]) -> tuple[Node, Any] | None:
    """The one node of ``body`` that is neither layout nor nothing, as what it is known for."""
    nodes = [n for n in body.graph.nodes if n.op not in ("placeholder", "output")]
    nodes = [n for n in nodes if not _is_layout(n) and n.target not in _NEITHER]
    found = known(nodes[0]) if len(nodes) == 1 else None
    return None if found is None else (nodes[0], found)


def _part(call: Node, number: int) -> Node | None:
    return next((u for u in call.users if u.target is operator.getitem and u.args[1] == number), None)


def _is_layout(node: Node) -> bool:
    """What it may take or add is at the end: two of them that fit one another are each other's transposes."""
    given = arguments(node) if node.target in _LAYOUT else {}
    if node.target in _PADS:
        front, *behind = given["pad"]
        constant = given.get("mode", "constant") == "constant" and not given.get("value")
        return constant and front == 0 and len(behind) == 1 and behind[0] >= 0
    if node.target is aten.slice.Tensor:
        last = given["dim"] in (-1, node.meta["val"].dim() - 1)
        return last and given["start"] in (None, 0) and given["step"] == 1
    return node.target in _LAYOUT


def _source(x: Any, *shaping: Any) -> Any:
    """What ``x`` is, seen through layout that changes no sizes, and through ``shaping``."""
    while isinstance(x, Node) and x.target in _LAYOUT:
        operand = positional(x)[0]
        sizes = [[expr_of(size) for size in n.meta["val"].shape] for n in (x, operand)]
        if x.target not in shaping and sizes[0] != sizes[1]:
            break
        x = operand
    return x


def _backward_of(node: Node) -> dict[str, Any] | None:
    """The arguments of a call that writes gradients of an attention into its operands."""
    given = dict(node.kwargs) if node.target is RETURNING else {}
    return given if given.keys() >= {"dout", "out", "softmax_lse", *_GRADIENTS.values()} else None


def _is_derivative(
    module: GraphModule, kept: dict[Node, Any], call: tuple[Node, Call], operands: dict[Node, Any]
) -> bool:
    """``kept``: which node of the forward each of what the backward is given is; ``operands``: by the
    forward's placeholders, in whose order the backward returns."""
    found = _only(module, _backward_of)
    if found is None:
        return False
    (node, given), (attend, forward) = found, call
    if _source(given["dout"], *_PADS) is not placeholders(module)[0]:
        return False
    wanted = {**forward.given, "out": _part(attend, 0), "softmax_lse": _part(attend, 1)}
    wanted["is_causal"] = wanted["causal"] = wanted.get("causal", wanted.get("is_causal"))
    for name in given.keys() - _OF_NO_CONSEQUENCE - {"dout", *_GRADIENTS.values()}:
        value = kept.get(_source(given[name]), given[name]) if isinstance(given[name], Node) else given[name]
        if value is not wanted.get(name) and (isinstance(value, Node) or value != wanted.get(name)):
            return False
    schema = schema_of(positional(node)[0])
    writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    first = max(1, len(schema.returns))
    gradients = {_source(forward.given[x], *_PADS): first + writes.index(dx) for x, dx in _GRADIENTS.items()}
    if len(gradients) < len(_GRADIENTS) or not gradients.keys() <= operands.keys():
        return False
    wanted_of = {x: _part(node, number) for x, number in gradients.items()}
    if any(part is None and may_have_gradient(operands[x]) for x, part in wanted_of.items()):
        return False
    returned = [_source(x, aten.slice.Tensor) for x in _returned(module)]
    return returned == [wanted_of.get(operand) for operand in operands]


def _written(
    build: Builder, body: GraphModule, call: tuple[Node, Call], operands: Sequence[Any], result: Node
) -> Node:
    attend, of = call
    copies: dict[Node, Any] = dict(zip(placeholders(body), operands, strict=True))

    def copied(x: Any) -> Any:
        return map_arg(x, lambda n: copies[n])

    for node in body.graph.nodes:
        if node is attend:
            copies[_out_of(attend)] = masked(build, of._replace(given=copied(of.given)))
        elif node.op == "call_function" and node.target in (*_LAYOUT, aten.sym_size.int):
            copies[node] = build(node.target, *copied(positional(node)), **copied(node.kwargs))
    return copies[result]


def _out_of(attend: Node) -> Node:
    out = _part(attend, 0)
    assert out is not None, "what the function returns was made of it"
    return out
