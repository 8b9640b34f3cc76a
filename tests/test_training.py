"""What a training loop does around the model: one process without torch.distributed, and two gloo ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hsap_compile.errors import Refused
from models import batch, build, difference
from pool import Pool

PACKS = [[[5, 1, 9, 4, 8]], [[20, 1, 1, 5]], [[3] * 9]]
# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def compiled(model: nn.Module, **options: Any) -> Any:
    lower = "eager" if torch.distributed.is_initialized() else "aot_eager"
    return torch.compile(model, backend="hsap", options={"lower": lower, **options})


def pair(name: str = "nano", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    model = build(name, dtype)
    return model, copy.deepcopy(model)


def packs(name: str = "nano") -> list[dict[str, Any]]:
    return [batch(name, rows, seed=i) for i, rows in enumerate(PACKS)]


def error_of_gradients(model: nn.Module, reference: nn.Module) -> float:
    errors = [0.0]
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"{name}: gradient {p.grad}, eager {q.grad}"
        if p.grad is not None and q.grad is not None:
            scale = max(float(q.grad.abs().max()), 1e-3)
            errors.append(float((p.grad.double() - q.grad.double()).abs().max()) / scale)
    return max(errors)


# --- what every rank runs: each returns an error that must be small -----------------------------------


def accumulation() -> float:
    """Backward after each of several batches, without clearing gradients."""
    model, reference = pair()
    step = compiled(model)
    for given in packs():
        (step(**given)[0] / 3).backward()
        (reference(**given)[0] / 3).backward()
    return error_of_gradients(model, reference)


def several_forwards() -> float:
    """Plans of earlier batches must live until their backward."""
    model, reference = pair()
    step = compiled(model)
    sum(step(**given)[0] for given in packs()).backward()
    sum(reference(**given)[0] for given in packs()).backward()
    return error_of_gradients(model, reference)


def optimiser() -> float:
    """Three steps of AdamW keep the parameters together."""
    model, reference = pair()
    step = compiled(model)
    for module, function in ((model, step), (reference, reference)):
        adam = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for given in packs():
            adam.zero_grad()
            function(**given)[0].backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            adam.step()
    both = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in both)


def no_gradients() -> float:
    model, reference = pair()
    step, worst = compiled(model), 0.0
    for context in (torch.no_grad, torch.inference_mode):
        for given in packs():
            with context():
                got, wanted = step(**given), reference(**given)
                assert not got[0].requires_grad
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)))
    return worst


def after_evaluation() -> float:
    """Training goes on after a forward without gradients."""
    model, reference = pair()
    step = compiled(model)
    with torch.no_grad():
        step(**packs()[0])
    return difference(step, model, reference, packs()[1])


def frozen() -> float:
    model, reference = pair()
    for module in (model, reference):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("qkv" in name or "norm" in name)
    return difference(compiled(model), model, reference, packs()[0])


def untied() -> float:
    model = build("nano", tied=False)
    return difference(compiled(model), model, copy.deepcopy(model), packs()[0])


def embeddings() -> float:
    """inputs_embeds with a gradient: whole on every rank, like eager's."""
    model, reference = pair("llama")
    given = packs("llama")[0]
    ids = given.pop("input_ids")
    results = []
    step = compiled(model)
    for module, function in ((model, step), (reference, reference)):
        embeds = module.get_input_embeddings().weight.detach()[ids].requires_grad_()
        function(inputs_embeds=embeds, **given).loss.backward()
        results.append(embeds.grad)
    got, wanted = results
    return max(error_of_gradients(model, reference), float((got - wanted).abs().max() / wanted.abs().max()))


class LowRank(nn.Module):
    """A linear layer with a frozen weight and two small trained ones, as LoRA has."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(x, self.up @ self.down)


def low_rank() -> float:
    torch.manual_seed(3)
    model = build("nano")
    for block in model.blocks:  # type: ignore[union-attr]
        block["qkv"] = LowRank(block["qkv"])
    return difference(compiled(model), model, copy.deepcopy(model), packs()[0])


class Regions(nn.Module):
    """A layer, and the numbers of documents, that autocast must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.qkv = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 48)
        self.one = nn.Buffer(torch.ones(1, 1))

    def forward(self, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            x = self.layer(self.words(ids))
            numbers = (documents[..., None].float() @ self.one)[..., 0]  # 256 and 257 are one in bfloat16
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mask = numbers[:, None, :, None] == numbers[:, None, None]
        return x, nn.functional.scaled_dot_product_attention(q, k, v, mask)


def regions_of_autocast() -> float:
    """Nothing is cast once more when the compiled graph runs."""
    model = Regions()
    step = compiled(model)
    documents = torch.tensor([[256] * 5 + [257] * 7])
    with torch.autocast("cpu", torch.bfloat16):
        (x, y), (wanted, out) = (f(torch.arange(12)[None] % 11, documents) for f in (step, model))
    assert x.dtype == wanted.dtype == torch.float32 and y.dtype == out.dtype == torch.bfloat16
    assert float((y - out).detach().abs().max()) < 0.02 * float(out.detach().abs().max())
    return float((x - wanted).detach().abs().max())


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad.float() @ weight, torch.einsum("bso,bsi->oi", grad.float(), x.float())


class Products(Regions):
    """Custom functions inside of autocast, and in a region without it."""

    def forward(self, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        x, y = super().forward(ids, documents)
        y = Product.apply(y.transpose(1, 2).flatten(2), self.layer.weight)
        with torch.autocast("cpu", enabled=False):
            z = Product.apply(x, self.layer.weight)
        return Product.apply(x, self.layer.weight), y, z


def functions_of_autocast() -> float:
    """They run under the autocast of their call: types are eager's, and values as near as they can be."""
    model = Products()
    reference, step = copy.deepcopy(model), compiled(model, strict=True)  # and they stay on the rank
    given = torch.arange(12)[None] % 11, torch.tensor([[0] * 5 + [1] * 7])
    worst = 0.0
    for function in (step, reference):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function(*given)
        assert [x.dtype for x in outputs] == [torch.bfloat16, torch.bfloat16, torch.float32]
        sum(x.float().square().sum() for x in outputs).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        worst = max(worst, float((p.grad - q.grad).norm() / q.grad.norm()))
    assert 0 < worst < 0.02
    return 0.0


def checkpointed_as_a_whole() -> float:
    """What the compiler traces is not what the checkpoint counts."""
    model, reference = pair()
    step, given = compiled(model), packs()[0]
    for function in (step, reference):
        torch.utils.checkpoint.checkpoint(lambda f: f(**given)[0], function, use_reentrant=False).backward()
    return error_of_gradients(model, reference)


class Weighted(nn.Module):
    """A loss with a weight that is a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("nano")

    def forward(self, weight: float, **given: Any) -> Any:
        loss, logits = self.inner(**given)
        return loss * weight + weight**2, logits * weight


def a_number_that_changes() -> float:
    """It is no reason to break the graph, nor to compile for every value."""
    model = Weighted()
    reference, step = copy.deepcopy(model), compiled(model)
    counters.clear()
    errors = [difference(step, model, reference, {"weight": w, **packs()[0]}) for w in (1.0, 0.7, 0.4, 0.2)]
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    return max(errors)


def views_of_one_row() -> float:
    """Inputs of the same length with other strides, in turns."""
    model, reference = pair()
    step, errors = compiled(model), []
    row = batch("nano", [[6, 1, 9, 4, 8]])
    views = {name: x[:, :-1] for name, x in row.items()}
    whole = {name: x.contiguous() for name, x in views.items()}
    for given in (views, whole, views):
        errors.append(difference(step, model, reference, given))
    return max(errors)


class Scaled(nn.Module):
    """Scales by statistics of the past, and then updates them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("nano")
        self.register_buffer("mean", torch.rand(61, dtype=torch.float64))
        self.register_buffer("view", self.mean.view(1, -1), persistent=False)
        self.reads_view = False

    def forward(self, **given: Any) -> Any:
        loss, logits = self.inner(**given)
        out = (logits * self.mean.sin().exp() + self.mean.clone()).square().mean()
        with torch.no_grad():
            self.mean.mul_(0.5).add_(logits.mean((0, 1)), alpha=0.1)
        return out + self.view.sum() if self.reads_view else out, logits


def buffers_of_the_past() -> float:
    """The backward reads what a buffer was."""
    model = Scaled()
    reference, step = copy.deepcopy(model), torch.compile(model, backend="hsap")
    errors = [difference(step, model, reference, given) for given in packs()[:1] * 2]
    return max(*errors, float((model.mean - reference.mean).abs().max()))


CASES = [
    accumulation, several_forwards, optimiser, no_gradients, after_evaluation, frozen, untied, embeddings,
    low_rank, regions_of_autocast, functions_of_autocast, checkpointed_as_a_whole,
    a_number_that_changes, views_of_one_row, buffers_of_the_past,
]  # fmt: skip


ON_RANKS = (no_gradients, frozen, embeddings)  # the same on two ranks


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in ON_RANKS), id=c.__name__) for c in CASES]
)
def test_one_process(case: Callable[[], float]) -> None:
    assert case() < 1e-6


SLOW = (optimiser, after_evaluation, untied, low_rank, checkpointed_as_a_whole, buffers_of_the_past)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW), id=c.__name__) for c in CASES]
)
def test_two_ranks(pool: Pool, case: Callable[[], float]) -> None:
    assert max(pool.run(case, world=2)) < 1e-6


# --- memory that inputs share ---------------------------------------------------------------------------


def test_a_write_into_memory_that_another_input_lies_in_is_refused() -> None:
    model = Scaled()
    model.reads_view = True
    with pytest.raises(Refused, match="writes into an input that shares memory with another one") as caught:
        compiled(model)(**packs()[0])
    assert "got:    mean, which is written into, and view" in str(caught.value)
    assert "do:     clone one of the two (x.clone())" in str(caught.value)


def test_parts_of_one_piece_of_memory_are_told_apart() -> None:
    def step(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        x.add_(ids)
        return x.sum() + y.sum()

    rows = torch.zeros(3, 1, 12, dtype=torch.int64)
    ids, function = torch.arange(12)[None], compiled(step)
    assert int(function(rows[0], rows[1], ids)) == 66 and torch.equal(rows[0], ids)
    with pytest.raises(Refused, match="shares memory"):
        function(rows.view(1, 36)[:, 3:15], rows[1], ids)


# --- low precision: no worse than eager's own error, within a factor ----------------------------------


def errors_in(how: str) -> tuple[float, float]:
    """The errors of the compiled and of the eager model to float64, of loss, logits and gradients."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}[how]
    low = build("nano", dtype)
    exact = copy.deepcopy(low).double()
    eager, step, given = copy.deepcopy(low), compiled(low), packs()[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        results = [_values(step, low, given), _values(eager, eager, given)]
    with torch.autocast("cpu", enabled=False):
        truth = _values(exact, exact, given)
    ours, theirs = (
        max(float((value - truth[key]).norm() / truth[key].norm()) for key, value in result.items())
        for result in results
    )
    return ours, theirs


def _values(function: Callable[..., Any], model: nn.Module, given: Any) -> dict[str, Tensor]:
    loss, logits = function(**given)
    loss.backward()
    gradients = {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), "logits": logits.detach().double(), **gradients}


@pytest.mark.parametrize("how", ["bf16", pytest.param("fp16", marks=pytest.mark.slow), "autocast"])
def test_low_precision(pool: Pool, how: str) -> None:
    for ours, theirs in [errors_in(how), *pool.run(errors_in, how, world=2)]:
        assert 0 < ours <= 2 * theirs < 0.5
