"""Attention alone on two ranks: the compiled graph's operators against what one would write by hand.

    python benchmarks/attention_two_ranks.py

Forward and backward of one causal attention in float32 on two gloo processes of one thread each.  For
packed documents the rival is Ulysses with one scaled_dot_product_attention a document; for one document
it is also the ring attention of torch's own context parallelism, given ATen's CPU kernel, with its load
balancing on.  Ours is the graph that ``partition_attention`` writes, lowered by Inductor, on the mesh
2 x 1 (key/value rows travel) and 1 x 2 (heads do).  All contenders start from their own rank's tokens, in
the layout of a model's projections, live in the same two processes and take turns; the plan is made
before, as one serves all layers.  ``min_cpu_s`` is the CPU time of the busier rank, which other programs
do not lengthen; it lacks the time that a rank waits.
Every output and gradient is compared with attention in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch
import torch.distributed as dist
from _measure import Bar, Ranks, Row, report, summary
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hsap_compile import formula, masks
from hsap_compile._torch import FakeTensorMode, expr_of, fake_table, run_fake
from hsap_compile.graph import placeholders
from hsap_compile.kernels import dense
from hsap_compile.mesh import group_name
from hsap_compile.passes.lower import lower
from hsap_compile.passes.partition_attention import Traffic, partition_attention
from hsap_compile.plan import Attended, Kind, MeshShape, Plan, make
from hsap_compile.runtime import _tensors

RANKS = 2
MESHES = {"2 x 1": MeshShape(((0,), (1,))), "1 x 2": MeshShape(((0, 1),))}
ULYSSES, RING = "Ulysses, document loop", "torch ring"

THAN_ULYSSES = 0.9  # of its time, packed documents
THAN_RING = 1.0  # of its time, one document

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Contender(NamedTuple):
    """``attention`` of this rank's tokens, which are the ``columns`` of the sequence."""

    attention: Attention
    columns: torch.Tensor


def main() -> None:
    arguments = parse()
    rows: list[Row] = []
    bars: list[Bar] = []
    for documents in (arguments.documents, 1):
        found = compare(documents, arguments)
        rows += found.values()
        bars += promises(documents, {name: row["min_s"] for name, row in found.items()})
    report("attention_two_ranks", vars(arguments), rows, bars)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def promises(documents: int, times: dict[str, float]) -> list[Bar]:
    ours = {name: s for name, s in times.items() if name.startswith("hsap") and "balanced" in name}
    if documents > 1:
        return [
            Bar(f"{documents} documents: {name} / Ulysses", s / times[ULYSSES], THAN_ULYSSES)
            for name, s in ours.items()
        ]
    ring = min(s for name, s in times.items() if name.startswith(RING))
    return [Bar(f"1 document: {name} / ring", s / ring, THAN_RING) for name, s in ours.items()]


def names(documents: int) -> list[str]:
    ours = ["hsap 2 x 1 balanced", "hsap 2 x 1 contiguous", "hsap 1 x 2 balanced"]
    rings = [f"{RING}, {method}" for method in ("allgather", "alltoall")]
    return [ULYSSES, *ours, *(rings if documents == 1 else [])]


def compare(documents: int, arguments: argparse.Namespace) -> dict[str, Row]:
    contenders = names(documents)
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    with Ranks(steps, documents, arguments, count=RANKS, distributed=True) as ranks:
        errors = {name: max(ranks.turn(name, True)) for name in contenders}
        for _ in range(arguments.repeats):
            for name in contenders:
                seconds = ranks.turn(name, False)
                wall[name].append(max(s[0] for s in seconds))
                cpu[name].append(max(s[1] for s in seconds))
    rows = {}
    for name in contenders:
        times = summary(wall[name]) | {"min_cpu_s": round(min(cpu[name]), 5)}
        ratio = round(times["min_s"] / min(wall[ULYSSES]), 3)
        case = {"case": f"{documents} document{'s' if documents > 1 else ''}", "contender": name}
        rows[name] = case | times | {"time / Ulysses": ratio, "largest error": errors[name]}
    return rows


# --- on a rank -----------------------------------------------------------------------------------------


def steps(documents: int, arguments: argparse.Namespace) -> Callable[[str, bool], Any]:
    """``step(contender, check)``: wall and CPU seconds of one forward and backward, or its largest error."""
    torch.set_num_threads(1)
    lengths = document_lengths(arguments.tokens, documents)
    q, k, v, grad = inputs(arguments)
    contenders = {name: contender(name, lengths, arguments) for name in names(documents)}
    local = {name: local_inputs(c.columns, q, k, v, grad) for name, c in contenders.items()}

    def step(name: str, check: bool) -> Any:
        *leaves, gradient = local[name]
        for x in leaves:
            x.grad = None
        dist.barrier()
        started, began = time.perf_counter(), time.process_time()
        out = contenders[name].attention(*leaves)
        out.backward(gradient)
        dist.barrier()
        seconds = time.perf_counter() - started, time.process_time() - began
        if not check:
            return seconds
        got = [out.detach(), *(x.grad for x in leaves)]
        return largest_error(got, reference(lengths, q, k, v, grad), contenders[name].columns)

    return step


def document_lengths(tokens: int, documents: int) -> list[int]:
    """Random lengths that add up to ``tokens``, the same every time."""
    random = np.random.default_rng(0)
    cuts = np.sort(random.choice(tokens - 1, documents - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [tokens]))).tolist()


def inputs(arguments: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, (1, H, S, D)."""
    torch.manual_seed(0)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    return [torch.randn(1, h, arguments.tokens, arguments.width) for h in heads]


def local_inputs(columns: torch.Tensor, *whole: torch.Tensor) -> list[torch.Tensor]:
    """This rank's part, laid out as a model's projections do; all but the last require gradients."""
    parts = [x.transpose(1, 2).index_select(1, columns).transpose(1, 2) for x in whole]
    return [x.requires_grad_() for x in parts[:-1]] + parts[-1:]


def reference(lengths: list[int], *tensors: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    out = document_loop(q, k, v, lengths)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def largest_error(got: Sequence[Any], wanted: Sequence[torch.Tensor], columns: torch.Tensor) -> float:
    """Of the output and the gradients, relative to the largest element of each."""
    pairs = zip(got, wanted, strict=True)
    errors = [(g - w.index_select(2, columns)).abs().max() / w.abs().max() for g, w in pairs]
    return float(f"{max(errors).item():.1e}")


def contender(name: str, lengths: list[int], arguments: argparse.Namespace) -> Contender:
    if name == ULYSSES:
        return ulysses(lengths)
    if name.startswith(RING):
        return ring(sum(lengths), name.rpartition(" ")[2])
    mesh, kind = name[5:10], name[11:]
    plan = planned(MESHES[mesh], "contiguous" if kind == "contiguous" else "balanced", lengths)
    return ours(plan, lengths, compiled(MESHES[mesh], arguments))


# --- ours ----------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """A graph of one attention after ``partition_attention`` and ``lower``, the tables that it takes, and
    what it sends."""

    function: Callable[..., Any]
    tables: list[Any]
    traffic: tuple[Traffic, ...]


def labels_of(lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)[None]


def planned(mesh: MeshShape, kind: Kind, lengths: list[int]) -> Plan:
    labels = labels_of(lengths)
    return make([Attended(batch=1, tokens=labels.shape[1], labels=labels, lo=0)], mesh, kind)


def ours(plan: Plan, lengths: list[int], graph: Compiled) -> Contender:
    tables = _tensors(plan, dist.get_rank())
    leaf, extra = torch.from_numpy(labels_of(lengths)), [tables[key] for key in graph.tables]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return graph.function(q, k, v, leaf, *extra)[0]

    return Contender(attention, tables["columns"])


def compiled(
    mesh: MeshShape, arguments: argparse.Namespace, patches: Mapping[str, Any] | None = None
) -> Compiled:
    """``patches``: of Inductor's configuration."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    own = fake_table(mode, torch.zeros(1, 1, arguments.tokens // mesh.size, arguments.width), (2,)).shape[2]
    with mode:
        examples = [torch.empty(1, own, h, arguments.width).transpose(1, 2).requires_grad_() for h in heads]
        examples.append(torch.zeros(1, arguments.tokens, dtype=torch.int64))
    module = dense_graph(mode, examples)
    partitioned = partition_attention(module, mode, mesh, group_name(None), expr_of(own), arguments.tokens)
    assert len(partitioned.traffic) == 1, "the attention was left as it is"
    tables = [n.meta["table"] for n in placeholders(module)[len(examples) :]]
    return Compiled(lower(module, "inductor", dict(patches or {})), tables, partitioned.traffic)


def dense_graph(mode: FakeTensorMode, values: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """What ``lift_mask`` leaves of an attention with the mask "same document and causal"."""
    b, q, k = formula.b, formula.q, formula.k
    same = sympy.Eq(formula.leaf(0, b, q), formula.leaf(0, b, k))
    logits = sympy.Piecewise((formula.score, same & (k <= q)), (-sympy.oo, True))
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("q", "k", "v", "labels")]
    for node, value in zip(nodes, values, strict=True):
        node.meta.update(val=value, parameter=False)
    scale = values[0].shape[-1] ** -0.5
    rest = (formula.dumps(logits), scale, False)
    site = graph.call_function(dense.OP, (*nodes[:3], [nodes[3]], *rest))
    site.meta.update(mask=masks.normalise(logits)[0], reads=())
    site.meta["val"] = run_fake(mode, dense.OP, (*values[:3], [values[3]], *rest), {})
    graph.output((site,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


# --- by hand -------------------------------------------------------------------------------------------


def document_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Causal attention inside each document; all tensors (1, heads, S, D)."""
    parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    grouped = q.shape[1] != k.shape[1]
    return torch.cat([sdpa(a, b, c, is_causal=True, enable_gqa=grouped) for a, b, c in parts], 2)


class _Exchange(torch.autograd.Function):
    """(1, H, n / P, D) of all heads to (1, H / P, n, D) of the P ranks' tokens, or the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to_tokens: bool, group: Any) -> torch.Tensor:
        ctx.to_tokens, ctx.group = to_tokens, group
        split, joined = (1, 2) if to_tokens else (2, 1)
        sent = torch.stack(x.chunk(dist.get_world_size(group), split))
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        return torch.cat(got.unbind(), joined)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Exchange.apply(grad, not ctx.to_tokens, ctx.group), None, None


def with_heads_split(inner: Attention, group: Any = None) -> Attention:
    """Ulysses: ``inner`` of all the group's tokens and a part of the heads."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (_Exchange.apply(x, True, group) for x in (q, k, v))
        return _Exchange.apply(inner(q, k, v), False, group)

    return attention


def ulysses(lengths: list[int]) -> Contender:
    loop = with_heads_split(lambda q, k, v: document_loop(q, k, v, lengths))
    return Contender(loop, own_chunk(sum(lengths)))


def own_chunk(tokens: int) -> torch.Tensor:
    return torch.arange(tokens).chunk(dist.get_world_size())[dist.get_rank()]


class _Ring(torch.autograd.Function):
    """torch's templates with ATen's CPU kernel, which they have no rule for."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, method: str) -> torch.Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention as cp

        ctx.method = method
        cp.set_rotate_method(method)
        cp._cp_options.enable_load_balance = True
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = cp._templated_ring_attention(
            dist.group.WORLD, 2, kernel, q, k, v, is_causal=True, dropout_p=0.0, scale=None
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        from torch.distributed.tensor.experimental._context_parallel import _attention as cp

        cp.set_rotate_method(ctx.method)
        q, k, v, out, lse = ctx.saved_tensors
        grads = cp._templated_ring_attention_backward(
            dist.group.WORLD, 2, _ring_kernel_backward, grad_out=grad.contiguous(), grad_out_name="grad_out",
            query=q, key=k, value=v, out=out, logsumexp=lse, is_causal=True,
        )  # fmt: skip
        return (*grads[:3], None)


def _ring_kernel_backward(
    *, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool
) -> Any:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return kernel(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)


def ring(tokens: int, method: str) -> Contender:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    chunks = torch.arange(tokens).chunk(2 * ranks)
    columns = torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])
    return Contender(lambda q, k, v: _Ring.apply(q, k, v, method), columns)


if __name__ == "__main__":
    main()
