"""Operators of other libraries that treat every token alone, because the user says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hsap_compile.errors import Refused
from hsap_compile.options import parse
from test_shard_tokens import LOCAL, Program, check, trace

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

OPS = torch.ops.hsap_test_rows
NAME = "hsap_test_rows::product"


@torch.library.custom_op(NAME, mutates_args=())
def product(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """``rows``: 0, or how many x has."""
    assert rows in (0, x.shape[1])
    return x @ weight


@product.register_fake
def _(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    return torch.empty_like(x)


def _saved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return grad @ weight.mT, x.flatten(0, 1).mT @ grad.flatten(0, 1), None


product.register_autograd(_gradients, setup_context=_saved)


@torch.library.custom_op("hsap_test_rows::quantised", mutates_args=())
def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round(), scale


@quantised.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))


@torch.library.custom_op("hsap_test_rows::scaled", mutates_args=())
def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    return x / x.abs().amax(), x.abs().amax()


@scaled.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


class Frozen(torch.autograd.Function):
    """A product with weights that learn nothing, as with quantised ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return OPS.product(x, weight, 0)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return OPS.product(grad, ctx.saved_tensors[0].mT.contiguous(), 0), None


def _product(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + OPS.product(x, p.square, 0)  # type: ignore[no-any-return]


def _frozen(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + Frozen.apply(x, p.square.detach())  # type: ignore[no-any-return]


def _two_results(p: Program, x: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        steps, scale = OPS.quantised(x)
    return x + steps * scale


def _told_the_length(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + OPS.product(x, p.square, x.shape[1])  # type: ignore[no-any-return]


def _of_all(p: Program, x: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        steps, scale = OPS.scaled(x)
    return x + steps * scale


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("pattern", [_product, _frozen, _two_results])
def test_stays_local(pattern: Any, rows: int) -> None:
    of = trace(Program((LOCAL["linear"], pattern, LOCAL["affine"])), rows=rows)
    named = ["hsap_test_rows::product", OPS.quantised]
    assert check(of, 2, 1, token_wise=named) == []
    assert check(of, 1, 2, token_wise=named, lower="aot_eager") == []


def test_the_log_says_how() -> None:
    of = trace(Program((LOCAL["linear"], _product, _frozen)), rows=2)
    first, second = check(of, 2, 1)
    how = 'no rule for this operator; if it treats every token alone, name it in options={"token_wise": [..]}'
    assert first.startswith(f"{NAME} runs on gathered tokens on every rank ({how})")
    assert f"(a custom function that mixes tokens: {NAME}, {how})" in second


@pytest.mark.parametrize("pattern", [_told_the_length, _of_all])
def test_what_sizes_contradict_is_gathered(pattern: Any) -> None:
    of = trace(Program((LOCAL["linear"], pattern, LOCAL["affine"])), rows=2)
    assert len(check(of, 2, 1, token_wise=[OPS.product, OPS.scaled.default])) == 1


def test_names() -> None:
    assert parse({"token_wise": [OPS.product, OPS.scaled.default, "a::b"]}, None).token_wise == {
        NAME, "hsap_test_rows::scaled", "a::b",
    }  # fmt: skip
    for wrong in ("product", "aten::mm", torch.ops.aten.mm, torch.mm):
        with pytest.raises(Refused, match='option "token_wise" names no operator of another library'):
            parse({"token_wise": [wrong]}, None)
    with pytest.raises(Refused, match='option "token_wise" has the wrong type'):
        parse({"token_wise": NAME}, None)
