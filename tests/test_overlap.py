"""Differentiated graphs: exchanges apart from their waits, attention in two parts, gradients in buckets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule

from attention_cases import Case, drawn, make_case
from hsap_compile import formula as f
from hsap_compile._torch import FakeTensorMode
from hsap_compile.graph import Builder
from hsap_compile.kernels import attention, exchange
from hsap_compile.kernels.slices import CAUSAL, FULL, MOD
from hsap_compile.passes import _parts
from hsap_compile.passes import overlap as of
from threads import run_threads


def graph_of(function: Any, results: int, *args: Any) -> tuple[GraphModule, list[Tensor]]:
    """A graph of one call, and the tensors it takes; ``results``: how many it returns."""
    graph, mode, values = Graph(), FakeTensorMode(), iter(args)
    flat: list[Tensor] = []

    def node(value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
            return [node(x) for x in value]
        if not isinstance(value, Tensor):
            return value
        made = graph.placeholder(f"x{len(flat)}")
        made.meta["val"] = mode.from_tensor(value.detach())
        flat.append(value.detach())
        return made

    arguments = [node(value) for value in values]
    build = Builder(graph, mode)
    called = build(function, *arguments)
    parts = [build(operator.getitem, called, i) for i in range(results)]
    graph.output(tuple(parts))
    return GraphModule(torch.nn.Module(), graph), flat


def before_and_after(function: Any, results: int, *args: Any) -> tuple[list[Tensor], list[Tensor], Graph]:
    module, flat = graph_of(function, results, *args)
    before = module(*flat)
    of.overlap(module.graph)
    module.recompile()
    return list(before), list(module(*flat)), module.graph


def calls(graph: Graph, target: Any) -> int:
    return sum(node.target is target for node in graph.nodes)


def forward_arguments(case: Case) -> tuple[Any, ...]:
    floats = (case.q, case.k, case.v, case.k_remote, case.v_remote)
    indices = (case.slices, case.rows, case.remote_rows, case.heads)
    return (*floats, *indices, list(case.leaves), case.mod, case.q.shape[0] + 50, case.q.shape[2] ** -0.5)


def error_of_both(case: Case) -> float:
    """The largest difference that the rewrite makes, forward and backward."""
    forward = forward_arguments(case)
    before, after, _ = before_and_after(attention.OP, 2, *forward)
    errors = [difference(a, b) for a, b in zip(before, after, strict=True)]
    backward = (case.grad, *forward, *before, case.grad_lse, [])
    old, new, _ = before_and_after(attention.BACKWARD, 5, *backward)
    return max(*errors, *(difference(a, b) for a, b in zip(old, new, strict=True)))


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    assert torch.equal(one.isinf(), other.isinf())
    gap = (one - other).masked_fill(one.isinf(), 0).abs().max() if one.numel() else torch.zeros(())
    return float(gap) / max(1.0, float(one.masked_fill(one.isinf(), 0).abs().max()) if one.numel() else 1.0)


@settings(max_examples=40, deadline=None)
@given(drawn())
def test_two_parts_equal_one(arguments: dict[str, Any]) -> None:
    assert error_of_both(make_case(**arguments)) < 1e-11


def test_two_parts_of_large_logits_equal_one() -> None:
    """No part of a softmax takes itself for the whole, whatever rounding did to l."""
    case = make_case([[0, 8, 0, 8, MOD, 0, 0], [0, 8, 8, 20, MOD, 0, 0]], 8, 12)
    assert error_of_both(replace(case, q=case.q * 1e3)) < 1e-9


ROWS = [[0, 8, 0, 8, CAUSAL, 0, 0], [4, 8, 8, 12, FULL, 0, 0], [0, 4, 12, 20, MOD, 0, 0]]


def test_one_call_becomes_two() -> None:
    case = make_case(ROWS, 8, 12)
    forward = forward_arguments(case)
    out, _, graph = before_and_after(attention.OP, 2, *forward)
    assert calls(graph, attention.OP) == 2
    _, _, graph = before_and_after(attention.BACKWARD, 5, case.grad, *forward, *out, None, [])
    assert calls(graph, attention.BACKWARD) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda case: replace(case, k_remote=None, v_remote=None, remote_rows=None, slices=case.slices[:1]),
        lambda case: make_case(ROWS, 8, 12, otherwise=-1e30),  # soft: l holds no more than the peak
        lambda case: replace(case, mod=f.dumps(f.sink(f.loads(case.mod), f.leaf(0, f.h)))),  # counts once
    ],
    ids=["nothing received", "finite masks", "a sink"],
)
def test_what_stays_one_call(change: Callable[[Case], Case]) -> None:
    case = change(make_case(ROWS, 8, 12))
    before, after, graph = before_and_after(attention.OP, 2, *forward_arguments(case))
    assert calls(graph, attention.OP) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_leaves_with_gradients_keep_one_backward() -> None:
    case = make_case(ROWS, 8, 12)
    forward = forward_arguments(case)
    out, _, _ = before_and_after(attention.OP, 2, *forward)
    _, _, graph = before_and_after(attention.BACKWARD, 5, case.grad, *forward, *out, None, [0])
    assert calls(graph, attention.BACKWARD) == 1


def test_a_part_counted_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "OF_KEYS", lambda slices, first, stop, shift: slices)
    with pytest.raises(AssertionError):
        assert error_of_both(make_case(ROWS[:1], 8, 12)) < 1e-11


# --- sums of gradients --------------------------------------------------------------------------------


def summed(sizes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> tuple[list[list[int]], float]:
    """What is summed in one bucket, by number, and the largest error on this rank."""
    import torch.distributed as dist

    group = dist.group.WORLD.group_name
    g = torch.Generator().manual_seed(dist.get_rank())
    given = [torch.randn(s, generator=g).to(d) for s, d in zip(sizes, dtypes, strict=True)]
    graph, mode = Graph(), FakeTensorMode()
    inputs = []
    for i, value in enumerate(given):
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = mode.from_tensor(value)
    build = Builder(graph, mode)
    sums = [build(exchange.SUM_RANKS, x, group) for x in inputs]
    graph.output(tuple(sums))
    numbers = {node: i for i, node in enumerate(sums)}
    buckets = [[numbers[n] for n in bucket] for bucket in of._buckets(sums)]
    module = GraphModule(torch.nn.Module(), graph)
    wanted = module(*given)
    of.overlap(graph)
    module.recompile()
    assert calls(graph, exchange.ALL_REDUCE_START) == calls(graph, exchange.WAIT) == len(buckets)
    return buckets, max(float((a - b).abs().max()) for a, b in zip(module(*given), wanted, strict=True))


def test_small_gradients_are_summed_together() -> None:
    for buckets, error in run_threads(2, summed, [(3, 4), (5,), (), (7, 2)], [torch.float32] * 4):
        assert buckets == [[0, 1, 2, 3]] and error == 0.0


def test_types_have_their_own_buckets() -> None:
    types = [torch.float32, torch.bfloat16, torch.float32]
    for buckets, error in run_threads(2, summed, [(3,), (4,), (5,)], types):
        assert sorted(buckets) == [[0, 2], [1]] and error == 0.0


def test_large_gradients_travel_in_several_buckets() -> None:
    megabyte = (2**18,)
    for buckets, error in run_threads(2, summed, [megabyte] * 8, [torch.float32] * 8):
        assert buckets == [[0, 1], [2, 3], [4, 5], [6, 7]] and error == 0.0


# --- starts and waits ---------------------------------------------------------------------------------


class Scheduled:
    """As much of a node of Inductor's scheduler as the pass reads.  It is fused of operations, each of which
    knows its own ancestors only."""

    def __init__(self, name: str, kind: str, operations: dict[str, set[str]]) -> None:
        self.name, self.kind, self.operations = name, kind, operations
        self.ancestors = set().union(*operations.values()) - set(operations)

    def get_operation_names(self) -> set[str]:
        return set(self.operations)


def nodes_of(lines: str) -> list[Scheduled]:
    """``a = work, f = work | a, s = start f.1, r = wait s``: what a line computes, and of what.  f is fused
    of an operation that reads nothing, f or f.0, and one that reads a, f.1."""
    nodes: list[Scheduled] = []
    ancestors: dict[str, set[str]] = {}
    for line in lines.split(", "):
        name, kind, *rest = line.replace(" =", "").split(" ")
        operations = {}
        for i, operands in enumerate(" ".join(rest).split("|")):
            read = {x if "." in x else f"{x}.0" for x in operands.split()}
            operations[f"{name}.{i}"] = read.union(*(ancestors[x] for x in read))
        ancestors |= operations
        nodes.append(Scheduled(name, kind, operations))
    return nodes


@pytest.fixture
def reordered(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Scheduled]], list[Scheduled]]:
    monkeypatch.setattr(of, "contains_collective", lambda node: node.kind == "start")
    monkeypatch.setattr(of, "contains_wait", lambda node: node.kind == "wait")
    return lambda order: of.start_early(of.wait_late(order))


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        # what the start does not need comes behind it
        ("w1 = work, a = work, s = start a, r = wait s", "a s w1 r"),
        # rows that wait for nothing travel together with those before them
        ("s = start, r = wait s, w = work r, t = start, q = wait t", "s t r w q"),
        # a start stays behind a wait that it needs, which comes as late as it can
        ("s = start, w1 = work, r = wait s, w2 = work, a = work r, t = start a", "s w1 w2 r a t"),
        # nothing is put off twice
        ("w1 = work, s = start, w2 = work, a = work, t = start a, w3 = work, u = start", "s w1 a t w2 u w3"),
        # what was fused with something needed is computed with it, so its operands are needed, too
        ("w1 = work, a = work, f = work | a, s = start f, r = wait s", "a f s w1 r"),
    ],
    ids=["needed first", "together", "behind its wait", "put off once", "fused"],
)
def test_order_of_starts(lines: str, wanted: str, reordered: Any) -> None:
    assert [node.name for node in reordered(nodes_of(lines))] == wanted.split()


@st.composite
def schedules(draw: st.DrawFn) -> str:
    """Lines of work, starts, and waits for them, in any order that can be computed."""
    lines: list[str] = []
    for i in range(draw(st.integers(1, 14))):
        starts = [
            j for j, line in enumerate(lines) if "start" in line and f"wait n{j}" not in ", ".join(lines)
        ]
        kind = draw(st.sampled_from(["work", "fused", "start", *["wait"] * bool(starts)]))
        if kind == "wait":
            lines.append(f"n{i} = wait n{draw(st.sampled_from(starts))}")
            continue
        read = []
        for j in draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []:
            read.append(f"n{j}.1" if "|" in lines[j] and draw(st.booleans()) else f"n{j}")
        if kind == "fused":
            read.insert(draw(st.integers(0, len(read))), "|")
        lines.append(" ".join([f"n{i} =", kind.replace("fused", "work"), *read]))
    return ", ".join(lines)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedules())
def test_any_order_of_starts_can_be_computed(reordered: Any, lines: str) -> None:
    before = nodes_of(lines)
    after = reordered(before)
    assert sorted(map(id, before)) == sorted(map(id, after))
    seen: set[str] = set()
    for node in after:
        assert node.ancestors <= seen
        seen |= node.get_operation_names()
    starts = [[n for n in order if n.kind == "start"] for order in (before, after)]
    assert starts[0] == starts[1]  # every rank starts the same one after the same
    for node in [n for n in before if n.kind != "wait"]:
        passed = set(before[before.index(node) :]) & set(after[: after.index(node)])
        assert sum(other.kind == "start" for other in passed) <= 1
