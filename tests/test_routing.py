"""Mixture of experts: every rank sorts its own tokens by their expert; what else is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (registers a grouped product for any type)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile.passes import _routing
from test_shard_tokens import MESHES, ON_MESHES, UNSHRUNK, WIDTH, Program, check, trace

EXPERTS, SLOTS = 3, 2
_grouped_mm = torch.ops.transformers.grouped_mm_fallback


@torch.library.custom_op("torchtitan::deterministic_scatter_add", mutates_args=())
def _scatter_add(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    return out.scatter_add(0, index, src)


@_scatter_add.register_fake
def _(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    return torch.empty_like(out)


def _index_saved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


_scatter_add.register_autograd(
    lambda ctx, grad: (grad, None, grad.gather(0, ctx.saved_tensors[0])), setup_context=_index_saved
)


def _routes(p: Program, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (T, F), weights (T, K), experts (T, K))"""
    tokens = x.flatten(0, 1)
    weights, experts = (tokens @ p.square[:, :EXPERTS]).softmax(-1).topk(SLOTS, -1)
    return tokens, weights, experts


def _experts(p: Program) -> Tensor:
    return p.kernel.permute(2, 0, 1) + p.vector[:EXPERTS, None, None]


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def inverse_by_writing(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    sorted_ids, perm = torch.sort(experts.reshape(-1))
    counts = torch.histc(sorted_ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    y = _grouped_mm(tokens[perm // SLOTS], _experts(p), _ends(counts))
    y = y.add_(p.square[sorted_ids]) * weights.reshape(-1)[perm][:, None]
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0])
    return y[inverse].view(-1, SLOTS, WIDTH).sum(1).view_as(x)


def inverse_by_sorting(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    perm = experts.flatten().argsort(stable=True)
    counts = torch.histc(experts.flatten().double(), bins=EXPERTS, min=0, max=EXPERTS)
    of_tokens = perm.div(SLOTS, rounding_mode="trunc")
    y = _grouped_mm(tokens.index_select(0, of_tokens), _experts(p), _ends(counts.int()))
    return (y[perm.argsort()].view(-1, SLOTS, WIDTH) * weights[..., None]).sum(1).view(x.shape)


def rows_added(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    ids, perm = experts.view(-1).sort(stable=True)
    where = (perm // SLOTS)[:, None].expand(-1, WIDTH)
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS)
    y = _grouped_mm(tokens.gather(0, where), _experts(p), _ends(counts)).tanh()
    y = y * weights.view(-1)[perm].unsqueeze(-1)
    # the load of every expert is a sum over all ranks
    return x.add(torch.zeros_like(tokens).scatter_add(0, where, y).view_as(x) * counts[0] / x.shape[1])


def maps_of_ids(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Counted by maps that have a one for every id; one is read by others, too."""
    scores = (x @ p.square[:, :EXPERTS]).softmax(-1)
    weights, experts = scores.topk(SLOTS, -1)
    counts = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True).sum((0, 1))
    perm = experts.view(-1).argsort(stable=True)
    tokens, first = x.flatten(0, 1), experts[..., 0].reshape(-1)
    y = _grouped_mm(tokens[perm // SLOTS], _experts(p), _ends(counts)) * weights.view(-1)[perm][:, None]
    where = (perm // SLOTS).reshape(-1, 1).expand(-1, WIDTH)
    x = x + _scatter_add(torch.zeros_like(tokens), where, y).view_as(x) * counts[1] / x.shape[1]
    again = F.one_hot(first, EXPERTS).sum(0)
    rows = first.argsort(stable=True)
    return x + _grouped_mm(tokens[rows], _experts(p), _ends(again))[rows.argsort()].view_as(x)


def experts_of_words(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Known without any parameter; what is sorted is read in its own order, too."""
    tokens, places = x.flatten(0, 1), torch.arange(SLOTS)
    experts = (i.flatten()[:, None] + places) % EXPERTS
    ids, perm = experts.flatten().sort(stable=True)
    counts = torch.histc(ids.double(), bins=EXPERTS, min=0, max=EXPERTS)
    y = _grouped_mm(tokens[perm // SLOTS], _experts(p), _ends(counts)) + p.square[ids]
    y = y[perm.argsort()].view(-1, SLOTS, WIDTH).sum(1).view_as(x)
    return y + (perm.view(*x.shape[:2], SLOTS) % 5).to(x.dtype) @ p.square[:SLOTS] * counts[0]


def rows_of_slots(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    perm = experts.flatten().argsort()
    y = tokens[perm // SLOTS] * p.square[perm % SLOTS] * experts.flatten()[perm][:, None]
    y = y - y.mean(0) + F.layer_norm(y, (WIDTH,)).cumsum(-1)
    out = torch.zeros_like(tokens).index_add(0, perm // SLOTS, y @ p.square)
    twice = torch.empty_like(y)
    twice[perm] = y
    return (out + twice.view(-1, SLOTS, WIDTH)[:, 1]).view_as(x)


def every_expert(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    scores = torch.full((tokens.shape[0], EXPERTS), -torch.inf, dtype=x.dtype).scatter(1, experts, weights)
    inputs = tokens.repeat(EXPERTS, 1) * scores.sigmoid().transpose(0, 1).reshape(-1, 1)
    outputs = torch.bmm(inputs.view(EXPERTS, -1, WIDTH), _experts(p)).view(-1, WIDTH)
    return outputs.reshape(EXPERTS, -1, WIDTH).sum(0).view_as(x)


def a_weight_for_every_row(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, weights, experts = _routes(p, x)
    each = tokens.repeat_interleave(SLOTS, 0)
    y = torch.bmm(_experts(p)[experts.reshape(-1)], each.unsqueeze(-1)).squeeze(-1)
    return (y.view(-1, SLOTS, WIDTH) * weights[..., None]).sum(1).view_as(x)


def router_loss(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, _, experts = _routes(p, x)
    gates = torch.cat([tokens @ p.square, tokens @ p.square.mT], 0).softmax(-1)
    chosen = F.one_hot(gates.topk(SLOTS, -1).indices, WIDTH).double().mean(0)
    return x * (chosen * gates.mean(0)[None]).sum() * WIDTH


LOCAL: dict[str, Callable[[Program, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        inverse_by_writing, inverse_by_sorting, rows_added, maps_of_ids, experts_of_words, rows_of_slots,
        every_expert, a_weight_for_every_row, router_loss,
    )
}  # fmt: skip


def _sorted(p: Program, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, experts = _routes(p, x)
    ids, perm = experts[:, 0].sort(stable=True)
    return tokens, ids, perm


def other_counts(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, ids, perm = _sorted(p, x)
    counts = torch.histc((i.flatten() % EXPERTS).float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return x + _grouped_mm(tokens[perm], _experts(p), _ends(counts))[perm.argsort()].view_as(x)


def unsorted_rows(p: Program, x: Tensor, i: Tensor) -> Tensor:
    tokens, ids, perm = _sorted(p, x)
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return x + _grouped_mm(tokens, _experts(p), _ends(counts)).view_as(x)


def _map_of_unknown_ids(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Numbers that may be the same twice for a token have fewer ones than rows."""
    tokens, weights, _ = _routes(p, x)
    ids = (tokens @ p.square[:, :EXPERTS]).argsort(-1)[:, 1:]
    counts = torch.zeros_like(tokens[:, :EXPERTS], dtype=torch.bool).scatter(-1, ids, True).sum(0)
    perm = ids.flatten().argsort()
    y = _grouped_mm(tokens[perm // SLOTS], _experts(p), _ends(counts))
    return x + y[perm.argsort()].view(-1, SLOTS, WIDTH).sum(1).view_as(x)


def _softmax_of_some(p: Program, x: Tensor, i: Tensor) -> Tensor:
    order = (x[0, :-1] @ p.vector).argsort()
    return x + F.pad(x[0, :-1][order].softmax(0)[order.argsort()], (0, 0, 0, 1)) * p.vector


#: What must not stay local, and how many operators are reported.
GATHERED: dict[str, tuple[Callable[[Program, Tensor, Tensor], Tensor], int]] = {
    "sorted beside unsorted": (lambda p, x, i: x + (_sorted(p, x)[1].view(x.shape[:2])[..., None] * x), 1),
    "along the sorted": (lambda p, x, i: x * _sorted(p, x)[0][_sorted(p, x)[2]].cumsum(0).mean(), 1),
    "row numbers as numbers": (lambda p, x, i: x + _sorted(p, x)[2].double().mean() / 99, 1),
    "the next row": (
        lambda p, x, i: x + x.flatten(0, 1)[(_sorted(p, x)[2] + 1) % x[..., 0].numel()].sin().mean(0), 2
    ),
    "half of the rows": (lambda p, x, i: x + x.flatten(0, 1)[_sorted(p, x)[2] // 2].view_as(x), 2),
    "one of the sorted": (lambda p, x, i: x * _sorted(p, x)[1][-1], 1),
    "rows of other rows": (
        lambda p, x, i: x + torch.cat([x, x], 1).flatten(0, 1)[_sorted(p, x)[2]].view_as(x) * p.scalar, 1
    ),
    "pairs of sorted rows": (
        lambda p, x, i: x + x.flatten(0, 1).repeat_interleave(2, 0)[
            _routes(p, x)[2].flatten().argsort()].view(-1, 2, WIDTH)[:, 0].sin().mean(0), 1
    ),
    "other counts": (other_counts, 2),
    "unsorted rows": (unsorted_rows, 1),
    "map of unknown ids": (_map_of_unknown_ids, 2),
    "largest of the sorted": (
        lambda p, x, i: x + x[0][(x[0] @ p.vector).argsort()].argmax(0) / 9 * p.vector, 1
    ),
    "softmax of some sorted": (_softmax_of_some, 2),
    "best tokens": (lambda p, x, i: x + x.flatten(0, 1)[(x @ p.vector).flatten().topk(3).indices].mean(0), 1),
}  # fmt: skip


@ON_MESHES
@pytest.mark.parametrize("name", LOCAL)
def test_stays_local(name: str, mesh: tuple[int, int]) -> None:
    of = trace(Program((LOCAL[name],)), rows=2)
    assert check(of, *mesh) == []


@pytest.mark.parametrize("name", LOCAL)
def test_stays_local_of_a_part_of_the_tokens(name: str) -> None:
    for tokens, mesh in (("cut", (3, 1)), ("prompted", (2, 1))):
        found = check(trace(Program((LOCAL[name], LOCAL[name]), tokens=tokens), rows=2), *mesh)
        sums = 2 * (name == "rows_of_slots" and tokens == "cut")  # of sorted rows: some are no tokens
        assert len(found) == sums, found


@pytest.mark.parametrize("name", GATHERED)
def test_falls_back(name: str) -> None:
    pattern, count = GATHERED[name]
    found = check(trace(Program((pattern,)), rows=2), 3, 1)
    assert len(found) == count, found


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=UNSHRUNK)
@given(
    names=st.lists(st.sampled_from(sorted(LOCAL)), min_size=2, max_size=3),
    tokens=st.integers(8, 23),
    mesh=st.sampled_from(MESHES),
    grad=st.booleans(),
)
def test_layers_of_experts(names: list[str], tokens: int, mesh: tuple[int, int], grad: bool) -> None:
    of = trace(Program(tuple(LOCAL[name] for name in names)), 2, tokens, grad)
    assert check(of, *mesh, tolerance=1e-9) == []


def test_broken_rules_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    of = trace(Program((LOCAL["rows_added"],)), rows=2)
    check(of, 3, 1)
    monkeypatch.setattr(_routing, "whole_counts", lambda sharder, node: sharder.home[node].node)
    monkeypatch.setattr("hsap_compile.passes.shard_tokens.whole_counts", _routing.whole_counts)
    with pytest.raises(AssertionError):
        check(of, 3, 1)


def test_counts_beside_others_are_whole() -> None:
    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        counts = F.one_hot(_routes(p, x)[2][:, 0], EXPERTS).sum(0)
        return x + torch.cat([counts, counts[:1]])[-1].double() / 1000

    assert check(trace(Program((pattern,))), 2, 1) == []


def test_counts_are_added_up_before_they_are_rounded() -> None:
    def pattern(p: Program, x: Tensor, i: Tensor) -> Tensor:
        first = _routes(p, x)[2][:, 0] * 0
        return x + F.one_hot(first, EXPERTS).bfloat16().sum(0)[0].double() / 1000

    assert check(trace(Program((pattern,)), tokens=605), 2, 1) == []
