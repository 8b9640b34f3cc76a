"""Capture: a functional graph against one that writes in place, explicit against ambient autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsap_compile._torch import operator_name
from hsap_compile.errors import Refused
from hsap_compile.passes import _in_place
from hsap_compile.passes import capture as capture_pass
from hsap_compile.passes.capture import capture
from hsap_compile.verify import BrokenGraph, verify
from simulate import Traced, eager, traced, worst
from strategies import dynamic

Function = Callable[[Tensor], Any]
CASES: dict[str, Function] = {}


def case(function: Function) -> Function:
    CASES[function.__name__.strip("_")] = function
    return function


@case
def slice_from_itself(x: Tensor) -> Any:
    x[:, 1:] = x[:, :-1].clone()
    return x


@case
def written_after_idle_dropout(x: Tensor) -> Any:
    y = F.dropout(x * 2, 0.3, training=False)
    y[..., 0] = 1.0
    z = F.dropout(y, 0.0)
    z[:, 0] = 2.0
    return y


@case
def without_a_gradient_in_inference_mode(x: Tensor) -> Any:
    with torch.no_grad():
        with torch.inference_mode():
            y = x * 2
        z = x * 3
    with torch.inference_mode():
        w = x * 2
    return x + y.clone() + z + w.clone()


@torch.compiler.allow_in_graph
def _moved_on(x: Tensor) -> Tensor:
    x.add_(1)
    return x.to(x.dtype)


@case
def written_and_returned_in_one_call(x: Tensor) -> Any:
    y = x * 2
    with torch.no_grad():
        z = _moved_on(y.detach().clone())
    return y * z, z


@case
def select_last(x: Tensor) -> Any:
    x[:, -1] = 3.0
    return x


@case
def rows_one_by_one(x: Tensor) -> Any:
    for i in range(2):
        x[i].mul_(i + 2)
    return x


@case
def view_made_before_and_read_after(x: Tensor) -> Any:
    y = x[:, 1:]
    x.add_(1)
    return y * x[:, :1]


@case
def chained_views(x: Tensor) -> Any:
    v = x[:, 1:]
    w = v[:, :, 1]
    x.mul_(3)
    w.add_(1)
    return x, v, w


@case
def only_the_last_of_a_chain_is_read(x: Tensor) -> Any:
    w = x[:, 1:][:, :, 1]
    x.mul_(3)
    return w


@case
def one_view_written_twice(x: Tensor) -> Any:
    v = x[:, 1:]
    v.add_(1)
    v.mul_(2)
    return x, v


@case
def through_a_transpose(x: Tensor) -> Any:
    y = x.transpose(1, 2)
    y[:, 1:].add_(1)
    return x * 2, y


@case
def through_permute_mt_flatten_narrow_diagonal(x: Tensor) -> Any:
    x.permute(2, 0, 1)[1] = 5
    x.mT.mul_(torch.arange(1.0, 5.0)[:, None])
    x.flatten(1)[:, ::2] = 0
    x.view(-1).add_(1)
    x.narrow(1, 1, 2).add_(7)
    x.diagonal(0, 1, 2).mul_(2)
    return x


@case
def contiguous_and_to_may_be_views(x: Tensor) -> Any:
    y = x.contiguous()
    y.add_(1)
    x.to(x.dtype).mul_(2)
    z = x.mT.contiguous()  # a copy
    z.add_(100)
    return x, z


@case
def shape_changed_in_place(x: Tensor) -> Any:
    y, z = x.transpose(0, 1), x.clone()
    x.unsqueeze_(0)
    z.transpose_(0, 1)
    return x.sum(0) * y.transpose(0, 1), z


@case
def a_copy_is_no_view_of_its_source(x: Tensor) -> Any:
    y = torch.zeros_like(x)
    y.copy_(x)
    x.add_(1)
    y[:, :2].copy_(x[:, :2])
    y[..., 0] += x[..., 1]
    return x, y


@case
def masked_and_relu(x: Tensor) -> Any:
    x.masked_fill_(x > 1, -1.0)
    x[x < -1] = 0
    F.relu(x, inplace=True)
    return x


@case
def boolean_assignments(x: Tensor) -> Any:
    m = x > 0
    m &= x < 1
    m |= x > 2
    m ^= True
    return torch.where(m, x, 0.0)


@case
def the_type_of_what_is_written_stays(x: Tensor) -> Any:
    y = x.float()
    y += x
    return y.double()


@case
def results_written_to_a_tensor_that_is_given(x: Tensor) -> Any:
    with torch.no_grad():
        y, z = torch.zeros_like(x[0]), torch.zeros_like(x, dtype=torch.float32)
        F.normalize(x[0].detach(), dim=0, out=y)
        torch.add(x.detach(), 1, alpha=2, out=z)  # of another type
        torch.sum(x.detach(), 0, out=y[:])
    return x * y, z


@case
def pieces_are_read_after_a_write(x: Tensor) -> Any:
    i = torch.arange(6)
    a, _ = i.split(3)
    i.add_(1)
    return x * a.sum()


@case
def parts_that_are_no_views(x: Tensor) -> Any:
    values, indices = x.topk(2, -1)
    values /= values.sum(-1, keepdim=True)
    return values, indices, x


@case
def idle_dropout_in_place(x: Tensor) -> Any:
    y = F.dropout(x, 0.5, False, inplace=True)
    y.add_(1)
    return x, y


def trace(function: Function) -> Traced:
    def model(ids: Tensor, weight: Tensor) -> Any:
        return function(weight[ids] * 1.0)

    weight = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    return traced(model, dynamic({"ids": torch.arange(10).view(2, 5), "weight": weight}))


def check(traced_call: Traced) -> torch.fx.GraphModule:
    graph = capture(traced_call.module)
    verify(graph, "capture")
    got, wanted = eager(Traced(graph, traced_call.length, traced_call.args)), eager(traced_call)
    for a, b in zip(got.outputs, wanted.outputs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert set(got.gradients) == set(wanted.gradients)
    for i, gradient in wanted.gradients.items():
        torch.testing.assert_close(got.gradients[i], gradient, rtol=1e-14, atol=1e-14)
    return graph


@pytest.mark.parametrize("name", CASES)
def test_in_place(name: str) -> None:
    check(trace(CASES[name]))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda x: x.add_(1),
    "a part": lambda x: x[:, 1:].fill_(0),
    "an element": lambda x: x.view(-1)[0].fill_(3),
    "twice": lambda x: (x.mul_(2), x[0].sub_(1)),
    "through a view made before": lambda x: (lambda v: (x.mul_(3), v.add_(1)))(x[:, 2]),
}


def written(ids: Tensor, x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    before = x * 2
    write(x)
    return before + x.sum() + ids.sum()


@pytest.mark.parametrize("write", WRITES)
def test_writes_to_inputs_become_outputs(write: str) -> None:
    x = torch.randn(2, 5)
    call = traced(
        functools.partial(written, write=WRITES[write]),
        dynamic({"ids": torch.arange(10).view(2, 5), "x": x.clone()}),
    )
    graph = capture(call.module)
    (place,) = graph.meta["writes"]
    args = [x.clone() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args]
    result, after = graph(*args)
    assert torch.equal(args[place], x)
    wanted = x.clone()
    assert torch.equal(result, written(torch.arange(10).view(2, 5), wanted, WRITES[write]))
    assert torch.equal(after, wanted)


def test_writes_to_inputs_with_a_gradient_are_refused() -> None:
    def model(ids: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.add_(1)
        return x.sum() + ids.sum()

    x = torch.randn(2, 5, requires_grad=True)
    call = traced(model, dynamic({"ids": torch.arange(10).view(2, 5), "x": x}))
    with pytest.raises(Refused, match="hsap: the model writes into one of its inputs in place") as refused:
        capture(call.module)
    assert "an in-place write to l_x_, a leaf that has a gradient" in str(refused.value)
    assert "do:     write into a copy (x = x.clone()) instead" in str(refused.value)
    assert "test_capture.py:" in str(refused.value)


def test_writes_that_autograd_does_not_see_are_refused() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return x * 1.0

    with pytest.raises(Refused, match="in place, unseen by autograd, into a value with a gradient"):
        capture(trace(function).module)
    with pytest.raises(Refused, match="in place"):
        capture(trace(lambda x: x.detach().mul_(2) + x).module)


def _buffer(x: Tensor) -> Tensor:
    b = torch.zeros_like(x)
    b.detach().add_(x)
    return x * b


def _of_a_detached_view(x: Tensor) -> Tensor:
    v = (x * 2).detach()[..., :]
    v.add_(x[:1])
    return v * x


def _of_an_einsum(x: Tensor) -> Tensor:
    y = x * 2
    torch.einsum("bsf->bfs", y).mul_(2)
    return y


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_buffer, "in place, with a gradient, into what was detached"),
        (_of_a_detached_view, "in place, with a gradient, into what was detached"),
        (_of_an_einsum, r"in place into a view \(aten::mul_ into aten::einsum\)"),
    ],
)
def test_writes_that_cannot_be_followed_are_refused(function: Function, text: str) -> None:
    with pytest.raises(Refused, match=text) as refused:
        capture(trace(function).module)
    assert "do:     write into a copy" in str(refused.value)


def test_so_are_those_into_what_complex_numbers_were() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j).flatten(-2) * 1.0
        with torch.no_grad():
            y.mul_(2)
        return y

    with pytest.raises(Refused, match="in place, unseen by autograd, into a value with a gradient"):
        capture(trace(function).module)


def test_writes_into_new_tensors_that_are_like_one_with_a_gradient() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        z, w = torch.zeros_like(y), y.new_zeros(4)
        with torch.no_grad():
            z.add_(y)
            w.add_(y.mean((0, 1)))
        return (y * z).sum() + (y * w).sum()

    call = trace(function)
    assert worst(eager(Traced(capture(call.module), call.length, call.args)), eager(call)) == (0.0, 0.0)


def test_idle_dropout_is_gone_and_real_dropout_stays() -> None:
    def names(function: Function) -> set[str]:
        return {operator_name(n.target) for n in capture(trace(function).module).graph.nodes}

    assert "aten::dropout" not in names(lambda x: F.dropout(F.dropout(x, 0.0), 0.5, training=False))
    assert "aten::dropout" in names(lambda x: F.dropout(x, 0.5))


class Block(nn.Module):
    """What autocast treats in different ways: linear, attention, norm, softmax, a region without it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 11)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        bias = torch.zeros(s, s).masked_fill(torch.ones(s, s).triu(1).bool(), torch.finfo(torch.float32).min)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        z = torch.softmax(q @ k.mT, -1) @ v
        with torch.autocast("cpu", enabled=False):
            w = torch.matmul(q.float(), k.float().mT).softmax(-1) @ v.float()
        u = (q @ k.mT).float().softmax(-1).to(q.dtype) @ v  # a type that only autocast makes q have
        hidden = (y + z + w + u).transpose(1, 2).reshape(b, s, 16)
        total = torch.cat([hidden, x], -1)[..., :16]
        residual = hidden.to(torch.bfloat16).clone()
        residual += x  # autocast leaves in-place operators alone
        logits = self.out(self.norm(total) + residual)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("where", ["ambient", "inside", "none"])
def test_autocast_is_explicit(where: str) -> None:
    model = Block()

    def call(ids: Tensor) -> Tensor:
        if where != "inside":
            return model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "ambient"):
        call_traced = traced(call, dynamic({"ids": torch.randint(0, 11, (2, 7))}))
        wanted = eager(call_traced)
        graph = capture(call_traced.module)
    assert not torch.is_autocast_enabled("cpu")
    got = eager(Traced(graph, call_traced.length, call_traced.args))
    assert [o.dtype for o in got.outputs] == [o.dtype for o in wanted.outputs]
    torch.testing.assert_close(got.outputs, wanted.outputs, rtol=1e-6, atol=1e-6)
    assert set(got.gradients) == set(wanted.gradients)
    for i, gradient in wanted.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            got.gradients[i], gradient, rtol=0, atol=1e-5 + 1e-2 * scale * (where != "none")
        )
    casts = sum(n.target is torch.ops.aten.to.dtype for n in graph.graph.nodes)
    assert (casts > 10) == (where != "none")


def test_the_check_sees_a_write_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    call = trace(CASES["view_made_before_and_read_after"])
    with monkeypatch.context() as patch:
        patch.setattr(_in_place, "_views", lambda _: set())
        with pytest.raises(AssertionError):
            check(call)
    with monkeypatch.context() as patch:
        patch.setattr(capture_pass, "functionalize", lambda *_: None)
        with pytest.raises(BrokenGraph, match="writes in place"):
            check(call)
    with monkeypatch.context() as patch:
        patch.setattr(capture_pass, "_explicit_autocast", lambda *_: None)
        with pytest.raises((AssertionError, RuntimeError)):
            test_autocast_is_explicit("ambient")


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * 2).mT.as_strided((2, 3), (3, 1)), lambda x: (x * 2)[:, 1:].as_strided((2, 3), (1, 2))],
    ids=["turned", "a part"],
)
def test_memory_in_another_order_is_not_read(function: Function) -> None:
    with pytest.raises(Refused, match="as_strided reads what lies in memory") as refused:
        capture(trace(function).module)
    assert "do:     use .contiguous() before" in str(refused.value)


def test_what_an_embedding_renormalises_is_refused() -> None:
    words = torch.nn.Embedding(9, 4, max_norm=1.0)
    call = traced(lambda ids: words(ids), dynamic({"ids": torch.arange(10).view(2, 5) % 9}))
    with pytest.raises(Refused, match="embedding_renorm_") as refused:
        capture(call.module)
    assert "do:     drop max_norm, or renormalise the weight between steps" in str(refused.value)
