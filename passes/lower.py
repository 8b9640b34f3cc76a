"""Pass 8: the rewritten graph -> a callable, by Inductor, AOTAutograd alone, or as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from hsap_compile._torch import compile_with_aot_eager, compile_with_inductor, without_autocast
from hsap_compile.graph import placeholders


def lower(module: GraphModule, how: str, patches: dict[str, Any]) -> Callable[..., Any]:
    """``how``: "inductor", "aot_eager" or "eager".  Autocast was made explicit by ``capture``, so that
    it must not be applied a second time."""
    inputs = [n.meta["val"] for n in placeholders(module)]
    with without_autocast():
        if how == "eager":
            return module
        if how == "aot_eager":
            return compile_with_aot_eager(module, inputs)
        return compile_with_inductor(module, inputs, patches)
