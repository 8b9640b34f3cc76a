"""Real gloo ranks, as torchrun starts them: ``torch.compile(model, backend="hsap")`` against eager.

This module must not import hsap_compile: the ranks find the backend by its entry point.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models import batch, build, difference
from pool import Pool

Rows = list[list[int]]
PACKS: list[Rows] = [[[5, 1, 9, 4, 8]], [[27]], [[1] * 9 + [18]], [[30, 2, 9]]]


def compare(name: str, packs: list[Rows], lower: str, options: dict[str, Any]) -> list[float]:
    """The relative error of loss, logits and all gradients, for every pack, on this rank."""
    model = build(name, torch.float32)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hsap", options={"lower": lower, **options})
    return [difference(compiled, model, reference, batch(name, rows, seed=i)) for i, rows in enumerate(packs)]


@pytest.mark.parametrize(
    ("name", "world", "options"),
    [
        ("nano", 2, {"lower": "inductor"}),
        ("llama", 2, {"lower": "aot_eager", "intra": 1}),
        ("nano", 4, {"lower": "aot_eager", "intra": 2, "placement": "contiguous"}),
        pytest.param("llama", 4, {"lower": "aot_eager", "intra": 2}, marks=pytest.mark.slow),
        pytest.param("llama", 4, {"lower": "inductor", "intra": 2}, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, {"lower": "inductor"}, marks=pytest.mark.slow),
        pytest.param("mistral", 2, {"lower": "aot_eager", "intra": 1}, marks=pytest.mark.slow),
        pytest.param("encoder", 4, {"lower": "aot_eager", "intra": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks(pool: Pool, name: str, world: int, options: dict[str, Any]) -> None:
    options = dict(options)
    for errors in pool.run(compare, name, PACKS, options.pop("lower"), options, world=world):
        assert max(errors) < 2e-5


# --- ranks that disagree ------------------------------------------------------------------------------


def refused(change: Callable[[torch.nn.Module, dict[str, Any]], None]) -> str:
    """What rank r says when ``change`` was made on the last rank only."""
    model, given = build("nano", torch.float32), batch("nano", [[5, 1, 9, 4, 8]])
    if dist.get_rank() == dist.get_world_size() - 1:
        change(model, given)
    try:
        torch.compile(model, backend="hsap", options={"lower": "eager"})(**given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def other_tokens(model: torch.nn.Module, given: dict[str, Any]) -> None:
    given["ids"] = given["ids"].flip(1)


def other_length(model: torch.nn.Module, given: dict[str, Any]) -> None:
    given.update(batch("nano", [[5, 9, 4, 8]]))


def other_weights(model: torch.nn.Module, given: dict[str, Any]) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def other_model(model: torch.nn.Module, given: dict[str, Any]) -> None:
    model.attention = "causal"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_tokens, "the ranks were given different batches"),
        (other_length, "the ranks were given batches of different lengths"),
        (other_weights, "the ranks hold different parameters"),
        (other_model, "the ranks run different graphs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ranks_that_disagree_are_refused(pool: Pool, change: Any, text: str) -> None:
    for said in pool.run(refused, change, world=2, timeout=120.0):
        assert said.startswith("Refused: hsap: ") and text in said
        assert "ranks [1] differ from rank 0" in said and "\n  do: " in said
