"""What a model may be given, and what it makes of it before it attends: complex numbers, rows whose number
depends on data, a few tokens more or fewer, empty parts, buffers that fix the length."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hsap_compile.errors import Refused
from simulate import eager, simulate, traced, worst
from test_backend import Tiny, batch


class Turned(torch.nn.Module):
    """Rotates queries and keys by complex numbers: a buffer, a parameter and an input."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.words = torch.nn.Parameter(torch.randn(11, 8, dtype=torch.float64, generator=g))
        self.turn = torch.nn.Parameter(torch.randn(4, dtype=torch.complex128, generator=g))
        angles = torch.outer(torch.arange(64), torch.arange(1, 5) * 0.1).double()
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, ids: torch.Tensor, phases: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.words[ids]
        z = torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.turns[: ids.shape[1]]
        y = torch.view_as_real(z * self.turns[ids] * self.turn * phases[..., None].conj()).flatten(2)[:, None]
        keys = y.new_empty(y.shape)  # a part that is turned behind one that is not
        keys[..., :4].copy_(x[:, None, :, :4])
        keys[..., 4:].copy_(y[..., 4:])
        same = (ids[:, None] == 0).cumsum(2)
        y = torch.nn.functional.scaled_dot_product_attention(
            y, keys, x[:, None], same[..., None] == same[:, :, None]
        )
        return (y * z.abs().sum()).square().mean(), z.conj(), z.sum(1)


def test_complex_buffers_parameters_and_inputs() -> None:
    g = torch.Generator().manual_seed(1)
    given = {
        "ids": torch.randint(0, 4, (1, 19), generator=g),
        "phases": torch.randn(1, 19, dtype=torch.complex128, generator=g),
    }
    of = traced(Turned(), given)
    for mesh in ((3, 1), (1, 1)):
        for step in simulate(of, *mesh).ranks:
            assert max(worst(step, eager(of))) <= 1e-12


class Seeing(Tiny):
    """Adds what it sees in the images that are not blank, however many those are."""

    def forward(self, images: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        seen = images[images.any(-1).any(-1)][:, None]
        seen = torch.nn.functional.scaled_dot_product_attention(seen, seen, seen)
        return super().forward(**given) + seen.mean((0, 1, 2))[0]


def test_an_attention_over_rows_whose_number_depends_on_data() -> None:
    images = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[1] = 0
    of = traced(Seeing(), {"images": images, **batch([0, 0, 1, 1, 1, 2])})
    for step in simulate(of, 2, 1).ranks:
        assert max(worst(step, eager(of))) <= 1e-12


class Unused(torch.nn.Module):
    """Takes tokens, and computes with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).square().sum() + ids.shape[1]


def test_a_graph_that_every_rank_computes_says_so(caplog: pytest.LogCaptureFixture) -> None:
    of = traced(Unused(), {"ids": batch([0] * 9)["ids"], "x": torch.randn(3, 5, dtype=torch.float64)})
    with caplog.at_level(logging.WARNING, "hsap_compile"):
        result = simulate(of, 2, 1)
    assert (
        result.program.whole
        and "no value is made of the tokens of a row: every rank computes all" in caplog.text
    )
    assert f"{__file__}:" in caplog.text
    for step in result.ranks:
        assert max(worst(step, eager(of))) <= 1e-12
    with pytest.raises(Refused, match="no input has the tokens as a dimension"):
        simulate(of, 2, 1, strict=True)


class Ratios(Tiny):
    """Compares with what it said before of all tokens but the first; its words are one more than S."""

    def forward(self, words: torch.Tensor, documents: torch.Tensor, old: torch.Tensor) -> Any:
        ids, labels = words[:, :-1], words[:, 1:]
        said = super().forward(ids, documents).log_softmax(-1)
        said = said.gather(-1, labels[..., None] % 8).squeeze(-1)[:, :-1]
        return ((said - old).exp() * old).mean(), said


def test_inputs_of_a_few_tokens_more_or_fewer() -> None:
    given = batch([0, 0, 1, 1, 1, 2, 2, 3])
    given["words"] = torch.cat([given.pop("ids"), torch.tensor([[3]])], 1)
    given["old"] = torch.rand(1, 7, dtype=torch.float64)
    of = traced(Ratios(), given)
    for step in simulate(of, 3, 1).ranks:
        assert max(worst(step, eager(of))) <= 1e-12


class Joined(Tiny):
    """Puts its rows behind those of a cache that is empty."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        y = super().forward(ids, documents)
        return torch.cat([torch.tensor([]), y.reshape_as(y.clone()), torch.tensor([])], dim=-2)


def test_empty_vectors_that_are_joined_with_rows() -> None:
    of = traced(Joined(), batch([0, 0, 1, 1, 1, 2]))
    for step in simulate(of, 2, 1, strict=True).ranks:
        assert max(worst(step, eager(of))) <= 1e-12


class TorchsOwnMasked(torch.nn.Module):
    """torch's module, which compares the sizes of its mask with those of its input."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        mask = torch.full((longest, longest), -torch.inf, dtype=torch.float64).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        mask = self.mask[: x.shape[1], : x.shape[1]]
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0] * ids[..., None]


def test_a_buffer_that_fixes_the_length_is_said_to() -> None:
    x, ids = torch.randn(1, 9, 8, dtype=torch.float64), torch.arange(9)[None]
    of = traced(TorchsOwnMasked(10), {"x": x, "ids": ids})
    for step in simulate(of, 2, 1).ranks:
        assert max(worst(step, eager(of))) <= 1e-12
    with pytest.raises(Exception, match=r"the sequence length stays a constant") as caught:
        simulate(traced(TorchsOwnMasked(9), {"x": x, "ids": ids}), 2, 1)
    assert "make buffers that are exactly 9 long longer than the rows" in str(caught.value)
