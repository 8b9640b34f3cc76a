"""Random numbers on real ranks: others on every rank, the same again with the same seed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool import Pool


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(self.weight * torch.ones_like(ids, dtype=torch.float32), 0.5)


def _draws() -> dict[str, Any]:
    model = Noisy()
    compiled = torch.compile(model, backend="hsap", options={"lower": "eager", "placement": "contiguous"})
    ids = torch.arange(64).view(1, 64)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(compiled(ids))
        after = torch.rand(1).item()
    model.zero_grad()
    found[-1].sum().backward()
    return {"outputs": [x.detach() for x in found], "after": after, "gradient": model.weight.grad}


def test_every_rank_drops_other_places(pool: Pool) -> None:
    first, second = pool.run(_draws, world=2)
    for a, b in zip(first["outputs"], second["outputs"], strict=True):
        assert torch.equal(a, b)  # gathered: what one rank dropped, all see dropped
    once, again, other = first["outputs"]
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert not torch.equal(once[:, :32], once[:, 32:])  # the ranks' halves
    assert 0.3 < float((once == 0).float().mean()) < 0.7
    assert first["after"] == second["after"]  # the generators agree again
    assert torch.equal(first["gradient"], second["gradient"])
    assert float(first["gradient"]) == float(first["outputs"][-1].sum())  # of the numbers that were drawn
