"""Attention of libraries that wrap their operators in autograd functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_interface import Packed
from hsap_compile.errors import Refused
from hsap_compile.passes import _attention_functions
from simulate import Simulated, eager, simulate, simulate_all, traced, worst
from varlen_reference import reference_kernels

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTHS = [5, 1, 9, 14, 3, 2]


def sequences(lengths: list[int], of_keys: list[int] | None = None) -> dict[str, Any]:
    def ends(of: list[int]) -> Tensor:
        return torch.tensor([0, *of]).cumsum(0).int()

    total, keys = sum(lengths), of_keys or lengths
    batch = {"ids": torch.arange(total) * 7 % 50, "ends": ends(lengths), "of_keys": ends(keys)}
    return {**batch, "longest": max(*lengths, *keys)}


def rows() -> dict[str, Any]:
    return {"ids": torch.arange(48).view(2, 24) * 7 % 50}


def compared(model: Packed, batch: dict[str, Any], inter: int, intra: int) -> tuple[float, Simulated]:
    """The largest error on any rank, and what ran."""
    of = traced(model, batch)
    wanted, got = eager(of), simulate(of, inter, intra)
    return max(max(worst(step, wanted)) for step in got.ranks), got


def is_planned(got: Simulated) -> bool:
    """Nothing is gathered, and the mask is documents, order and windows alone."""
    masks = [planned.mask for planned in got.program.masks]
    return got.program.fallbacks == () and len(masks) == 1 and not masks[0].residual


HOW: list[dict[str, Any]] = [
    {}, {"causal": False}, {"window": (3, 0)}, {"causal": False, "window": (2, 1)}, {"width": 6},
]  # fmt: skip


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_sequences(how: dict[str, Any], mesh: tuple[int, int]) -> None:
    error, got = compared(Packed(**how), sequences(LENGTHS), *mesh)
    assert error <= 1e-12 and is_planned(got)
    (planned,) = got.runner.last_plan.masks  # type: ignore[union-attr]
    assert not planned.structure.mask.residual


@pytest.mark.parametrize("how", HOW[:4], ids=str)
def test_rows(how: dict[str, Any]) -> None:
    error, got = compared(Packed(**how), rows(), 2, 2)
    assert error <= 1e-12 and is_planned(got)


@pytest.mark.parametrize("how", HOW[:4], ids=str)
def test_keys_of_other_lengths_are_told_apart_in_every_batch(how: dict[str, Any]) -> None:
    """Causal order then counts from the ends.  A query before the first key attends to nothing, as here."""
    batches = [sequences(LENGTHS), sequences(LENGTHS, [3, 3, 9, 13, 2, 4])]
    of = traced(Packed(**how), batches[0])
    calls = [tuple(_given(batches[0], batch, x) for x in of.args) for batch in batches]
    for call, apart in zip(calls, (False, True), strict=True):
        wanted, got = eager(of, call), simulate(of, 2, 2, call)
        assert max(max(worst(step, wanted)) for step in got.ranks) <= 1e-12
        (planned,) = got.runner.last_plan.masks  # type: ignore[union-attr]
        assert planned.structure.mask.residual == apart


def _given(old: dict[str, Any], new: dict[str, Any], argument: Any) -> Any:
    return next((new[name] for name, value in old.items() if value is argument), argument)


def test_the_kernel_over_sequences_takes_equal_ends() -> None:
    batches = [sequences(LENGTHS), sequences([14, 20]), sequences(LENGTHS, [3, 3, 9, 13, 2, 4])]
    of = traced(Packed(), batches[0])
    same, other, apart = (tuple(_given(batches[0], batch, x) for x in of.args) for batch in batches)
    with reference_kernels():
        got = simulate_all(of, 2, 2, same, other, attention="varlen")
        for call, result in zip((same, other), got, strict=True):
            assert max(max(worst(step, eager(of, call))) for step in result.ranks) <= 1e-12
        with pytest.raises(Refused, match=r"keys in other documents than their queries \(mask 0\)"):
            simulate(of, 2, 2, apart, attention="varlen")


def test_two_tensors_of_ends_are_compared() -> None:
    (attention,) = simulate(traced(Packed(), sequences(LENGTHS)), 2, 1).program.masks
    assert len(attention.mask.alike) == 2 and not attention.mask.residual


def test_sequences_across_rows_are_left_to_the_function() -> None:
    """Rows that are made one have no part for every rank; a dense mask of all pairs would not fit."""
    batch = sequences(LENGTHS)
    error, got = compared(Packed(), {**batch, "ids": batch["ids"].view(2, 17)}, 2, 1)
    assert error <= 1e-12 and got.program.masks == ()
    assert "autograd_function_apply" in [f.operator for f in got.program.fallbacks]


WRONG = [
    "scale",
    "gradient",
    "swapped",
    "clipped",
    "keys",
    "doubled",
    "lse",
    "padded",
    "sliced",
    "out shifted",
    "k shifted",
    "dout shifted",
    "dq shifted",
    "last of dq",
    "no dk",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_functions_that_do_something_else_stay_what_they_are(wrong: str) -> None:
    width = 6 if wrong == "last of dq" else 8
    error, got = compared(Packed(width, kv_heads=4, wrong=wrong), sequences(LENGTHS), 2, 1)
    assert error <= 1e-12
    assert [f.operator for f in got.program.fallbacks] == ["autograd_function_apply"]


def test_the_gradient_of_a_bare_operator_is_its_own() -> None:
    error, got = compared(Packed(bare=True), sequences(LENGTHS), 2, 1)
    assert error <= 1e-12
    assert [f.operator for f in got.program.fallbacks] == ["hsap_test_flash::bare"]


@pytest.mark.parametrize("how", [{"dropout": 0.25}, {"softcap": 0.5}], ids=str)
def test_calls_that_a_mask_does_not_say_stay_what_they_are(how: dict[str, Any]) -> None:
    error, got = compared(Packed(**how), sequences(LENGTHS), 2, 1)
    assert error <= 1e-12 and len(got.program.fallbacks) == 1


@pytest.mark.parametrize("wrong", ["scale", "gradient", "clipped"])
def test_the_comparison_sees_a_backward_that_is_no_derivative(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attention_functions, "_is_derivative", lambda *_: True)
    error, _ = compared(Packed(wrong=wrong), sequences(LENGTHS), 2, 1)
    assert error > 1e-3
