"""Documents and lengths change from batch to batch: nothing is compiled again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flash_interface import Sequences
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


class Told(nn.Module):
    """Documents come as what their caller made of them: a block mask, or ends and the longest."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(11, 16), again

    def attend(self, x: Tensor, told: dict[str, Any]) -> Tensor:
        if "blocks" in told:
            q = x[None].transpose(1, 2)
            return flex.flex_attention(q, q * 2, q, block_mask=told["blocks"])[0].transpose(0, 1)
        ends, longest = told["ends"], told["longest"]
        rest = (True, (-1, -1), 0.0, 0.0, "")
        return Sequences.apply(x, x * 2, x * 1, ends, ends + 0, longest, *rest)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, told: dict[str, Any]) -> Tensor:
        x = self.words(ids[0]).unflatten(-1, (2, 8))
        if self.again:
            return checkpoint(self.attend, x, told, use_reentrant=False).square().mean()
        return self.attend(x, told).square().mean()


def told(pack: list[int], how: str) -> dict[str, Any]:
    ends = torch.tensor([0, *pack]).cumsum(0).int()
    if how == "ends":
        return {"ends": ends, "longest": max(pack)}
    document = torch.arange(len(pack)).repeat_interleave(torch.tensor(pack))

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    total = sum(pack)
    return {"blocks": flex.create_block_mask(same, None, None, total, total, device="cpu", BLOCK_SIZE=16)}


def of_told(how: str, again: bool) -> list[tuple[float, int]]:
    """The error of every pack, and how many graphs were compiled up to it."""
    torch.manual_seed(0)
    model, found = Told(again).double(), []
    compiled = torch.compile(model, backend="hsap", options={"lower": "eager", "strict": True})
    check, flex._validate_device = (
        flex._validate_device,
        lambda *_: None,
    )  # torch's own kernel has no gradient
    try:
        for pack in ([20, 17, 3], [1, 38, 1], [40], [5] * 8, [30, 60], [9, 9, 30, 99, 3], [16, 2]):
            ids = torch.randint(11, (1, sum(pack)))
            results = []
            for function, as_told in ((model, "ends"), (compiled, how)):
                model.zero_grad()
                function(ids, told(pack, as_told)).backward()
                results.append(model.words.weight.grad)
            got, wanted = results
            found.append((float((got - wanted).abs().max()), counters["stats"]["unique_graphs"]))
    finally:
        flex._validate_device = check
    return found


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("how", ["blocks", "ends"])
def test_what_the_caller_makes_of_documents(pool: Pool, how: str, again: bool) -> None:
    for found in pool.run(of_told, how, again, world=2):
        assert max(error for error, _ in found) < TOLERANCE["nano"]
        assert [graphs for _, graphs in found] == [found[0][1]] * len(found)


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


class Labelled(nn.Module):
    """Words and labels meet in the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(ids).unflatten(-1, (2, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy(self.head(y)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def labelled(rows: list[int], options: dict[str, Any], limit: int = 8) -> list[Any]:
    """For each number of rows the error of the loss, or what was refused, and behind them what was logged;
    ``limit``: how many graphs torch compiles of a function."""
    torch.manual_seed(0)
    model = Labelled().double()
    compiled = torch.compile(model, backend="hsap", options={"lower": "eager", **options})
    found: list[Any] = []
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hsap_compile")
    logger.addHandler(handler)
    try:
        for many in rows:
            ids, labels = torch.randint(11, (2, many, 12)).unbind()
            with torch._dynamo.config.patch(recompile_limit=limit):
                try:
                    found.append(float((compiled(ids, labels) - model(ids, labels)).detach().abs()))
                except Exception as error:
                    found.append(str(error))
    finally:
        logger.removeHandler(handler)
    return [*found, said]


def test_labels_have_as_many_rows_as_words(pool: Pool) -> None:
    """In the graph of the second number of rows too, where torch would have two symbols."""
    for *errors, said in pool.run(labelled, [1, 2, 3], {"strict": True}, world=2):
        assert max(errors) < TOLERANCE["nano"] and said == []


def test_the_last_graph_of_a_function_is_refused_where_eager_would_be_wrong(pool: Pool) -> None:
    """Torch runs what it does not compile in eager: whole on every rank."""
    for options in ({"grad_sync": False}, {"outputs": "local"}):
        for first, second, said in pool.run(labelled, [1, 2], options, 2, world=2):
            assert first < TOLERANCE["nano"] and said == []
            assert "the next kind of call would silently run in eager" in second
            assert "and graph 2 of one function, the last one that torch compiles" in second
            assert "do:     raise torch._dynamo.config.recompile_limit" in second
    for first, second, third, said in pool.run(labelled, [1, 2, 3], {}, 2, world=2):
        assert max(first, second, third) < TOLERANCE["nano"]
        assert [s.partition(",")[0] for s in said] == ["this function was compiled 2 times"]
