"""Flash attention over sequences as ``hsap::attend``: what is ours, over a reference of torch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import test_overlap
from attention_cases import HALF, check, drawn, errors, make_case, packs
from hsap_compile.kernels import sequences, varlen
from hsap_compile.kernels.reference import attend_reference
from hsap_compile.kernels.slices import BAND, CAUSAL, FULL, MOD
from test_sequences import without_formulas
from varlen_reference import reference_kernels


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[list[Any]]:
    with reference_kernels() as calls:
        yield calls


#: Rows that several slices share, of own and of received keys; one row without a key.
MIXED = make_case(
    [[0, 20, 0, 20, CAUSAL, 0, 0], [0, 20, 50, 60, FULL, 0, 0], [10, 30, 60, 80, BAND, -5, 3]]
    + [[30, 49, 30, 49, BAND, 0, 6], [35, 49, 3, 20, FULL, 0, 0]],
    50,
    30,
    sizes=(8, 12),
)


@settings(max_examples=100, deadline=None)
@given(drawn())
def test_equals_the_reference(arguments: dict[str, Any]) -> None:
    check(make_case(**without_formulas(arguments)), torch.float64)


@settings(max_examples=50, deadline=None)
@given(packs(), st.sampled_from([torch.float64, torch.float32]))
def test_packs_equal_the_reference(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


@settings(max_examples=40, deadline=None)
@given(packs(), st.sampled_from(HALF))
def test_packs_in_half_precision(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(**arguments), dtype)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 5), (24, 16), (3, 20)])
def test_heads_and_head_sizes(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    rows = [[0, 20, 0, 20, CAUSAL, 0, 0], [5, 20, 20, 29, FULL, 0, 0]]
    check(make_case(rows, 20, 9, heads=heads, sizes=sizes), torch.float64)


@pytest.mark.parametrize("own", [0, 5])
@pytest.mark.parametrize("remote", [None, 0, 3])
def test_nothing_to_attend_to(own: int, remote: int | None) -> None:
    case = make_case([[0, 0, 0, 4, FULL, 0, 0]], own, remote or 0).to(torch.bfloat16)
    if remote == 0:
        case = replace(case, k_remote=case.k[:0], v_remote=case.v[:0])
    out, lse, *grads = case.run(torch.ops.hsap.attend)
    assert out.shape == case.q.shape and not out.any() and (lse == -torch.inf).all()
    assert all(not g.any() for g in grads)


def test_a_sink_takes_part_once() -> None:
    case = make_case([[0, 9, 0, 9, CAUSAL, 0, 0], [3, 9, 10, 15, FULL, 0, 0]], 10, 5, sink=True)
    check(case, torch.float64)
    assert case.run(torch.ops.hsap.attend)[-2].any()  # the gradient of the sink's leaf


#: 100 sequences over the same 8 keys; 60 rows whose keys are in 4 calls.
SHARED_KEYS = [[4 * i, 4 * i + 2, 0, 8, FULL, 0, 0] for i in range(100)]
SHARED_ROWS = [[0, 60, 60 + 60 * i, 120 + 60 * i, (CAUSAL, BAND, FULL)[i % 3], 0, 5] for i in range(5)]


@pytest.mark.parametrize("rows", [SHARED_KEYS, SHARED_ROWS], ids=["keys", "rows"])
def test_what_calls_say_is_added_up_in_float32(rows: list[list[int]]) -> None:
    case = make_case(rows, 400, heads=(1, 1)).to(torch.bfloat16)
    exact = case.to(torch.float64).run(attend_reference)
    assert max(errors(case.run(torch.ops.hsap.attend), exact)) <= 0.4 * torch.finfo(torch.bfloat16).eps


def test_results_are_contiguous_whatever_the_operands_are() -> None:
    case = make_case([[0, 20, 0, 20, CAUSAL, 0, 0]], 20, sizes=(5, 8), strided=True)
    forward = test_overlap.forward_arguments(case)
    out, lse = torch.ops.hsap.attend(*forward)
    grads = torch.ops.hsap.attend_backward(case.grad, *forward, out, lse, None, [])
    assert all(x.is_contiguous() for x in (out, lse, *grads[:5]))
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(grads[:3], forward[:3], strict=True))


def test_rows_that_begin_anywhere() -> None:
    """The kernel reads 16 bytes at once, from wherever a row begins."""
    case = make_case([[0, 20, 0, 20, CAUSAL, 0, 0]], 20).to(torch.bfloat16)
    wide = torch.zeros(20, 2 * 16 + 3, dtype=torch.bfloat16)
    wide[:, 3:] = case.k.flatten(1)
    check(replace(case, k=wide[:, 3:].unflatten(1, (2, 16))), torch.bfloat16)


def test_a_gradient_that_is_one_number() -> None:
    floats = [None if x is None else x.detach().requires_grad_() for x in MIXED.floats]
    rest = (MIXED.slices, None, None, None, [], "", 0, 0.3)
    torch.ops.hsap.attend(*floats, *rest)[0].sum().backward()
    wanted = [None if x is None else x.detach().requires_grad_() for x in MIXED.floats]
    attend_reference(*wanted, *rest)[0].sum().backward()
    for x, y in zip(floats, wanted, strict=True):
        assert x is not None and y is not None
        torch.testing.assert_close(x.grad, y.grad)


def test_autocast_does_not_reach_inside() -> None:
    wanted = MIXED.run(attend_reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MIXED.to(torch.float32).run(torch.ops.hsap.attend)
    assert max(errors(found, wanted)) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(drawn())
def test_two_parts_equal_one(arguments: dict[str, Any]) -> None:
    """Own and received keys apart, as inside of Inductor: gradients from the out and lse of the whole."""
    assert test_overlap.error_of_both(make_case(**without_formulas(arguments))) < 1e-11


def test_documents_are_one_call_over_rows_in_place(
    kernels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.clear()
    monkeypatch.setattr(Tensor, "index_select", None)
    rows = [[a, b, a, b, CAUSAL, 0, 0] for a, b in ((0, 7), (7, 8), (8, 30))]
    make_case(rows, 30).run(torch.ops.hsap.attend)
    assert kernels == [("forward", 3, 30, True), ("backward", 3, 30, True)]


def test_a_formula_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask's formula decides, expected full, causal or band"):
        make_case([[0, 4, 0, 4, MOD, 0, 0]], 4).run(torch.ops.hsap.attend)


# --- that a mistake would be seen -----------------------------------------------------------------------


def _unweighted(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    return out + other, torch.logaddexp(lse, other_lse)


def _other_lse(backward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a, **k: backward(*a[:5], a[5] + 1e-6, *a[6:], **k)


def _one_further(window: tuple[int, int]) -> tuple[int, int]:
    return (window[0] + 1, 0) if window[0] > 0 else window


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "merged without weights": lambda p: p.setattr(varlen, "merge", _unweighted),
    "another lse": lambda p: p.setattr(varlen, "_backward", _other_lse(varlen._backward)),
    "gradients that overwrite": lambda p: p.setattr(varlen._Rows, "add", varlen._Rows.write),
    "a window of one more": lambda p: p.setattr(
        sequences.Call, "__new__", lambda cls, window, *a: tuple.__new__(cls, (_one_further(window), *a))
    ),
    "rows that are not looked up": lambda p: p.setattr(
        varlen, "_placed", lambda rows, _: varlen._Rows(rows.start, rows.size, None)
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(MIXED, torch.float64)
    sequences._calls.cache_clear()
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(AssertionError):
        check(MIXED, torch.float64)
    sequences._calls.cache_clear()
