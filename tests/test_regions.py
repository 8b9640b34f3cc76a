"""What is no plain call in dynamo's graph: what tracing would lose, checkpoints, vmaps; varlen calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from hsap_compile._torch import CUSTOM_FUNCTION, SAVED
from hsap_compile.errors import Refused
from hsap_compile.kernels import exchange
from hsap_compile.passes.capture import capture
from hsap_compile.passes.choose_saved import choose_saved
from simulate import eager, simulate, since, traced, worst
from strategies import dynamic
from test_custom_functions import Scaled
from test_shard_tokens import LOCAL, Program, check, trace

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# --- what tracing would lose ----------------------------------------------------------------------------


def _hooked(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda grad: grad * 3)
    return y


def _derived(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return x + torch.func.grad(lambda y: y.tanh().sum())(x)


def _branched(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))


def _looped(p: Program, x: Tensor, i: Tensor) -> Tensor:
    return scan(lambda carry, y: (carry + y, carry * y), x[:, 0] * 1, x.transpose(0, 1))[1]


def _switched(p: Program, x: Tensor, i: Tensor) -> Tensor:
    def function(t: Tensor) -> Tensor:
        with torch.no_grad():
            most = t.abs().mean()
        return t / most

    return torch.vmap(function)(x)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_switched, "switches gradients off inside of a vmap"),
        (_derived, "takes a derivative in its forward"),
        (_branched, "a branch or a loop inside of its graph"),
        (_looped, "a branch or a loop inside of its graph"),
    ],
)
def test_what_tracing_would_lose_is_refused(function: Any, text: str) -> None:
    with pytest.raises(Refused, match=text) as refused:
        capture(trace(Program((function,))).module)
    assert "\n  do: " in str(refused.value)


def test_a_hook_is_refused_or_a_custom_function() -> None:
    """What dynamo makes of it depends on its version."""
    of = trace(Program((LOCAL["linear"], _hooked, LOCAL["affine"])), rows=2)
    if any(node.target is CUSTOM_FUNCTION for node in of.module.graph.nodes):
        assert check(of, 3, 1) == []
        return
    with pytest.raises(Refused, match="the model registers a hook on a gradient") as refused:
        simulate(of, 3, 1)
    assert "\n  do: " in str(refused.value)


def test_data_is_a_value_without_a_gradient() -> None:
    of = trace(Program((LOCAL["linear"], lambda p, x, i: x * x.data)), rows=2)
    assert check(of, 3, 1) == []


class Scoring(nn.Module):
    """Flex attention whose score function has parts without a gradient; ``dense`` writes it out."""

    def __init__(self, kind: str, dense: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(9, 8, generator=generator, dtype=torch.float64))
        self.far = nn.Parameter(torch.randn(2, 40, generator=generator, dtype=torch.float64))
        self.kind, self.dense = kind, dense

    def scored(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.kind == "score":
            return score.detach() * 0.5 + score * 0.5
        if self.kind == "parameter":
            return score + self.far.detach()[h, q - k + 20]
        with torch.no_grad():
            bias = self.far[h, q - k + 20]
        return score + bias

    def forward(self, ids: Tensor) -> Tensor:
        q = F.embedding(ids, self.words).unflatten(-1, (2, 4)).transpose(1, 2)
        if self.dense:
            sizes = (*q.shape[:3], q.shape[2])
            at = [torch.arange(n).view([-1 if d == e else 1 for e in range(4)]) for d, n in enumerate(sizes)]
            y = self.scored(q @ q.mT / 2, *at).softmax(-1) @ q
        else:
            y = flex.flex_attention(q, q, q, score_mod=self.scored)
        return y.pow(2).sum() + self.far.sum()


@pytest.mark.parametrize(("kind", "inter"), [("score", 1), ("parameter", 2), ("region", 2)])
def test_score_functions_with_parts_without_a_gradient(
    kind: str, inter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # no gradients on CPU: of torch's kernel
    ids = dynamic({"ids": torch.arange(24).view(2, 12) % 9})
    wanted = eager(traced(Scoring(kind, dense=True), ids))
    call = traced(Scoring(kind, dense=False), ids)
    for step in simulate(call, inter, 1).ranks:
        found = {tuple(g.shape): g for g in step.gradients.values()}
        for gradient in wanted.gradients.values():
            torch.testing.assert_close(found[tuple(gradient.shape)], gradient, rtol=1e-11, atol=1e-12)


class TwoScales(nn.Module):
    """Two layers, whose scales differ: numbers that are symbols to torch once lengths are."""

    def __init__(self, flexible: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.qkv = nn.Embedding(11, 16).double(), nn.Linear(16, 48).double()
        self.scales, self.flexible = [0.3, 0.7], flexible

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for scale in self.scales:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            if self.flexible:
                y = flex.flex_attention(q, k, v, scale=scale)
            else:
                y = F.scaled_dot_product_attention(q, k, v, scale=scale)
            x = x + y.transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("dynamic", [None, True])
def test_scales_that_are_attributes(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # no gradients on CPU: of torch's kernel
    for length in (12, 9):
        ids = torch.arange(length)[None] * 7 % 11
        models, reference = (TwoScales(True), TwoScales(False)), TwoScales(False)
        reference(ids).sum().backward()
        for model in models:
            options = {"lower": "eager", "strict": True}
            torch.compile(model, backend="hsap", dynamic=dynamic, options=options)(ids).sum().backward()
            for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("written", [False, True])
def test_windows_that_are_symbols(
    written: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The number that a mask's function closes over; another one compiles again."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # no gradients on CPU: of torch's kernel
    caplog.set_level("INFO", "hsap_compile")
    words = nn.Embedding(11, 16).double()

    def step(ids: Tensor, near: Callable[..., Tensor]) -> Tensor:
        q = words(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        place = torch.arange(ids.shape[1])
        if written:
            return F.scaled_dot_product_attention(q, q, q, near(0, 0, place[:, None], place))
        blocks = flex.create_block_mask(near, None, None, len(place), len(place), device="cpu")
        return flex.flex_attention(q, q, q, block_mask=blocks)

    def within(window: int) -> Callable[..., Tensor]:
        return lambda b, h, q, k: (q >= k) & (q - k <= window - 1)

    options = {"lower": "eager", "strict": True}
    compiled = torch.compile(step, backend="hsap", dynamic=True, options=options)
    place = torch.arange(20)
    for window in (3, 7):
        q = words(place[None] * 7 % 11).unflatten(-1, (2, 8)).transpose(1, 2)
        seen = within(window)(0, 0, place[:, None], place)
        wanted = F.scaled_dot_product_attention(q, q, q, seen)
        torch.testing.assert_close(compiled(place[None] * 7 % 11, within(window)), wanted)
    assert "stays as it is written" not in caplog.text
    assert caplog.text.count("0 masks stay dense") == 2


def _bare(place: Tensor) -> tuple[Tensor, Tensor]:
    return place[:, None], place


def _half(ids: Tensor, documents: Tensor) -> Tensor:
    """Beyond 2048, half has every second number."""
    told = (documents + 2049).half()
    return told[:, None, :, None] == told[:, None, None, :]


def _own(ids: Tensor, documents: Tensor) -> Tensor:
    """What is no number is told apart by not being equal to itself."""
    told = torch.where(ids % 4 == 0, torch.nan, documents.double())
    return ((told == told) & (ids >= 0))[:, None, None, :]


#: Logits of scores, ids and documents.  Python's numbers that are made of the length are symbols.
NUMBERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bias by the length": lambda s, i, d: s + torch.sub(*_bare(torch.arange(i.shape[1]).to(s.dtype))) * (
        8.0 / i.shape[1]
    ),
    "scale by the length": lambda s, i, d: s / i.shape[1] ** 0.5,
    "window by the length": lambda s, i, d: s.masked_fill(
        torch.sub(*_bare(torch.arange(i.shape[1]))) > i.shape[1] * 0.15, -torch.inf
    ),
    "filled by the length": lambda s, i, d: s.masked_fill(
        torch.sub(*_bare(torch.arange(i.shape[1]))) > 3, 10 / i.shape[1]
    ),
    "labels in half": lambda s, i, d: s.masked_fill(~_half(i, d), -torch.inf),
    "window in bfloat16": lambda s, i, d: s.masked_fill(
        torch.sub(*_bare(torch.arange(i.shape[1]).add(250).bfloat16())) > 3, -torch.inf
    ),
    "large labels in float": lambda s, i, d: s.masked_fill(
        (d + 2**24).float()[:, None, :, None] != (d + 2**24).float()[:, None, None, :], -torch.inf
    ),
    "what is no number": lambda s, i, d: s.masked_fill(~_own(i, d), -torch.inf),
}  # fmt: skip


class Told(nn.Module):
    def __init__(self, logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.logits = nn.Embedding(11, 16).double(), logits

    def forward(self, ids: Tensor, documents: Tensor) -> Tensor:
        q = self.words(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        return (self.logits(q @ q.cos().mT, ids, documents).softmax(-1) @ q.sin()).square().mean()


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_logits(name: str, mesh: tuple[int, int]) -> None:
    batch = {"ids": torch.arange(26)[None] * 7 % 11, "documents": torch.arange(26)[None] // 4}
    of = traced(Told(NUMBERS[name]), dynamic(batch))
    wanted, got = eager(of), simulate(of, *mesh)
    assert max(max(worst(step, wanted)) for step in got.ranks) <= 1e-12
    assert len(got.program.masks) == 1 and got.program.fallbacks == ()


@pytest.mark.parametrize("dynamic", [None, True])
def test_floats_that_change(dynamic: bool | None) -> None:
    """A soft-cap, a temperature and a slope; none compiles again once it is a symbol."""
    model = Told(lambda s, i, d: s)

    def step(ids: Tensor, by: float) -> Tensor:
        place = torch.arange(ids.shape[1]).double()
        model.logits = lambda s, i, d: by * (s / by).tanh() - by * torch.sub(*_bare(place)).abs()
        return model(ids, ids)

    compiled = torch.compile(
        step, backend="hsap", dynamic=dynamic, options={"lower": "eager", "strict": True}
    )
    for by in (0.7, 1.3, 0.2, 2.5):
        ids = torch.arange(24)[None] * 7 % 11
        torch.testing.assert_close(compiled(ids, by), step(ids, by), rtol=1e-12, atol=1e-12)


class Turned(nn.Module):
    """Similar keys count less, or all the same."""

    def __init__(self, scale: float, written: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.scale, self.written = nn.Embedding(11, 16).double(), scale, written

    def forward(self, ids: Tensor, documents: Tensor) -> Tensor:
        q = self.words(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = q.cos(), q.sin()
        seen = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
        if self.written:
            return ((q @ k.mT * self.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).square().mean()
        return F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale).square().mean()


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float, written: bool, mesh: tuple[int, int]) -> None:
    batch = {"ids": torch.arange(24)[None] * 7 % 11, "documents": torch.arange(24)[None] // 9}
    of = traced(Turned(scale, written), dynamic(batch))
    wanted, got = eager(of), simulate(of, *mesh)
    assert got.program.fallbacks == () and len(got.program.masks) == 1
    assert max(max(worst(step, wanted)) for step in got.ranks) <= 1e-12


# --- checkpoints --------------------------------------------------------------------------------------


def _checkpointed(p: Program, x: Tensor, i: Tensor) -> Tensor:
    def block(y: Tensor) -> Tensor:
        return Scaled.apply(y @ p.square, p.vector) - y.mean(1, keepdim=True)

    return checkpoint(block, x, use_reentrant=False)


def test_checkpoints_are_inlined_with_their_tags() -> None:
    of = trace(Program((LOCAL["linear"], _checkpointed, _checkpointed)), rows=2)
    assert check(of, 3, 1) == []
    graph = capture(of.module).graph
    tagged = [n for n in graph.nodes if "recompute" in n.meta]
    assert len({n.meta["ac_graph_id"] for n in tagged}) == 2
    assert len([n for n in tagged if n.target is CUSTOM_FUNCTION]) == 2
    assert not any("recompute" in n.meta for n in graph.nodes if n.target is torch.ops.aten.linear.default)


def test_what_crossed_ranks_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    of = trace(Program((_checkpointed,)), rows=2)
    kept: list[torch.fx.Node] = []

    def keep(module: torch.fx.GraphModule, *, again: bool) -> int:
        found = choose_saved(module, again=again)
        kept.extend(n for n in module.graph.nodes if n.target is exchange.SUM_RANKS)
        return found

    monkeypatch.setattr("hsap_compile.pipeline.choose_saved", keep)
    check(of, 2, 1)
    assert [n.meta.get("recompute") for n in kept] == [SAVED] * 2  # the mean's, and the loss outside


class Deep(nn.Module):
    """Blocks of much that a backward reads."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = again
        self.words = nn.Embedding(11, 16)
        self.weights = nn.ParameterList(torch.randn(16, 16) / 4 for _ in range(4))

    def block(self, x: Tensor, weight: Tensor) -> Tensor:
        q = (x @ weight)[:, None]
        x = x + F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)[:, 0]
        return x + torch.tanh(torch.sin(x @ weight) @ weight.mT)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for weight in self.weights:
            x = (
                checkpoint(self.block, x, weight, use_reentrant=False)
                if self.again
                else self.block(x, weight)
            )
        return x.square().mean()


def _saved(again: bool) -> tuple[Tensor, int]:
    """The gradient of the words, and how many numbers the forward keeps for it."""
    torch._dynamo.reset()
    model, count = Deep(again), 0
    compiled = torch.compile(model, backend="hsap", options={"lower": "aot_eager"})
    ids = torch.arange(64).mul(5).remainder(11).view(1, 64)
    compiled(ids)

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        count += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = compiled(ids)
    loss.backward()
    return model.words.weight.grad, count


def test_a_checkpoint_saves_memory_in_compiled_code() -> None:
    (wanted, everything), (got, little) = _saved(False), _saved(True)
    torch.testing.assert_close(got, wanted)
    assert little < everything / 2, (little, everything)


# --- vmap ---------------------------------------------------------------------------------------------


def test_a_vmap_is_traced_below_its_batching() -> None:
    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        return torch.vmap(lambda row, shift: (row * p.vector + shift).sin())(x, i[:, 0].to(x.dtype))

    assert check(trace(Program((pattern, LOCAL["linear"])), rows=2), 3, 1) == []


# --- varlen -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unrun() -> None:
    """torch's operator has no kernel on CPU: a trace needs none, but dynamo calls what it has traced."""

    def nothing(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.zeros_like(q),
            q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32),
            q.new_zeros(2).to(torch.uint64),
        )

    varlen._varlen_attn.register_kernel("cpu")(nothing)


class Varlen(nn.Module):
    def __init__(self, window: tuple[int, int], reference: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window, self.reference = window, reference
        self.words, self.qkv = nn.Embedding(50, 32).double(), nn.Linear(32, 64).double()

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (t.unflatten(-1, (-1, 8)) for t in self.qkv(x).split([32, 16, 16], -1))
        if not self.reference:
            y = varlen.varlen_attn(q, k, v, ends, ends, 40, 40, window_size=self.window, enable_gqa=True)
        else:
            left, right = self.window
            i = torch.arange(ids.shape[0])
            document = (ends[None, 1:] <= i[:, None]).sum(1)
            mask = document[:, None] == document
            if right >= 0:
                mask &= i - i[:, None] <= right
            if left >= 0:
                mask &= i[:, None] - i <= left
            heads = (t[None].transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(*heads, mask, enable_gqa=True)[0].transpose(0, 1)
        return (x + y.flatten(1)).square().mean()


@since((2, 12), "varlen_attn knows no grouped heads")
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 0), (2, 1)], ids=str)
def test_varlen_attention(window: tuple[int, int], unrun: None) -> None:
    ends = torch.tensor([0, 5, 6, 15, 29, 32, 34], dtype=torch.int32)
    batch = {"ids": torch.arange(34) * 7 % 50, "ends": ends}
    of, reference = (traced(Varlen(window, r), dynamic(dict(batch))) for r in (False, True))
    wanted = eager(reference)
    got = simulate(of, 2, 2)
    assert got.program.fallbacks == () and len(got.program.traffic) == 1
    assert got.program.masks[0].mask.alike == ()  # one tensor has the ends of both
    assert simulate(of, 1, 1).program.masks[0].plannable
    by_shape = {g.shape: i for i, g in wanted.gradients.items()}
    for step in got.ranks:
        gradients = {by_shape[g.shape]: g for g in step.gradients.values()}
        assert max(worst(type(step)(step.outputs, gradients), wanted)) <= 1e-12
