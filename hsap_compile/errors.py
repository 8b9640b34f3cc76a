"""What a user reads when something cannot be done: what, got, wanted, what to do, and where."""

from __future__ import annotations

import os
import re

import torch
from torch.fx import Node

_TORCH = os.path.dirname(torch.__file__) + os.sep


class Refused(RuntimeError):
    """The model, batch, mesh or option cannot be handled exactly."""

    def __init__(self, what: str, *, got: str, wanted: str, do: str, at: str = "") -> None:
        place = f"\n  at:     {at}" if at else ""
        super().__init__(f"hsap: {what}.\n  got:    {got}\n  wanted: {wanted}\n  do:     {do}{place}")


def too_few(tokens: int, ranks: int, least: int) -> Refused:
    """Of a row that not every rank would have ``least`` tokens of."""
    return Refused(
        "a row has too few tokens",
        got=f"{tokens} tokens on {ranks} ranks",
        wanted=f"at least {least * ranks}, {least} a rank",
        do="pass longer rows (pad short ones), or use fewer ranks",
    )


def where(node: Node) -> str:
    """``file:line, code`` of the model's source that ``node`` came from, or the operator when unknown.

    The innermost frame that is not torch's own: who calls ``F.pad`` looks for that line, not for torch's."""
    return innermost(node.meta.get("stack_trace") or "") or str(node.target)


def innermost(stack: str) -> str:
    """``file:line, code`` of the innermost frame of a formatted stack that is not torch's own; "" of none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', stack)
    if not frames:
        return ""
    file, line, code = ([f for f in frames if not f[0].startswith(_TORCH)] or frames)[-1]
    return f"{file}:{line}, `{code.strip()}`"


def module_of(node: Node) -> str:
    """The name in the model of the module whose forward ``node`` comes from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()][-1:]
    return path[0].partition(".")[2] if path else ""
