"""Pass 10: the rewritten graph -> a callable, by Inductor, AOTAutograd alone, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from hsap_compile._torch import (
    as_backend_sees,
    compile_with_aot_eager,
    compile_with_inductor,
    keeping,
    without_autocast,
)
from hsap_compile.graph import placeholders
from hsap_compile.kernels import exchange
from hsap_compile.passes.choose_saved import choices
from hsap_compile.passes.overlap import PATCHES, Overlap


def lower(
    module: GraphModule, how: str, patches: Mapping[str, Any], budget: float | None = None
) -> Callable[..., Any]:
    """``how``: "inductor", "aot_eager" or "eager".  ``patches``: of Inductor's configuration; overlap is one
    unless they say otherwise.  ``budget``: see ``Options.memory_budget``.  Autocast was made explicit by
    ``capture``, so that it must not be applied a second time."""
    inputs = as_backend_sees([n.meta["val"] for n in placeholders(module)])
    with without_autocast(), keeping(budget):
        if how == "eager":
            return module
        if how == "aot_eager":
            return compile_with_aot_eager(module, inputs)
        crossing = any(n.target is exchange.ALL_TO_ALL for n in module.graph.nodes)
        crossing |= any(isinstance(x, DTensor) for x in inputs)
        ours = {"post_grad_custom_post_pass": Overlap(saved=choices(module))}
        overlapping = PATCHES if crossing else {}
        return compile_with_inductor(module, inputs, {**ours, **overlapping, **patches})
