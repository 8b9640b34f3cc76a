"""The order of our operators in the code that Inductor writes."""

from __future__ import annotations

import re
from typing import Any

import torch

from models import batch, build


def order_of_calls(options: dict[str, Any]) -> list[list[str]]:
    """Our operators and the waits, forward and backward, in the order of the generated code."""
    from torch._inductor.utils import run_and_get_code

    model = torch.compile(build("nano", torch.float32), backend="hsap", options=options)

    def step() -> None:
        model(**batch("nano", [[20, 1, 6]]))[0].backward()

    return operators_in(run_and_get_code(step)[1])


def operators_in(code: list[str]) -> list[list[str]]:
    operators = "all_to_all_start|wait_tensor|attend_backward|attend|all_reduce_|sum_ranks|pack|unpack"
    pattern = re.compile(
        rf"^\s*(?:\w+ = )?(?:torch\.ops\.\w+\.({operators})\.default|extern_kernels\.(mm))\("
    )
    found = []
    for graph in code:
        matches = [pattern.search(line) for line in graph.splitlines()]
        found.append([m.group(1) or m.group(2) for m in matches if m])
    return found
