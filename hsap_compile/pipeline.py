"""The compiler: a list of passes over one graph, verified between them.

Each pass is a file in ``passes`` with one public function; this list is the architecture.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from hsap_compile import formula
from hsap_compile._torch import (
    break_of,
    expr_of,
    fake_mode_of,
    fake_table,
    fixed_at,
    size_now,
    source_name,
    trace_structured,
)
from hsap_compile.errors import Refused, innermost, module_of, where
from hsap_compile.graph import extract, placeholders, positional
from hsap_compile.kernels import dense, varlen
from hsap_compile.mesh import group_name, mesh_shape, place_in
from hsap_compile.options import Options
from hsap_compile.outputs import leaving, warn_of_large
from hsap_compile.passes._random import is_random
from hsap_compile.passes._regions import drop_idle_layouts
from hsap_compile.passes.capture import capture
from hsap_compile.passes.choose_saved import choices, choose_saved
from hsap_compile.passes.find_attention import Attention, find_attention
from hsap_compile.passes.gather_parameters import gather_parameters
from hsap_compile.passes.infer_tokens import infer_tokens, longest_row, symbol_of
from hsap_compile.passes.lift_mask import lift_mask
from hsap_compile.passes.lower import lower
from hsap_compile.passes.partition_attention import Site, partition_attention
from hsap_compile.passes.shard_tokens import Fallback, Rows, shard_tokens
from hsap_compile.passes.sum_gradients import sum_gradients
from hsap_compile.plan import MeshShape, ReceiveLimit
from hsap_compile.plan.placement import LEAST
from hsap_compile.runtime import Program
from hsap_compile.verify import verify

log = logging.getLogger("hsap_compile")


@dataclass(frozen=True)
class Rewritten:
    """A graph after all passes, before it is lowered.

    ``program`` runs ``graph`` as it is; ``sites`` are the attentions that were partitioned, in the order of
    ``program.traffic``; ``as_written`` those that no mask was found for: where, in which module, and why.
    """

    graph: GraphModule
    program: Program
    sites: tuple[Site, ...]
    as_written: tuple[tuple[str, str, str], ...]


def compile_graph(module: GraphModule, options: Options, symbol: sympy.Basic | None) -> Program:
    """Dynamo's ``module`` as a program for the mesh's ranks.  ``symbol``: the inputs' length; None when it is
    static."""
    group = group_name(options.mesh)
    _, ranks = place_in(group)
    made = rewrite(module, options, symbol, ranks, group)
    function = lower(made.graph, options.lower, options.inductor, options.memory_budget)
    return replace(made.program, function=function)


def rewrite(
    module: GraphModule, options: Options, symbol: sympy.Basic | None, ranks: int, group: str
) -> Rewritten:
    """Dynamo's ``module`` for ``ranks`` ranks, which are the process group ``group`` once it runs.

    Nothing is run and no rank is asked: the result is the same on each, and on a machine that has none.
    """
    values = [n.meta["example_value"] for n in placeholders(module)]
    mode = fake_mode_of(values)
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    stopped = break_of(module)
    names = tuple(source_name(n) for n in placeholders(module))
    if ranks > 1 and not options.grad_sync:
        _check_shares(values, names, stopped)
    if ranks > 1 and stopped:
        log.warning(
            "the graph ends at %s: what torch does not compile behind it runs whole on every rank", stopped
        )
    graph = capture(module, symbol, ranks)
    if symbol is not None:
        size = size_now(mode, symbol)
        if size.is_Integer and ranks > 1:
            raise constant_length(int(size), values)
        symbol = next(iter(size.free_symbols), None)
    writes: tuple[int, ...] = graph.meta["writes"]
    if any(i >= len(values) for i in writes):
        raise Refused(
            "the model writes into a parameter of which every rank holds a part",
            got="a write into what was gathered of it, which would be lost",
            wanted="parameters that a forward only reads",
            do="write into model.parameters() outside of the forward (every rank into its part), or use the "
            "changed value without writing (weight.clamp(-1, 1))",
        )
    seen: frozenset[int] = graph.meta["writes_with_gradient"]
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    returned = len(positional(output)[0]) - len(writes)
    _done("capture", graph)

    attentions = find_attention(graph)
    log.info("find_attention: %d attentions", len(attentions))
    tokens = (
        None if symbol is None else longest_row(graph, [a.query.tokens for a in attentions], symbol, ranks)
    )
    dense_masks = lift_mask(graph, attentions, mode)
    log.info("lift_mask: %d masks stay dense", dense_masks)
    as_written = tuple(
        (where(a.output), module_of(a.output), a.output.meta["as_written"])
        for a in attentions
        if "as_written" in a.output.meta
    )
    _done("lift_mask", graph)

    heads, kv_heads = _common_heads(graph)
    mesh = mesh_shape(options, kv_heads, heads, ranks)
    inputs = len(values)
    fallbacks: tuple[Fallback, ...] = ()
    local_outputs: Mapping[int, Rows] = {}
    whole = False
    length: tuple[int, int, int] | int
    if tokens is None and ranks > 1:
        tokens, length = _without_tokens(attentions), LEAST * ranks
    else:
        length = _static_length(attentions) if tokens is None else _token_input(graph, tokens, inputs)
    symbol = None if tokens is None else symbol_of(tokens)
    rows = tokens if tokens is not None else sympy.Integer(length)
    if ranks > 1:
        assert tokens is not None
        _refuse_cache(graph, attentions)
        call = next((n for n in graph.graph.nodes if n.op == "call_function"), None)
        first = "" if call is None else f", from {where(call)} on"
        infer_tokens(graph, tokens)
        columns, order = (
            fake_table(mode, torch.zeros(shape, dtype=torch.int64, device=device), (len(shape) - 1,), LEAST)
            for shape in ((8,), (2, 8))
        )
        sharded = shard_tokens(
            graph,
            mode,
            tokens,
            group,
            columns=columns,
            order=order,
            ranks=ranks,
            outputs="gather" if stopped else options.outputs,  # what follows a break is whole
            whole_outputs=len(writes),
            strict=options.strict,
            token_wise=options.token_wise,
        )
        rows = expr_of(columns.shape[0])
        graph, fallbacks, local_outputs = sharded.module, sharded.fallbacks, sharded.local_outputs
        for fallback in fallbacks:
            log.warning(
                "%s runs on gathered tokens on every rank (%s), at %s",
                fallback.operator,
                fallback.reason,
                fallback.at,
            )
        whole = sharded.whole or isinstance(length, int)
        if whole:
            if options.strict:
                raise _no_tokens()
            log.warning("no value is made of the tokens of a row: every rank computes all of it%s", first)
        log.info("shard_tokens: %d operators on gathered tokens", len(fallbacks))
        _done("shard_tokens", graph, symbol)
        if options.grad_sync:
            log.info("sum_gradients: %d parameters", sum_gradients(graph, mode, group, ranks))
            _done("sum_gradients", graph)

    if gathered := gather_parameters(graph, mode):
        log.info("gather_parameters: %d parameters", gathered)
        _done("gather_parameters", graph)

    drop_idle_layouts(graph)
    kernel = _kernel(options, device)
    partitioned = partition_attention(
        graph,
        mode,
        mesh,
        group,
        rows,
        length,
        kernel=kernel,
        kernel_options=options.kernel_options,
        most=options.received if isinstance(options.received, int) else None,
    )
    log.info(
        "partition_attention: %d attentions over %d x %d ranks",
        len(partitioned.traffic),
        mesh.inter,
        mesh.intra,
    )
    _done("partition_attention", graph, symbol)
    leave = leaving(graph, local_outputs)[0]
    warn_of_large([output for output in leave if output.index < returned], stopped, options.outputs)
    for site in partitioned.sites if partitioned.limit.stages > 1 else ():
        if site.mask.soft or formula.without_sink(site.mask.logits)[1] is not None:
            log.warning(
                "the attention at %s holds all received rows at a time, more than options['received']: %s",
                site.at,
                "its masked logits are finite (use -inf or a mask of truth values)"
                if site.mask.soft
                else "it has a sink, which counts once",
            )
    again = options.received != "save"
    log.info("choose_saved: %d exchanges are repeated in the backward", choose_saved(graph, again=again))

    leaves = [leaf for mask in partitioned.masks for leaf in mask.read]
    tables = [n for n in placeholders(graph)[inputs:]]
    program = Program(
        function=graph,
        documents=extract(graph, leaves, inputs),
        masks=partitioned.masks,
        tables=tuple(n.meta["table"] for n in tables),
        mesh=mesh,
        group=group,
        placement=options.placement,
        traffic=partitioned.traffic,
        limit=partitioned.limit,
        bands_only=kernel == "varlen",
        again=again and options.lower != "eager",  # which has no backward of its own that would repeat
        on_step=options.on_step,
        tokens=length,
        local_outputs=local_outputs,
        writes=writes,
        writes_with_gradient=seen,
        parameters=frozenset(i for i, n in enumerate(placeholders(graph)[:inputs]) if n.meta["parameter"]),
        names=names,
        signature=zlib.crc32(_signature(graph, mesh, kernel, partitioned.limit, options).encode()),
        check=options.check,
        fallbacks=fallbacks,
        whole=whole,
        random=any(is_random(n) for n in graph.graph.nodes),
    )
    return Rewritten(graph, program, partitioned.sites, as_written)


def _signature(
    graph: GraphModule, mesh: MeshShape, kernel: str, limit: ReceiveLimit, options: Options
) -> str:
    """What decides which collectives a rank starts, and of which sizes; without ``inductor``, whose patches
    may be objects of one process."""
    chosen = (options.placement, options.check, options.lower, options.memory_budget, options.received)
    return f"{graph.code} {choices(graph)} {mesh} {kernel} {limit} {chosen}"


def _done(name: str, graph: GraphModule, length: sympy.Basic | None = None) -> None:
    """After a pass: the graph is legal, and can be read."""
    verify(graph, name, length)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("after %s:\n%s", name, graph.print_readable(print_output=False))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"hsap_{name}", "encoding": "string"},
        payload_fn=lambda: graph.print_readable(print_output=False),
    )


def _kernel(options: Options, device: torch.device) -> str:
    """Which kernel partial attention is written with."""
    chosen = options.attention
    if chosen == "auto":
        chosen = "slices" if device.type == "cpu" else "flex"
    if chosen == "slices" and device.type != "cpu":
        raise Refused(
            f"there is no kernel of slices for {device.type}",
            got=f'attention="slices" and tensors on {device}',
            wanted='attention="varlen", which makes calls of flash attention of the slices, "flex" or "auto"',
            do='pass options={"attention": "varlen"}, or drop "attention" from the options',
        )
    if chosen == "varlen" and device.type not in varlen.DEVICES:
        raise Refused(
            f"there is no flash attention over sequences for {device.type}",
            got=f'attention="varlen" and tensors on {device}',
            wanted=f'tensors on {" or ".join(varlen.DEVICES)}, or attention="slices" or "auto" on CPU',
            do='drop "attention" from the options',
        )
    if chosen == "flex" and device.type == "cpu" and options.lower == "inductor":
        raise Refused(
            "Inductor has no backward of flex attention on CPU",
            got='attention="flex", lower="inductor" and tensors on cpu',
            wanted='attention="slices" on CPU, or lower="aot_eager" or "eager" to debug',
            do='drop "attention" from the options',
        )
    if chosen == "flex" and isinstance(options.received, int):
        raise Refused(
            "flex attention takes all received rows at once",
            got=f"received={options.received}, a number of bytes that are held at a time",
            wanted='"save" or "again"; stages are for attention="slices" on CPU and "varlen" on CUDA',
            do='pass options={"received": "again"}: rows are then held for one attention at a time',
        )
    return chosen


def _check_shares(values: Sequence[Any], names: Sequence[str], stopped: str) -> None:
    """Shares of gradients add up if all parameters are in one graph: what runs outside of compiled code, in
    front of it or behind a break, runs whole on every rank, and gives its parameters whole gradients."""
    if not torch.is_grad_enabled():
        return
    if any(isinstance(value, DTensor) for value in values):
        raise Refused(
            "gradients of sharded parameters are summed over the ranks where they are computed",
            got='"grad_sync": False, and parameters of which every rank holds a part',
            wanted="gradients that nobody sums once more",
            do='drop "grad_sync": False: it costs no further sum, and gradients are the mean over the mesh',
        )
    made = [
        name
        for value, name in zip(values, names, strict=True)
        if isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf
    ]
    if made or stopped:
        beyond = f"{made[0]}, made with a gradient outside of it" if made else f"an end at {stopped}"
        raise Refused(
            "gradients can be shares of ranks only where the whole model is one graph",
            got=f'"grad_sync": False, and a graph with {beyond}',
            wanted="a graph that all parameters are in: elsewhere they get whole gradients on every rank",
            do='drop "grad_sync": False (gradients are then whole and equal on every rank, and DDP and FSDP '
            "take their mean), or compile the whole model without a graph break",
        )


def _refuse_cache(graph: GraphModule, attentions: Sequence[Attention]) -> None:
    """Keys and values that leave the graph are a key/value cache.  One that has tokens of a caller's cache in
    front (prefix tuning) is no choice of the caller's, and is gathered."""
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    leaving = set(output.all_input_nodes)
    for attention in attentions:
        if expr_of(attention.key.tokens) != expr_of(attention.query.tokens):
            continue
        if not leaving.isdisjoint((*attention.key.nodes, *attention.value.nodes)):
            raise Refused(
                "the model returns a key/value cache",
                got="keys and values of an attention among the outputs",
                wanted="a training or scoring forward, whose outputs are a loss, logits or hidden states",
                do="pass use_cache=False (Hugging Face), or call the model without its cache",
                at=where(attention.output),
            )


def _common_heads(graph: GraphModule) -> tuple[int, int]:
    """The greatest common divisors of all lifted attentions' query heads and key/value heads."""
    operands: list[Any] = [n.args for n in graph.graph.nodes if n.target is dense.OP]
    q, k = ([int(o[i].meta["val"].shape[1]) for o in operands] for i in (0, 1))
    return math.gcd(*q), math.gcd(*k)


def _token_input(graph: GraphModule, tokens: sympy.Expr, inputs: int) -> tuple[int, int, int]:
    symbol = symbol_of(tokens)
    for i, node in enumerate(placeholders(graph)[:inputs]):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if expr_of(size) == symbol:
                    return i, dim, int(tokens - symbol)
    raise _no_tokens()


def _without_tokens(attentions: Sequence[Attention]) -> sympy.Symbol:
    """A symbol that no size has: a piece between graph breaks may get no batch, and then every rank computes
    all of it."""
    if attentions:
        raise _no_tokens()
    return sympy.Symbol("tokens")


def _static_length(attentions: Sequence[Attention]) -> int:
    """For one rank and a length that no input has (image patches, say)."""
    return int(attentions[0].query.tokens) if attentions else 1


def constant_length(length: int, inputs: Sequence[Any]) -> Refused:
    """Of a graph that is for one ``length`` only, with such ``inputs``."""
    return Refused(
        "the sequence length stays a constant",
        got=f"a graph for exactly {length} tokens",
        wanted="a symbolic length: documents and lengths change without compiling again",
        do="drop dynamic=False; pass torch.compile(.., dynamic=True) where the graph breaks in front of it; "
        "pass what remembers the length (a BlockMask, a number) as an argument, not as a module's attribute; "
        "drop code that needs the length as a Python number (in place of a loop over positions: "
        f"x.chunk(8, 1)); make buffers that are exactly {length} long longer than the rows",
        at=innermost(fixed_at(inputs)),
    )


def _no_tokens() -> Refused:
    return Refused(
        "no input has the tokens as a dimension",
        got="a graph whose sequence length is not the size of a dimension of any input",
        wanted="a batch such as input_ids (B, S) as an argument",
        do="compile the function that takes the batch; where documents are cut by Python numbers (.tolist(), "
        "which breaks the graph) for an attention each, call one attention with a mask of documents",
    )
