"""Attention whose log-sum-exp is read, of flex attention or written out: sinks, penalties, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from pool import Pool
from simulate import Simulated, Step, Traced, eager, relative, simulate, traced, worst
from strategies import dynamic
from varlen_reference import reference_kernels
from zoo import flex_with_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*return_lse is deprecated:FutureWarning"),
]
HEADS, WIDTH = 4, 8
LENGTHS = (9, 1, 14, 6)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with flex_with_gradients():
        yield


def by_sigmoid(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    return out * (lse - sinks[:, None]).sigmoid()[..., None].to(out.dtype)


def by_sum(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    lse = lse[..., None]
    both = torch.cat([lse, sinks.view(1, -1, 1, 1).expand(*lse.shape)], -1)
    return out * (lse - both.logsumexp(-1, keepdim=True)).exp().to(out.dtype)


def scaled(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Only the gradient of lse tells this apart from another factor."""
    return out * sinks[:, None, None] + lse.cos()[..., None]


class Attending(nn.Module):
    """An attention of documents, the function ``read`` of what it returns, and a layer."""

    def __init__(self, read: Callable[..., Tensor], kv_heads: int = 2, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, HEADS * WIDTH)
        self.qkv = nn.Linear(HEADS * WIDTH, (HEADS + 2 * kv_heads) * WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.read, self.kv_heads, self.how = read, kv_heads, how

    def operands(self, ids: Tensor) -> list[Tensor]:
        heads = [HEADS, self.kv_heads, self.kv_heads]
        return [
            x.unflatten(-1, (n, WIDTH)).transpose(1, 2)
            for x, n in zip(
                self.qkv(self.words(ids)).split([n * WIDTH for n in heads], -1), heads, strict=True
            )
        ]

    def written_out(self, logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.how.get("how", "")
        with torch.set_grad_enabled(kind != "without a gradient"):
            lse = logits.logsumexp(-1, keepdim=kind == "kept")
        if kind == "kept":
            lse = lse.squeeze(-1)
        weights = logits.softmax(-1, dtype=torch.float64) if kind == "in another type" else logits.softmax(-1)
        return weights @ (v * 2 if kind == "before the values" else v), lse

    def forward(self, ids: Tensor, documents: Tensor) -> Tensor:
        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (documents[b, q] == documents[b, k]) & (q >= k)

        q, k, v = self.operands(ids)
        if "written" in self.how:
            k, v = (x.repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
            mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
            if self.how["written"] != -torch.inf:
                mask = mask & (ids % 5 > 0)[:, None, :, None]
            logits = (q @ k.mT / math.sqrt(WIDTH)) + torch.where(mask, 0.0, self.how["written"])
            y = self.read(*self.written_out(logits, v), self.sinks)
        elif self.how.get("dense"):
            k, v = (x.repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
            mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
            logits = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(~mask, -torch.inf)
            y = self.read(logits.softmax(-1) @ v, logits.logsumexp(-1), self.sinks)
        else:
            n = ids.shape[1]
            blocks = flex.create_block_mask(allowed, ids.shape[0], None, n, n, device="cpu")
            scored = {"score_mod": self.how["score_mod"]} if "score_mod" in self.how else {}
            out, lse = flex.flex_attention(
                q, k, v, block_mask=blocks, enable_gqa=True, return_lse=True, **scored
            )
            y = self.read(out, lse, self.sinks)
        return y.transpose(1, 2).flatten(2)


def batch(rows: int = 2) -> dict[str, Any]:
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    documents = torch.stack([documents, documents.flip(0)])[:rows]
    ids = torch.arange(documents.numel()).view(documents.shape) * 7 % 11
    return dynamic({"ids": ids, "documents": documents})


def of(read: Callable[..., Tensor], dtype: torch.dtype = torch.float64, **how: Any) -> Traced:
    return traced(Attending(read, **how).to(dtype), batch())


def by_shape(step: Step) -> Step:
    """With gradients by shapes, which tell the parameters apart: graphs do not have them in one order."""
    return Step(step.outputs, {tuple(g.shape): g for g in step.gradients.values()})  # type: ignore[misc]


def error(got: Simulated, wanted: Traced) -> float:
    exact = by_shape(eager(wanted))
    assert len(exact.gradients) == 4
    return max(max(worst(by_shape(step), exact)) for step in got.ranks)


READ = {f.__name__: f for f in (by_sigmoid, by_sum, scaled)}
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("read", READ)
def test_what_is_made_of_it(read: str, mesh: tuple[int, int]) -> None:
    got = simulate(of(READ[read]), *mesh)
    assert error(got, of(READ[read], dense=True)) <= 1e-12
    assert got.program.fallbacks == () and len(got.program.masks) == 1
    (traffic,) = got.program.traffic
    heads = 2 * HEADS // mesh[1]  # of both rows
    assert traffic.heads_out == heads * (WIDTH + 1) * 8  # one more column comes back with the heads
    assert traffic.heads_in == heads * (WIDTH + 2 * WIDTH // 2) * 8


def test_rows_that_arrive_in_stages() -> None:
    got = simulate(of(by_sum), 3, 1, received=2 * 3 * 2 * 2 * WIDTH * 8)
    assert got.runner.program.limit.stages > 1
    assert error(got, of(by_sum, dense=True)) <= 1e-12


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_other_kernels(attention: str) -> None:
    dtype = torch.float64
    with reference_kernels():
        got = simulate(
            of(by_sigmoid, dtype), *((1, 1) if attention == "flex" else (2, 2)), attention=attention
        )
    assert error(got, of(by_sigmoid, dtype, dense=True)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_none_of_its_digits(dtype: torch.dtype) -> None:
    """Three columns hold a number of float32: a loss of its squares tells."""
    wanted = of(lambda out, lse, _: lse[..., None] + 0 * out, dtype)
    exact = eager(wanted).outputs[0]
    assert exact.dtype == torch.float32
    for step in simulate(wanted, 2, 2).ranks:
        assert (
            float((step.outputs[0] - exact).abs().max())
            <= 4e-6
            < float((exact.to(dtype) - exact).abs().max())
        )


def on_ranks(read: str) -> float:
    torch.manual_seed(0)
    given, models = batch(), [Attending(READ[read], **how).double() for how in ({}, {"dense": True})]
    with flex_with_gradients():
        options = {"attention": "flex", "lower": "eager"}
        torch.compile(models[0], backend="hsap", options=options)(**given).square().sum().backward()
    models[1](**given).square().sum().backward()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max(relative(got.grad, wanted.grad) for got, wanted in pairs)  # type: ignore[arg-type]


def test_flex_attention_on_ranks(pool: Pool) -> None:
    assert max(pool.run(on_ranks, "by_sum", world=2)) <= 1e-12


def test_one_that_is_returned_and_not_read_costs_nothing() -> None:
    got = simulate(of(lambda out, lse, sinks: out * sinks[:, None, None]), 2, 2)
    assert got.program.traffic[0].heads_out == HEADS // 2 * 2 * WIDTH * 8


@pytest.mark.parametrize(
    ("mesh", "attention"), [((1, 1), "flex"), ((1, 1), "slices"), ((2, 2), "slices")], ids=str
)
@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min])
def test_masked_logits_that_are_finite(masked: float, mesh: tuple[int, int], attention: str) -> None:
    """Some queries have no other keys, and attend to all of these alike."""
    trace = of(lambda out, lse, s: out * s[:, None, None] + (lse / masked)[..., None], written=masked)
    got = simulate(trace, *mesh, attention=attention)
    # flex attention's backward makes weights of lse, which lacks the digits of what 1e9 is added to
    assert error(got, trace) <= (1e-7 if attention == "flex" and masked == -1e9 else 1e-12)
    assert got.program.fallbacks == () and len(got.program.traffic) == 1


@pytest.mark.parametrize("how", ["kept", "in another type", "before the values", "without a gradient"])
def test_written_out(how: str) -> None:
    trace = of(by_sum, written=-torch.inf, how=how)
    got = simulate(trace, 2, 2)
    assert error(got, trace) <= 1e-12
    assert len(got.program.traffic) == 1
    left = how in ("before the values", "without a gradient")
    assert bool(got.program.fallbacks) == left  # the logits are there for it alone


def test_a_gradient_that_is_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hsap_compile.kernels import attention

    monkeypatch.setattr(attention, "with_gradient_of_lse", lambda grad, _, out: (grad, out))
    assert error(simulate(of(scaled), 2, 1), of(scaled, dense=True)) > 1e-3
