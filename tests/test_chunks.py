"""Losses and layers that are computed chunk by chunk: every rank computes its rows of each chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hsap_compile.kernels import exchange
from hsap_compile.passes import _shifts
from hsap_compile.passes import shard_tokens as sharding
from hsap_compile.plan.chunks import TOKENS, Chunk, Joined, chunk_tables
from simulate import eager, rebatched, simulate, simulate_all, traced, worst
from test_shard_tokens import LOCAL, ON_MESHES, TIGHT, WIDTH, Pattern, Program, batch, check, trace

#: dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def _loss(p: Program, x: Tensor, labels: Tensor, n: int = 4, how: str = "sum") -> Tensor:
    """As trainers write it: the logits of a chunk are thrown away before those of the next are made."""
    total = x.new_zeros(())
    for rows, wanted in zip(x.chunk(n, 1), labels.chunk(n, 1), strict=True):
        total = total + F.cross_entropy(
            (rows @ p.square).flatten(0, 1), wanted.flatten() % WIDTH, reduction=how
        )
    return total


def _each(x: Tensor, f: Callable[[Tensor], Tensor], n: int = 4) -> Tensor:
    return torch.cat([f(rows) for rows in x.chunk(n, 1)], 1)


def _written(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y, size = torch.empty_like(x), x.shape[1] // 3
    for n in range(3):
        at = slice(n * size, (n + 1) * size if n < 2 else None)
        y[:, at] = (x[:, at] @ p.square).tanh()
    return y * p.vector


def _half_written(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y, size = x * p.vector, x.shape[1] // 2
    y[:, size:] += x[:, size:] @ p.square
    y[:, 1:size] *= 2.0
    return y


def _gated(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Layers tiled along the tokens, each tile recomputed in the backward."""

    def layer(rows: Tensor) -> Tensor:
        gate, up = (rows @ p.square).chunk(2, -1)
        return x.new_zeros(()) + rows + F.pad(F.silu(gate) * up, (0, WIDTH // 2))

    return _each(x, lambda rows: checkpoint(layer, rows, use_reentrant=False), 3)


def _shifted(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x * _loss(p, x[:, :-1], i[:, 1:]) / i.shape[1]


def _likelihood(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Every token's log-probability, as preference losses need it."""
    found = [
        (rows @ p.square).log_softmax(-1).gather(-1, wanted[..., None] % WIDTH)[..., 0]
        for rows, wanted in zip(x.chunk(4, 1), i.chunk(4, 1), strict=True)
    ]
    return x + torch.cat(found, 1)[..., None]


def _positions(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """What is no parameter's is read at the tokens of the chunk."""
    at = torch.arange(x.shape[1]).to(x.dtype).div(9).sin()[:, None]
    parts = zip(x.chunk(4, 1), at.chunk(4), (i % 3 > 0).chunk(4, 1), strict=True)
    return torch.cat([(rows * more).masked_fill(mask[..., None], 0.5) for rows, more, mask in parts], 1)


def len_of(x: Tensor, parts: int) -> int:
    return x.shape[1] // parts


def _written_into_zeros(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y, size = torch.zeros(x.shape, dtype=x.dtype), x.shape[1] // 2
    y[:, :size] = x[:, :size] @ p.square
    y[:, size:] = x[:, size:].sin()
    z = x * p.vector
    z[:, :size].zero_()
    return y + z


def _counted(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """How many tokens of a chunk an expert gets."""
    experts = (x.chunk(2, 1)[0].flatten(0, 1) @ p.square).argmax(-1)
    return x + torch.histc(experts.double(), WIDTH, 0, WIDTH - 1).sin()


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class _Decayed(torch.autograd.Function):
    """Whose weight has a gradient where the result has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, ((grad + 0.1 * x) * x).sum((0, 1))


def _sorted(p: Program, x: Tensor, i: Tensor) -> Tensor:
    loss = x.new_zeros(())
    for y in x.chunk(4, 1):
        rows = y.flatten(0, 1)
        order = torch.sort((rows @ p.square)[:, :4].argmax(-1), stable=True).indices
        loss = loss + (rows[order] * p.vector).pow(2).mean()
    return x * loss


CHUNKED: dict[str, Pattern] = {
    "loss": lambda p, x, i: x * _loss(p, x, i) / x.shape[1],
    "loss of shifted labels": _shifted,
    "mean of means": lambda p, x, i: x * _loss(p, x, i, how="mean"),
    "layers": lambda p, x, i: _each(x, lambda rows: F.layer_norm(rows @ p.square, (WIDTH,), p.vector)),
    "recomputed layers": _gated,
    "written": _written,
    "a half written": _half_written,
    "likelihood": _likelihood,
    "positions": _positions,
    "split by a size": lambda p, x, i: torch.cat([y.sin() for y in x.split(x.shape[1] // 4, 1)], 1),
    "unlike parts": lambda p, x, i: torch.cat(
        [x[:, : len_of(x, 4)].sin(), x[:, len_of(x, 4) : -len_of(x, 3)], x[:, -len_of(x, 3) :]], 1
    ),
    "written into zeros": _written_into_zeros,
    "counted": _counted,
    "a function of one's own": lambda p, x, i: _each(x, lambda y: _Tanh.apply(y) * p.vector),
    "standardised": lambda p, x, i: _each(
        x, lambda y: (y - y.mean(-1, True)) / y.std(-1, keepdim=True) * p.vector
    ),
    "odds": lambda p, x, i: x + sum(
        ((1 - y.exp()).log() * p.scalar).mean() for y in x.log_softmax(-1).chunk(3, 1)
    ),
    "chunks of unlike chunks": lambda p, x, i: _each(x, lambda y: _each(y, lambda z: z.sin(), 2), 3),
    "equal ends of two starts": lambda p, x, i: (
        x + x[:, : len_of(x, 2)].mul(p.vector).mean(1, True) + x[:, 1:][:, : len_of(x, 2)].mean(1, True)
    ),
    "zeros": lambda p, x, i: _each(x, lambda y: y + torch.zeros(y.shape, dtype=y.dtype)),
    "split evenly": lambda p, x, i: x + sum((y * p.vector).mean() for y in x.tensor_split(4, 1)),
    "words of a chunk": lambda p, x, i: x + F.embedding(
        torch.where(torch.arange(i.shape[1]) < len_of(x, 2), x.argmax(-1), 99)[:, : len_of(x, 2)], p.words
    ).mean(1, True),
    "words of a slice": lambda p, x, i: x + F.embedding(
        torch.where(torch.arange(i.shape[1]) < i.shape[1] - 1, x.argmax(-1), 99)[:, :-1], p.words
    ).mean(1, True),
    "the first half": lambda p, x, i: x + x[:, : x.shape[1] // 2].mul(p.vector).mean(1, keepdim=True),
    "the last tokens of a half": lambda p, x, i: x + x[:, : x.shape[1] // 2][:, 1:].sum((0, 1)),
    "chunks of chunks": lambda p, x, i: _each(x, lambda y: _each(y, lambda z: z @ p.square, 2), 2),
    "sums of chunks": lambda p, x, i: (
        x + torch.stack([(y * p.vector).sum((0, 1)) + y.var() + y.norm() for y in x.chunk(3, 1)]).sum(0)
    ),
    "the first token of a chunk": lambda p, x, i: x + x.chunk(2, 1)[1][:, :1] * p.vector,
    "largest of a chunk": lambda p, x, i: x + torch.cat([y.amax(1) for y in x.chunk(4, 1)]).sum(0).sin(),
    "covariance": lambda p, x, i: x @ sum(y.mT @ y for y in x.chunk(3, 1)) / x.shape[1],
    "errors": lambda p, x, i: x * sum(F.mse_loss(y @ p.square, y) for y in x.chunk(3, 1)),
    "folded": lambda p, x, i: (
        x + torch.stack([(y @ p.square).sin().sum(0) for y in x.flatten(0, 1).chunk(5)]).sum(0)
    ),
    "by number": lambda p, x, i: x + sum(
        p.words.new_zeros(3, WIDTH).index_add(0, n.flatten() % 3, y.flatten(0, 1)).tanh().sum(0)
        for y, n in zip(x.chunk(3, 1), i.chunk(3, 1), strict=True)
    ),
    "heads of a chunk": lambda p, x, i: _each(
        x, lambda y: y.view(*y.shape[:2], 2, 3).transpose(1, 2).tanh().transpose(1, 2).flatten(2)
    ),
    "behind a slice": lambda p, x, i: F.pad(_each(x[:, 3:], lambda y: y @ p.square), (0, 0, 3, 0)),
    "no grad": lambda p, x, i: x / (1 + _each(x.detach(), lambda y: y.abs().amax(-1, True))),
}  # fmt: skip

GATHERED: dict[str, tuple[Pattern, str]] = {
    "two chunks": (lambda p, x, i: x + (x[:, : x.shape[1] // 2] * x[:, -(x.shape[1] // 2) :]).sum(1, True),
                   "tokens of chunks meet others"),
    "folded and joined": (
        lambda p, x, i: torch.cat([y @ p.square for y in x.flatten(0, 1).chunk(5)]).view(x.shape),
        "the result has no single token dimension",
    ),
    "sums of sorted rows": (_sorted, "sorted rows of which some are no tokens"),
    "a weight's own gradient": (
        lambda p, x, i: _each(x, lambda y: _Decayed.apply(y, p.vector)), "a custom function that mixes tokens"
    ),
    "begins anywhere": (
        lambda p, x, i: x + x[:, x.shape[1] % 4 :][:, : len_of(x, 2)].cumsum(1).mean(1, True), "a size of Mod"
    ),
    "turned chunks": (
        lambda p, x, i: torch.cat(x.chunk(2, 1)[::-1], 1) * p.vector, "it joins tokens with others"
    ),
    "order in a chunk": (lambda p, x, i: _each(x, lambda y: y.cumsum(1), 2), "it works along the tokens"),
    "a fixed number": (
        lambda p, x, i: torch.cat([y @ p.square for y in x.split(5, 1)], 1), "a fixed number of parts"
    ),
    "shifted in a chunk": (
        lambda p, x, i: _each(x, lambda y: F.pad(y[:, 1:] - y[:, :-1], (0, 0, 0, 1))),
        "it needs other tokens of a chunk",
    ),
}  # fmt: skip


TOKENS_OF_ROWS = 15  # of 4 chunks 4, 4, 4 and 3: torch takes a part of one token for a constant


@ON_MESHES
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_stay_local(name: str, mesh: tuple[int, int]) -> None:
    of = trace(Program((LOCAL["linear"], CHUNKED[name])), rows=2, tokens=TOKENS_OF_ROWS)
    assert check(of, *mesh) == []


@pytest.mark.parametrize("name", GATHERED)
def test_what_is_no_row_of_a_chunk_is_gathered(name: str) -> None:
    pattern, why = GATHERED[name]
    found = check(trace(Program((LOCAL["linear"], pattern)), rows=2), 3, 1)
    assert any(why in text for text in found), found


def test_other_batches_and_lengths_have_chunks_of_their_own() -> None:
    """Without compiling again: where chunks end is data, and a rank may have no token of one."""
    pattern: Pattern = lambda p, x, i: _each(_shifted(p, x, i), lambda y: y @ p.square, 3)  # noqa: E731
    old = batch(2, TOKENS_OF_ROWS)
    of = traced(Program((LOCAL["linear"], pattern), ends="loss"), old)
    calls = [rebatched(of, old, batch(2, tokens, seed=tokens)) for tokens in (TOKENS_OF_ROWS, 18, 24, 47)]
    for args, result in zip(calls, simulate_all(of, 4, 1, *calls), strict=True):
        assert max(worst(result.ranks[0], eager(of, args))) <= TIGHT


def _sent(pattern: Pattern, rows: int = 1) -> list[tuple[Any, tuple[Any, ...]]]:
    program = Program((LOCAL["linear"], pattern), ends="loss")
    of = trace(program, rows=rows, tokens=TOKENS_OF_ROWS, grad=False)
    found = simulate(of, 3, 1)
    assert max(max(worst(step, eager(of))) for step in found.ranks) <= TIGHT
    graph: Any = found.program.function
    crossing = (
        exchange.SUM_RANKS, exchange.EXTREME, exchange.GATHER, exchange.SHARD, exchange.ALL_TO_ALL
    )  # fmt: skip
    nodes = [n for n in graph.graph.nodes if n.target in crossing]
    return [(n.target, tuple(n.meta["val"].shape)) for n in nodes]


@pytest.mark.parametrize(
    ("first", "over"),
    [
        *[(f, "nothing") for f in ("0", "0.0", "x.new_zeros(())", "torch.tensor(0.0)", "x.sum()")],
        ("0.0", "a number"),
        ("0.0", "a count"),
    ],
)
def test_a_loss_of_chunks_is_one_sum_over_ranks(first: str, over: str) -> None:
    """Ranks that have no token of a chunk do not wait for those that have."""

    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        starts = {
            "0": 0, "0.0": 0.0, "x.new_zeros(())": x.new_zeros(()), "torch.tensor(0.0)": torch.zeros(()),
            "x.sum()": p.vector.sum(),
        }  # fmt: skip
        total = starts[first]
        for rows, wanted in zip(x.chunk(4, 1), i.chunk(4, 1), strict=True):
            logits = (rows @ p.square).flatten(0, 1)
            loss = F.cross_entropy(logits, wanted.flatten() % WIDTH, reduction="sum")
            total = total + loss / {"nothing": 1, "a number": i.shape[1], "a count": (i > 3).sum()}[over]
        return x * total

    sums = 4 if first == "x.sum()" else 1
    assert _sent(pattern) == [(exchange.SUM_RANKS, ())] * (sums + 1)


def test_a_loss_that_is_read_alone_too_is_sent_once() -> None:
    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        loss = F.cross_entropy((x @ p.square).flatten(0, 1), i.flatten() % WIDTH, reduction="sum")
        return x * loss + (0.0 + loss)

    assert _sent(pattern) == [(exchange.SUM_RANKS, ())] * 2


def test_layers_of_chunks_send_nothing() -> None:
    assert _sent(CHUNKED["layers"]) == _sent(CHUNKED["written"]) == [(exchange.SUM_RANKS, ())]  # the loss


def test_a_chunk_that_is_returned_is_gathered() -> None:
    class Halves(Program):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            x = x * (ids >= 0)[..., None] @ self.square
            first, last = x.chunk(2, 1)
            parts = x.flatten(0, 1).chunk(4)
            return first.sin(), last[:, 1:], parts[1] * 2, parts[3].T, last.chunk(2, 1)[0]

    of = trace(Halves(()), rows=2, tokens=18)
    for options in ({}, {"outputs": "local"}):
        assert check(of, 3, 1, **options) == []


# --- the tables ---------------------------------------------------------------------------------------------


def test_rows_of_a_chunk() -> None:
    """Two rows of 10 tokens, of which a rank has columns 2, 3, 7, 9; elements 5 to 13 of tokens 1 to 9."""
    columns, tokens = np.array([7, 9, 2, 3]), 10
    chunk = Chunk(2, TOKENS - 1, 1, 1, sympy.Integer(5), 2 * TOKENS - 6)
    rows, elements = chunk.rows(columns, tokens)
    # the rank's rows are (row, column): (0, 7) is token 6, element 6; (1, 2) is token 1 of row 1, element 10
    assert rows.tolist() == [0, 1, 6, 7] and elements.tolist() == [1, 3, 5, 6]
    half = Chunk(1, 2 * TOKENS - 11, 1, 0, sympy.Integer(5), 2 * TOKENS - 11, of=chunk)
    assert [x.tolist() for x in half.rows(elements, tokens)] == [[2, 3], [0, 1]]
    tables = chunk_tables([half], columns, tokens)
    assert [tables[half, name].tolist() for name in ("rows", "elements")] == [[2, 3], [0, 1]]


def test_rows_that_are_made_up() -> None:
    chunk = Chunk(1, TOKENS, 1, 0, sympy.Integer(0), TOKENS // 2)
    assert [x.tolist() for x in chunk.rows(np.array([5, 1]), 6)] == [[1, 1], [1, -1]]
    assert [x.tolist() for x in chunk.rows(np.array([5, 4]), 6)] == [[0, 0], [-1, -1]]
    tail = Chunk(1, TOKENS - 1, 1, 1, sympy.Integer(0), TOKENS // 2)
    assert [x.tolist() for x in tail.rows(np.array([0, 5]), 6)] == [[1, 1], [-1, -1]]
    inside = Chunk(1, TOKENS // 2, 1, 0, sympy.Integer(0), sympy.Integer(2), of=chunk)
    assert [x.tolist() for x in inside.rows(np.array([1, -1]), 6)] == [[0, 0], [1, -1]]


def test_places_of_joined_chunks() -> None:
    ends = [sympy.Integer(0), TOKENS // 3, 2 * (TOKENS // 3), TOKENS]
    chunks = tuple(Chunk(1, TOKENS, 1, 0, a, b) for a, b in zip(ends, ends[1:], strict=False))
    columns = np.array([8, 1, 6, 2])
    held = np.concatenate([chunk.rows(columns, 9)[0] for chunk in chunks])
    ((_, places),) = chunk_tables([Joined(chunks)], columns, 9).items()
    assert held[places].tolist() == [0, 1, 2, 3]
    assert len(held) == 6  # the second chunk has two rows that are made up


# --- mutations ----------------------------------------------------------------------------------------------


def _made_up_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharding.Sharder, "valid_rows", lambda *_: None)


def _not_in_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Joined, "places", lambda self, found, n: np.arange(n))


def _one_late(patch: pytest.MonkeyPatch) -> None:
    right = _shifts.chunk_of
    patch.setattr(_shifts, "chunk_of", lambda sharder, node, x, first: right(sharder, node, x, first + 1))


def _any_frame(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharding.Sharder, "frame_of", lambda sharder, node: sharder.frame)


def _dropped_rows_kept(patch: pytest.MonkeyPatch) -> None:
    right = Chunk.rows

    def rows(chunk: Chunk, held: Any, tokens: int) -> Any:
        held, elements = right(chunk, held, tokens)
        return held, np.where(elements < 0, 0, elements)

    patch.setattr(Chunk, "rows", rows)


@pytest.mark.parametrize(
    ("break_it", "name"),
    [
        (_made_up_counted, "loss"),
        (_not_in_order, "layers"),
        (_one_late, "likelihood"),
        (_any_frame, "two chunks"),
        (_dropped_rows_kept, "written"),
    ],
)
def test_broken_chunks_are_noticed(
    break_it: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = CHUNKED[name] if name in CHUNKED else GATHERED[name][0]
    of = trace(Program((LOCAL["linear"], pattern)), rows=2, tokens=TOKENS_OF_ROWS)
    check(of, 3, 1)
    break_it(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(of, 3, 1)
