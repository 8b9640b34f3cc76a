"""Real gloo ranks, as torchrun starts them: ``torch.compile(model, backend="hsap")`` against eager.

This module must not import hsap_compile: the ranks find the backend by its entry point.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models import batch, build, difference
from pool import Pool

Rows = list[list[int]]
PACKS: list[Rows] = [[[5, 1, 9, 4, 8]], [[27]], [[1] * 9 + [18]], [[30, 2, 9]]]


def compare(name: str, packs: list[Rows], lower: str, options: dict[str, Any]) -> list[float]:
    """The relative error of loss, logits and all gradients, for every pack, on this rank."""
    model = build(name, torch.float32)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hsap", options={"lower": lower, **options})
    return [difference(compiled, model, reference, batch(name, rows, seed=i)) for i, rows in enumerate(packs)]


@pytest.mark.parametrize(
    ("name", "world", "options"),
    [
        ("nano", 2, {"lower": "inductor"}),
        pytest.param("llama", 2, {"lower": "aot_eager", "intra": 1}, marks=pytest.mark.slow),
        ("nano", 4, {"lower": "aot_eager", "intra": 2, "placement": "contiguous"}),
        pytest.param("next token", 2, {"lower": "aot_eager", "intra": 1}, marks=pytest.mark.slow),
        pytest.param("next token", 4, {"lower": "inductor", "intra": 2}, marks=pytest.mark.slow),
        pytest.param("llama", 4, {"lower": "aot_eager", "intra": 2}, marks=pytest.mark.slow),
        pytest.param("llama", 4, {"lower": "inductor", "intra": 2}, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, {"lower": "inductor"}, marks=pytest.mark.slow),
        pytest.param("mistral", 2, {"lower": "aot_eager", "intra": 1}, marks=pytest.mark.slow),
        pytest.param("encoder", 4, {"lower": "aot_eager", "intra": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks(pool: Pool, name: str, world: int, options: dict[str, Any]) -> None:
    options = dict(options)
    for errors in pool.run(compare, name, PACKS, options.pop("lower"), options, world=world):
        assert max(errors) < 2e-5


# --- ranks that disagree ------------------------------------------------------------------------------


def refused(change: Callable[..., Any], check: str = "batch", before: int = 0) -> str:
    """What rank r says when ``change`` (which may return other options) was made on the last rank only,
    after ``before`` calls."""
    model, given = build("nano", torch.float32), batch("nano", [[5, 1, 9, 4, 8]])
    options = {"lower": "eager", "check": check}
    compiled = torch.compile(model, backend="hsap", options=options)
    with torch.no_grad():
        for _ in range(before):
            compiled(**given)
        if dist.get_rank() == dist.get_world_size() - 1:
            other = change(model, given)
            if other is not None:
                compiled = torch.compile(model, backend="hsap", options={**options, **other})
        try:
            compiled(**given)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"


def nothing(model: torch.nn.Module, given: dict[str, Any]) -> None:
    pass


def other_tokens(model: torch.nn.Module, given: dict[str, Any]) -> None:
    given["ids"] = given["ids"].flip(1)


def other_length(model: torch.nn.Module, given: dict[str, Any]) -> None:
    given.update(batch("nano", [[5, 9, 4, 8]]))


def other_weights(model: torch.nn.Module, given: dict[str, Any]) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def other_model(model: torch.nn.Module, given: dict[str, Any]) -> None:
    model.attention = "causal"


def other_option(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    return {"placement": "contiguous"}


class Embedded(torch.nn.Module):
    """Takes its tokens as vectors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)


def other_vectors() -> str:
    x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0))
    if dist.get_rank() == 1:
        x = x.flip(1)
    try:
        torch.compile(Embedded(), backend="hsap", options={"lower": "eager"})(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def other_bytes(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    return {"received": 1 << 12}


class Windowed(Embedded):
    """Attends to so many tokens."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, window: int) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        q, mask = x[:, None], (at[:, None] - at).abs() < window
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask) * ids[:, None, :, None]


def other_numbers() -> str:
    x, compiled = torch.ones(1, 12, 8), torch.compile(Windowed(), backend="hsap", options={"lower": "eager"})
    ids = torch.ones(1, 12, dtype=torch.int64)
    for window in (3, 4, 5):  # symbolic from the second one on
        compiled(x, ids, window)
    try:
        compiled(x, ids, 6 + dist.get_rank())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("change", "check", "before", "text"),
    [
        (other_tokens, "first", 0, "the ranks were given different batches"),
        (other_tokens, "batch", 1, "the ranks were given different batches"),
        (other_length, "batch", 0, "the ranks were given batches of different lengths"),
        (other_weights, "batch", 0, "the ranks hold different parameters"),
        (other_weights, "always", 1, "the ranks hold different parameters"),
        (other_model, "batch", 0, "the ranks run different graphs"),
        (other_option, "batch", 0, "the ranks run different graphs"),
        (other_bytes, "batch", 0, "the ranks run different graphs"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_ranks_that_disagree_are_refused(pool: Pool, change: Any, check: str, before: int, text: str) -> None:
    for said in pool.run(refused, change, check, before, world=2, timeout=120.0):
        assert said.startswith("Refused: hsap: ") and text in said
        assert "ranks [1] differ from rank 0" in said and "\n  do: " in said


def test_vectors_that_differ_are_refused(pool: Pool) -> None:
    for function in (other_vectors, other_numbers):
        for said in pool.run(function, world=2, timeout=120.0):
            assert said.startswith("Refused: hsap: the ranks were given different batches")


@pytest.mark.parametrize(("change", "check"), [(nothing, "always"), (other_weights, "batch")])
def test_what_is_not_compared(pool: Pool, change: Any, check: str) -> None:
    """After the first call, weights are compared only when that is asked for."""
    assert pool.run(refused, change, check, 1, world=2, timeout=120.0) == ["accepted"] * 2


# --- under wrappers that average gradients --------------------------------------------------------------


def wrapped(how: str) -> float:
    """The largest difference of gradients under DDP or FSDP2, which take the mean over ranks unless told."""
    model = build("nano")
    reference, given = copy.deepcopy(model), batch("nano", PACKS[0])
    options = {"lower": "eager", "grad_sync": how == "DDP"}
    step: Any
    if how == "FSDP2":
        fully_shard(model).set_gradient_divide_factor(1)
        model.compile(backend="hsap", options=options)
        step = model
    else:
        step = torch.nn.parallel.DistributedDataParallel(model)
        if how == "DDP, added up":
            step.register_comm_hook(None, added_up)
        step = torch.compile(step, backend="hsap", options=options)
    for function in (step, reference):
        function(**given)[0].backward()
    errors = []
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert got is not None and q.grad is not None
        errors.append(float((got - q.grad).abs().max() / q.grad.abs().max()))
    return max(errors)


def added_up(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and no texts
    sum_ = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sum_.then(lambda done: done.value()[0])


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.parametrize("how", ["DDP", "DDP, added up", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_wrappers(pool: Pool, how: str) -> None:
    assert max(pool.run(wrapped, how, world=2, timeout=120.0)) < 1e-12


def pieces_of_ddp() -> str:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]
    step = torch.nn.parallel.DistributedDataParallel(build("nano"), bucket_cap_mb=0.004)  # type: ignore[arg-type]
    try:
        torch.compile(step, backend="hsap", options={"lower": "eager"})(**batch("nano", PACKS[0]))
    except Exception as error:
        return str(error)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 20  # type: ignore[attr-defined]
    return "accepted"


def test_a_graph_that_ddp_cuts_is_refused(pool: Pool) -> None:
    for said in pool.run(pieces_of_ddp, world=2, timeout=120.0):
        assert "DistributedDataParallel cuts the graph into pieces" in said
        assert "do:     set torch._dynamo.config.optimize_ddp = False" in said


# --- buffers that the model writes ----------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Normalises over all tokens, keeps statistics, and counts tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (2, -1)).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        y = self.norm(y.transpose(1, 2).flatten(2).mT).mT
        self.seen += y.detach().square().sum((0, 1))
        return (y * self.seen)[:, 1:]


def written(lower: str, outputs: str) -> float:
    """The largest relative difference of outputs, gradients and buffers after three calls."""
    torch.manual_seed(0)
    model, reference = Counting(), Counting()
    compiled = torch.compile(model, backend="hsap", options={"lower": lower, "outputs": outputs})
    errors = []
    for tokens in (12, 9, 14):
        x = torch.randn(1, tokens, 8)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, wanted = compiled(one), reference(other)
        mine = got.hsap_columns if outputs == "local" else slice(None)
        errors.append((got - wanted[:, mine]).abs().max() / wanted.abs().max())
        got.pow(3).sum().backward()
        wanted.pow(3).sum().backward()
        errors.append((one.grad - other.grad).abs().max() / other.grad.abs().max())
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        errors.append((a - b).abs().max() / b.abs().max())
    return float(max(errors))


@pytest.mark.parametrize(("lower", "outputs"), [("eager", "gather"), ("aot_eager", "local")])
def test_buffers_that_the_model_writes(pool: Pool, lower: str, outputs: str) -> None:
    assert max(pool.run(written, lower, outputs, world=2, timeout=120.0)) < 2e-5


# --- pieces of a graph ----------------------------------------------------------------------------------


class Broken(torch.nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = Embedded()(x)[:, 0] * ids[..., None]
        torch._dynamo.graph_break()
        z = Embedded()(y)[:, 0]
        return z, torch.nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten() % 2)


def local_after_a_break() -> float:
    """Rows that cross a graph break are whole; those of an output are not."""
    x, ids = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12)[None]
    wanted, loss = Broken()(x, ids)
    options = {"lower": "eager", "outputs": "local"}
    got, mine = torch.compile(Broken(), backend="hsap", options=options)(x, ids)
    assert got.shape[1] == 6
    return max(float((got - wanted[:, got.hsap_columns]).abs().max()), abs(float(mine - loss)))


def test_rows_that_cross_a_break_are_whole(pool: Pool) -> None:
    assert max(pool.run(local_after_a_break, world=2, timeout=120.0)) < 1e-6


# --- plans made ahead -----------------------------------------------------------------------------------


def ahead() -> list[float]:
    """Rank 0 alone plans the second batch ahead: it asks no other rank.  The errors of both steps."""
    prefetch = importlib.import_module("hsap_compile").prefetch
    model = build("nano", torch.float32)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hsap", options={"lower": "eager"})
    batches = [batch("nano", rows, seed=i) for i, rows in enumerate(PACKS[:2])]
    errors = [difference(compiled, model, reference, batches[0])]
    if dist.get_rank() == 0:
        prefetch(compiled, **batches[1])
    return [*errors, difference(compiled, model, reference, batches[1])]


def test_one_rank_plans_ahead(pool: Pool) -> None:
    for errors in pool.run(ahead, world=2, timeout=120.0):
        assert max(errors) < 2e-5
