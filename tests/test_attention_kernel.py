"""hsap::attend against its reference: values, gradients, dtypes, compilation, and that merging matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile import formula as f
from hsap_compile.kernels import attention
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
            out.backward(self.grad)
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
    strided: bool = False,
    seed: int = 0,
) -> Case:
    made = torch.Generator().manual_seed(seed)

    def rows(n: int, n_heads: int, size: int) -> Tensor:
        if strided:  # heads first, last stride 2
            x = torch.randn(n_heads, n, 2 * size, generator=made, dtype=torch.float64)
            return x[..., ::2].transpose(0, 1)
        return torch.randn(n, n_heads, size, generator=made, dtype=torch.float64)

    value, condition = FORMULAS[mod]
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
        f.dumps(sympy.Piecewise((value, condition), (otherwise, True))),
        torch.randn(own, heads[0], sizes[1], generator=made, dtype=torch.float64),
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
        "strided": draw(st.booleans()),
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
    if dtype in HALF:
        eager = errors(case.run(attend_reference), exact)
        limits = [2 * max(e, torch.finfo(dtype).eps) for e in eager]  # eager may be exact by luck
    else:
        limits = [1e-11 if dtype == torch.float64 else 1e-5] * len(exact)
    assert [e for e in zip(errors(found, exact), limits, strict=True) if e[0] > e[1]] == []


@settings(max_examples=200, deadline=None)
@given(drawn(), st.sampled_from([torch.float64, torch.float32]))
def test_equals_the_reference(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


@settings(max_examples=60, deadline=None)
@given(drawn(), st.sampled_from(HALF))
def test_half_precision_is_as_good_as_eager(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    if arguments["otherwise"] == LOWEST:  # eager float16 cannot hold it
        arguments = {**arguments, "otherwise": -sympy.oo}
    check(make_case(**arguments), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_as_good_as_eager_sdpa(dtype: torch.dtype) -> None:
    lengths, remote = [64, 64, 100, 28], 40
    starts = [0, 64, 128, 228]
    slices = [[s, s + n, s, s + n, CAUSAL, 0, 0] for s, n in zip(starts, lengths, strict=True)]
    slices.insert(1, [0, 100, 256, 256 + remote, FULL, 0, 0])
    case = make_case(slices, 256, remote, sizes=(32, 32)).to(dtype)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    seen = (document[:, None] == document) & torch.ones(256, 256, dtype=torch.bool).tril()
    seen = torch.cat([seen, (torch.arange(256) < 100)[:, None].expand(-1, remote)], 1)

    def sdpa(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        k, v = torch.cat([rest[0], rest[2]]), torch.cat([rest[1], rest[3]])
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1), q[0, ..., 0].T

    exact = case.to(torch.float64).run(attend_reference)
    part = [0, 2, 3, 4, 5, 6]  # out, dq, dk, dv, dk_remote, dv_remote
    ours, eager = (case.run(run) for run in (torch.ops.hsap.attend, sdpa))
    wanted = [exact[i] for i in part]
    ours_off, eager_off = (errors([x[i] for i in part], wanted) for x in (ours, eager))
    assert all(a <= 2 * b for a, b in zip(ours_off, eager_off, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_lowest_logits_attends_uniformly(dtype: torch.dtype) -> None:
    # keys 4.. of two slices are after every query: all logits finfo.min, two slices to merge
    case = make_case([[0, 4, 4, 9, MOD, 0, 0], [0, 4, 9, 20, MOD, 0, 0]], 20, otherwise=LOWEST).to(dtype)
    out = case.run(torch.ops.hsap.attend)[0]
    mean = case.v[4:20].mean(0).repeat_interleave(2, 0)
    torch.testing.assert_close(out[:4], mean.expand(4, -1, -1))
    check(case, dtype)


@pytest.mark.parametrize(
    ("rows", "lo", "hi"),
    [
        (500, 0, 50),
        (500, -20, 30),
        (500, -(2**31), -40),
        (500, 100, 2**31),
        (2600, 0, 2200),  # the kernel reads 512 keys at a time: here some rows see none of the first 512
    ],
)
def test_bands_of_a_long_document(rows: int, lo: int, hi: int) -> None:
    case = make_case([[0, rows, 0, rows, BAND, lo, hi]], rows, heads=(1, 1), sizes=(8, 8))
    check(case, torch.float64)


def test_dense_blocks_are_cut_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MOD_LOGITS", 2**9)
    monkeypatch.setattr(attention, "_MOD_MIN_QUERIES", 4)
    for mod in FORMULAS:
        check(make_case([[3, 60, 2, 61, MOD, 0, 0]], 64, mod=mod), torch.float64)


@pytest.mark.parametrize("slices", [[], [[0, 0, 0, 0, FULL, 0, 0]] * 2])
@pytest.mark.parametrize("own", [0, 5])
def test_nothing_to_attend_to(slices: list[list[int]], own: int) -> None:
    out, lse, *grads = make_case(slices, own).run(torch.ops.hsap.attend)
    assert (out == 0).all() and (lse == -torch.inf).all() and all((g == 0).all() for g in grads)


def test_equal_documents_are_one_run() -> None:
    def runs(slices: list[list[int]]) -> list[int]:
        return [r.q.count for r in attention._plan(torch.tensor(slices), 512, 512, 4).runs]

    equal = [[s, s + 16, s, s + 16, CAUSAL, 0, 0] for s in range(0, 512, 16)]
    received = [[s, s + 16, 512 + s, 512 + s + 16, FULL, 0, 0] for s in range(0, 512, 32)]
    assert runs(equal) == [32]
    # every other document has remote keys: alone and merged documents are runs of their own
    assert runs(sorted(equal + received)) == [16, 16, 16]
    check(make_case(sorted(equal + received), 512, 512), torch.float64)
    assert runs([[0, 512, 0, 512, BAND, 0, 63]]) == [1, 7]  # the first block sees fewer keys
    assert runs([[0, 512, 0, 512, BAND, -(2**31), 2**31]]) == [1]


MIXED = make_case(
    [[0, 20, 0, 20, CAUSAL, 0, 0], [0, 20, 50, 60, FULL, 0, 0], [10, 30, 60, 80, BAND, -5, 3]]
    + [[30, 50, 0, 50, MOD, 0, 0], [0, 0, 0, 0, FULL, 0, 0]],
    50,
    30,
    sizes=(8, 12),
)


# torch 2.14's own check reads .grad of tensors that are not leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    case = MIXED.to(torch.float32)
    floats = [None if x is None else x.detach().requires_grad_() for x in case.floats]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in case.leaves]
    rest = (case.slices, case.rows, case.remote_rows, case.heads, leaves, case.mod, 100, 0.3)
    torch.library.opcheck(torch.ops.hsap.attend.default, (*floats, *rest))
    plain = [None if x is None else x.detach() for x in floats]
    rest = (*rest[:4], [x.detach() for x in leaves], *rest[5:])
    out, lse = torch.ops.hsap.attend(*plain, *rest)
    args = (case.grad, *plain, *rest, out, lse, [0, 1])
    torch.library.opcheck(
        torch.ops.hsap.attend_backward.default, args, test_utils=("test_schema", "test_faketensor")
    )


def _around(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.hsap.attend(q * 2, *rest)
    return out.sin(), lse


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_for_all_sizes(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_around, backend=backend, dynamic=True, fullgraph=True)
    small = make_case([[0, 9, 0, 9, CAUSAL, 0, 0], [9, 30, 31, 38, MOD, 0, 0]], 30, 17, sizes=(8, 12))
    assert max(errors(MIXED.run(compiled), MIXED.run(_around))) <= 1e-11
    with torch.compiler.set_stance("fail_on_recompile"):
        assert max(errors(small.run(compiled), small.run(_around))) <= 1e-11


def test_autocast_does_not_reach_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MIXED.to(torch.float32).run(torch.ops.hsap.attend)
    assert max(errors(found, MIXED.run(attend_reference))) <= 1e-5


def test_only_asked_leaves_get_a_gradient() -> None:
    leaves = [x.detach() for x in MIXED.leaves]
    leaves[1].requires_grad_()
    rest = (MIXED.slices, MIXED.rows, MIXED.remote_rows, MIXED.heads, leaves, MIXED.mod, 100, 0.3)
    out, lse = torch.ops.hsap.attend(*MIXED.floats, *rest)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()  # a gradient of stride 0
    assert (
        leaves[0].grad is None and leaves[1].grad is not None and not leaves[1].grad.any()
    )  # alibi does not read the table


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"slices": torch.zeros(2, 6, dtype=torch.int64)},
            r"slices are \(2, 6\) torch.int64 on cpu, expected",
        ),
        ({"mod": ""}, "mod is empty; pass formula.dumps"),
        ({"rows": None}, "rows is None; pass"),
        ({"heads": None}, "heads is None; pass"),
    ],
)
def test_messages(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(MIXED, **change).run(torch.ops.hsap.attend)  # type: ignore[arg-type]


def _plain_sum(
    self: attention._Merge, span: attention._Span, out: Tensor, peak: Tensor, mass: object
) -> None:
    span.of(self.out).add_(out[..., : self.out.shape[2]])
    span.of(self._peak).copy_(torch.logaddexp(span.of(self._peak), peak))
    if self._mass is not None:
        span.of(self._mass).fill_(1)


def test_merging_without_rescaling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention._Merge, "add", _plain_sum)
    with pytest.raises(AssertionError):
        check(MIXED, torch.float64)


def test_backward_with_another_lse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = attention._softmax
    monkeypatch.setattr(attention, "_softmax", lambda *a: replace(softmax(*a), lse=softmax(*a).lse + 1e-6))
    with pytest.raises(AssertionError):
        check(MIXED, torch.float64)


def test_backward_without_what_rounding_took_from_lse_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_log_mass", lambda *_: None)
    with pytest.raises(AssertionError):
        check(make_case([[0, 4, 4, 20, MOD, 0, 0]], 20, otherwise=LOWEST), torch.float64)
