"""What leaves a rewritten graph with tokens in it: this rank's rows, or gathered."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import hint_of
from hsap_compile.errors import where
from hsap_compile.facts import Output
from hsap_compile.graph import positional
from hsap_compile.kernels import exchange

log = logging.getLogger("hsap_compile")

aten = torch.ops.aten
_MOVED = (aten.slice.Tensor, aten.reshape.default)  # what shard_tokens puts behind a gather

#: Bytes of a gathered output that are worth a warning.
LARGE = 1 << 24


def leaving(graph: GraphModule, local: Collection[int]) -> tuple[tuple[Output, ...], set[Node]]:
    """The outputs with tokens, and the gathers that are there for outputs alone."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    values: Any = positional(output)[0]
    found, gathers = [], set()
    for i, value in enumerate(values):
        source = value
        while isinstance(source, Node) and source.target in _MOVED and len(source.users) == 1:
            source = positional(source)[0]
        gathered = isinstance(source, Node) and source.target is exchange.GATHER
        if i not in local and not gathered:
            continue
        if gathered and len(source.users) == 1:
            gathers.add(source)
        value_now = value.meta["val"]
        shape = () if i in local else tuple(hint_of(s) for s in value_now.shape)
        size = 0 if i in local else bytes_of(value)
        at = where(positional(source)[0] if gathered else source)
        found.append(Output(i, shape, str(value_now.dtype).removeprefix("torch."), size, gathered, at))
    return tuple(found), gathers


def warn_of_large(outputs: Collection[Output], stopped: str, asked: str) -> None:
    """Say once for each graph which outputs are large and gathered; ``stopped``: why the graph ends before
    its function does, if it does; ``asked``: the option "outputs"."""
    if stopped:
        why = f"it crosses a graph break ({stopped})"
    elif asked == "local":
        why = "it has no row for each token"
    else:
        why = "options={'outputs': 'local'} keeps this rank's rows and sends nothing"
    for output in outputs:
        if output.gathered and output.bytes >= LARGE:
            log.warning(
                "output %d of the graph, %s %s (%d MiB), made at %s, is gathered on every rank: %s",
                output.index,
                output.dtype,
                list(output.shape),
                output.bytes >> 20,
                output.at,
                why,
            )


def bytes_of(node: Node) -> int:
    """Of the value that ``node`` gathers, cuts into rows or sums, whole."""
    value = (positional(node)[0] if node.target is exchange.SHARD else node).meta["val"]
    return math.prod(hint_of(s) for s in value.shape) * int(value.itemsize)
