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


def step(sync: bool) -> tuple[list[str], float, float]:
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
        options = {"lower": "eager", "grad_sync": sync}
        loss, drawn = torch.compile(model, backend="hsap", options=options)(**given)
    finally:
        logger.removeHandler(handler)
    wanted, _ = reference(**given)
    loss.backward()
    wanted.backward()
    errors = [float(((loss - wanted) / wanted).detach().abs())]
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        if not sync:
            dist.all_reduce(mine.grad)
        errors.append(float((mine.grad - other.grad).abs().max() / other.grad.abs().max()))
    return said, float(drawn), max(errors)


@pytest.mark.parametrize("sync", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pieces_without_a_batch(pool: Pool, sync: bool) -> None:
    steps = pool.run(step, sync, world=2, timeout=240.0)
    assert len({drawn for _, drawn, _ in steps}) == 1  # what the first rank drew
    for said, _, error in steps:
        assert error < 2e-5
        texts = [s for s in said if "no value is made of the tokens of a row" in s]
        assert len(texts) >= 2 and all("every rank computes all of it, from" in s for s in texts)
        assert all("test_breaks.py:" in s for s in texts)
        (number,) = [s for s in said if "another length will compile again" in s]
        assert number.startswith("every rank computes all of it, and") and "dynamic=True" in number


class Outside(nn.Module):
    """Its vectors are made in front of a graph break, by the model's embedding."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.compiled = compiled

    def forward(self, ids: Tensor) -> Tensor:
        embed = self.embedding if self.compiled else torch._dynamo.disable(self.embedding)
        x = embed(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        torch._dynamo.graph_break()
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)).square().mean()


def outside(compiled: bool, sync: bool, lower: str, grad: bool = True) -> str:
    """What is said where the embedding is ``compiled``, in a graph of its own, or not."""
    torch.manual_seed(0)
    model, ids = Outside(compiled).double(), torch.arange(30)[None]
    reference = copy.deepcopy(model)
    step = torch.compile(model, backend="hsap", options={"lower": lower, "grad_sync": sync})
    with torch.set_grad_enabled(grad):
        try:
            loss = step(ids)
        except Exception as error:
            return str(error)
        wanted = reference(ids)
    assert float((loss - wanted).detach().abs()) < 1e-12
    if grad:
        loss.backward()
        wanted.backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert mine.grad is not None and other.grad is not None
            if not sync:
                dist.all_reduce(mine.grad)
            assert float((mine.grad - other.grad).abs().max() / other.grad.abs().max()) < 1e-12
    return "right"


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_shares_want_all_parameters_inside(pool: Pool, lower: str) -> None:
    """An embedding that runs whole on every rank would count as often as there are ranks."""
    for compiled, sync, grad in ((True, False, True), (False, True, True), (False, False, False)):
        assert pool.run(outside, compiled, sync, lower, grad, world=2, timeout=240.0) == ["right"] * 2
    for said in pool.run(outside, False, False, lower, world=2, timeout=240.0):
        assert "used outside of compiled code gets its whole gradient on every rank" in said
        assert "made of a parameter of shape (64, 16)" in said and 'do:     drop "grad_sync": False' in said
