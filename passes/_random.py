"""Random numbers: drawn on the rank of their tokens, or agreed on where every rank reads them.

before: t = rand(B);                  y = x * rand(x.shape)
after:  t = sum_ranks(on_first(rand(B)));  y = x_local * rand(x_local.shape)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import is_operator, operator_name
from hsap_compile.errors import Refused, where
from hsap_compile.graph import arguments
from hsap_compile.kernels import exchange
from hsap_compile.passes._forms import Local
from hsap_compile.passes._operands import output_axis, schema_of

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def is_random(node: Node) -> bool:
    """Whether the operator draws random numbers with these arguments."""
    target: Any = node.target
    if not is_operator(target) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = arguments(node)
    probability = given.get("p", given.get("dropout_p", 1.0))
    return bool(probability) and bool(given.get("train", True))


def drawn(sharder: Sharder, node: Node) -> Any:
    """rand(size) and its like: every rank draws for its own tokens."""
    output_axis(node)
    args = list(map_arg(node.args, sharder.whole))
    args[[argument.name for argument in schema_of(node)].index("size")] = sharder.local_shape(node)
    return Local(sharder.emit(node.target, *args, **node.kwargs))


def agreed(sharder: Sharder, node: Node, draw: Node) -> Node:
    """What the first rank drew, on every rank.  What dropout keeps of ones is what it keeps of any x."""
    value = draw.meta["val"]
    if isinstance(value, torch.Tensor) and not (node in sharder.differentiable and value.is_floating_point()):
        kind = torch.uint8 if value.dtype == torch.bool else value.dtype
        sent = sharder.emit(exchange.ON_FIRST, sharder.emit(aten.to.dtype, draw, kind), sharder.group)
        return sharder.emit(aten.to.dtype, sharder.emit(exchange.SUM_RANKS, sent, sharder.group), value.dtype)
    if node.target not in (aten.dropout.default, aten.feature_dropout.default):
        raise disagreed(node)
    x, *rest = draw.args
    ones = sharder.emit(aten.ones_like.default, sharder.emit(aten.detach.default, x))
    kept = sharder.emit(node.target, ones, *rest, **draw.kwargs)
    sent = sharder.emit(exchange.ON_FIRST, kept, sharder.group)
    return sharder.emit(aten.mul.Tensor, x, sharder.emit(exchange.SUM_RANKS, sent, sharder.group))


def disagreed(node: Node) -> Refused:
    return Refused(
        f"{operator_name(node.target)} draws random numbers that every rank would have to agree on",
        got="a random function, of a value with a gradient, that is not computed on one rank's tokens",
        wanted="dropout, random functions of token values, or draws that no gradient flows through",
        do="draw the numbers apart from the value, or outside of the compiled model and pass them in",
        at=where(node),
    )
