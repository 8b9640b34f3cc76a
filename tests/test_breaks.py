"""Pieces between graph breaks that get no batch: every rank computes all of them, and the sums of gradients
stay right.

This module must not import hsap_compile: the ranks find the backend by its entry point.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import batch, build
from pool import Pool

PACK = [[5, 1, 9, 4, 8]]


class Broken(nn.Module):
    """A model whose loss is made behind graph breaks: of vectors alone, of constants, of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.scale = build("nano", torch.float32), nn.Linear(1, 3), nn.Linear(1, 3)

    def forward(self, **given: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self.inner(**given)
        torch._dynamo.graph_break()
        most = self.head(logits.logsumexp(-1)[..., None])
        drawn = nn.functional.dropout(most.detach(), 0.5).sum()
        loss = loss + most.square().mean()
        kept, flat = (most > 0)[..., 0].repeat(2, 1), most[..., 0].repeat(2, 1).flatten()
        torch._dynamo.graph_break()
        loss = loss + flat.view(kept.shape).masked_fill(kept, 0).mean()  # it makes the length a number
        torch._dynamo.graph_break()
        weights = torch.ones(3) * 2
        torch._dynamo.graph_break()
        lengths = torch.tensor(PACK[0][:3])
        torch._dynamo.graph_break()
        return loss + (self.scale(loss[None]) * weights * lengths / lengths.sum()).sum(), drawn


def step() -> tuple[list[str], float, float]:
    """What was logged, what was drawn, and the largest relative error of the loss and the gradients."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hsap_compile")
    logger.addHandler(handler)
    torch.manual_seed(0)
    model = Broken()
    reference, given = copy.deepcopy(model), batch("nano", PACK)
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    torch.manual_seed(dist.get_rank())  # ranks draw apart
    try:
        loss, drawn = torch.compile(model, backend="hsap", options={"lower": "eager"})(**given)
    finally:
        logger.removeHandler(handler)
    wanted, _ = reference(**given)
    loss.backward()
    wanted.backward()
    errors = [float(((loss - wanted) / wanted).detach().abs())]
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        errors.append(float((mine.grad - other.grad).abs().max() / other.grad.abs().max()))
    return said, float(drawn), max(errors)


def test_pieces_without_a_batch(pool: Pool) -> None:
    steps = pool.run(step, world=2, timeout=240.0)
    assert len({drawn for _, drawn, _ in steps}) == 1  # what the first rank drew
    for said, _, error in steps:
        assert error < 2e-5
        ends = [s for s in said if s.startswith("the graph ends at ")]
        assert any("test_breaks.py:" in s and "runs whole on every rank" in s for s in ends)
        texts = [s for s in said if "no value is made of the tokens of a row" in s]
        assert len(texts) >= 2 and all("every rank computes all of it, from" in s for s in texts)
        assert all("test_breaks.py:" in s for s in texts)
        (number,) = [s for s in said if "another length will compile again" in s]
        assert number.startswith("every rank computes all of it, and") and "dynamic=True" in number


class Outside(nn.Module):
    """Some of it runs outside of compiled code: what is in front of attention, or behind it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.where = where

    def forward(self, ids: Tensor) -> Tensor:
        embed = torch._dynamo.disable(self.embedding) if self.where == "in front" else self.embedding
        x = embed(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)
        out = torch._dynamo.disable(self.out) if self.where == "behind" else self.out
        return out(y).square().mean()


def outside(where: str, sync: bool, grad: bool) -> str:
    """What is said, or "right"."""
    torch.manual_seed(0)
    model, ids = Outside(where).double(), torch.arange(30)[None]
    reference = copy.deepcopy(model)
    step = torch.compile(model, backend="hsap", options={"lower": "eager", "grad_sync": sync})
    with torch.set_grad_enabled(grad):
        try:
            loss = step(ids)
        except Exception as error:
            return str(error)
        wanted = reference(ids)
    assert float((loss - wanted).detach().abs()) < 1e-12
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        if grad:
            (got,), (right,) = (
                torch.autograd.grad(x, p, retain_graph=True) for x, p in ((loss, mine), (wanted, other))
            )
            if not sync:
                dist.all_reduce(got)
            assert float((got - right).abs().max() / right.abs().max()) < 1e-12
    return "right"


@pytest.mark.parametrize(
    ("where", "text"),
    [("in front", "made with a gradient outside of it"), ("behind", "and a graph with an end at ")],
)
def test_shares_want_one_graph(pool: Pool, where: str, text: str) -> None:
    """What runs whole on every rank would count as often as there are ranks."""
    for case in ((where, True, True), (where, False, False), ("nowhere", False, True)):
        assert pool.run(outside, *case, world=2, timeout=240.0) == ["right"] * 2
    for said in pool.run(outside, where, False, True, world=2, timeout=240.0):
        assert "gradients can be shares of ranks only where the whole model is one graph" in said
        assert text in said and 'do:     drop "grad_sync": False' in said


class Writing(nn.Module):
    """Writes, behind graph breaks, into what was made in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x, kept = self.words(ids) * 2, torch.zeros(ids.shape + (16,), dtype=self.out.weight.dtype)
        torch._dynamo.graph_break()
        x[:, 1] = 0
        x *= self.out.bias
        x[ids % 3 == 0] += 1
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        kept[:, 1:] = y.transpose(1, 2).flatten(2)[:, 1:]
        torch._dynamo.graph_break()
        logits = self.out(kept + x)
        return logits


def writing(lower: str) -> float:
    """The largest relative error of the gradients of a loss of outputs that are written in place."""
    torch.manual_seed(0)
    model, ids = Writing().double(), torch.arange(30).view(1, -1)
    reference = copy.deepcopy(model)
    for step in (torch.compile(model, backend="hsap", options={"lower": lower}), reference):
        step(ids).div_(0.7).square().mean().backward()
    return max(
        float((mine.grad - other.grad).abs().max() / other.grad.abs().max())  # type: ignore[operator, union-attr]
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True)
    )


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_writes_across_graph_breaks(pool: Pool, lower: str) -> None:
    assert max(pool.run(writing, lower, world=2, timeout=240.0)) < 1e-12


def short(lengths: list[int]) -> list[str]:
    """What is said of rows of so many tokens, in order."""
    torch._dynamo.reset()
    compiled = torch.compile(build("nano"), backend="hsap", options={"lower": "eager"})
    said = []
    for length in lengths:
        try:
            compiled(**batch("nano", [[length]]))
            said.append("right")
        except Exception as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("lengths", [[3], [2], [1], [9, 5, 3]], ids=str)
def test_rows_of_too_few_tokens(pool: Pool, lengths: list[int]) -> None:
    for *first, last in pool.run(short, lengths, world=2):
        assert first == ["right"] * len(first)
        assert "a row has too few tokens" in last and f"got:    {lengths[-1]} tokens on 2 ranks" in last
        assert "do:     pass longer rows (pad short ones), or use fewer ranks" in last
