"""Triton kernels that the model launches, and other libraries' operators that write into their operands: on
gathered tokens, kernels from memory that lies as they were told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import offline_gpu
from hsap_compile.errors import Refused
from hsap_compile.kernels.copies import LAID_OUT
from hsap_compile.options import parse
from hsap_compile.pipeline import rewrite
from launches import launches_on_cpu
from simulate import simulate, since
from test_shard_tokens import LOCAL, WIDTH, Program, check, trace

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@triton.jit
def double(x, y, rows, batch_stride, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    b, t, at = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    values = tl.load(x + b * batch_stride + t * stride + at, mask=at < width)
    tl.store(y + (b * rows + t) * width + at, 2 * values, mask=at < width)


def _double(
    x: Tensor, y: Tensor, rows: int, batch_stride: int, stride: int, width: int, BLOCK: int, grid: Any
) -> None:
    source = x.as_strided((grid[0], grid[1], width), (batch_stride, stride, 1))
    y.as_strided(source.shape, (rows * width, width, 1)).copy_(2 * source)


def _doubled(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    grid = (x.shape[0], x.shape[1])
    double[grid](x, y, x.shape[1], x.stride(0), x.stride(1), x.shape[2], BLOCK=8)
    return y


@triton.jit
def scale_forward(x, w, y, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < width)
    tl.store(y + row * width + at, values * tl.load(w + at, mask=at < width), mask=at < width)


@triton.jit
def scale_backward(x, w, dy, dw, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    grad = tl.load(dy + row * width + at, mask=at < width)
    tl.store(dw + row * width + at, grad * tl.load(x + row * stride + at, mask=at < width), mask=at < width)
    tl.store(dy + row * width + at, 3 * grad * tl.load(w + at, mask=at < width), mask=at < width)


def _scale_forward(x: Tensor, w: Tensor, y: Tensor, stride: int, width: int, BLOCK: int, grid: Any) -> None:
    y.as_strided((grid[0], width), (width, 1)).copy_(x.as_strided((grid[0], width), (stride, 1)) * w)


def _scale_backward(
    x: Tensor, w: Tensor, dy: Tensor, dw: Tensor, stride: int, width: int, BLOCK: int, grid: Any
) -> None:
    grad = dy.as_strided((grid[0], width), (width, 1))
    dw.as_strided(grad.shape, (width, 1)).copy_(grad * x.as_strided(grad.shape, (stride, 1)))
    grad.copy_(3 * grad * w)


class Scale(torch.autograd.Function):
    """A weight for every feature; the backward, which is not the forward's, overwrites what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        flat = x.new_empty((x.shape[0] * x.shape[1], x.shape[2]))
        scale_forward[(flat.shape[0],)](x, w, flat, x.stride(1), x.shape[2], BLOCK=8)
        ctx.save_for_backward(x, w)
        return flat.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        dx, dw = grad.clone(memory_format=torch.contiguous_format), x.new_empty(x.shape)
        rows = dx.view(-1, x.shape[2])
        scale_backward[(rows.shape[0],)](x, w, rows, dw, x.stride(1), x.shape[2], BLOCK=8)
        return dx, dw.sum((0, 1))


MEANINGS = {double: _double, scale_forward: _scale_forward, scale_backward: _scale_backward}


@pytest.fixture
def ran() -> Iterator[list[str]]:
    with launches_on_cpu(MEANINGS) as names:
        yield names


def plain(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + _doubled(x)


def features(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Of rows that are parts of longer ones."""
    wide = torch.cat([x, 3 * x], -1)
    return x + _doubled(wide[..., WIDTH:])


def turned(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Of rows in an order that the kernel knows by their strides."""
    return x + _doubled(x.transpose(0, 1).contiguous().transpose(0, 1))


def twice(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Into memory that is looked at from elsewhere."""
    y = torch.zeros_like(x)
    double[(x.shape[0], x.shape[1])](
        x, y.view(-1, WIDTH), x.shape[1], x.stride(0), x.stride(1), WIDTH, BLOCK=8
    )
    z = y.sin()
    double[(x.shape[0], x.shape[1])](z, y, x.shape[1], z.stride(0), z.stride(1), WIDTH, BLOCK=8)
    return x + y


KERNELS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "plain": (plain, ["kernel double"]),
    "features": (features, ["kernel double"]),
    "turned": (turned, ["kernel double"]),
    "twice": (twice, ["kernel double"] * 2),
    "function": (lambda p, x, i: Scale.apply(x, p.vector), ["autograd_function_apply"]),
    "function of features": (
        lambda p, x, i: Scale.apply(torch.cat([x, 3 * x], -1)[..., WIDTH:], p.vector),
        ["autograd_function_apply"],
    ),
}


@pytest.mark.parametrize(
    ("name", "lower"), [*((name, "eager") for name in KERNELS), ("function of features", "aot_eager")]
)
def test_kernels_run_on_gathered_tokens(name: str, lower: str, ran: list[str]) -> None:
    pattern, gathered = KERNELS[name]
    of = trace(Program((LOCAL["linear"], pattern, LOCAL["linear"])), rows=2)
    ran.clear()
    found = check(of, 2, 1, lower=lower)
    assert [text.split(" runs on gathered tokens")[0] for text in found] == gathered
    assert check(of, 1, 1, lower=lower) == []
    once = ["scale_forward", "scale_backward"] if "function" in name else ["double"] * (1 + (name == "twice"))
    assert sorted(ran) == sorted(once * 5)  # eager, two ranks, eager, one rank


def test_a_kernel_that_is_told_wrong_strides_is_noticed(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = trace(Program((LOCAL["linear"], features, LOCAL["linear"])), rows=2)
    monkeypatch.setattr("hsap_compile.pipeline.drop_idle_layouts", _drop_all)
    with pytest.raises((AssertionError, RuntimeError), match="assert|out of bounds"):
        check(of, 2, 1)


def _drop_all(module: torch.fx.GraphModule) -> None:
    for node in [n for n in module.graph.nodes if n.target is LAID_OUT]:
        node.replace_all_uses_with(node.args[0])
    module.recompile()


def _lengthened(p: Program, x: Tensor, i: Tensor) -> Tensor:
    double[(x.shape[0], x.shape[1])](x, x, x.shape[1], x.stride(0), x.stride(1), WIDTH, BLOCK=8)
    return x * 2


def test_a_kernel_that_writes_into_what_has_a_gradient_is_refused(ran: list[str]) -> None:
    of = trace(Program((LOCAL["linear"], _lengthened)), rows=2)
    with pytest.raises(Refused, match="writes in place, unseen by autograd, into a value with a gradient"):
        simulate(of, 2, 1)


def _generated() -> list[list[str]]:
    """The kernels of Inductor's forward and backward for a GPU."""
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional

    with launches_on_cpu(MEANINGS):
        of = trace(Program((LOCAL["linear"], plain, LOCAL["linear"])), rows=2)
        graph = rewrite(of.module, parse({}, None), of.length, 1, "").graph
    made = offline_gpu.generate(graph, rewrite=decompose_triton_kernel_wrapper_functional)
    return [list(offline_gpu.kernels(part.source)) for part in made]


@since((2, 13), "this pass of Inductor's does not run on its own")
def test_generated_code_launches_the_kernel() -> None:
    forward, backward = offline_gpu.in_a_process(_generated)
    assert sum(name.startswith("double") for name in forward) == 1
    assert not any(name.startswith("double") for name in backward)


# --- operators that write into their operands ---------------------------------------------------------


@torch.library.custom_op("hsap_tests::swept", mutates_args=("y", "z"))
def swept(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    y.copy_(2 * x)
    z.mul_(x)
    return x + z


@swept.register_fake
def _(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hsap_tests::waves", mutates_args=("y",))
def waves(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    if y is not None:
        y.copy_(2 * x)
    return x.sin(), x.cos()


@waves.register_fake
def _(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("hsap_tests::filled", mutates_args=("y",))
def filled(x: Tensor, y: Tensor) -> None:
    y.copy_(2 * x)


def _operators(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Into a view, which others see; into nothing; with and without a result."""
    with torch.no_grad():
        y, z = torch.zeros_like(x), x.detach().clone()
        w = swept(x.detach(), y[..., :], z)
        a, b = waves(w, None)
        c, _ = waves(b, z[:, :, :])
        filled(c, u := torch.empty_like(x))
    return x + y * z + w * a - b + x * u


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_operators_that_write_run_on_gathered_tokens(lower: str) -> None:
    of = trace(Program((LOCAL["linear"], _operators, LOCAL["linear"])), rows=2)
    names = [text.split(" ")[0] for text in check(of, 2, 1, lower=lower)]
    assert names == ["hsap_tests::swept", "hsap_tests::waves", "hsap_tests::filled"]
    assert check(of, 1, 1, lower=lower) == []


class Swept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, z = torch.empty_like(x), torch.ones_like(x)
        return swept(x, y, z) + y * z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        filled(grad, given := torch.empty_like(grad))
        return given


def test_operators_that_write_in_custom_functions() -> None:
    of = trace(Program((LOCAL["linear"], lambda p, x, i: Swept.apply(x), LOCAL["linear"])), rows=2)
    (found,) = check(of, 2, 1)
    assert found.startswith("autograd_function_apply runs on gathered tokens")
    assert check(of, 1, 1, lower="aot_eager") == []
