"""Custom autograd functions: local, gathered, or refused.

No backward is the forward's own, which would hence be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hsap_compile._torch import CUSTOM_FUNCTION
from hsap_compile.errors import Refused
from hsap_compile.passes import _custom_functions
from hsap_compile.passes.capture import capture
from simulate import simulate
from test_shard_tokens import LOCAL, ON_MESHES, Program, check, trace

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 3 * grad * weight, (grad * x * 5).sum((0, 1))


class Folded(torch.autograd.Function):
    """Views with sizes of their own, two results, one without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(x.shape[0] * x.shape[1], -1)
        ctx.save_for_backward(rows)
        signs = rows.sign().view(x.shape)
        ctx.mark_non_differentiable(signs)
        return rows.view(x.shape) * 2, signs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grad.reshape(rows.shape) * rows.cos()).view(grad.shape)


class Centred(torch.autograd.Function):
    """The forward is token-wise, the backward is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(1, keepdim=True)


class Mixed(torch.autograd.Function):
    """The forward mixes tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.cumsum(1) / 9

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(1)


class Halved(torch.autograd.Function):
    """Saves nothing, so that its operand may be written to later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Injected(torch.autograd.Function):
    """Gives every token a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad + 0.1 * x


class Auxiliary(torch.autograd.Function):
    """Gives a loss of its own a gradient of one, and a parameter one of its size: alike on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(loss, weight)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, weight = ctx.saved_tensors
        return grad, torch.ones_like(loss), 0.1 * weight


class Kept(torch.autograd.Function):
    """Saves what it returns, and one operand twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out, other = x.tanh(), x * y
        ctx.save_for_backward(out, y, other, y)
        return out, other

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_other: Tensor) -> tuple[Tensor, Tensor]:
        out, y, other, again = ctx.saved_tensors
        return 2 * grad * (1 - out * out) + grad_other * again, grad_other * other + grad * y


class Overwriting(torch.autograd.Function):
    """Writes into what it made, and into what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        x.mul_(0.5)
        x[..., :2] = 3.0
        ctx.save_for_backward(x)
        y.mul_(2)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x.mul_(grad)
        given = grad.clone()
        given[..., 0] = 1.0
        return x.add_(given)


class Rows(torch.autograd.Function):
    """Returns the rows of all sequences as one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.reshape(-1, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (3 * grad).view(ctx.shape)


class Reversed(torch.autograd.Function):
    """Returns a view of what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.3 * grad


class Centring(torch.autograd.Function):
    """In place, and over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x - x.mean(1, keepdim=True)
        y.mul_(2)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        given = grad - grad.mean(1, keepdim=True)
        given.mul_(3)
        return given


def overwriting(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return Overwriting.apply(x * p.vector) + x


def kept(p: Program, x: Tensor, i: Tensor) -> Tensor:
    a, b = Kept.apply(x, x.cos())
    c, d = Kept.apply(x * p.vector, x.sin())
    return a * 2 + b.sin() + c - d * d


def auxiliary(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return Auxiliary.apply(x, (x * p.vector).softmax(-1).mean((0, 1)).square().sum(), p.vector)


def scaled(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return Scaled.apply(x, p.vector) + p.vector


def folded(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y, signs = Folded.apply(x)
    return y + signs


@ON_MESHES
@pytest.mark.parametrize("function", [scaled, folded, auxiliary, kept, overwriting])
def test_custom_functions_stay_local(function: Callable[..., Tensor], mesh: tuple[int, int]) -> None:
    of = trace(Program((LOCAL["linear"], function, LOCAL["linear"])), rows=2)
    assert check(of, *mesh) == []


def _parts(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Of the row, and of all but its ends."""
    x = Injected.apply(x)
    return x + F.pad(folded(p, Injected.apply(x[:, 1:-1]), i), (0, 0, 1, 1))


def test_custom_functions_of_a_part_of_the_tokens() -> None:
    for tokens in ("cut", "input cut", "prompted"):
        assert check(trace(Program((_parts, LOCAL["linear"]), tokens=tokens), rows=2), 3, 1) == []
    (found,) = check(trace(Program((scaled,), tokens="cut"), rows=2), 3, 1)
    assert "(a custom function that mixes tokens: aten::sum)" in found


@pytest.mark.parametrize("function", [Centred, Mixed, Centring, Rows])
def test_custom_functions_that_mix_tokens_are_gathered(function: Any) -> None:
    of = trace(Program((LOCAL["linear"], lambda p, x, i: function.apply(x).view(x.shape))), rows=2)
    (found,) = check(of, 3, 1)
    assert "autograd_function_apply runs on gathered tokens on every rank (a custom function" in found


def _written_after(p: Program, x: Tensor, i: Tensor) -> Tensor:
    z = x * 2
    y = Halved.apply(z)
    z += y
    w = Halved.apply(z[:, :, 1:])
    z.mul_(3)
    return z * y + F.pad(w, (1, 0))


def test_a_custom_function_reads_what_is_there_when_it_is_called() -> None:
    of = trace(Program((LOCAL["linear"], _written_after)), rows=2)
    assert check(of, 1, 1) == [] and check(of, 3, 1) == []


def _overwritten(p: Program, x: Tensor, i: Tensor) -> Tensor:
    z = x * p.vector
    return Overwriting.apply(z) + z


def _overwritten_view(p: Program, x: Tensor, i: Tensor) -> Tensor:
    z = x * p.vector
    return Overwriting.apply(z.view(z.shape)) + z


def _overwritten_in_autocast(p: Program, x: Tensor, i: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _overwritten(p, x, i)


def _reversed(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y = x * 2
    z = Reversed.apply(y) + 1
    y.add_(1)
    return y + z


def _result_written(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y = Scaled.apply(x, p.vector)
    y[..., 0] = 0.5
    y.mul_(2)
    return y


@pytest.mark.parametrize("function", [_reversed, _result_written])
def test_a_result_of_a_custom_function_is_a_value_as_any_other(function: Any) -> None:
    assert check(trace(Program((LOCAL["linear"], function)), rows=2), 2, 1) == []


def _overwritten_parameter(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + Overwriting.apply(p.words)[0]


@pytest.mark.parametrize(
    "function", [_overwritten, _overwritten_view, _overwritten_in_autocast, _overwritten_parameter]
)
def test_an_operand_that_a_custom_function_overwrites_is_not_read_later(function: Any) -> None:
    of = trace(Program((LOCAL["linear"], function)), rows=2)
    assert check(of, 1, 1) == []
    with pytest.raises(Refused, match="writes into its operand, which is read later") as caught:
        simulate(of, 2, 1)
    assert "do:     write into a copy (x = x.clone()) in its forward" in str(caught.value)


def test_what_a_custom_function_writes_in_place_is_not_dead() -> None:
    of = trace(Program((LOCAL["linear"], overwriting, LOCAL["linear"])), rows=2)
    assert check(of, 1, 1, lower="aot_eager") == []


def test_a_custom_function_is_one_call() -> None:
    graph = capture(trace(Program((scaled,))).module)
    assert sum(n.target is CUSTOM_FUNCTION for n in graph.graph.nodes) == 1


def test_a_gradient_that_is_summed_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    of = trace(Program((scaled,)), rows=2)
    # the sum over ranks left inside is refused, and with it the local form
    monkeypatch.setattr(_custom_functions._Body, "share", lambda self, value: value)
    assert len(check(of, 3, 1)) == 1


# --- functions that dynamo does not trace -------------------------------------------------------------


@torch._dynamo.allow_in_graph
class Hidden(torch.autograd.Function):
    """Its backward is no derivative of what its forward does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Within(Hidden):
    pass


@torch._dynamo.allow_in_graph
def hidden(x: Tensor) -> tuple[int, Tensor]:
    return 1, Within.apply(x.sin())  # type: ignore[return-value]


@torch._dynamo.allow_in_graph
def plain(x: Tensor) -> Tensor:
    return x.sin() + x.detach().round()


@torch._dynamo.nonstrict_trace
def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda grad: grad * 3)
    return y


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: Hidden.apply(x), "Hidden"),
        (lambda x: hidden(x)[1], "Within"),
        (lambda x: hooked(x), "tensor.register_hook"),
    ],
)
def test_functions_whose_backward_no_graph_shows_are_refused(call: Any, name: str) -> None:
    of = trace(Program((LOCAL["linear"], lambda p, x, i: call(x))), rows=2)
    for ranks in (1, 2):
        with pytest.raises(Refused, match="a custom backward is hidden from") as caught:
            simulate(of, ranks, 1)
        assert f"got:    {name}, which is allowed in graphs untraced" in str(caught.value)
        assert "test_custom_functions.py:" in str(caught.value)


def test_functions_that_are_allowed_in_graphs_are_traced() -> None:
    of = trace(Program((LOCAL["linear"], lambda p, x, i: plain(x), LOCAL["linear"])), rows=2)
    assert check(of, 2, 1) == []
