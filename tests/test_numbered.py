"""Few tokens at positions, sums of tokens by number, rows in the order of a mask: all without a gather."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsap_compile.kernels import exchange
from simulate import eager, rebatched, simulate, traced, worst
from test_shard_tokens import LOCAL, ON_MESHES, WIDTH, WORDS, Pattern, Program, batch, check, trace


def _twice(x: Tensor, numbers: Tensor) -> Tensor:
    return x[numbers, numbers].sin().sum()


def _starts(i: Tensor) -> Tensor:
    """Positions that the batch says, some from the end."""
    return torch.stack([i[0, 0], i[0, 1] % 5, i[0, 2] * 0 - 1, i[0, 0] - 11])


def _added(x: Tensor, p: Program, i: Tensor, **how: object) -> Tensor:
    return x + p.vector.expand(4, WIDTH).scatter_reduce(
        0, (i % 4).flatten()[:, None].expand(-1, WIDTH), x.flatten(0, 1), **how
    ).sin().sum(0)


def _of_document(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """The mean of every document's tokens, given back to them."""
    document = (i > 7).cumsum(1)
    sums = x.new_zeros(x.shape[0], 30, WIDTH).scatter_add(1, document[..., None].expand(-1, -1, WIDTH), x)
    count = x.new_zeros(x.shape[0], 30).scatter_add(1, document, torch.ones_like(x[..., 0]))
    mean = sums / count.clamp(min=1)[..., None]
    return x + mean.gather(1, document[..., None].expand(-1, -1, WIDTH))


def _counted(p: Program, x: Tensor, i: Tensor) -> Tensor:
    kind = x.argmax(-1).flatten()
    count = torch.zeros(WIDTH, dtype=torch.int64).index_add(0, kind, torch.ones_like(kind))
    return x * count / x.shape[1]


def _numbers_as_values(p: Program, x: Tensor, i: Tensor) -> Tensor:
    kind = x.argmax(-1).flatten()
    sums = torch.ones(WIDTH, dtype=torch.int64).scatter_reduce(0, kind, kind, "sum", include_self=False)
    return x * sums.scatter_add(0, kind, kind) / x.shape[1]


def _images(p: Program, x: Tensor, i: Tensor) -> Tensor:
    rows = (p.places * 2)[:, :WIDTH]
    x = x.masked_scatter((i > 5)[..., None], p.places)  # a parameter as it is
    return x.masked_scatter((i > 6)[..., None].expand_as(x), rows) + x.masked_scatter(
        i[..., None] > 7, rows.sin()
    )


def _put(x: Tensor, indices: tuple[Tensor | slice, ...], rows: Tensor) -> Tensor:
    y = x.clone()
    y[indices] = rows
    return y


def _folded_rows(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """As vision models merge images: rows of a batch that is folded into one."""
    mask = i.flatten() > 6
    y = x.flatten(0, 1).masked_scatter(mask[:, None], p.places.cos())
    y = y.masked_scatter(mask[:, None], p.places).view(x.shape)
    behind = y.repeat_interleave(2, 1).flatten(0, 1)
    behind = behind.masked_scatter((i > 7).repeat_interleave(2, 1).flatten()[:, None], p.places)
    return behind.view(2, -1, WIDTH).unflatten(1, (-1, 2)).sum(2)


WRITTEN: dict[str, Pattern] = {
    "put": lambda p, x, i: _put(x, (slice(None), i[0, :2]), p.square[:2]),
    "put, from the end": lambda p, x, i: _put(x, (slice(None), _starts(i)[2:]), p.square[:2] * 2),
    "put in each row": lambda p, x, i: _put(x, (torch.arange(2), i[:, 0]), p.square[:2]),
    "put into a feature": lambda p, x, i: _put(x, (torch.arange(2), i[:, 0], i[:, 1] % WIDTH), p.vector[:2]),
    "added to pairs": lambda p, x, i: (
        x.index_put((torch.arange(2)[:, None], i[:, :2]), p.square[:2], accumulate=True)
    ),
    "copied": lambda p, x, i: x.index_copy(1, i[0, :2], x[:, i[0, 1:3]]),
    "copied into a tail": lambda p, x, i: F.pad(
        x[:, 2:].index_copy(1, i[0, :2], p.square[None, :2].expand(2, -1, -1)), (0, 0, 2, 0)
    ),
    "filled": lambda p, x, i: x.index_fill(1, i[0, :2], 0.5) + x.index_fill(2, i[0, :1] % WIDTH, p.scalar),
    "truth filled": lambda p, x, i: torch.where((x > 0).index_fill(1, i[0, :2], True), x, p.vector),
    "added": lambda p, x, i: x.index_add(1, i[0, :3] % 2, p.places[None, :3].expand(2, -1, -1), alpha=2),
    "added to folded rows": lambda p, x, i: (
        x.flatten(0, 1).index_add(0, torch.tensor([3, 5, 3]), p.square[:3]).view(x.shape)
    ),
    "scattered": lambda p, x, i: (
        x.scatter(1, i[:, :2, None].expand(-1, -1, WIDTH), 0.5)
        + x.scatter_add(1, i[:, :3, None].expand(-1, -1, 2), p.places[:3, :2].expand(2, -1, -1))
    ),
    "the largest written": lambda p, x, i: x.scatter_reduce(
        1, i[:, :2, None].expand(-1, -1, WIDTH), p.square[:2].expand(2, -1, -1), "amax"
    ),
    "features copied": lambda p, x, i: x.index_copy(2, torch.tensor([4, 1]), x[..., :2] * p.scalar),
    "folded rows in the order of a mask": _folded_rows,
    "a tail in the order of a mask": lambda p, x, i: F.pad(
        x[:, 1:].masked_scatter((i > 6)[:, 1:, None], p.places), (0, 0, 1, 0)
    ),
}  # fmt: skip

NUMBERED: dict[str, Pattern] = {
    "rows selected": lambda p, x, i: x + x.index_select(1, i[0, :3]).sin().sum(1, keepdim=True),
    "rows at numbers": lambda p, x, i: x + x[:, _starts(i)].sin().sum(1, keepdim=True),
    "rows at constants": lambda p, x, i: x + x[:, [1, -2, 1]].sin().sum(1, keepdim=True),
    "one of each row": lambda p, x, i: x + x[torch.arange(x.shape[0]), i[:, 0]].sin()[:, None],
    "one feature": lambda p, x, i: x + x[0, i[0, :2], i[0, 1:3] % WIDTH].sin().sum(),
    "features apart": lambda p, x, i: x + x.mT[:, i[0, :3] % WIDTH][..., i[0, :2]].sum((1, 2))[:, None, None],
    "gathered": lambda p, x, i: (
        x + x.gather(1, i[:, :2, None].expand(-1, -1, WIDTH)).sin().sum(1, keepdim=True)
    ),
    "the same numbers twice": lambda p, x, i: (
        x + x[:, i[0, :3] % WIDTH, i[0, :3] % WIDTH].sin().sum() + _twice(x, i[0, :2] % 2)
    ),
    "values given back": lambda p, x, i: (
        x * p.words.gather(0, (i % 3).flatten()[:, None].expand(-1, WIDTH)).view(x.shape)
        + p.square.index_select(1, (i % 3).flatten()).mT.view(x.shape)
        + x.sum(1).gather(1, i % WIDTH)[..., None]
    ),
    "numbers of features": lambda p, x, i: (
        x.index_add(2, torch.tensor([1, 0]), x[..., 2:4] * p.scalar)
        + x.scatter_reduce(2, (i[..., None] % WIDTH).expand_as(x), x * p.vector, "sum")
    ),
    "pairs": lambda p, x, i: x + x[torch.arange(2)[:, None], i[0, :3]].sin().sum(1, keepdim=True),
    "pairs, as many": lambda p, x, i: x + x[torch.arange(2)[:, None], i[0, :2]].sin().sum(1, keepdim=True),
    "of a tail": lambda p, x, i: x + x[:, 2:][:, i[0, :3]].sin().sum(1, keepdim=True),
    "of folded rows": lambda p, x, i: x + x.flatten(0, 1)[torch.tensor([3, -1, 0])].sin().sum(0),
    "of folded rows behind": lambda p, x, i: (
        x + x.repeat_interleave(2, 1).flatten(0, 1)[torch.tensor([3, -1, 0, 5])].sin().sum(0)
    ),
    "by document": _of_document,
    "added to a parameter": lambda p, x, i: (
        x + p.places[:WORDS].index_add(0, i.flatten(), x.flatten(0, 1), alpha=0.5).sin().sum(0)
    ),
    "added along a row": lambda p, x, i: (
        x + x.new_zeros(2, 4, WIDTH).index_add(1, i[0] % 4, x).sin().sum(1)[:, None]
    ),
    "added of a tail": lambda p, x, i: (
        x + x.new_zeros(2, 4, WIDTH).index_add(1, i[0, 1:] % 4, x[:, 1:]).sin().sum(1)[:, None]
    ),
    "put at numbers": lambda p, x, i: (
        x + p.square.index_put((i % 3,), x * 0.1, accumulate=True).sin().sum(0)
    ),
    "put at pairs": lambda p, x, i: (
        x + x.new_zeros(3, 2, WIDTH).index_put((i % 3, i % 2), x, accumulate=True).sin().sum((0, 1))
    ),
    "mean by number": lambda p, x, i: _added(x, p, i, reduce="mean"),
    "mean without itself": lambda p, x, i: _added(x, p, i, reduce="mean", include_self=False),
    "sum without itself": lambda p, x, i: _added(x, p, i, reduce="sum", include_self=False),
    "counted": _counted,
    "numbers as values": _numbers_as_values,
    "one hot": lambda p, x, i: x + (F.one_hot(i % 4, 4).to(x.dtype).mT @ x).sin().sum(1, keepdim=True),
    "masked scatter": _images,
}  # fmt: skip


@ON_MESHES
@pytest.mark.parametrize("name", [*NUMBERED, *WRITTEN])
def test_numbers_stay_local(name: str, mesh: tuple[int, int]) -> None:
    of = trace(Program((LOCAL["linear"], (NUMBERED | WRITTEN)[name], LOCAL["affine"])), rows=2)
    assert check(of, *mesh, tolerance=1e-11) == []


@pytest.mark.parametrize("name", ["put in each row", "copied into a tail", "a tail in the order of a mask"])
def test_another_batch_has_its_own_numbers(name: str) -> None:
    largest: Pattern = lambda p, x, i: x + F.relu(x).max(1, keepdim=True).values  # noqa: E731
    old, new = batch(2, 13), batch(2, 29, seed=1)
    of = traced(Program((LOCAL["linear"], WRITTEN[name], largest)), old)
    args = rebatched(of, old, new)
    wanted = eager(of, args)
    for step in simulate(of, 3, 1, args).ranks:
        assert max(worst(step, wanted)) <= 1e-11


SUMMED = exchange.SUM_RANKS
#: What crosses ranks besides the loss: operators and the shapes of what they return.
SENT: dict[str, tuple[Pattern, list[tuple[object, tuple[int, ...]]]]] = {
    "rows read": (lambda p, x, i: x + x[:, i[0, :3]].sum(1, keepdim=True), [(SUMMED, (2, 3, WIDTH))]),
    "sums by number": (
        lambda p, x, i: x + x.new_zeros(2, 4, WIDTH).index_add(1, i[0] % 4, x).sum(1)[:, None],
        [(SUMMED, (2, 4, WIDTH))],
    ),
    "means by number": (
        lambda p, x, i: _added(x, p, i, reduce="mean"), [(SUMMED, (4, WIDTH)), (SUMMED, (4, WIDTH))]
    ),
    "rows written": (lambda p, x, i: x.index_copy(1, i[0, :2], p.square[:2].expand(2, -1, -1)), []),
    "in the order of a mask": (lambda p, x, i: x.masked_scatter((i > 6)[..., None], p.places * 2), []),
    "which is the largest": (
        lambda p, x, i: x + x.max(1, keepdim=True).values,
        [(exchange.EXTREME, (2, 1, WIDTH))] * 2 + [(SUMMED, (2, 1, WIDTH))],
    ),
    "the largest": (lambda p, x, i: x - x.amax(1, keepdim=True), [(exchange.EXTREME, (2, 1, WIDTH))]),
    "softmax": (
        lambda p, x, i: x.softmax(1), [(exchange.EXTREME, (2, 1, WIDTH)), (SUMMED, (2, 1, WIDTH))]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_nothing_else_is_sent(name: str) -> None:
    pattern, wanted = SENT[name]
    program = Program((LOCAL["linear"], pattern), ends="loss")
    graph: Any = simulate(trace(program, rows=2, grad=False), 3, 1).program.function
    crossing = (SUMMED, exchange.EXTREME, exchange.GATHER, exchange.SHARD, exchange.ALL_TO_ALL)
    sent = [(n.target, tuple(n.meta["val"].shape)) for n in graph.graph.nodes if n.target in crossing]
    assert sent == [*wanted, (SUMMED, ())]  # the loss


def test_most_of_the_tokens_are_gathered() -> None:
    """A part that is computed whole on every rank must not be large in silence."""
    pattern: Pattern = lambda p, x, i: x + x[:, torch.arange(7)].sin().sum(1, keepdim=True)  # noqa: E731
    (said,) = check(trace(Program((LOCAL["linear"], pattern)), rows=2), 3, 1)
    assert "it reads more than half of the tokens" in said


def _written(rows: int, trailing: bool) -> Pattern:
    """Tokens that an image has, written in order, as ``inputs_embeds[mask] = image``."""

    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        mask = i > 6 if trailing else (i > 6)[:, :, None].expand_as(x)
        y[mask] = (p.places[:rows, :WIDTH] if trailing else p.places.flatten()[:rows]) * 2
        return y * p.vector

    return pattern


@ON_MESHES
def test_rows_are_added_in_the_order_of_a_mask(mesh: tuple[int, int]) -> None:
    """As deep layers of a vision tower are; here with a parameter as it is."""

    def added(p: Program, x: Tensor, i: Tensor) -> Tensor:
        place = torch.arange(i.numel()).view(i.shape) % 4 == 1
        return x.index_put((place,), p.square, accumulate=True)  # as many rows as tokens in the mask

    of = trace(Program((LOCAL["linear"], added)), rows=2, tokens=12)
    assert check(of, *mesh, tolerance=1e-11) == []


@ON_MESHES
@pytest.mark.parametrize("trailing", [True, False])
def test_rows_are_written_in_the_order_of_a_mask(trailing: bool, mesh: tuple[int, int]) -> None:
    count = int((batch(2, 13)["ids"] > 6).sum())
    of = trace(Program((LOCAL["linear"], _written(count if trailing else count * WIDTH, trailing))), rows=2)
    assert check(of, *mesh, tolerance=1e-11) == []


@pytest.mark.parametrize(("column", "word"), [(0, 1), (1, 7)], ids=["fewer", "more"])
def test_another_number_of_rows_than_the_mask_has_is_an_error(column: int, word: int) -> None:
    ids = batch(2, 13)["ids"]
    of = trace(Program((LOCAL["linear"], _written(int((ids > 6).sum()), True))), rows=2)
    (at,) = [n for n, x in enumerate(of.args) if isinstance(x, Tensor) and torch.equal(x, ids)]
    changed = ids.clone()
    changed[0, column] = word
    assert int((changed > 6).sum()) != int((ids > 6).sum())
    with pytest.raises(IndexError, match="out of range|out of bounds"):
        simulate(replace(of, args=(*of.args[:at], changed, *of.args[at + 1 :])), 2, 1)


def test_a_parameter_written_to_a_token_as_it_is() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(2)
            self.first = nn.Parameter(torch.randn(2, WIDTH, generator=g, dtype=torch.float64))

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor]:
            x = torch.select_scatter(x * (ids >= 0)[..., None], self.first, 1, 0)
            return ((x * x.sin()).mean(),)

    assert check(traced(Written(), batch(2, 13)), 3, 1) == []
