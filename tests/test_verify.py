"""The verifier sees a broken graph: one test for each of its rules."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from hsap_compile._torch import expr_of, fake_mode_of, fake_table
from hsap_compile.graph import Builder, placeholders
from hsap_compile.kernels import dense, exchange
from hsap_compile.passes.capture import capture
from hsap_compile.passes.find_attention import find_attention
from hsap_compile.passes.lift_mask import lift_mask
from hsap_compile.verify import BrokenGraph, verify
from simulate import traced
from test_backend import Tiny, batch

aten = torch.ops.aten


def lifted() -> tuple[torch.fx.GraphModule, Any]:
    trace = traced(Tiny(), batch([0, 0, 1, 1, 1, 2]))
    mode = fake_mode_of([n.meta["example_value"] for n in placeholders(trace.module)])
    graph = capture(trace.module)
    lift_mask(graph, find_attention(graph), mode)
    verify(graph, "lift_mask")
    return graph, mode


def _table(graph: torch.fx.GraphModule, mode: Any) -> torch.fx.Node:
    with graph.graph.inserting_after(placeholders(graph)[-1]):
        table = graph.graph.placeholder("columns")
    table.meta.update(val=fake_table(mode, torch.zeros(4, dtype=torch.int64), (0,)), table="columns")
    return table


def test_a_value_that_is_not_known() -> None:
    graph, mode = lifted()
    del next(n for n in graph.graph.nodes if n.target is dense.OP).meta["val"]
    with pytest.raises(BrokenGraph, match="has no value"):
        verify(graph, "lift_mask")


def test_an_attention_without_a_mask() -> None:
    graph, mode = lifted()
    del next(n for n in graph.graph.nodes if n.target is dense.OP).meta["mask"]
    with pytest.raises(BrokenGraph, match="is an attention without a mask"):
        verify(graph, "lift_mask")


def test_a_write_in_place_after_capture() -> None:
    graph, mode = lifted()
    node = next(n for n in graph.graph.nodes if n.target is dense.OP)
    with graph.graph.inserting_after(node):
        Builder(graph.graph, mode)(aten.relu_.default, node)
    with pytest.raises(BrokenGraph, match="writes in place"):
        verify(graph, "capture")


def test_rows_of_one_rank_that_meet_whole_tokens() -> None:
    graph, mode = lifted()
    node = next(n for n in graph.graph.nodes if n.target is dense.OP)
    table = _table(graph, mode)
    with graph.graph.inserting_before(node):
        ids = next(n for n in placeholders(graph) if _is_ids(n))
        Builder(graph.graph, mode)(aten.add.Tensor, aten_unsqueeze(graph, mode, ids), table)
    verify(graph, "shard_tokens", sympy.Symbol("rows"))  # some other size of an input
    with pytest.raises(BrokenGraph, match="mixes rows of one rank with whole tokens"):
        verify(graph, "shard_tokens", expr_of(ids.meta["val"].shape[1]))


@pytest.mark.parametrize("splits", [("one shift", "splits"), None], ids=str)
def test_an_exchange_whose_counts_are_of_another_table(splits: Any) -> None:
    graph, mode = lifted()
    node = next(n for n in graph.graph.nodes if n.target is dense.OP)
    rows, where_to = _table(graph, mode), _table(graph, mode)
    rows.meta["table"], where_to.meta["table"] = ("another shift", "arriving"), splits
    with graph.graph.inserting_before(node):
        build = Builder(graph.graph, mode)
        build(exchange.ALL_TO_ALL, rows, where_to, build.size(rows, 0), False, "")
    with pytest.raises(BrokenGraph, match="sends by the table .* and receives as many rows as the table"):
        verify(graph, "shard_tokens")


def _is_ids(node: torch.fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and "table" not in node.meta


def aten_unsqueeze(graph: torch.fx.GraphModule, mode: Any, node: torch.fx.Node) -> torch.fx.Node:
    return Builder(graph.graph, mode)(aten.unsqueeze.default, node, -1)


def test_an_attention_that_was_left_on_the_rows_of_one_rank() -> None:
    graph, mode = lifted()
    table = _table(graph, mode)
    node = next(n for n in graph.graph.nodes if n.target is dense.OP)
    with graph.graph.inserting_before(node):
        build = Builder(graph.graph, mode)
        operands = [build(aten.index_select.default, x, 2, table) for x in node.args[:3]]
        build(dense.OP, *operands, [], "Symbol('score', real=True)", 1.0, False)
    with pytest.raises(BrokenGraph, match="attends over the rows of one rank alone"):
        verify(graph, "partition_attention")
