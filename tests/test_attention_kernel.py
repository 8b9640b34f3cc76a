"""hsap::attend against its reference: values, gradients, dtypes, compilation, and that merging matters."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import FORMULAS, HALF, LOWEST, MIXED, check, drawn, errors, make_case, packs
from hsap_compile import formula as f
from hsap_compile.kernels import attention, slices
from hsap_compile.kernels.attention import BAND, CAUSAL, FULL, MOD, Span
from hsap_compile.kernels.reference import attend_reference

#: A slope whose keys are 25 rows away: its gradient cancels.
FAR = {
    "slices": [[0, 26, 1, 4, MOD, 0, 0]], "own": 26, "remote": 0, "heads": (1, 1), "sizes": (8, 8),
    "mod": "alibi", "otherwise": -sympy.oo, "sink": False, "strided": False, "seed": 0,
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(drawn(), st.sampled_from([torch.float64, torch.float32]))
@example(FAR, torch.float32)
def test_equals_the_reference(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a few rows, so that small documents are cut, batched and cut into batches."""
    for module in (attention, slices):
        monkeypatch.setattr(module, "STEP", 4)
        monkeypatch.setattr(module, "STAIR_TOKENS", (6, 32))
    monkeypatch.setattr(attention, "_LONG", 6)
    monkeypatch.setattr(slices, "_STAIR_WORK", 0)
    monkeypatch.setattr(slices, "_CALL_ELEMENTS", 400)


@settings(max_examples=100, deadline=None)
@given(packs(), st.sampled_from([torch.float64, torch.float32]))
@pytest.mark.usefixtures("small_blocks")
def test_packs_equal_the_reference(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


@settings(max_examples=40, deadline=None)
@given(packs(), st.sampled_from(HALF))
@pytest.mark.usefixtures("small_blocks")
def test_packs_in_half_precision(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


STARTS = [0, 1, 331, 395, 459, 460, 657]
LONG = make_case(
    [[a, b, a, b, CAUSAL, 0, 0] for a, b in itertools.pairwise(STARTS)], STARTS[-1], sizes=(64, 64)
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_of_hundreds_of_tokens(dtype: torch.dtype) -> None:
    plan = slices.plan(LONG.slices, 657, 0, 4, 256)
    assert sorted(len(list(run.calls())) for run in plan.runs) == [1, 1, 4, 6]
    check(LONG, dtype)


@example(  # of a slope's gradient
    {
        "slices": [[0, 0, 0, 0, 0, 0, 0], [0, 14, 1, 6, MOD, 0, 0]], "own": 14, "remote": 20, "heads": (1, 1),
        "sizes": (8, 8), "mod": "alibi", "otherwise": -sympy.oo, "sink": False, "strided": False, "seed": 0,
    },
    torch.bfloat16,
)  # fmt: skip
@settings(max_examples=60, deadline=None)
@given(drawn(), st.sampled_from(HALF))
def test_half_precision_is_as_good_as_eager(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    if arguments["otherwise"] == LOWEST:  # eager float16 cannot hold it
        arguments = {**arguments, "otherwise": -sympy.oo}
    check(make_case(**arguments), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sides", [(160, 2), (8, 160)])
def test_what_many_slices_share_is_rounded_once(sides: tuple[int, int], dtype: torch.dtype) -> None:
    queries, keys = sides
    table = [
        [q, q + queries, k, k + keys, FULL, 0, 0] for q in range(0, 160, queries) for k in range(0, 160, keys)
    ]
    case = make_case(table, 160).to(dtype)
    exact = case.to(torch.float64).run(attend_reference)
    assert max(errors(case.run(torch.ops.hsap.attend), exact)) <= 0.6 * torch.finfo(dtype).eps


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


def test_a_sink_beside_large_logits() -> None:
    case = make_case([[0, 9, 0, 20, MOD, 0, 0], [9, 20, 0, 20, FULL, 0, 0]], 20)
    logits = sympy.Piecewise((f.score + 300, f.k <= f.q), (-sympy.oo, True))
    check(replace(case, mod=f.dumps(f.sink(logits, f.leaf(0, f.h) + 300))), torch.float64)


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


@pytest.mark.parametrize(("queries", "keys"), [(2, 4), (4, 0), (4, 2), (5, 3)])
def test_equally_spaced_slices_that_overlap(queries: int, keys: int) -> None:
    """Blocks of 4 queries and 4 keys: shared queries are merged, and the gradients of shared keys added."""
    table = [[i * queries, i * queries + 4, i * keys, i * keys + 4, FULL, 0, 0] for i in range(5)]
    plan = slices.plan(torch.tensor(table), 24, 0, 4, 64)
    assert sorted(run.q.blocks for run in plan.runs) == ([5] if queries >= 4 and keys else [1] * 5)
    check(make_case(table, 24), torch.float64)


def test_dense_blocks_are_cut_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MOD_LOGITS", 2**9)
    monkeypatch.setattr(slices, "_MOD_MIN_QUERIES", 4)
    for mod in FORMULAS:
        check(make_case([[3, 60, 2, 61, MOD, 0, 0]], 64, mod=mod), torch.float64)


def _plain_sum(self: attention._Merge, span: Span, out: Tensor, peak: Tensor, mass: object) -> None:
    span.of(self.out).add_(out[..., : self.out.shape[2]])
    span.of(self._peak).copy_(torch.logaddexp(span.of(self._peak), peak))
    if self._mass is not None:
        span.of(self._mass).fill_(1)


def test_a_mask_that_shows_the_next_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    band = attention._Masks._band
    monkeypatch.setattr(attention._Masks, "_band", lambda s, nq, nk, lo, hi: band(s, nq, nk, lo - 1, hi))
    with pytest.raises(AssertionError):
        check(LONG, torch.float64)


def test_a_call_whose_keys_are_not_summed_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "add_", lambda x, *_: x)
    with pytest.raises(AssertionError):
        check(LONG, torch.float64)


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
