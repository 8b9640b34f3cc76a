"""What is no plain call in dynamo's graph: custom autograd functions, checkpoints, vmaps; varlen calls."""

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
from hsap_compile.passes import _custom_functions
from hsap_compile.passes.capture import capture
from hsap_compile.passes.choose_saved import choose_saved
from simulate import eager, simulate, since, traced, worst
from strategies import dynamic
from test_shard_tokens import LOCAL, ON_MESHES, Program, check, trace

# dynamo makes an instance of autograd.Function (torch 2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# --- custom autograd functions: no backward is the forward's own, which would hence be noticed ---------


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
    assert "(a custom function that mixes tokens)" in found


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
    by_shape = {g.shape: i for i, g in wanted.gradients.items()}
    for step in got.ranks:
        gradients = {by_shape[g.shape]: g for g in step.gradients.values()}
        assert max(worst(type(step)(step.outputs, gradients), wanted)) <= 1e-12
