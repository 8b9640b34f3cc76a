"""The rewritten graph of a whole model on every rank of a mesh, in one process.

``traced(model, batch)`` is what dynamo hands to the backend; ``simulate(traced, inter, intra)`` compiles it
once for that mesh and runs it, forward and backward, on threads that are its ranks; ``eager(traced)`` is
one process running the untouched graph.  Both return a ``Step``.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from torch.fx.node import map_aggregate

from hsap_compile.backend import prepare
from hsap_compile.options import parse
from hsap_compile.pipeline import compile_graph
from hsap_compile.runtime import Program, Runner
from threads import run_threads


def since(version: tuple[int, int], before: str) -> pytest.MarkDecorator:
    """For a test of what earlier versions of torch cannot do; ``before``: what is so in them."""
    earlier = f"before torch {version[0]}.{version[1]} {before}"
    return pytest.mark.skipif(torch.__version__ < version, reason=earlier)


@dataclass(frozen=True)
class Traced:
    """Dynamo's graph, the symbol of its inputs' length, and the arguments of the traced call."""

    module: torch.fx.GraphModule
    length: sympy.Expr | None
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """Outputs of one call, and the gradient of every argument that has one (by position)."""

    outputs: tuple[Any, ...]
    gradients: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Simulated:
    """One ``Step`` a rank, and the program they ran."""

    ranks: tuple[Step, ...]
    program: Program
    runner: Runner


def traced(model: Callable[..., Any], batch: Mapping[str, Any], ranks: int = 2) -> Traced:
    """The one graph of ``model(**batch)``, symbolic in the tokens, for one rank or several."""
    torch._dynamo.reset()
    found: list[Traced] = []

    def backend(module: torch.fx.GraphModule, examples: Any) -> Any:
        length = prepare(module, examples, ranks)

        def call(*args: Any) -> Any:
            found.append(Traced(module, length, args))
            return module(*args)

        return call

    torch.compile(model, backend=backend, fullgraph=True)(**batch)
    (result,) = found
    return result


def widened(trace: Traced) -> Traced:
    """``trace`` with every float32 in its code replaced by float64.

    Models take norms, softmax and losses to float32; in float64 both sides of a comparison can be exact.
    """
    module = copy.deepcopy(trace.module)
    for graph in (m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in graph.nodes:
            if node.op == "call_method" and node.target == "float":
                node.target = "double"
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda x: torch.float64 if x is torch.float32 else x
            )
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            part.recompile()
    return Traced(module, trace.length, trace.args)


def rebatched(trace: Traced, old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of ``trace``, which was made of the batch ``old``, for another batch."""
    names = {id(value): name for name, value in old.items() if isinstance(value, torch.Tensor)}
    length = next(
        value.shape[-1] for value in new.values() if isinstance(value, torch.Tensor) and value.dim() == 2
    )

    def value(argument: Any) -> Any:
        if type(argument) is int:  # dynamo passes S as an argument of its own
            return length
        return new[names[id(argument)]] if id(argument) in names else argument

    return tuple(value(argument) for argument in trace.args)


def eager(trace: Traced, args: tuple[Any, ...] | None = None) -> Step:
    return _step(trace.module, trace.args if args is None else args)


def simulate(
    trace: Traced, inter: int, intra: int, *more: tuple[Any, ...], backward: bool = True, **options: Any
) -> Simulated:
    """Run ``trace``; with ``more`` arguments, call after call, and return the last."""
    return simulate_all(trace, inter, intra, trace.args, *more, backward=backward, **options)[-1]


def simulate_all(
    trace: Traced, inter: int, intra: int, *calls: tuple[Any, ...], backward: bool = True, **options: Any
) -> list[Simulated]:
    """Compile ``trace`` once and call it with each of ``calls``."""
    lock, shared = threading.Lock(), {}
    chosen = parse({"lower": "eager", "intra": intra, **options}, None)

    def rank() -> list[Step]:
        with lock:
            if "runner" not in shared:
                shared["runner"] = Runner(compile_graph(trace.module, chosen, trace.length))
        return [_step(shared["runner"], args, backward) for args in calls]

    ranks = run_threads(inter * intra, rank)
    runner = shared["runner"]
    return [Simulated(tuple(steps), runner.program, runner) for steps in zip(*ranks, strict=True)]


def _step(function: Callable[..., Any], args: tuple[Any, ...], backward: bool = True) -> Step:
    fresh = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
    ]
    outputs = tuple(function(*fresh))
    floating = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if backward and floating:
        scalars = [o for o in floating if o.dim() == 0]
        total = scalars[0] if scalars else sum(_weighted(o) for o in floating)
        total.backward()
    gradients = {i: a.grad for i, a in enumerate(fresh) if isinstance(a, torch.Tensor) and a.grad is not None}
    return Step(tuple(o.detach() if isinstance(o, torch.Tensor) else o for o in outputs), gradients)


def _weighted(output: torch.Tensor) -> torch.Tensor:
    """A loss that treats every element differently, the same on every rank."""
    weights = torch.linspace(-1.0, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def worst(got: Step, wanted: Step) -> tuple[float, float]:
    """The largest relative errors of outputs and of gradients, to the largest element of each.

    A gradient that cancels to nothing has no digits of its own: it is measured by the largest of the others.
    """
    assert set(got.gradients) == set(wanted.gradients), "gradients of other arguments than eager's"
    outputs = [
        relative(a, b)
        for a, b in zip(got.outputs, wanted.outputs, strict=True)
        if isinstance(b, torch.Tensor) and (b.is_floating_point() or b.is_complex())
    ]
    largest = max((float(g.abs().max()) for g in wanted.gradients.values() if g.numel()), default=0.0)
    floor = 0.0 if math.isnan(largest) else 1e-4 * largest
    gradients = [relative(got.gradients[i], wanted.gradients[i], floor) for i in wanted.gradients]
    return max(outputs, default=0.0), max(gradients, default=0.0)


def relative(got: torch.Tensor, wanted: torch.Tensor, floor: float = 0.0) -> float:
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if wanted.is_complex():
        got, wanted = (torch.view_as_real(x.resolve_conj()) for x in (got, wanted))
    assert torch.equal(got.isnan(), wanted.isnan()), "NaN where eager has none, or the other way round"
    difference = (
        (got.double() - wanted.double()).nan_to_num().abs().max() if got.numel() else torch.tensor(0.0)
    )
    scale = wanted.double().nan_to_num().abs().max() if got.numel() else torch.tensor(0.0)
    scale = max(float(scale), floor)
    return float(difference) / scale if scale > 0 else float(difference)
