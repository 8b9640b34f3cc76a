"""``explain``: what the backend would do with a model and a batch on many ranks, found out on one machine.

Every graph that dynamo makes of the model goes through the passes of the pipeline for a mesh that need not
be there.  Nothing that involves a parameter is computed: where dynamo runs a graph, zeros of the right shapes
come out of it, so that the code after a graph break can be traced as well.
"""

from __future__ import annotations

import math
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node

from hsap_compile._torch import (
    RetraceWithSymbols,
    TorchDynamoException,
    break_of,
    check_version,
    hint_of,
    operator_name,
    source_name,
)
from hsap_compile.backend import of_constants, prepare
from hsap_compile.errors import Refused, where
from hsap_compile.facts import (
    AttentionFact,
    Collective,
    Explanation,
    Gathered,
    GraphExplanation,
)
from hsap_compile.graph import ancestors, extract, placeholders, positional
from hsap_compile.kernels import dense, exchange
from hsap_compile.options import Options, parse
from hsap_compile.outputs import bytes_of, leaving
from hsap_compile.passes.capture import capture
from hsap_compile.passes.choose_saved import sends_rows
from hsap_compile.passes.partition_attention import Site
from hsap_compile.passes.shard_tokens import Fallback
from hsap_compile.pipeline import Rewritten, rewrite
from hsap_compile.plan import Placement
from hsap_compile.plan.shifts import Shift, shifted
from hsap_compile.runtime import StepReport

aten = torch.ops.aten


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    hsap_ranks: int = 8,
    hsap_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="hsap")(*args, **kwargs)`` would do on ``hsap_ranks`` ranks.

    One process, no torch.distributed, no GPU; no parameter is read or written.  Code of the model that dynamo
    does not trace (between graph breaks) runs, on zeros where graphs would have computed values.

    Args:
        model: a module or function, not compiled.
        args, kwargs: the whole batch, as for the model itself.
        hsap_ranks: ranks of the mesh that is asked about, 1 or more.
        hsap_options: the backend's options, such as {"intra": 4}; see ``hsap_compile.options.Options``.

    Raises:
        Refused: an option is wrong.  What is refused of the model is in the result.
        ValueError: hsap_ranks is below 1.
    """
    check_version()
    if hsap_ranks < 1:
        raise ValueError(f"explain: got hsap_ranks={hsap_ranks}; wanted 1 or more: pass a number of ranks")
    explainer = _Explainer(parse(hsap_options, None), hsap_ranks, torch.is_grad_enabled())

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # dynamo keeps what it compiled with the code object: one of this call's own leaves no entries behind
    own: Any = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    failure = ""
    try:
        torch.compile(own, backend=explainer.backend)(*args, **kwargs)
    except TorchDynamoException as error:
        failure = str(error)
    except Exception as error:
        if not explainer.graphs:
            raise
        failure = (
            f"the model's code after graph {len(explainer.graphs)} raised {type(error).__name__}: {error} "
            "(it ran on zeros)"
        )
    if not explainer.graphs and not failure:
        failure = "dynamo found nothing to compile in the model: it would run as it is, on every rank"
    return Explanation(hsap_ranks, tuple(explainer.graphs), failure)


class _Explainer:
    """A backend that keeps a ``GraphExplanation`` of every graph."""

    def __init__(self, options: Options, ranks: int, grad: bool) -> None:
        self.options, self.ranks, self.grad = options, ranks, grad
        self.graphs: list[GraphExplanation] = []

    def backend(self, module: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        if of_constants(module):
            return module.forward
        made: Rewritten | str
        names = [source_name(n) for n in placeholders(module)]  # dynamo forgets them after compilation
        try:
            made = rewrite(module, self.options, prepare(module, examples, self.ranks), self.ranks, "")
        except RetraceWithSymbols:
            raise
        except (Refused, ValueError) as error:
            made = str(error)

        def run(*args: Any) -> Any:
            self.graphs.append(self._explained(module, made, names, args))
            return _stand_ins(module, args)

        return run

    def _explained(
        self, module: GraphModule, made: Rewritten | str, names: Sequence[str], args: Sequence[Any]
    ) -> GraphExplanation:
        stopped = break_of(module)
        if isinstance(made, str):
            return GraphExplanation(refused=made, break_reason=stopped)
        program, graph = made.program, made.graph
        try:
            step = program.report(program.plan(program.read(args), program.length(args)))
        except (Refused, ValueError) as error:
            return GraphExplanation(refused=str(error), break_reason=stopped)
        named = dict(zip(placeholders(graph), names, strict=False))  # tables follow the inputs
        outputs, for_outputs = leaving(graph, program.local_outputs)
        summed = [n for n in _calls(graph, exchange.BROADCAST) if _of_input(n)]
        gathers = [n for n in _calls(graph, exchange.GATHER) if n not in for_outputs]
        return GraphExplanation(
            attentions=_all_attentions(made, step, named, program.fallbacks),
            gathered=_fallbacks(program.fallbacks, gathers),
            outputs=outputs,
            collectives=_counted(graph, step, for_outputs, self.grad),
            parameters=len(summed),
            parameter_bytes=sum(map(bytes_of, summed)),
            grad_sync=self.options.grad_sync,
            grad=self.grad,
            step=step,
            whole=program.whole,
            break_reason=stopped,
        )


# --- from a rewritten graph to facts --------------------------------------------------------------------


def _all_attentions(
    made: Rewritten, step: StepReport, names: Mapping[Node, str], fallbacks: Sequence[Fallback]
) -> tuple[AttentionFact, ...]:
    found = []
    for site, traffic in zip(made.sites, made.program.traffic, strict=True):
        sent = int(step.plan.masks[traffic.mask].rows_sent.sum())
        found.append(_fact(site, names, _partition(site, step, sent), ""))
    reasons = {f.at: f.reason for f in fallbacks}
    for node in made.graph.graph.nodes:
        if node.target is dense.OP:
            site = Site.of(node)
            why = reasons.get(site.at, "its queries or keys are not the batch's tokens, one row a token")
            found.append(_fact(site, names, "every rank computes all of it", why))
    found += [
        AttentionFact(at, module, "", (), 0, 0, "as any operators", why)
        for at, module, why in made.as_written
    ]
    return tuple(found)


def _fact(site: Site, names: Mapping[Node, str], how: str, dense: str) -> AttentionFact:
    called: list[str] = []
    reads = []
    for leaf, made_at in zip(site.leaves, site.reads, strict=True):
        name = names.get(leaf) or operator_name(leaf.target).split("::")[-1]
        name = name if name not in called else f"{name}_{len(called)}"
        called.append(name)
        reads.append(f"{name}: {'an input' if leaf in names else made_at}")
    return AttentionFact(
        site.at, site.module, site.mask.readable(called), tuple(reads), site.heads, site.kv_heads, how, dense
    )


def _partition(site: Site, step: StepReport, rows: int) -> str:
    placement = step.plan.placement
    mesh = placement.mesh
    if mesh.size == 1:
        return "on the one rank, over the pairs that the mask allows"
    parts = []
    if mesh.intra > 1:
        parts.append(
            f"{int(placement.alone.sum())} of {placement.tokens} tokens alone on their rank, the others' "
            f"heads exchanged: {site.heads // mesh.intra} of {site.heads} a rank"
        )
    if mesh.inter > 1:
        parts.append(f"{rows} key/value rows sent between {mesh.inter} groups")
    return "; ".join(parts)


def _fallbacks(fallbacks: Sequence[Fallback], gathers: Sequence[Node]) -> tuple[Gathered, ...]:
    sizes: Counter[str] = Counter()
    for node in gathers:
        sizes[where(node)] += bytes_of(node)
    # a place's gathers are counted once, with the first operator that stands there
    return tuple(Gathered(f.operator, f.reason, f.at, f.module, sizes.pop(f.at, 0)) for f in fallbacks)


def _counted(
    graph: GraphModule, step: StepReport, for_outputs: set[Node], grad: bool
) -> tuple[Collective, ...]:
    gathers = _calls(graph, exchange.GATHER)
    exchanges = _calls(graph, exchange.ALL_TO_ALL)
    rows = [n for n in exchanges if sends_rows(n)]
    shifts = [n for n in exchanges if isinstance(_splits(n)[0], Shift)]
    heads = [n for n in exchanges if n not in rows and n not in shifts]
    returned, forward_rows = [*rows, *(rows if step.again else [])], step.rows_bytes
    returned_shifts = [n for n in shifts if n.meta["val"].is_floating_point()]
    away, back = (sum(_shifted(n, step.plan.placement) for n in nodes) for nodes in (shifts, returned_shifts))
    sums = _calls(graph, exchange.BROADCAST)
    of_inputs = [n for n in sums if _of_input(n)]
    outputs = [n for n in gathers if n in for_outputs]
    inside = [n for n in gathers if n not in for_outputs]
    extremes = _calls(graph, exchange.EXTREME)
    learned = [n for n in extremes if n.meta["val"].is_floating_point() and not _is_detached(n)]
    parts = [n for n in graph.graph.nodes if n.op.startswith("call") and _is_made_of_parts(n)]
    everyone = "all ranks"
    rows_of_table: tuple[tuple[str, str, list[Node], list[Node], int | None, int | None], ...] = (
        ("heads of attention", "in groups", heads, heads, step.intra_bytes // 2, step.intra_bytes // 2),
        ("keys and values", "between groups", rows, returned, forward_rows, step.inter_bytes - forward_rows),
        ("rows of shifted tokens", everyone, shifts, returned_shifts, away, back),
        ("gathered for outputs", everyone, outputs, [], None, None),
        ("gathered for operators", everyone, inside, [], None, None),
        ("gradients of whole values cut into rows", everyone, [], _calls(graph, exchange.SHARD), None, None),
        ("sums over tokens", everyone, _calls(graph, exchange.SUM_RANKS), [], None, None),
        ("largest of tokens", everyone, extremes, learned, None, None),
        ("gradient sums of parameters", everyone, [], of_inputs, None, None),
        ("parameters in parts, and again what the backward reads", "their mesh", parts, [], None, None),
        ("gradient sums of parts", "their mesh", [], [n for n in parts if _has_gradient(n)], None, None),
        ("gradient sums of other values", everyone, [], [n for n in sums if n not in of_inputs], None, None),
    )
    found = []
    for what, level, forward, backward, forward_bytes, backward_bytes in rows_of_table:
        backward = backward if grad else []
        if forward or backward:
            sent = sum(map(bytes_of, forward)) if forward_bytes is None else forward_bytes
            got = sum(map(bytes_of, backward)) if backward_bytes is None else backward_bytes
            found.append(Collective(what, level, len(forward), len(backward), sent, got if grad else 0))
    return tuple(found)


def _calls(graph: GraphModule, target: Any) -> list[Node]:
    return [n for n in graph.graph.nodes if n.target is target]


def _is_made_of_parts(node: Node) -> bool:
    """Whether it is the last call that makes a distributed parameter whole."""
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    return not isinstance(node.meta.get("val"), DTensor) and any(isinstance(x, DTensor) for x in operands)


def _has_gradient(node: Node) -> bool:
    return bool(node.meta["val"].requires_grad)


def _splits(exchanged: Node) -> Any:
    """The table that says how many rows go where."""
    return positional(exchanged)[1].meta["table"]


def _shifted(exchanged: Node, placement: Placement) -> int:
    """Bytes that all ranks send of tokens that others read at a distance."""
    sent = positional(exchanged)[0].meta["val"]
    row = math.prod(hint_of(s) for s in sent.shape[1:]) * int(sent.itemsize)
    return row * int(shifted(placement, _splits(exchanged)[0]).rows(placement.mesh.size).sum())


def _is_detached(node: Node) -> bool:
    return positional(node)[0].target is torch.ops.aten.detach.default


def _of_input(node: Node) -> bool:
    return bool(positional(node)[0].op == "placeholder")


def _stand_ins(module: GraphModule, args: Sequence[Any]) -> tuple[Any, ...]:
    """What the graph returns, of the right shapes: zeros, which take no memory until somebody writes them,
    except that integers and truth values of inputs alone are computed: masks and positions are such."""
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    wanted: Any = positional(output)[0]
    values = [w.meta["example_value"] if isinstance(w, Node) else w for w in wanted]
    exact = [i for i, value in enumerate(values) if _discrete(value)]
    computed: dict[int, Any] = {}
    if exact:
        graph = capture(module)
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        nodes: Any = positional(output)[0]
        exact = [i for i in exact if not any(n.meta.get("parameter") for n in ancestors([nodes[i]]))]
        with torch.no_grad():
            results = extract(graph, [nodes[i] for i in exact], len(placeholders(graph)))(*args)
        computed.update(zip(exact, results, strict=True))
    return tuple(computed[i] if i in computed else _zeros(value) for i, value in enumerate(values))


def _discrete(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _zeros(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return hint_of(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [hint_of(s) for s in value.shape]
    zeros = torch.zeros((), dtype=value.dtype).new_zeros(shape)
    return zeros.requires_grad_() if value.requires_grad else zeros
