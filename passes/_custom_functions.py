"""The rule for a custom ``autograd.Function``: token-wise when its forward and its backward are.

before: y = apply(forward, backward, x, w)          whole x
after:  y = apply(forward', backward', x_local, w)

Both bodies are rewritten by ``shard_tokens`` itself, on their own: the function stays as it is when no
operator of theirs had to be gathered, and no sum crosses ranks but the one that makes a gradient of an
operand without tokens: that one is left out, because gradients of parameters are shares that are summed
outside of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import SET_GRAD_ENABLED, expr_of, run_fake, without_autocast
from hsap_compile.errors import Refused, where
from hsap_compile.graph import placeholders, positional, remove_dead
from hsap_compile.kernels import exchange
from hsap_compile.passes._forms import Frame, Local, NoTables, NotLocal
from hsap_compile.passes._reindex import where as chosen
from hsap_compile.passes.capture import capture_body
from hsap_compile.passes.infer_tokens import MANY, TokenAxis, infer_tokens

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def overwriting(node: Node) -> Refused:
    """Of a call that capture found to be so."""
    return Refused(
        "a custom function writes into its operand, which is read later",
        got="an autograd.Function whose forward overwrites what it is given",
        wanted="a forward that returns new tensors, or overwrites what nobody else reads",
        do="write into a copy (x = x.clone()) in its forward",
        at=where(node),
    )


def custom_function(sharder: Sharder, node: Node) -> Any:
    if any(part.meta.get("tokens") is MANY for part in node.users):
        raise NotLocal("a custom function whose result has several token dimensions")
    forward_node, backward_node, *operands = positional(node)
    forward, backward = forward_node.meta["val"], backward_node.meta["val"]
    values = [n.meta["val"] if isinstance(n, Node) else n for n in operands]
    axes = [n.meta.get("tokens") if isinstance(n, Node) else None for n in operands]
    with torch.no_grad():
        detached = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
        results, saved = run_fake(sharder.mode, forward, detached, {})
    start = sharder.start_of(*node.all_input_nodes)
    first = _Body(sharder, forward, detached, axes, start)
    outputs, kept = first.outputs
    second = _Body(sharder, backward, [*results, *saved], [first.axis(x) for x in (*outputs, *kept)], start)
    local_forward = first.local(lambda x: x)
    local_backward = second.local(second.share)
    local = []
    for operand in operands:
        if isinstance(operand, Node) and operand.op == "get_attr":
            raise NotLocal("a custom function of a constant")
        local.append(_operand(sharder, operand, start) if isinstance(operand, Node) else operand)
    names = []
    for role, body in (("forward", local_forward), ("backward", local_backward)):
        name = f"{node.name}_{role}_local"
        setattr(sharder.old, name, body)
        names.append(sharder.graph.get_attr(name))
        names[-1].meta["val"] = body
    return Local(sharder.emit(node.target, *names, *local, **node.kwargs), start)


def _because_of(fallbacks: Sequence[Any], reason: str) -> str:
    """``reason``, and the operator that had to be gathered."""
    for first in fallbacks[:1]:
        why = "" if first.reason == reason else f", {first.reason}"
        return f"{reason}: {first.operator}{why}"
    return reason


def _operand(sharder: Sharder, node: Node, start: int) -> Any:
    """Rows that are no tokens of the value get no gradient, whatever the backward gives them."""
    value, axis = sharder.operand(node, start), node.meta.get("tokens")
    if not isinstance(axis, TokenAxis) or node not in sharder.differentiable:
        return value
    valid = sharder.valid_rows(axis, start, value.meta["val"].dim())
    if valid is None:
        return value
    return chosen(sharder, valid, value, sharder.emit(aten.detach.default, value))


class _Body:
    """A body, rewritten for local operands with its own graph."""

    def __init__(
        self, outer: Sharder, body: GraphModule, values: Sequence[Any], axes: Sequence[Any], start: int
    ) -> None:
        from hsap_compile.passes.shard_tokens import Sharder

        self.start = start
        with without_autocast():  # explicit in a forward, and not there in a backward
            self.module = capture_body(body, values, grad=False)
        inputs = placeholders(self.module)
        infer_tokens(self.module, outer.length, dict(zip(inputs, axes, strict=True)))
        tables = NoTables("a custom function that mixes tokens")
        frame = Frame(outer.length, tables, outer.frame.rows, chunk=outer.frame.chunk)
        self.inner = inner = Sharder(
            self.module, outer.mode, frame, outer.group, strict=False, token_wise=outer.token_wise
        )
        for placeholder, axis in zip(inputs, axes, strict=True):
            new = inner.graph.placeholder(placeholder.name)
            new.meta["val"] = placeholder.meta["val"]
            if isinstance(axis, TokenAxis):
                new.meta["val"] = self._local_value(placeholder.meta["val"], axis, outer)
                inner.home[placeholder] = Local(new, start, frame=frame)
            else:
                inner.wholes[placeholder] = new
                if isinstance(placeholder.meta["val"], torch.SymInt):
                    inner.symbols[expr_of(placeholder.meta["val"])] = new
            inner.heavy.add(placeholder)
        self._count_rows()
        for node in self.module.graph.nodes:
            if node.op in ("call_function", "get_attr") and node.target is not SET_GRAD_ENABLED:
                try:
                    inner.visit(node)
                except NotLocal as reason:
                    raise NotLocal(_because_of(inner.fallbacks, str(reason))) from reason

    def _local_value(self, value: Any, axis: TokenAxis, outer: Sharder) -> Any:
        shape = list(value.shape)
        shape[axis.dim] = outer.frame.rows * (axis.outer * axis.inner)
        return run_fake(outer.mode, value.new_empty, (shape,), {})

    def _count_rows(self) -> None:
        """n, read from an operand."""
        for placeholder, home in self.inner.home.items():
            axis = placeholder.meta["tokens"]
            rows = self.inner.emit(aten.sym_size.int, home.node, axis.dim)
            if axis.folded:
                rows = self.inner.emit(operator.floordiv, rows, axis.outer * axis.inner)
            self.inner.tables["n"] = rows
            return
        raise NotLocal("a custom function without tokens")

    @property
    def outputs(self) -> Any:
        (output,) = (n for n in self.module.graph.nodes if n.op == "output")
        return positional(output)[0]

    def axis(self, value: Any) -> Any:
        return value.meta.get("tokens") if isinstance(value, Node) else None

    def local(self, read: Any) -> GraphModule:
        """The rewritten body; ``read`` makes an output of a whole value."""

        def output(value: Any) -> Any:
            if not isinstance(value, Node):
                return value
            if value in self.inner.home:
                home = self.inner.home[value]
                if home.routed or home.start != self.start:
                    raise NotLocal("a custom function that selects tokens")
                return home.node
            if value.meta.get("tokens") is not None:
                raise NotLocal("a custom function whose result has several token dimensions")
            return read(self.inner.whole(value))

        self.inner.graph.output(torch.fx.node.map_aggregate(self.outputs, output))
        module = GraphModule(self.module, self.inner.graph)
        remove_dead(module)
        crossing = (exchange.GATHER, exchange.SHARD, exchange.SUM_RANKS, exchange.BROADCAST)
        nodes = set(module.graph.nodes)
        if any(n.target in crossing or not nodes.issuperset(n.all_input_nodes) for n in nodes):
            raise NotLocal("a custom function that sums over tokens")
        return module

    def share(self, value: Any) -> Any:
        """This rank's part of a gradient: the sum over ranks is taken by whoever owns the operand.  What is
        no such sum is alike on every rank, and counts on one."""
        if not isinstance(value, Node) or not isinstance(value.meta["val"], torch.Tensor):
            return value
        if value.target is exchange.SUM_RANKS:
            return positional(value)[0]
        return self.inner.emit(exchange.ON_FIRST, value, self.inner.group)
