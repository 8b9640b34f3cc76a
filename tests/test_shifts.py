"""Slices, shifts, rolls and convolutions along the tokens stay on this rank's rows: outputs and all gradients
against eager, how many exchanges they take, and that nothing is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsap_compile.errors import Refused
from hsap_compile.plan.shifts import Shift, shifted
from simulate import Traced, eager, simulate, traced, worst
from strategies import dynamic
from test_collectives import at_run_time, in_graph
from test_shard_tokens import ON_MESHES, fallbacks

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # it says that it copies
WIDTH, K = 4, 3
TIGHT = 1e-12
Pattern = Callable[["Around", Tensor, Tensor], Tensor]


class Around(nn.Module):
    """``pattern`` between a loss and an attention inside of documents, which scatters them over the ranks."""

    shapes = {
        "square": (WIDTH, WIDTH), "vector": (WIDTH,), "words": (2, WIDTH), "kernel": (WIDTH, WIDTH, K),
        "depth": (WIDTH, 1, K), "even": (WIDTH, 1, K + 1), "groups": (2 * WIDTH, WIDTH // 2, K),
        "point": (WIDTH, WIDTH, 1), "any": (WIDTH, WIDTH, 4),
    }  # fmt: skip

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=g, dtype=torch.float64) / 2
            setattr(self, name, nn.Parameter(value))
        self.pattern = pattern

    def forward(self, x: Tensor, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        q = (x @ self.square).unflatten(-1, (2, -1)).transpose(1, 2)
        mask = (documents[:, :, None] == documents[:, None, :])[:, None]
        x = F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)
        y = self.pattern(self, x, ids)
        return (y * y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).sum() / x.shape[1], y


def batch(lengths: list[int], rows: int = 2) -> dict[str, Tensor]:
    g, tokens = torch.Generator().manual_seed(0), sum(lengths)
    x = torch.randn(rows, tokens, WIDTH, generator=g, dtype=torch.float64, requires_grad=True)
    documents = (
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(rows, -1).contiguous()
    )
    return {"x": x, "ids": torch.randint(0, 9, (rows, tokens), generator=g), "documents": documents}


LENGTHS = [5, 1, 9, 4, 8]


def trace(pattern: Pattern, lengths: list[int] = LENGTHS, rows: int = 2) -> Traced:
    return traced(Around(pattern), dynamic(batch(lengths, rows)))


def check(of: Traced, mesh: tuple[int, int], gathers: int = 0, **options: Any) -> Any:
    wanted = eager(of)
    with fallbacks() as found:
        result = simulate(of, *mesh, **options)
    assert len(found) == gathers, found
    for step in result.ranks:
        assert max(worst(step, wanted)) <= TIGHT
    return result


def exchanges(result: Any) -> int:
    """Re-indexes in the graph: all-to-alls that are not the attention's."""
    graph: Any = result.program.function
    tables = [n.args[1].meta["table"] for n in graph.graph.nodes if "all_to_all" in str(n.target)]
    return sum(isinstance(table, tuple) and isinstance(table[0], Shift) for table in tables)


def _written(p: Around, x: Tensor, i: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = p.vector
    y[:, 1:] = x[:, :-1]
    y[:, -2:] = p.words
    return y


def _no_grad(p: Around, x: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
    return x * before


def _front(p: Around, x: Tensor) -> Tensor:
    return p.vector.expand(x.shape[0], 1, WIDTH)


#: name: (pattern, exchanges)
SHIFTS: dict[str, tuple[Pattern, int]] = {
    "token shift": (lambda p, x, i: x * p.vector + F.pad(x[:, :-1], (0, 0, 1, 0)), 1),
    "token shift by module": (lambda p, x, i: nn.ZeroPad2d((0, 0, 1, -1))(x) @ p.square, 1),
    "from behind": (lambda p, x, i: F.pad(x[:, 2:], (0, 0, 0, 2)), 1),
    "padded and cut": (lambda p, x, i: F.pad(x, (0, 0, 2, 0))[:, : x.shape[1]], 1),
    "padded and cut again": (lambda p, x, i: F.pad(F.pad(x, (0, 0, 2, 3))[:, 3:], (0, 0, 1, 0))[:, :-3], 0),
    "padded in place": (lambda p, x, i: F.pad(x[:, 2:-1], (0, 0, 2, 1), value=1.5), 0),
    "padded both ways": (lambda p, x, i: F.pad(x[:, :-1], (1, 0, 1, 0))[..., 1:], 1),
    "filled": (lambda p, x, i: F.pad(x, (0, 0, 3, 0), value=2.5)[:, :-3] * p.vector, 1),
    "filled with nothing": (lambda p, x, i: F.pad(x, (0, 0, 1, 0), value=-torch.inf)[:, :-1].exp(), 1),
    "zeros in front": (lambda p, x, i: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1), 1),
    "new zeros": (lambda p, x, i: torch.cat([x.new_zeros(x.shape[0], 2, WIDTH), x], 1)[:, :-2], 1),
    "a learned token in front": (lambda p, x, i: torch.cat([_front(p, x), x], 1)[:, :-1] * p.vector, 1),
    "learned at both ends": (
        lambda p, x, i: torch.cat([p.words.expand(x.shape[0], 2, WIDTH), x[:, 3:], _front(p, x)], 1), 1
    ),
    "turned by parts": (lambda p, x, i: torch.cat([x[:, 2:], x[:, :2]], 1), 1),
    "rolled": (lambda p, x, i: x.roll(1, 1), 1),
    "rolled back": (lambda p, x, i: x.roll((-3, 1), (1, 2)), 1),
    "truth values rolled": (lambda p, x, i: x * (x > 0.1).roll(1, 1), 1),
    "rolled far": (lambda p, x, i: x.roll(100, 1), 1),
    "rolled, shorter": (lambda p, x, i: x[:, 1:].roll(2, 1), 1),
    "difference": (lambda p, x, i: F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 1)), 1),
    "differences": (lambda p, x, i: x.diff(n=2, dim=1) @ p.square, 1),
    "ends meet": (lambda p, x, i: x[:, 2:] * x[:, :-2] + x[:, 1:-1], 2),
    "quotient": (lambda p, x, i: x[:, :-2] / x[:, 2:] * p.vector, 1),
    "quotients of windows": (lambda p, x, i: p.vector / F.conv1d(x[:, 1:].mT, p.kernel).mT, 1),
    "fewest bytes move": (lambda p, x, i: x[:, 1:] * x[:, :-1, :1], 1),
    "loss of the next": (lambda p, x, i: x * F.mse_loss(x[:, 1:] @ p.square, x[:, :-1]), 1),
    "folded": (lambda p, x, i: x[:, 1:].flatten(0, 1) * x[:, :-1].reshape(-1, WIDTH), 1),
    "convolution": (lambda p, x, i: F.conv1d(x.mT, p.kernel, p.vector, padding=1).mT, 1),
    "causal": (lambda p, x, i: F.conv1d(x.mT, p.kernel, p.vector, padding=K - 1)[..., : x.shape[1]].mT, 1),
    "anticausal": (lambda p, x, i: F.conv1d(x.mT, p.kernel, padding=K - 1)[..., K - 1 :].mT, 1),
    "last outputs": (lambda p, x, i: F.conv1d(x.mT, p.kernel, padding=K - 1)[..., -x.shape[1] :].mT, 1),
    "padded convolution": (lambda p, x, i: F.conv1d(F.pad(x.mT, (K - 1, 0), value=0.5), p.kernel).mT, 1),
    "depthwise": (
        lambda p, x, i: F.conv1d(x.mT, p.depth, p.vector, padding=K - 1, groups=WIDTH)[..., : 1 - K].mT, 1
    ),
    "same": (lambda p, x, i: F.conv1d(x.mT, p.even, padding="same", dilation=3, groups=WIDTH).mT, 1),
    "groups": (lambda p, x, i: F.conv1d(x.mT, p.groups, padding=2, dilation=2, groups=2).mT, 1),
    "pointwise": (lambda p, x, i: F.conv1d(x.mT, p.point).mT, 0),
    "shorter": (lambda p, x, i: F.conv1d(x.mT, p.kernel).mT, 1),
    "unbatched": (lambda p, x, i: F.conv1d(x[0].mT, p.kernel, padding=1).mT, 1),
    "windows": (lambda p, x, i: F.pad(x, (0, 0, K - 1, 0)).unfold(1, K, 1).mul(p.depth[:, 0]).sum(-1), 1),
    "a convolution of a shift": (
        lambda p, x, i: F.conv1d(x[:, 1:].mT, p.kernel, padding=1).mT - x[:, :-1], 1
    ),
    "written": (_written, 1),
    "without a gradient": (_no_grad, 1),
    "first": (lambda p, x, i: x + x[:, :1] * p.vector + x[:, 0, None], 0),
    "last": (lambda p, x, i: x + x[:, -1:] + x[:, -1, None] * p.vector + x[:, 2:4].sum(1, keepdim=True), 0),
    "far": (lambda p, x, i: x + F.pad(x, (0, 0, 40, 0))[:, :-40], 1),
    "labels": (
        lambda p, x, i: x * (F.pad(i, (1, 0))[:, :-1] + i.roll(1, 1) - i.diff(append=i[:, :1]))[..., None], 0
    ),
}  # fmt: skip


@ON_MESHES
@pytest.mark.parametrize("name", SHIFTS)
def test_stays_local(name: str, mesh: tuple[int, int]) -> None:
    pattern, count = SHIFTS[name]
    assert exchanges(check(trace(pattern), mesh)) == count


GATHERED: dict[str, tuple[Pattern, int]] = {
    "strided": (lambda p, x, i: F.conv1d(x.mT, p.kernel, stride=2)[..., :3], 1),
    "reflected": (lambda p, x, i: F.pad(x.mT, (1, 1), mode="reflect").mT, 1),
    "two fills": (lambda p, x, i: F.pad(F.pad(x, (0, 0, 1, 0)), (0, 0, 1, 0), value=1.0)[:, :-2], 1),
    "every second": (lambda p, x, i: x[:, ::2], 1),
}


@pytest.mark.parametrize("changed", [False, True])
def test_rows_that_grow_make_all_rows_longer(changed: bool) -> None:
    def longer(p: Around, x: Tensor, i: Tensor) -> Tensor:
        y = F.pad(x, (0, 0, 1, 0))
        return y.sin()[:, :-1] if changed else y

    check(trace(longer), (3, 1))


@pytest.mark.parametrize("name", GATHERED)
def test_what_is_no_shift_is_gathered_and_told(name: str) -> None:
    pattern, count = GATHERED[name]
    of = trace(pattern)
    check(of, (2, 1), gathers=count)
    with pytest.raises(Refused, match="cannot be computed on one rank's tokens"):
        simulate(of, 2, 1, strict=True)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_exactly_the_rows_that_are_needed(mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One all-to-all forward and one backward a re-index, none on one rank, and the rows of the tables."""
    attention = (mesh[0] > 1) + 2 * (mesh[1] > 1)
    of, ranks = trace(SHIFTS["token shift"][0]), mesh[0] * mesh[1]
    counts = []
    for backward in (False, True):
        with at_run_time(monkeypatch) as started:
            result = simulate(of, *mesh, backward=backward, outputs="local")
        counts.append(started["all_to_all_single"])
    once = 0 if ranks == 1 else ranks * (1 + attention)
    assert counts == [once, 2 * once]
    if ranks == 1:
        assert in_graph(result) == {}
        return
    placement = result.runner.last_plan.placement  # type: ignore[union-attr]
    (shift,) = {
        key[0] for key in result.program.tables if isinstance(key, tuple) and isinstance(key[0], Shift)
    }
    holder = {c: r for r in range(ranks) for c in placement.columns_of(r).tolist()}
    rows = [[0] * ranks for _ in range(ranks)]
    for column in range(1, sum(LENGTHS)):
        if holder[column] != holder[column - 1]:
            rows[holder[column - 1]][holder[column]] += 1
    assert shifted(placement, shift).rows(ranks).tolist() == rows
