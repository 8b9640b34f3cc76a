"""Shifts and convolutions on real ranks, through Inductor: other documents and lengths compile nothing again.

This module must not import hsap_compile: the ranks find the backend by its entry point.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from models import batch, build, difference
from pool import Pool

PACKS = [[5, 1, 9, 4, 8], [27], [1] * 9 + [18], [30, 2, 9], [4, 4]]


def compare(name: str, lower: str) -> list[tuple[float, int]]:
    """For every pack, the largest relative error and how many graphs have been compiled."""
    torch._dynamo.reset()
    counters.clear()
    model = build(name, torch.float32)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hsap", options={"lower": lower})
    found = []
    for i, pack in enumerate(PACKS):
        error = difference(compiled, model, reference, batch(name, [pack], seed=i))
        found.append((error, counters["stats"]["unique_graphs"]))
    return found


@pytest.mark.parametrize(
    ("name", "world", "lower"),
    [
        ("token shift", 2, "aot_eager"),
        pytest.param("token shift", 2, "inductor", marks=pytest.mark.slow),
        pytest.param("causal convolutions", 2, "inductor", marks=pytest.mark.slow),
        pytest.param("token shift", 4, "aot_eager", marks=pytest.mark.slow),
        pytest.param("causal convolutions", 4, "inductor", marks=pytest.mark.slow),
    ],
)
def test_other_packs_compile_nothing_again(pool: Pool, name: str, world: int, lower: str) -> None:
    for found in pool.run(compare, name, lower, world=world, timeout=400.0):
        errors, graphs = zip(*found, strict=True)
        assert max(errors) < 2e-5
        assert graphs == graphs[:1] * len(PACKS)
