"""Pass 11: exchanges start early, are waited for late, and own keys are attended to meanwhile.

before: y = all_to_all(x)                                 waits inside
after:  p = all_to_all_start(x); ...; y = wait(p)         other work in between

before: o, l = attend(q, k, v, k', v', slices)            k', v' have just been received
after:  o1, l1 = attend(q, k, v, own slices)              while they travel
        o2, l2 = attend(q, k', v', slices of k')
        o, l = o1 exp(l1 - l) + o2 exp(l2 - l), log(exp(l1) + exp(l2))

and the backward: the gradients of received rows first, which travel back while own keys are worked on.

before: g1, g2, .. = sum_ranks(x1), sum_ranks(x2), ..     gradients of parameters, which nothing here reads
after:  g1, g2, .. = split(wait(all_reduce(cat(x1, x2, ..))))   in buckets, as soon as a bucket is full

before: f(broadcast(p)), f(share(p))                      copies that only the gradient needed
after:  f(p)

It runs inside Inductor on the forward's and on the backward's graph, after differentiation, so that nothing
here needs a gradient.  How far starts and waits move apart is decided when Inductor has put everything
into an order (``start_early``).
passes/_parts.py says how an attention is written in parts.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from hsap_compile import graph as graph_module
from hsap_compile._torch import (
    CustomGraphPass,
    contains_collective,
    contains_wait,
    get_hash_for_files,
)
from hsap_compile.graph import ancestors
from hsap_compile.kernels import attention, exchange
from hsap_compile.passes import _parts
from hsap_compile.passes._parts import backward_in_parts, builder_at, forward_in_parts

aten = torch.ops.aten

LEAST_BUCKET_BYTES = 2**20  # of gradients in one all-reduce: below it, latency is all that counts
MOST_BUCKET_BYTES = 32 * 2**20  # more only costs memory


class Overlap(CustomGraphPass):
    """The pass as Inductor calls it.  Its identity is part of the key of Inductor's caches, and holds every
    pass and kernel, so that nothing compiled by other code than today's is served, and ``saved``: what the
    graph's tags say of the backward, which no key of torch's holds."""

    def __init__(self, saved: str) -> None:
        self.saved = saved

    def __call__(self, graph: Graph) -> None:
        overlap(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(tuple(str(path) for path in sources()), self.saved)


def sources() -> list[Path]:
    """The files that decide what is compiled."""
    folders = (Path(str(module.__file__)).parent for module in (graph_module, attention, _parts))
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def overlap(graph: Graph) -> None:
    """Rewrite a graph that has no gradient any more, in place."""
    for bucket in _buckets([n for n in graph.nodes if _leaves_as_it_is(n)]):
        _sum_together(graph, bucket)
    for node in list(graph.nodes):
        if node.target is attention.OP:
            forward_in_parts(graph, node)
        elif node.target is attention.BACKWARD:
            backward_in_parts(graph, node)
        elif node.target is exchange.ALL_TO_ALL:
            _start_and_wait(graph, node, exchange.ALL_TO_ALL_START, *node.args)
        elif node.target is exchange.SUM_RANKS and node.meta["val"].dtype in exchange.SENT:
            x, group = node.args
            _start_and_wait(graph, node, exchange.ALL_REDUCE_START, x, "sum", group)
        elif node.target in (exchange.BROADCAST, exchange.SHARE, exchange.SUMMED_LATER):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _start_together(graph)
    graph.lint()


def _start_and_wait(graph: Graph, node: Node, start: Any, *args: Any) -> None:
    with graph.inserting_before(node):
        build = builder_at(graph, node)
        done = build(exchange.WAIT, build(start, *args))
    node.replace_all_uses_with(done)
    graph.erase_node(node)


def _start_together(graph: Graph) -> None:
    """An exchange that does not need what the one before it brings starts in front of that one's wait:
    Inductor never moves a start over a wait.  Of rows that the backward receives again, those of the next
    layer thus travel together with the gradients of this layer's."""
    order, moved = list(graph.nodes), set[Node]()
    wait = -1
    for i, node in enumerate(order):
        if node.target is exchange.WAIT:
            wait = i
        elif node.target is exchange.ALL_TO_ALL_START and wait >= 0:
            needed = ancestors([node])
            if order[wait] not in needed:
                parts = [n for n in order[wait + 1 : i + 1] if n in needed and n not in moved]
                moved.update(parts)
                for part in parts:
                    order[wait].prepend(part)


def wait_late(order: list[Any]) -> list[Any]:
    """The nodes of Inductor's scheduler, each wait in front of the first that needs it.

    Inductor's own pass puts everything that can be computed in front of a wait: the rows of all layers that
    the backward sends again would be packed, and held, at its beginning.
    """
    found: list[Any] = []
    waits: list[Any] = []
    for node in order:
        if contains_wait(node):
            waits.append(node)
            continue
        for wait in list(waits):
            if not node.ancestors.isdisjoint(wait.get_operation_names()):
                waits.remove(wait)
                found.append(wait)
        found.append(node)
    return found + waits


def start_early(order: list[Any]) -> list[Any]:
    """The nodes of Inductor's scheduler: what a start needs before what it does not need, back to the start
    before it, or to a wait that it needs.

    Nothing is put off twice: work that no exchange waits for, gradients of parameters, would be put off to
    the end of the backward, and all that it reads be kept until then.
    """
    found: list[Any] = []
    later: set[Any] = set()
    for node in order:
        if not contains_collective(node):
            found.append(node)
            continue
        wanted = set(node.ancestors)  # those of what was fused with an ancestor come with it
        needed: list[Any] = []
        others: list[Any] = []
        while found and not contains_collective(found[-1]) and found[-1] not in later:
            needs = not wanted.isdisjoint(found[-1].get_operation_names())
            if needs and contains_wait(found[-1]):
                break
            last = found.pop()
            (needed if needs else others).append(last)
            if needs:
                wanted |= last.ancestors
        later.update(others)
        found += [*reversed(needed), node, *reversed(others)]
    return found


#: What of Inductor's configuration makes it start exchanges early and wait for them late.
PATCHES = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [wait_late, start_early],
}


def _leaves_as_it_is(node: Node) -> bool:
    """Whether the node is a sum over ranks that only the caller reads."""
    return node.target is exchange.SUM_RANKS and all(user.op == "output" for user in node.users)


def _buckets(sums: list[Node]) -> list[list[Node]]:
    """Neighbours of one type: a quarter of all, so that the first travel early, within the limits."""
    sizes = {n: n.meta["val"].numel() * n.meta["val"].dtype.itemsize for n in sums}
    most = min(max(sum(sizes.values()) // 4, LEAST_BUCKET_BYTES), MOST_BUCKET_BYTES)
    buckets: list[list[Node]] = []
    latest: dict[torch.dtype, list[Node]] = {}
    for node in sums:
        bucket = latest.setdefault(node.meta["val"].dtype, [])
        if not bucket or sum(sizes[n] for n in bucket) + sizes[node] > most:
            bucket = latest[node.meta["val"].dtype] = []
            buckets.append(bucket)
        bucket.append(node)
    return buckets


def _sum_together(graph: Graph, bucket: list[Node]) -> None:
    if len(bucket) == 1:
        return
    values = [n.meta["val"] for n in bucket]
    with graph.inserting_before(bucket[-1].next):
        build = builder_at(graph, bucket[-1])
        flat = [build(aten.reshape.default, n.args[0], [-1]) for n in bucket]
        total = build(exchange.SUM_RANKS, build(aten.cat.default, flat), bucket[0].args[1])
        parts = build(aten.split_with_sizes.default, total, [v.numel() for v in values])
        for i, (node, value) in enumerate(zip(bucket, values, strict=True)):
            part = build(operator.getitem, parts, i)
            node.replace_all_uses_with(build(aten.reshape.default, part, list(value.shape)))
    for node in bucket:
        graph.erase_node(node)
