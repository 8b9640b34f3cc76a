"""``grad_sync=False``: every rank has a share of each gradient, unless the parameter is used elsewhere.

What runs outside of compiled code, an embedding in front of a graph break, say, runs whole on every rank, and
so its parameters get whole gradients there.  Added up over ranks, one of the two would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hsap_compile.errors import Refused

_MADE = "hsap_compile"  # a key of a node's metadata: a compiled graph returned its result


def mark(outputs: Sequence[Any]) -> None:
    """Note in autograd's graph that a compiled graph returned ``outputs``."""
    for value in outputs:
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            metadata: Any = value.grad_fn.metadata
            metadata[_MADE] = True


def check_inputs(args: Sequence[Any], names: Sequence[str]) -> None:
    """Raises ``Refused`` where one of ``args`` is made of a parameter by other than compiled graphs."""
    if not torch.is_grad_enabled():
        return
    for value, name in zip(args, names, strict=True):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            found = _parameter_behind(value.grad_fn)
            if found is not None:
                raise Refused(
                    "a parameter that is used outside of compiled code gets its whole gradient on every rank",
                    got=f'"grad_sync": False, and {name}, made of a parameter of shape {tuple(found.shape)} '
                    "in front of the compiled function or of a graph break",
                    wanted="all parameters inside of compiled code, whose gradients are shares",
                    do='drop "grad_sync": False (gradients are then whole and equal on every rank, of which '
                    "DistributedDataParallel and FSDP take the mean), or compile the whole model as one",
                )


def _parameter_behind(node: Any) -> nn.Parameter | None:
    """A parameter that the result of ``node`` has a gradient for, through no compiled graph."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if _MADE in node.metadata:
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            return leaf
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        waiting += following
    return None
