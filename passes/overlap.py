"""Pass 10: exchanges start early, are waited for late, and own keys are attended to meanwhile.

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
An attention whose masked logits are finite keeps one operator (the softmax of a row that sees nothing does
not fit the one number l, see formula_blocks.forward), and so does one with a sink, which counts once.
"""

from __future__ import annotations

import math
import operator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from hsap_compile._torch import (
    CustomGraphPass,
    contains_collective,
    contains_wait,
    fake_mode_of,
    get_hash_for_files,
)
from hsap_compile.graph import Builder, ancestors
from hsap_compile.kernels import attention, exchange, formula_blocks

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
    folders = (Path(__file__).parent, Path(attention.__file__).parent)
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def overlap(graph: Graph) -> None:
    """Rewrite a graph that has no gradient any more, in place."""
    for bucket in _buckets([n for n in graph.nodes if _leaves_as_it_is(n)]):
        _sum_together(graph, bucket)
    for node in list(graph.nodes):
        if node.target is attention.OP:
            _split_forward(graph, node)
        elif node.target is attention.BACKWARD:
            _split_backward(graph, node)
        elif node.target is exchange.ALL_TO_ALL:
            _start_and_wait(graph, node, exchange.ALL_TO_ALL_START, *node.args)
        elif node.target is exchange.SUM_RANKS:
            x, group = node.args
            _start_and_wait(graph, node, exchange.ALL_REDUCE_START, x, "sum", group)
        elif node.target in (exchange.BROADCAST, exchange.SHARE):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _start_together(graph)
    graph.lint()


def _start_and_wait(graph: Graph, node: Node, start: Any, *args: Any) -> None:
    with graph.inserting_before(node):
        build = _builder(graph, node)
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
        build = _builder(graph, bucket[-1])
        flat = [build(aten.reshape.default, n.args[0], [-1]) for n in bucket]
        total = build(exchange.SUM_RANKS, build(aten.cat.default, flat), bucket[0].args[1])
        parts = build(aten.split_with_sizes.default, total, [v.numel() for v in values])
        for i, (node, value) in enumerate(zip(bucket, values, strict=True)):
            part = build(operator.getitem, parts, i)
            node.replace_all_uses_with(build(aten.reshape.default, part, list(value.shape)))
    for node in bucket:
        graph.erase_node(node)


def _builder(graph: Graph, node: Node) -> Builder:
    values = [n.meta["val"] for n in node.all_input_nodes]
    return Builder(graph, fake_mode_of(values), node)


def _slices(build: Builder, slices: Node, q: Node, received: bool) -> Node:
    """The slices whose keys are received rows, or the others; the rest is made empty."""
    first = build(aten.slice.Tensor, slices, 1, 2, 3)
    own = build(aten.lt.Scalar, first, build.size(q, 0))
    chosen = build(aten.logical_not.default, own) if received else own
    return build(aten.where.ScalarOther, chosen, slices, 0)


def _splits(args: tuple[Any, ...], received: int) -> bool:
    """Whether rows are received (argument ``received``), and a softmax is the sum of its parts."""
    logits = args[received + 7]
    if args[received] is None or not logits:
        return args[received] is not None
    parts = formula_blocks.read(logits)
    return parts.sink is None and not parts.soft


def _split_forward(graph: Graph, node: Node) -> None:
    args: Any = node.args
    if not _splits(args, 3):
        return
    q, k, v, k_remote, v_remote, slices, *rest = args
    with graph.inserting_before(node):
        build = _builder(graph, node)
        mine = build(attention.OP, q, k, v, None, None, _slices(build, slices, q, False), *rest)
        theirs = build(attention.OP, q, k, v, k_remote, v_remote, _slices(build, slices, q, True), *rest)
        (out1, lse1), (out2, lse2) = ([build(operator.getitem, x, i) for i in (0, 1)] for x in (mine, theirs))
        peak = build(aten.maximum.default, lse1, lse2)
        peak = build(aten.where.ScalarOther, build(aten.gt.Scalar, peak, -math.inf), peak, 0.0)
        masses = [build(aten.exp.default, build(aten.sub.Tensor, x, peak)) for x in (lse1, lse2)]
        mass = build(aten.add.Tensor, *masses)
        lse = build(aten.add.Tensor, build(aten.log.default, mass), peak)
        some = build(aten.where.ScalarOther, build(aten.gt.Scalar, mass, 0.0), mass, 1.0)
        parts = []
        for out, part in ((out1, masses[0]), (out2, masses[1])):
            weight = build(aten.unsqueeze.default, build(aten.div.Tensor, part, some), 2)
            parts.append(build(aten.mul.Tensor, out, weight))
        merged = build(aten.add.Tensor, *parts)
        if merged.meta["val"].dtype != out1.meta["val"].dtype:
            merged = build(aten.to.dtype, merged, out1.meta["val"].dtype)
    _replace(graph, node, [merged, lse])


def _split_backward(graph: Graph, node: Node) -> None:
    args: Any = node.args
    wanted = args[-1]
    if not _splits(args, 4) or wanted:
        return
    grad, q, k, v, k_remote, v_remote, slices, *rest = args
    with graph.inserting_before(node):
        build = _builder(graph, node)
        calls = []
        for received in (True, False):
            chosen = _slices(build, slices, q, received)
            far = (k_remote, v_remote) if received else (None, None)
            calls.append(build(attention.BACKWARD, grad, q, k, v, *far, chosen, *rest))
        theirs, mine = ([build(operator.getitem, x, i) for i in range(5)] for x in calls)
        d_q = build(aten.add.Tensor, mine[0], theirs[0])
    _replace(graph, node, [d_q, *mine[1:3], *theirs[3:5], None])  # of leaves, none is wanted


def _replace(graph: Graph, node: Node, parts: list[Node | None]) -> None:
    for user in list(node.users):
        part = parts[user.args[1]]  # type: ignore[index]
        assert part is not None
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    graph.erase_node(node)
