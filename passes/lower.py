"""Pass 8: the rewritten graph -> a callable, by Inductor, AOTAutograd alone, or as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from hsap_compile._torch import (
    OVERLAP_PATCHES,
    compile_with_aot_eager,
    compile_with_inductor,
    without_autocast,
)
from hsap_compile.graph import placeholders
from hsap_compile.kernels import exchange
from hsap_compile.passes.overlap import Overlap


def lower(module: GraphModule, how: str, patches: dict[str, Any]) -> Callable[..., Any]:
    """``how``: "inductor", "aot_eager" or "eager".  ``patches``: of Inductor's configuration; overlap is one
    unless they say otherwise.  Autocast was made explicit by ``capture``, so that it must not be applied a
    second time."""
    inputs = [n.meta["val"] for n in placeholders(module)]
    with without_autocast():
        if how == "eager":
            return module
        if how == "aot_eager":
            return compile_with_aot_eager(module, inputs)
        crossing = any(n.target is exchange.ALL_TO_ALL for n in module.graph.nodes)
        ours = {"post_grad_custom_post_pass": Overlap(), **(OVERLAP_PATCHES if crossing else {})}
        return compile_with_inductor(module, inputs, {**ours, **patches})
