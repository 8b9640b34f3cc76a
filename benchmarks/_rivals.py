"""Causal attention inside documents over many ranks, by hand: gathered keys, a ring, and Ulysses x ring.

Rank r of a group of P holds the r-th of P equal runs of tokens.  All tensors are (1, H, n, D), with as many
key/value heads as query heads; every rival attends only to pairs of one document, by ATen's CPU flash kernel,
one call for the queries and keys of a document that are here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attention_two_ranks import Attention, Contender, own_chunk, with_heads_split

Tensor = torch.Tensor


class Piece(NamedTuple):
    """Queries that see the same keys: all of them, or causally."""

    queries: slice
    keys: slice
    causal: bool


def pieces(lengths: list[int], queries: range, keys: range) -> list[Piece]:
    """What ``queries`` see of ``keys``, positions counted from the start of each."""
    found, start = [], 0
    for length in lengths:
        stop = start + length
        first, last = max(start, queries.start), min(stop, queries.stop)
        if first < last:
            here = slice(first - queries.start, last - queries.start)
            if keys.start <= first and last <= keys.stop:
                found.append(Piece(here, slice(first - keys.start, last - keys.start), True))
            low, high = max(start, keys.start), min(first, keys.stop)
            if low < high:
                found.append(Piece(here, slice(low - keys.start, high - keys.start), False))
        start = stop
    return found


def attend(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, found: list[Piece]) -> None:
    """Merge ``found`` into ``out`` (1, H, n, D) and ``lse`` (1, H, n).  Every query has one causal piece,
    the first of its pieces."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for here, there, causal in found:
        part, mass = kernel(q[:, :, here], k[:, :, there], v[:, :, there], 0.0, causal)
        if causal:
            out[:, :, here], lse[:, :, here] = part, mass
            continue
        before = lse[:, :, here]
        after = torch.logaddexp(before, mass)
        out[:, :, here].mul_((before - after).exp_()[..., None])
        out[:, :, here].addcmul_(part, (mass - after).exp_()[..., None])
        lse[:, :, here] = after


def attend_backward(
    grads: list[Tensor], saved: list[Tensor], k: Tensor, v: Tensor, found: list[Piece]
) -> None:
    """Add what ``found`` gives to ``grads`` of q, k, v; ``saved``: the output's gradient, q, out and lse."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for here, there, causal in found:
        grad, q, out, lse = (x[:, :, here] for x in saved)
        parts = kernel(grad, q, k[:, :, there], v[:, :, there], out, lse, 0.0, causal)
        for total, part, place in zip(grads, parts, (here, there, there), strict=True):
            total[:, :, place] += part


def chunk(tokens: int, parts: int, index: int) -> range:
    return range(tokens * index // parts, tokens * (index + 1) // parts)


class _Gathered(torch.autograd.Function):
    """Keys and values of all ranks come here, and their gradients are summed on the way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        ranks = dist.get_world_size()
        mine = torch.stack((k, v))
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(parts, mine)
        whole_k, whole_v = torch.cat(parts, 3)
        tokens = sum(lengths)
        ctx.found = pieces(lengths, chunk(tokens, ranks, dist.get_rank()), range(tokens))
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        attend(out, lse, q, whole_k, whole_v, ctx.found)
        ctx.save_for_backward(q, whole_k, whole_v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        whole = torch.zeros(2, *k.shape)
        d_q = torch.zeros_like(q)
        attend_backward([d_q, *whole], [grad, q, out, lse], k, v, ctx.found)
        parts = [x.contiguous() for x in whole.chunk(dist.get_world_size(), 3)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts)
        return d_q, *mine, None


def gathered(lengths: list[int]) -> Contender:
    return Contender(lambda q, k, v: _Gathered.apply(q, k, v, lengths), own_chunk(sum(lengths)))


class _Passing:
    """A tensor on its way to the next rank of ``group`` while the previous rank's comes here."""

    def __init__(self, sent: Tensor, group: Any) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        after, before = (dist.get_global_rank(group, (rank + i) % ranks) for i in (1, -1))
        self.sent, self.got = sent, torch.empty_like(sent)
        self.works = [dist.isend(sent, after, group=group), dist.irecv(self.got, before, group=group)]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.got


class _Ring(torch.autograd.Function):
    """Keys and values go round while the last ones are attended to; their gradients go round after them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Any) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        held, ranks = torch.stack((k, v)), dist.get_world_size(group)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for step in range(ranks):
            passing = _Passing(held, group) if step < ranks - 1 else None
            attend(out, lse, q, *held, _seen(lengths, group, step))
            held = passing.wait() if passing else held
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        group, ranks = ctx.group, dist.get_world_size(ctx.group)
        held, d_q = torch.stack((k, v)), torch.zeros_like(q)
        returning = None
        for step in range(ranks):
            passing = _Passing(held, group) if step < ranks - 1 else None
            d_kv = torch.zeros_like(held)
            attend_backward([d_q, *d_kv], [grad, q, out, lse], *held, _seen(ctx.lengths, group, step))
            held = passing.wait() if passing else held
            if returning is not None:
                d_kv += returning.wait()
            returning = _Passing(d_kv, group)
        assert returning is not None
        return d_q, *returning.wait(), None, None


def _seen(lengths: list[int], group: Any, step: int) -> list[Piece]:
    """What this rank sees of the keys that it holds after ``step`` passes."""
    ranks, rank, tokens = dist.get_world_size(group), dist.get_rank(group), sum(lengths)
    return pieces(lengths, chunk(tokens, ranks, rank), chunk(tokens, ranks, (rank - step) % ranks))


def ring_over(lengths: list[int], group: Any) -> Attention:
    return lambda q, k, v: _Ring.apply(q, k, v, lengths, group)


def ring(lengths: list[int]) -> Contender:
    return Contender(ring_over(lengths, dist.group.WORLD), own_chunk(sum(lengths)))


def ulysses_ring(lengths: list[int], inside: Any, across: Any) -> Contender:
    """Heads are split over the ranks of a host, ``inside``; keys go round the hosts, ``across``."""
    return Contender(with_heads_split(ring_over(lengths, across), inside), own_chunk(sum(lengths)))
