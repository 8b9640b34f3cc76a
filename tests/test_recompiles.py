"""Documents and lengths change from batch to batch: nothing is compiled again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from models import TOLERANCE, batch, build, difference
from pool import Pool

SAME_LENGTH = [[n, 24 - n] for n in range(1, 21)]
LENGTHS = [[n, 3, n + 1] for n in range(4, 14)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs(name: str, packs: list[list[int]], **options: Any) -> list[int]:
    """How many graphs were compiled up to each of ``packs``, forward and backward."""
    model = torch.compile(build(name), backend="hsap", options={"lower": "eager", **options})
    found = []
    for i, pack in enumerate(packs):
        result = model(**batch(name, [pack], seed=i))
        (result[0] if isinstance(result, tuple) else result.loss).backward()
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.parametrize("name", ["nano", "llama"])
def test_packings_of_one_length(name: str) -> None:
    found = graphs(name, SAME_LENGTH)
    assert found == found[:1] * 20


@pytest.mark.parametrize("name", ["nano", "llama"])
def test_lengths(name: str) -> None:
    found = graphs(name, SAME_LENGTH[:1] + LENGTHS)
    assert found[-1] - found[0] <= 1
    assert found[2:] == found[2:3] * len(found[2:])


def test_on_two_ranks(pool: Pool) -> None:
    for found in pool.run(graphs, "nano", SAME_LENGTH[:5] + LENGTHS, world=2):
        assert found[-1] - found[0] <= 1


def test_many_documents_after_one() -> None:
    """The tables grow from one slice to many, and shrink again."""
    found = graphs("nano", [[30], [1] * 30, [15, 15], [29, 1]])
    assert found == found[:1] * 4


ROWS = [[[20, 7], [3, 24]], [[20, 7], [3, 24], [9, 18]], [[27]], [[12, 7], [3, 16], [1, 18]], [[19, 4], [23]]]


def rows_of(packs: list[list[list[int]]]) -> list[tuple[float, int]]:
    """The error of every pack, and how many graphs were compiled up to it; no operator may run on
    gathered tokens."""
    model, found = build("nano"), []
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hsap", options={"lower": "eager", "strict": True})
    for i, pack in enumerate(packs):
        error = difference(compiled, model, reference, batch("nano", pack, seed=i))
        found.append((error, counters["stats"]["unique_graphs"]))
    return found


def test_other_numbers_of_rows_compile_once_each(pool: Pool) -> None:
    for found in pool.run(rows_of, ROWS, world=2):
        assert max(error for error, _ in found) < TOLERANCE["nano"]
        assert [graphs for _, graphs in found] == [1, 2, 3, 3, 3]
