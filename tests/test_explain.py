"""``hsap_compile.explain``: what a person reads about a model, against what the compiled model does."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hsap_compile
from hsap_compile import Refused, explain
from hsap_compile.explanation import GraphExplanation
from hsap_compile.runtime import StepReport
from models import OWN, Nano, batch, build
from simulate import simulate, traced

PACK = [[5, 1, 9, 4, 8]]
PARAMETERS = 28  # of "nano"


def only(model: Any, given: dict[str, Any], ranks: int = 4, **options: Any) -> GraphExplanation:
    (graph,) = explain(model, **given, hsap_ranks=ranks, hsap_options=options).graphs
    return graph


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
