"""``hsap_compile.explain``: what a person reads about a model, against what the compiled model does."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hsap_compile import Refused, explain
from hsap_compile.facts import Explanation, GraphExplanation
from hsap_compile.runtime import StepReport
from models import Nano, batch, build
from simulate import simulate, traced

PACK = [[5, 1, 9, 4, 8]]
PARAMETERS = 28  # of "nano"


def only(model: Any, given: dict[str, Any], ranks: int = 4, **options: Any) -> GraphExplanation:
    (graph,) = explain(model, **given, hsap_ranks=ranks, hsap_options=options).graphs
    return graph


@functools.cache
def nano(ranks: int = 4) -> GraphExplanation:
    return only(build("nano"), batch("nano", PACK), ranks)


def counts(graph: GraphExplanation) -> dict[str, tuple[int, int]]:
    return {c.what: (c.forward, c.backward) for c in graph.collectives}


class Mixing(nn.Module):
    """nano with one operator between its layers that mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.nano = Nano()

    def forward(self, ids: torch.Tensor, **rest: torch.Tensor) -> Any:
        loss, logits = self.nano(ids, **rest)
        return loss, torch.linalg.vector_norm(logits.cumsum(1).softmax(1), dim=-1)


def line_of(text: str) -> int:
    """Where ``text`` stands in this file."""
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_a_gather_names_its_line() -> None:
    graph = only(Mixing().double(), batch("nano", PACK))
    at = f"{__file__}:{line_of('logits.cumsum(1).softmax(1)')}, "
    assert {g.operator for g in graph.gathered} == {"aten::cumsum"}
    assert [g.at.startswith(at) for g in graph.gathered] == [True]
    assert [g.bytes for g in graph.gathered] == [27 * 61 * 8]
    assert at in str(graph) and "aten::cumsum: " in str(graph) and "13.2 kB gathered" in str(graph)


def test_attentions_say_where_they_are_and_what_they_attend() -> None:
    graph = only(build("llama"), batch("llama", PACK), intra=2)
    assert [(a.heads, a.kv_heads, a.dense) for a in graph.attentions] == [(4, 2, "")] * 2
    assert [a.module for a in graph.attentions] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    mask = "cumsum[0, q] == cumsum[0, k] and position_ids[0, q] >= position_ids[0, k]"
    assert {a.mask for a in graph.attentions} == {mask}
    assert all("sdpa_attention.py:" in a.at for a in graph.attentions)
    text = str(graph)
    assert f"attends: {mask}" in text and "position_ids: an input" in text
    assert "2 x " in text and "in model.layers.0.self_attn, model.layers.1.self_attn" in text
    assert "nothing runs on gathered tokens" in text


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_bytes_balance_and_counts_are_those_of_a_step(mesh: tuple[int, int]) -> None:
    """The same program on the ranks themselves; the counts are those of test_collectives."""
    reports: list[StepReport] = []
    given = batch("nano", [[5, 20, 2]])
    simulate(traced(build("nano"), given), *mesh, on_step=reports.append, outputs="local")
    graph = only(build("nano"), given, mesh[0] * mesh[1], intra=mesh[1], outputs="local")
    assert graph.step is not None
    got, wanted = graph.step, reports[0]
    assert (got.inter_bytes, got.intra_bytes, got.balance) == (
        wanted.inter_bytes,
        wanted.intra_bytes,
        wanted.balance,
    )
    assert got.plan.digest() == wanted.plan.digest()
    layers, heads, rows = 2, 2 * (mesh[1] > 1), int(mesh[0] > 1)
    exchanges = {"heads of attention": heads * layers, "keys and values": rows * layers}
    assert counts(graph) == {
        **{what: (n, n) for what, n in exchanges.items() if n},
        "sums over tokens": (1, 0),
        "gradient sums of parameters": (0, PARAMETERS),
    }
    sent = {c.what: c.forward_bytes + c.backward_bytes for c in graph.collectives}
    assert sent.get("heads of attention", 0) == wanted.intra_bytes
    assert sent.get("keys and values", 0) == wanted.inter_bytes


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=str)
def test_rows_of_shifted_tokens(mesh: tuple[int, int]) -> None:
    """Two convolutions, of 3 x 32 and of 32 channels; contiguous ranks send the tokens in front of them."""
    options = {"intra": mesh[1], "placement": "contiguous", "outputs": "local"}
    graph = only(
        build("causal convolutions"), batch("causal convolutions", PACK), mesh[0] * mesh[1], **options
    )
    (found,) = [c for c in graph.collectives if c.what == "rows of shifted tokens"]
    bytes_sent = (mesh[0] * mesh[1] - 1) * (3 * 96 + 4 * 32) * 8
    assert (found.forward, found.backward, found.level) == (2, 2, "all ranks")
    assert (found.forward_bytes, found.backward_bytes) == (bytes_sent, bytes_sent)
    assert not graph.gathered and "rows of shifted tokens" in str(graph)


def test_parameters_are_counted() -> None:
    size = sum(p.numel() * p.itemsize for p in build("nano").parameters())
    assert (nano().parameters, nano().parameter_bytes) == (PARAMETERS, size)
    assert f"gradients of {PARAMETERS} parameters are summed" in str(nano())
    shares = only(build("nano"), batch("nano", PACK), grad_sync=False, outputs="local")
    assert (shares.parameters, counts(shares)["sums over tokens"]) == (0, (1, 0))
    assert "grad_sync=False" in str(shares)
    (local,) = shares.outputs
    assert (local.gathered, local.bytes) == (False, 0) and "this rank's rows" in str(shares)


def test_without_gradients_there_is_no_backward() -> None:
    with torch.no_grad():
        graph = only(build("nano"), batch("nano", PACK))
    assert all(c.backward == c.backward_bytes == 0 for c in graph.collectives)
    assert "gradients" not in str(graph)


def test_gathered_outputs_say_their_size_and_the_remedy() -> None:
    (output,) = nano().outputs
    assert (output.index, output.shape, output.bytes, output.gathered) == (1, (1, 27, 61), 27 * 61 * 8, True)
    assert "self.head(self.norm(x))" in output.at
    assert "output 1: float64 (1, 27, 61), gathered, 13.2 kB on every rank" in str(nano())
    assert 'options={"outputs": "local"}' in str(nano())
    assert counts(nano())["gathered for outputs"] == (1, 0)


def test_one_rank_exchanges_nothing() -> None:
    graph = nano(1)
    assert graph.collectives == () and "no collectives" in str(graph)
    assert all(a.how.startswith("on the one rank") for a in graph.attentions)


def starts() -> dict[str, Any]:
    """The batch with where documents start in the place of their numbers."""
    given = batch("nano", PACK)
    given["starts"] = (given["positions"] == 0).long()
    del given["documents"]
    return given


class Broken(nn.Module):
    """Two halves with a graph break between them; documents are made in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Nano(), Nano()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor):
        documents = starts.cumsum(1)
        loss, logits = self.first(ids, labels, documents, positions)
        torch._dynamo.graph_break()  # the planted break
        more, _ = self.second(ids, labels, documents, positions)
        return loss + more, logits


def test_every_graph_has_a_section_and_a_break_its_cost() -> None:
    result = explain(Broken().double(), **starts(), hsap_ranks=2)
    first, second = result.graphs
    assert f"{__file__}:{line_of('# the planted break')}" in first.break_reason
    assert second.break_reason == "" and second.refused == first.refused == ""
    assert first.step is not None and second.step is not None
    # documents were computed, not guessed: both graphs attend the same pairs
    assert first.step.plan.digest() == second.step.plan.digest()
    text = str(result)
    made = f"cumsum: {__file__}:{line_of('documents = starts.cumsum(1)')}"
    assert made in text and "in first\n" in text and "in second\n" in text
    assert "graph 1 of 2" in text and "graph 2 of 2" in text
    assert f"graph break: {first.break_reason}" in text and "13.2 kB gathered here" in text


class Pieces(Broken):
    """Behind the break, constants, and what is made of one number."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor):
        loss, logits = self.first(ids, labels, starts.cumsum(1), positions)
        torch._dynamo.graph_break()
        weights = torch.ones(3) * 2
        torch._dynamo.graph_break()
        return loss * weights.sum(), logits


def test_a_piece_without_a_batch_is_said_to_be_computed_by_all() -> None:
    result = explain(Pieces().double(), **starts(), hsap_ranks=2)
    first, second = result.graphs
    assert (first.whole, second.whole, result.failure) == (False, True, "")
    said = "no value is made of the tokens of a row: every rank computes all of the graph"
    assert said not in str(first) and said in str(second) and "plan of this batch" not in str(second)


class Odd(nn.Module):
    """Over all tokens twice, then one that no mask can say."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        others = torch.cat([x, x], 1)[:, None]
        y = F.scaled_dot_product_attention(x[:, None], others, others)  # other tokens
        x = self.out(x + y[:, 0])
        return (x @ x.mT).cumsum(-1).softmax(-1) @ x  # scores summed up


def test_an_attention_that_is_not_partitioned_says_why() -> None:
    graph = only(Odd(), {"ids": torch.arange(11)[None] % 9}, 2)
    assert all(a.dense for a in graph.attentions)
    found = {a.at.split(",")[0]: a.dense for a in graph.attentions}
    last = f"{__file__}:{line_of('# scores summed up')}"
    assert found.keys() == {f"{__file__}:{line_of('# other tokens')}", last}
    assert found[last] == "there is no formula of each score alone for aten::cumsum"
    assert "not partitioned: there is no formula" in str(graph)


class Specialised(Nano):
    def forward(self, ids: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> Any:
        return super().forward(ids, *rest, **more)[1] * {27: 1.0, 5: 2.0}[ids.shape[1]]


def test_a_refusal_is_told() -> None:
    result = explain(Specialised().double(), **batch("nano", PACK))
    assert "the sequence length stays a constant" in result.graphs[0].refused
    assert "refused" in str(result) and "drop dynamic=False" in str(result)
    strict = only(Mixing().double(), batch("nano", PACK), strict=True)
    assert "aten::cumsum cannot be computed on one rank's tokens" in strict.refused
    few = only(build("nano"), batch("nano", [[5]]), 4)
    assert "5" in few.refused and few.step is None


def test_an_option_or_argument_that_is_wrong_is_raised() -> None:
    with pytest.raises(Refused, match=r"there is no option"):
        explain(build("nano"), hsap_options={"inner": 2})
    with pytest.raises(ValueError, match=r"got hsap_ranks=0; wanted 1 or more"):
        explain(build("nano"), hsap_ranks=0)
    with pytest.raises(TypeError, match=r"labels"):  # the model's own complaint
        explain(build("nano"), **{k: v for k, v in batch("nano", PACK).items() if k != "labels"})


def test_nothing_of_the_model_is_touched() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(7), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(9):  # more often than dynamo compiles one function
        assert len(explain(model, torch.arange(7)[None] % 9, hsap_ranks=1).graphs) == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_no_name_of_the_models_can_collide() -> None:
    kinds = {p.name: p.kind for p in inspect.signature(explain).parameters.values()}
    assert kinds["model"] == inspect.Parameter.POSITIONAL_ONLY
    named = [n for n, kind in kinds.items() if kind == inspect.Parameter.KEYWORD_ONLY]
    assert named and all(n.startswith("hsap_") for n in named)
    assert explain(lambda model, ranks: model * ranks, model=torch.ones(3), ranks=2, hsap_ranks=1).ranks == 1


def test_the_page_holds_the_text(tmp_path: Path) -> None:
    result = Explanation(2, (nano(),))
    result.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") and "q &gt;= k" in page and "<title>hsap on 2 ranks" in page
