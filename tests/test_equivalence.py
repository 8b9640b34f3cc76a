"""Whole models on every simulated rank against one process: outputs, loss and every gradient.

The rewritten graph runs as it is (``lower="eager"``), on threads.  A model is traced once and compiled once
for each mesh; hundreds of packs, of any length, then run on that one graph.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from hsap_compile.errors import Refused
from models import MODELS, TOLERANCE, batch, build
from simulate import (
    Traced,
    eager,
    rebatched,
    relative,
    simulate,
    simulate_all,
    since,
    traced,
    worst,
)

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 2)]
OPEN = pytest.mark.filterwarnings("ignore:hsap. position_ids restart")  # "nano causal" knows no documents
PLACEMENTS = ["balanced", "contiguous"]
Rows = list[list[int]]

#: What is easy to get wrong, for up to 8 ranks: two rows each.
CORNERS: list[Rows] = [
    [[16], [1] * 16],  # two tokens a rank; one giant beside sixteen of length one
    [[17], [3, 14]],
    [[1, 1, 1, 40, 1, 1], [9, 9, 9, 9, 9]],
    [[61], [61]],  # one document
    [[2] * 20, [39, 1]],
    [[5, 30, 2], [1, 35, 1]],
]


@st.composite
def packs(draw: st.DrawFn, rows: int = 2, least: int = 16) -> Rows:
    """``rows`` rows of one drawn length, cut into documents anew for every row."""
    tokens = draw(st.integers(least, 64))
    result = []
    for _ in range(rows):
        cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=tokens)))
        result.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)])
    return result


@functools.cache
def trace(name: str, dtype: torch.dtype = torch.float64, rows: int = 2) -> tuple[Traced, dict[str, Any]]:
    """``name`` as dynamo traces it, and the batch that it was traced with."""
    model, first = build(name, dtype), batch(name, CORNERS[2][:rows])
    return traced(model, first), first


def check(
    name: str, mesh: tuple[int, int], several: list[Rows], dtype: Any = torch.float64, **options: Any
) -> None:
    """Every rank gives eager's outputs and gradients for every pack of ``several``."""
    of, first = trace(name, dtype, len(several[0]))
    calls = [rebatched(of, first, batch(name, rows, seed=i)) for i, rows in enumerate(several)]
    tolerance = TOLERANCE[name] if dtype == torch.float64 else 1e-5
    for rows, args, result in zip(several, calls, simulate_all(of, *mesh, *calls, **options), strict=True):
        wanted = eager(of, args)
        for rank, step in enumerate(result.ranks):
            error = worst(step, wanted)
            assert max(error) <= tolerance, f"{name} on {mesh}, rank {rank}, documents {rows}: {error}"


SIMILAR = (
    "qwen2",
    "olmo2",
    "phi3",
    "gpt-neox",
    "gemma3",
    "mistral",
    "nano causal",
    "multihead",
)  # in the slow sweep only


@OPEN
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SIMILAR])
def test_models(name: str) -> None:
    check(name, (2, 2), CORNERS)


@OPEN
@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_on_meshes(name: str, mesh: tuple[int, int], placement: str) -> None:
    cut = name == "next token"  # by one, inside of the model: two tokens a rank are left of 17
    check(name, mesh, CORNERS[1 if cut else 0 :], placement=placement)


@pytest.mark.parametrize("placement", ["balanced", pytest.param("contiguous", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_meshes(mesh: tuple[int, int], placement: str) -> None:
    check("nano", mesh, CORNERS, placement=placement)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(packs(), min_size=12, max_size=12), st.sampled_from(MESHES[1:]), st.sampled_from(PLACEMENTS))
def test_packs(several: list[Rows], mesh: tuple[int, int], placement: str) -> None:
    check("nano", mesh, several, placement=placement)


@pytest.mark.parametrize("name", ["gemma2"])
def test_float32(name: str) -> None:
    check(name, (2, 2), CORNERS, torch.float32)


@OPEN
@pytest.mark.parametrize("name", ["mistral", "nano causal"])
def test_one_row(name: str) -> None:
    check(name, (3, 1), [rows[:1] for rows in CORNERS])


def test_few_key_value_heads_are_repeated() -> None:
    model, first = build("llama", num_key_value_heads=1, num_hidden_layers=1), batch("llama", CORNERS[2])
    of = traced(model, first)
    for intra in (2, 4):
        for step in simulate(of, 1, intra).ranks:
            assert max(worst(step, eager(of))) <= TOLERANCE["llama"]


def test_heads_that_do_not_divide_are_refused() -> None:
    of, _ = trace("nano")
    with pytest.raises(Refused, match="groups of 3 ranks are not possible") as caught:
        simulate(of, 1, 3)
    assert "intra=3 with 3 ranks and 4 query heads" in str(caught.value)
    assert "a divisor of both: one of [1]" in str(caught.value)


# --- losses -------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A loss of token-wise logits, one of ``LOSSES``."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(models.VOCABULARY, 7, generator=g, dtype=torch.float64))
        self.weights: Tensor
        self.register_buffer("weights", torch.rand(7, generator=g, dtype=torch.float64) + 0.1)
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = F.embedding(ids, self.table) * 2
        return LOSSES[self.loss](self, logits, labels)


def _flat(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, 7), labels.view(-1), **more)


LOSSES: dict[str, Any] = {
    "mean": lambda m, x, y: _flat(x, y),
    "sum": lambda m, x, y: _flat(x, y, reduction="sum"),
    "none": lambda m, x, y: _flat(x, y, reduction="none"),
    "ignore": lambda m, x, y: _flat(x, y.masked_fill(y < 0, 2), ignore_index=2),
    "weights": lambda m, x, y: _flat(x, y, weight=m.weights),
    "weights sum": lambda m, x, y: _flat(x, y, weight=m.weights, reduction="sum"),
    "smooth": lambda m, x, y: _flat(x, y, label_smoothing=0.2),
    "smooth weights": lambda m, x, y: _flat(x, y, label_smoothing=0.2, weight=m.weights),
    "probabilities": lambda m, x, y: F.cross_entropy(x.mT, F.one_hot(y.clamp(0), 7).to(x.dtype).mul(0.9).mT),
    "probabilities weights": lambda m, x, y: F.cross_entropy(
        x.view(-1, 7), F.one_hot(y.view(-1).clamp(0), 7) * x.new_tensor(0.8), m.weights, label_smoothing=0.1
    ),
    "classes second": lambda m, x, y: F.cross_entropy(
        x.mT, y.masked_fill(y < 0, 3), weight=m.weights, ignore_index=3
    ),
    "padded": lambda m, x, y: _flat(x, F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()),
    "sliced": lambda m, x, y: _flat(x[:, :-1].contiguous(), y[:, 1:].contiguous()),
    "sliced sum": lambda m, x, y: F.cross_entropy(x[..., :-1, :].mT, y[..., 1:], reduction="sum"),
    "sliced weights": lambda m, x, y: _flat(x[:, :-2].reshape(-1, 7), y[:, 2:].reshape(-1), weight=m.weights),
    "sliced none": lambda m, x, y: F.cross_entropy(x[:, :-1].mT, y[:, 1:], reduction="none"),
    "likelihood": lambda m, x, y: F.nll_loss(x.log_softmax(-1).mT, y, m.weights),
    "divided": lambda m, x, y: _flat(x, y, reduction="sum") / (y != -100).sum(),
    "masked mean": lambda m, x, y: (_flat(x, y, reduction="none") * (y != -100).view(-1)).mean(),
}


def labelled(kind: str, rows: int, tokens: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, models.VOCABULARY, (rows, tokens), generator=g)
    labels = torch.randint(0, 7, (rows, tokens), generator=g)
    if kind == "some":
        labels = labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.5, -100)
    elif kind == "one":  # most ranks own no label
        labels = torch.full_like(labels, -100).index_fill_(1, torch.tensor([tokens // 2]), 4)
    elif kind == "none":
        labels = torch.full_like(labels, -100)
    return {"ids": ids, "labels": labels}


_NEEDS = {n: since((2, 12), "one_hot fixes the length") for n in ("probabilities", "probabilities weights")}


@pytest.mark.parametrize("loss", [pytest.param(n, marks=_NEEDS.get(n, ())) for n in LOSSES])
def test_losses(loss: str) -> None:
    first = labelled("some", 2, 13)
    of = traced(Head(loss), first)
    for mesh in ((3, 1), (1, 2)):
        several = [labelled(kind, 2, n) for n in (6, 13, 16) for kind in ("all", "some", "one", "none")]
        calls = [rebatched(of, first, other) for other in several]
        for args, result in zip(calls, simulate_all(of, *mesh, *calls), strict=True):
            for step in result.ranks:
                assert max(worst(step, eager(of, args))) <= 1e-12


# --- options ------------------------------------------------------------------------------------------


def test_local_outputs() -> None:
    of, _ = trace("nano")
    wanted = eager(of)
    result = simulate(of, 2, 2, outputs="local")
    whole = torch.full_like(wanted.outputs[1], torch.nan)
    for rank, step in enumerate(result.ranks):
        columns = result.runner.last_plan.tables(rank).columns  # type: ignore[union-attr]
        whole[:, columns] = step.outputs[1]
        assert relative(step.outputs[0], wanted.outputs[0]) <= 1e-11  # a scalar is whole in any case
    assert relative(whole, wanted.outputs[1]) <= 1e-11


def test_gradient_shares_add_up() -> None:
    for name in ("nano", "llama"):
        of, _ = trace(name)
        wanted, ranks = eager(of), simulate(of, 2, 2, grad_sync=False).ranks
        for i, gradient in wanted.gradients.items():
            total = torch.stack([step.gradients[i] for step in ranks]).sum(0)
            assert relative(total, gradient, 1e-6) <= TOLERANCE[name]
            assert relative(ranks[0].gradients[i], gradient) > 1e-3
