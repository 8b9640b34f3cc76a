"""What a user reads when something cannot be done: what, got, wanted, what to do, and where."""

from __future__ import annotations

import re

from torch.fx import Node


class Refused(RuntimeError):
    """The model, batch, mesh or option cannot be handled exactly."""

    def __init__(self, what: str, *, got: str, wanted: str, do: str, at: str = "") -> None:
        place = f"\n  at:     {at}" if at else ""
        super().__init__(f"hsap: {what}.\n  got:    {got}\n  wanted: {wanted}\n  do:     {do}{place}")


def where(node: Node) -> str:
    """``file:line, code`` of the model's source that ``node`` came from, or the operator when unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    if not frames:
        return str(node.target)
    file, line, code = frames[-1]
    return f"{file}:{line}, `{code.strip()}`"
