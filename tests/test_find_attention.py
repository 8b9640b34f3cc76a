"""Which parts of a graph are attention, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from hsap_compile.errors import Refused
from hsap_compile.passes import find_attention as find_attention_pass
from hsap_compile.passes.capture import capture
from hsap_compile.passes.find_attention import Attention, find_attention
from simulate import traced
from strategies import dynamic

B, H, D = 2, 4, 6
Function = Callable[[Tensor, Tensor, Tensor], object]
attention = F.scaled_dot_product_attention


def graph_of(function: Function, kv: int = H) -> GraphModule:
    """The captured graph of ``function(q, k, v)`` with q (B, H, S, D), k and v (B, kv, S, D)."""

    def model(ids: Tensor, weight: Tensor) -> object:
        x = weight[ids]
        s = ids.shape[1]
        q, k, v = x.split([H * D, kv * D, kv * D], -1)
        return function(*(t.view(B, s, -1, D).transpose(1, 2) for t in (q, k, v)))

    weight = torch.randn(11, (H + 2 * kv) * D, requires_grad=True)
    return capture(
        traced(model, dynamic({"ids": torch.arange(B * 7).view(B, 7) % 11, "weight": weight})).module
    )


def found(function: Function, kv: int = H) -> tuple[Attention, ...]:
    return find_attention(graph_of(function, kv))


def test_sinks() -> None:
    spellings: list[Function] = [
        sink_as_transformers_writes_it,
        lambda q, k, v: logits_and_sink(q, k).softmax(-1)[..., :-1] @ v,
        lambda q, k, v: F.dropout(logits_and_sink(q, k).softmax(-1)[..., : k.shape[2]], 0.0) @ v,
    ]
    for function in spellings:
        (attention,) = found(function)
        assert attention.sink is not None and attention.sink.meta["val"].shape[-1] == 1
        assert attention.logits is not None and attention.logits.meta["val"].shape[-1] != 1
    (attention,) = found(lambda q, k, v: (q @ k.mT - q[..., :1]).softmax(-1) @ v)
    assert attention.scores is not None
    assert attention.sink is None and attention.logits is attention.scores.node  # one number a row is nothing


def test_heads_folded_into_the_batch() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        logits = torch.bmm(q, k.mT).unflatten(0, (B, H)) * 0.5
        return torch.bmm(logits.softmax(-1).flatten(0, 1), v)

    (attention,) = found(function)
    assert attention.query.split == attention.key.split == (B, H)


def heads(attentions: tuple[Attention, ...]) -> list[tuple[int, int]]:
    return [tuple(int(x.nodes[0].meta["val"].shape[1]) for x in (a.query, a.key)) for a in attentions]  # type: ignore[misc]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1)


def weights_and_result(q: Tensor, k: Tensor, v: Tensor) -> object:
    p = weights(q, k)
    return p @ v, p.sum()


def weights_cast_and_read(q: Tensor, k: Tensor, v: Tensor) -> object:
    p = weights(q, k)
    return p.double() @ v.double(), p


def logits_and_sink(q: Tensor, k: Tensor, sink: Tensor | float = 0.5) -> Tensor:
    """q @ k.T and one more column."""
    extra = q[..., :1] * 0 + sink
    return torch.cat([q @ k.mT * 0.5, extra], -1)


def sink_as_transformers_writes_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = logits_and_sink(q, k)
    logits = logits - logits.max(-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1] @ v


def sink_before_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.cat([q[..., :1], q @ k.mT], -1)
    return logits.softmax(-1)[..., 1:] @ v


def sink_with_a_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits_and_sink(q, k).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def router(q: Tensor, k: Tensor, v: Tensor) -> object:
    x = q.transpose(1, 2).flatten(2)
    return torch.softmax(x @ torch.ones(H * D, 3), -1) @ torch.ones(3, 5)


NOT_ATTENTION: dict[str, Function] = {
    "the weights are returned": weights_and_result,
    "the weights are read before a cast": weights_cast_and_read,
    "router": router,
    "softmax over queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "softmax over heads": lambda q, k, v: (q @ k.mT).softmax(1) @ v,
    "softmax over features": lambda q, k, v: torch.softmax(q, -1) @ (k.mT @ v),
    "linear attention": lambda q, k, v: (q.softmax(-1) @ k.softmax(-2).mT) @ v,
    "weights on the right": lambda q, k, v: v.mT @ weights(q, k),
    "weights masked after softmax": lambda q, k, v: weights(q, k).masked_fill(q[..., :1] > 0, 0) @ v,
    "a sink before the keys": sink_before_the_keys,
    "a sink with a value": sink_with_a_value,
    "the first weight dropped": lambda q, k, v: logits_and_sink(q, k).softmax(-1)[..., 1:] @ v,
    "two sinks": lambda q, k, v: torch.cat([logits_and_sink(q, k), q[..., :1]], -1).softmax(-1)[..., :-2] @ v,
    "weights gated": lambda q, k, v: (weights(q, k) * q[..., :1]) @ v,
    "no product in the logits": lambda q, k, v: (q[..., :1] - k[..., 0][:, :, None]).softmax(-1) @ v,
    "one query head, many key heads": lambda q, k, v: (q[:, :1] @ k.mT).softmax(-1) @ v,
    "one query head of an operator": lambda q, k, v: attention(q[:, :1], k, v),
    "one batch row of keys": lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v,
    "one query head of five dimensions": lambda q, k, v: attention(
        q.unflatten(1, (2, 2))[:, :1], k.unflatten(1, (2, 2)), v.unflatten(1, (2, 2))
    ),
    "other heads of values": lambda q, k, v: attention(q, k[:, :2], v, enable_gqa=True),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_is_no_attention(name: str) -> None:
    assert found(NOT_ATTENTION[name]) == ()


ATTENTION: dict[str, Function] = {
    "operator": lambda q, k, v: attention(q, k, v),
    "keywords": lambda q, k, v: attention(value=v, query=q, is_causal=True, key=k),
    "five dimensions": lambda q, k, v: attention(q[None], k[None], v[None]),
    "written out": lambda q, k, v: weights(q, k) @ v,
    "cast, idle dropout": lambda q, k, v: F.dropout(weights(q, k).float().to(q.dtype), 0.0) @ v,
    "torch.matmul, mT": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.mT), 3), v),
    "permute": lambda q, k, v: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v,
    "three dimensions": lambda q, k, v: torch.bmm(torch.bmm(q[0], k[0].transpose(1, 2)).softmax(2), v[0]),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_what_is_attention(name: str) -> None:
    (attention,) = found(ATTENTION[name])
    (query,), (key,) = attention.query.nodes, attention.key.nodes
    assert query.meta["val"].shape[-3] == key.meta["val"].shape[-3] == H
    assert (attention.logits is None) == (name in ("operator", "keywords", "five dimensions"))
    assert attention.causal == (name == "keywords")
    assert attention.scale == pytest.approx(1.0 if attention.logits is not None else D**-0.5)


def test_two_attentions_in_the_order_of_the_graph() -> None:
    first, second = found(lambda q, k, v: attention(weights(q, k) @ v, k, v))
    assert second.query.nodes == (first.output,)


@pytest.mark.parametrize("written_out", [False, True])
def test_dropout_is_refused(written_out: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if written_out:
            return F.dropout(weights(q, k), 0.25) @ v
        return attention(q, k, v, dropout_p=0.25)

    with pytest.raises(Refused) as refused:
        found(function)
    text, _, place = str(refused.value).partition("\n  at:     ")
    assert text == (
        "hsap: dropout inside attention is not supported.\n"
        "  got:    dropout_p=0.25\n"
        "  wanted: dropout_p=0 (every rank would have to draw the same weights' mask)\n"
        "  do:     set the attention dropout to 0, or call model.eval()"
    )
    assert "test_find_attention.py:" in place


def test_dropout_elsewhere_is_not_refused() -> None:
    assert found(lambda q, k, v: F.dropout(weights(q, k), 0.25).sum(-1, keepdim=True) * v) == ()
    assert len(found(lambda q, k, v: F.dropout(weights(q, k) @ v, 0.25))) == 1


def expanded(x: Tensor, at: int) -> Tensor:
    """Every head twice (at 2), or all heads twice (at 1)."""
    b, h, s, d = x.shape
    shape = (b, h, 2, s, d) if at == 2 else (b, 2, h, s, d)
    return x.unsqueeze(at).expand(shape).reshape(b, 2 * h, s, d)


REPEATS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "expand and reshape": (lambda x: expanded(x, 2), True),
    "the same, cast": (lambda x: expanded(x.double(), 2).to(x.dtype), True),
    "full slice": (lambda x: x[:, :, None, :, :].expand(-1, -1, 2, -1, -1).flatten(1, 2), True),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), True),
    "repeat_interleave from the end": (lambda x: x.repeat_interleave(2, dim=-3), True),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), False),
    "expand before the heads": (lambda x: expanded(x, 1), False),
    "cat": (lambda x: torch.cat([x, x], 1), False),
    "uneven": (lambda x: x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=4), False),
}


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_peeled_and_tiled_ones_are_not(name: str, written_out: bool) -> None:
    repeat, peeled = REPEATS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat(k), repeat(v)
        return weights(q, k) @ v if written_out else attention(q, k, v)

    assert heads(found(function, kv=2)) == [(4, 2 if peeled else 4)]


def test_keys_and_values_are_peeled_together_or_not_at_all() -> None:
    assert heads(found(lambda q, k, v: attention(q, expanded(k, 2), expanded(v, 1)), kv=2)) == [(4, 4)]
    assert heads(found(lambda q, k, v: attention(q, k, v, enable_gqa=True), kv=2)) == [(4, 2)]


def test_the_check_sees_wrong_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(find_attention_pass, "_real_heads", lambda node, dim, opaque: node)
        with pytest.raises(AssertionError):
            test_repeated_heads_are_peeled_and_tiled_ones_are_not("expand and reshape", False)
    with monkeypatch.context() as patch:
        patch.setattr(find_attention_pass, "_fit", lambda *_: True)
        with pytest.raises(AssertionError):
            test_what_is_no_attention("other heads of values")
    with monkeypatch.context() as patch:
        patch.setattr(find_attention_pass, "_refuse_dropout", lambda *_: None)
        with pytest.raises(pytest.fail.Exception):
            test_dropout_is_refused(True)
