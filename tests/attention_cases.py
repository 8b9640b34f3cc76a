"""Inputs of hsap::attend: drawn, run with gradients, compared with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile import formula as f
from hsap_compile.kernels.attention import BAND, CAUSAL, FULL, MOD
from hsap_compile.kernels.reference import attend_reference

LOWEST = float(torch.finfo(torch.float32).min)
BEFORE = f.k <= f.q
FORMULAS = {
    "mask": (f.score, f.q % 3 <= f.k % 5),  # some rows see nothing
    "alibi": (f.score - f.leaf(0, f.h) * (f.q - f.k), BEFORE),
    "bias": (f.score + f.leaf(1, f.b, f.k) * f.leaf(0, f.h), sympy.true),
    "documents": (f.score, sympy.Eq(f.leaf(2, f.q), f.leaf(2, f.k))),
    "softcap": (5 * sympy.tanh(f.score / 5) + f.q / f.S, BEFORE),
    "constant": (f.leaf(1, f.b, f.k), BEFORE),
}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    k_remote: Tensor | None
    v_remote: Tensor | None
    slices: Tensor
    rows: Tensor
    remote_rows: Tensor | None
    heads: Tensor
    leaves: tuple[Tensor, ...]
    mod: str
    grad: Tensor
    grad_lse: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        changed: dict[str, Any] = {
            n: getattr(self, n) for n in ("q", "k", "v", "k_remote", "v_remote", "grad")
        }
        changed = {n: None if x is None else x.to(dtype) for n, x in changed.items()}
        leaves = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.leaves)
        return replace(self, leaves=leaves, **changed)

    def run(self, attend: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        """out, lse, gradients of every floating input."""
        floats = [None if x is None else x.detach().requires_grad_() for x in self.floats]
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in self.leaves]
        indices = (self.slices, self.rows, self.remote_rows, self.heads)
        tokens = self.q.shape[0] + 50
        out, lse = attend(*floats, *indices, leaves, self.mod, tokens, self.q.shape[2] ** -0.5)
        if out.requires_grad:  # the reference of no slices is a constant
            results, grads = [out], [self.grad]
            if self.grad_lse is not None and lse.requires_grad:
                results.append(lse.masked_fill(lse.isinf(), 0))
                grads.append(self.grad_lse.to(lse.dtype))
            torch.autograd.backward(results, grads)
        sources = [x for x in (*floats, *leaves) if x is not None and x.is_floating_point()]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in sources]
        return [out.detach(), lse.detach(), *grads]

    @property
    def floats(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.k_remote, self.v_remote


def make_case(
    slices: Sequence[Sequence[int]],
    own: int,
    remote: int = 0,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    mod: str = "alibi",
    otherwise: object = -sympy.oo,
    sink: bool = False,
    strided: bool = False,
    of_lse: bool = False,
    seed: int = 0,
) -> Case:
    made = torch.Generator().manual_seed(seed)

    def rows(n: int, n_heads: int, size: int) -> Tensor:
        if strided:  # heads first, last stride 2
            x = torch.randn(n_heads, n, 2 * size, generator=made, dtype=torch.float64)
            return x[..., ::2].transpose(0, 1)
        return torch.randn(n, n_heads, size, generator=made, dtype=torch.float64)

    value, condition = FORMULAS[mod]
    logits = sympy.Piecewise((value, condition), (otherwise, True))
    position = torch.stack([torch.arange(own + remote) % 2, torch.arange(own + remote)], 1)
    leaves = (
        torch.rand(heads[0] + 3, generator=made, dtype=torch.float64),
        torch.randn(2, own + remote, generator=made, dtype=torch.float64),
        torch.arange(own + remote) // 7,
    )
    return Case(
        rows(own, heads[0], sizes[0]),
        rows(own, heads[1], sizes[0]),
        rows(own, heads[1], sizes[1]),
        rows(remote, heads[1], sizes[0]) if remote else None,
        rows(remote, heads[1], sizes[1]) if remote else None,
        torch.tensor(slices, dtype=torch.int64).reshape(-1, 7),
        position[:own],
        position[own:] if remote else None,
        torch.arange(heads[0]) + 2,
        leaves,
        f.dumps(f.sink(logits, f.leaf(0, f.h) + f.q / f.S) if sink else logits),
        torch.randn(own, heads[0], sizes[1], generator=made, dtype=torch.float64),
        torch.randn(own, heads[0], generator=made, dtype=torch.float64) if of_lse else None,
    )


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    at = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
    return list(zip(at, at[1:], strict=False))


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_case: a failure then prints integers, not tensors."""
    own, remote = draw(st.integers(1, 40)), draw(st.sampled_from([0, 3, 20]))
    slices = [[0, 0, 0, 0, draw(st.integers(0, 3)), 0, 0]]  # padding
    keys = cuts(draw, own) + [(own + a, own + b) for a, b in cuts(draw, remote)]
    for k0, k1 in keys:  # each stripe of keys cuts the queries differently: their ranges partly overlap
        for q0, q1 in cuts(draw, own):
            kind = draw(st.sampled_from([None, FULL, CAUSAL, BAND, MOD]))
            lo, hi = sorted(draw(st.tuples(*[st.integers(-12, 12) | st.sampled_from([-(2**31), 2**31])] * 2)))
            n = min(q1 - q0, k1 - k0)
            if kind == CAUSAL:
                slices.append([q0, q0 + n, k0, k0 + n, kind, 0, 0])
            elif kind is not None:
                slices.append([q0, q1, k0, k1, kind, lo, hi])
    return {
        "slices": sorted(slices),
        "own": own,
        "remote": remote,
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)])),
        "sizes": draw(st.sampled_from([(8, 8), (16, 8), (8, 20), (5, 5)])),
        "mod": draw(st.sampled_from(sorted(FORMULAS))),
        "otherwise": draw(st.sampled_from([-sympy.oo, LOWEST, -1e4])),
        "sink": draw(st.sampled_from([False, False, True])),
        "strided": draw(st.booleans()),
        "of_lse": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


def errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The largest difference of each tensor, relative to the largest wanted value.

    Inputs are of size 1, and so is what gradients are differences of: that is the floor of the scale (a
    row with one key has dq = 0, but its rounding is that of its terms).
    """
    assert len(found) == len(wanted)
    result = []
    for x, y in zip(found, wanted, strict=True):
        x, y = x.double(), y.double()
        assert x.shape == y.shape and not x.isnan().any()
        assert torch.equal(x == -torch.inf, y == -torch.inf)
        at = y.isfinite()
        scale = max(y[at].abs().max().item(), 1.0) if at.any() else 1.0
        result.append((x[at] - y[at]).abs().max().item() / scale if at.any() else 0.0)
    return result


def check(case: Case, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    exact = case.to(torch.float64).run(attend_reference)
    found = case.run(torch.ops.hsap.attend)
    assert all(x.dtype == dtype for x in (found[0], *found[2:]))
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # a slope's gradient is a difference of terms as large as distances are
    slopes = sum(x.is_floating_point() for x in case.leaves)
    terms = [1.0] * (len(exact) - slopes) + [float(len(case.k) + 1)] * slopes
    if dtype in HALF:
        eager, eps = errors(case.run(attend_reference), exact), torch.finfo(dtype).eps
        limits = [2 * max(e, eps * size) for e, size in zip(eager, terms, strict=True)]  # exact by luck
    else:
        limits = [(1e-11 if dtype == torch.float64 else 1e-5) * size for size in terms]
    assert [e for e in zip(errors(found, exact), limits, strict=True) if e[0] > e[1]] == []


@st.composite
def packs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_case: documents one after the other, many of them alike, some with received keys."""
    slices, start = [], draw(st.integers(0, 2))
    lengths = st.sampled_from([1, 1, 2, 3, 8, 8, 8, 9, 13, 20, 31])
    for length in draw(st.lists(lengths, min_size=1, max_size=9)):
        kind = draw(st.sampled_from([CAUSAL, CAUSAL, FULL]))
        before = draw(st.integers(0, min(2, start))) if kind == FULL else 0  # keys of the document before
        slices.append([start, start + length, start - before, start + length, kind, 0, 0])
        start += length + draw(st.sampled_from([0, 0, 2]))
    own = max(row[1] for row in slices) + draw(st.integers(0, 2))
    remote = draw(st.sampled_from([0, 6]))
    if remote:
        row = draw(st.sampled_from(slices))
        slices.append([row[0], row[1], own, own + remote, FULL, 0, 0])
    return {
        "slices": sorted(slices),
        "own": own,
        "remote": remote,
        "heads": draw(st.sampled_from([(2, 1), (1, 1)])),
        "strided": draw(st.booleans()),
        "of_lse": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


#: A slice of every kind, an empty one, and rows that several of them share.
MIXED = make_case(
    [[0, 20, 0, 20, CAUSAL, 0, 0], [0, 20, 50, 60, FULL, 0, 0], [10, 30, 60, 80, BAND, -5, 3]]
    + [[30, 50, 0, 50, MOD, 0, 0], [0, 0, 0, 0, FULL, 0, 0]],
    50,
    30,
    sizes=(8, 12),
)
