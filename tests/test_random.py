"""Random numbers in the model, on simulated ranks: each drawn once, and agreed on where all ranks read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsap_compile.errors import Refused
from hsap_compile.kernels import exchange
from hsap_compile.passes import shard_tokens
from simulate import Simulated, simulate, traced

B, S, D = 2, 13, 4
WEIGHT = torch.linspace(1, 2, D, dtype=torch.float64)
Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Draws(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.function = function

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return self.function((x + 0.0 * ids[..., None]) * self.weight, ids)


def run(function: Function, inter: int, intra: int = 1) -> Simulated:
    x = torch.linspace(1, 3, B * S * D, dtype=torch.float64).view(B, S, D)
    return simulate(traced(Draws(function), {"x": x, "ids": torch.arange(B * S).view(B, S)}), inter, intra)


def sums(result: Simulated) -> int:
    graph: Any = result.program.function
    return Counter(n.target for n in graph.graph.nodes)[exchange.SUM_RANKS]


#: Linear in h = x * weight, with as many draws as h has elements, tokens or rows.
ON_ROWS: dict[str, Function] = {
    "noise in place": lambda h, ids: (h * torch.zeros_like(h).uniform_(1, 2),),
    "normal in place": lambda h, ids: (h * torch.empty_like(h).normal_(3, 0.1),),
    "coins in place": lambda h, ids: (h * torch.empty_like(h).bernoulli_(0.5),),
    "coins of the default": lambda h, ids: (h * torch.empty_like(h).bernoulli_(),),
    "exponential in place": lambda h, ids: (h * torch.empty_like(h).exponential_(),),
    "like": lambda h, ids: (h * torch.randn_like(h),),
    "integers like": lambda h, ids: (h * torch.randint_like(h.detach(), 1, 9),),
    "of a shape": lambda h, ids: (h * torch.rand(h.shape, dtype=h.dtype),),
    "a token each": lambda h, ids: (h * torch.rand(ids.shape)[..., None],),
    "of token values": lambda h, ids: (h * torch.bernoulli(torch.sigmoid(h.detach())),),
    "of one token less": lambda h, ids: (h[:, 1:] * torch.rand(B, ids.shape[1] - 1)[..., None],),
}
#: The same, where all ranks read the draw.
AGREED: dict[str, Function] = {
    "a row each": lambda h, ids: (h * torch.rand(B)[:, None, None],),
    "bools": lambda h, ids: (h * (torch.rand(B) < 0.5)[:, None, None],),
    "a layer dropped": lambda h, ids: (h * torch.empty(B, 1, 1).bernoulli_(0.5),),
    "dropout of what is pooled": lambda h, ids: (F.dropout(h.sum(1), 0.5),),
    "like pooled rows": lambda h, ids: (h * torch.randn_like(h.sum(1))[:, None],),
    "like cut rows": lambda h, ids: (h * torch.bernoulli(h.sum(1).detach().sigmoid())[:, None],),
    "a permutation": lambda h, ids: (h[:, torch.randperm(ids.shape[1])],),
}


@pytest.mark.parametrize("name", [*ON_ROWS, *AGREED])
@pytest.mark.parametrize("mesh", [(3, 1), (2, 2)], ids=str)
def test_what_is_drawn_is_drawn_once(name: str, mesh: tuple[int, int]) -> None:
    """Ranks return the same numbers, and the gradient belongs to them: times the weight, it is the loss."""

    def summed(h: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        (out,) = (ON_ROWS | AGREED)[name](h, ids)
        return out, out.sum()

    result = run(summed, *mesh)
    first = result.ranks[0].outputs[0]
    assert len(first.unique()) > 2 or name in AGREED
    for step in result.ranks:
        assert torch.equal(step.outputs[0], first)
        (gradient,) = [g for g in step.gradients.values() if g.shape == (D,)]
        torch.testing.assert_close(gradient @ WEIGHT, first.sum(), rtol=1e-12, atol=1e-12)
    # of the loss, of what one rank drew, and of what it was drawn like
    assert sums(result) == 1 + (name in AGREED) + name.startswith("like ")


def test_features_are_dropped_for_all_tokens_at_once() -> None:
    def dropped(h: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        out = F.dropout1d(h.mT, 0.5)
        return out, out.sum()

    for step in run(dropped, 3).ranks:
        kept = step.outputs[0] != 0
        assert torch.equal(kept, kept[..., :1].expand_as(kept)) and 0 < kept.sum() < kept.numel()
        (gradient,) = [g for g in step.gradients.values() if g.shape == (D,)]
        torch.testing.assert_close(gradient @ WEIGHT, step.outputs[1], rtol=1e-12, atol=1e-12)


def attended(h: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    keep = torch.rand(B, 1, 1, ids.shape[1]) < 0.7
    q = h[:, None]
    return F.scaled_dot_product_attention(q, q, q, keep), keep, h


@pytest.mark.parametrize("mesh", [(1, 1), (3, 1)], ids=str)
def test_a_drawn_mask_is_drawn_once(mesh: tuple[int, int]) -> None:
    """The host, which reads masks to plan, does not draw another one."""
    for step in run(attended, *mesh).ranks:
        out, keep, h = step.outputs
        assert 0 < int(keep.sum()) < keep.numel()
        wanted = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], keep)
        torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)


def test_a_random_function_that_ranks_cannot_agree_on_is_refused() -> None:
    with pytest.raises(
        Refused, match="alpha_dropout draws random numbers that every rank would have to agree on"
    ):
        run(lambda h, ids: (F.alpha_dropout(h.sum(1), 0.5, True),), 2)


def test_a_draw_that_ranks_do_not_agree_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_tokens, "agreed", lambda sharder, node, draw: draw)
    with pytest.raises(AssertionError):
        test_what_is_drawn_is_drawn_once("a row each", (3, 1))
