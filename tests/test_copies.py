"""Operators that copy rows apart and together, each the transpose of another, against their definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile.kernels import copies

SIZES = st.tuples(st.integers(1, 2), st.integers(0, 3), st.integers(0, 4), st.integers(1, 3))
PARTS = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3
)


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check(
    operator: Callable[..., Sequence[Tensor]], definition: Callable[..., Sequence[Tensor]], *xs: Tensor
) -> None:
    """Values and gradients."""
    found, wanted = operator(*xs), definition(*xs)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    grads = [torch.randn_like(x) for x in wanted]
    pairs = [*zip(found, wanted, strict=True)]
    pairs += zip(*(torch.autograd.grad(y, xs, grads) for y in (found, wanted)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-14) for a, b in pairs)


def apart(xs: Sequence[Tensor], first: int, groups: int, repeats: Sequence[int]) -> list[Tensor]:
    sent = []
    for g in range(groups):
        heads = [x.repeat_interleave(r, 1).chunk(groups, 1)[g] for x, r in zip(xs, repeats, strict=True)]
        sent.append(torch.cat([x[:, :, first:].permute(2, 0, 1, 3).flatten(1) for x in heads], 1))
    return [*(x[:, :, :first].transpose(1, 2).flatten(0, 1) for x in xs), torch.cat(sent)]


@settings(max_examples=60, deadline=None)
@given(SIZES, PARTS)
def test_heads(sizes: tuple[int, int, int, int], parts: list[tuple[int, int, int]]) -> None:
    """``parts``: for each tensor how often its heads are repeated, whole heads a rank, and their width."""
    torch.manual_seed(0)
    batch, first, others, groups = sizes
    n, repeats = first + others, [repeat for repeat, _, _ in parts]
    xs = [made(batch, count * groups, n, width) for _, count, width in parts]
    check(
        lambda *xs: copies.SPLIT_HEADS(xs, first, groups, repeats),
        lambda *xs: apart(xs, first, groups, repeats),
        *xs,
    )

    def transposed(*ys: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(apart(xs, first, groups, repeats), xs, ys, create_graph=True)

    check(
        lambda *ys: copies.JOIN_HEADS(ys[:-1], ys[-1], batch, n, groups, repeats),
        transposed,
        *(made(*y.shape) for y in apart(xs, first, groups, repeats)),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.booleans())
def test_packed_rows(rows: list[int], later: bool) -> None:
    torch.manual_seed(0)
    at, k, v = torch.tensor(rows, dtype=torch.int64), made(6, 2, 3), made(6, 2, 4)
    check(
        lambda k, v: [copies.PACK(k, v, at, torch.full((), torch.nan) if later else None)],
        lambda k, v: [torch.cat([k[at].flatten(1), v[at].flatten(1)], 1)],
        k,
        v,
    )
    back = torch.randn(len(rows), 14, dtype=torch.float64)
    found = copies.UNPACK(back, at, 6, 2, [3, 4], k, v)
    alone = copies.UNPACK(back, at, 6, 2, [3, 4], None, None)
    assert all(torch.allclose(a, b + c, rtol=1e-14) for a, b, c in zip(found, (k, v), alone, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_rows_of_several_exchanges(sizes: list[int]) -> None:
    torch.manual_seed(0)
    check(lambda *xs: [copies.TOGETHER(xs)], lambda *xs: [torch.cat(xs)], *(made(n, 2, 3) for n in sizes))
