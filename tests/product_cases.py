"""Attention written with products of any layout (``FORMS``), and what only looks like it (``MISSES``)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

KV, G, D, R, WIDTH = 2, 3, 4, 2, 12  # key/value heads, query heads of each, widths
Attend = Callable[["Model", Tensor, Tensor], Tensor]
einsum = torch.einsum


class Model(nn.Module):
    """``attend(model, x, doc)`` returns (B, S, ..)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.words = attend, nn.Embedding(17, WIDTH)
        sizes = {"q": KV * G * D, "k": KV * D, "v": KV * D, "q2": KV * G * R, "k2": R, "one": D}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(WIDTH, size))
        self.bias, self.number = nn.Parameter(torch.randn(KV, G, 99)), nn.Parameter(torch.tensor(0.7))

    def forward(self, ids: Tensor, doc: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        y = self.attend(self, self.words(ids), doc)
        y = y.flatten(2) * torch.linspace(-1, 2, y[0, 0].numel(), dtype=y.dtype)
        return (y * y).mean() + y.sin().mean(), y


def heads(m: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, KV, G, D) queries, (B, S, KV, D) keys and values."""
    return m.q(x).unflatten(-1, (KV, G, D)), m.k(x).unflatten(-1, (KV, D)), m.v(x).unflatten(-1, (KV, D))


def allowed(doc: Tensor) -> Tensor:
    """(B, S, S) bool: causal inside of documents."""
    c = torch.arange(doc.shape[1])
    return (doc[:, :, None] == doc[:, None]) & (c[:, None] >= c)


def additive(doc: Tensor) -> Tensor:
    return torch.where(allowed(doc), 0.0, -math.inf)


def distance(doc: Tensor) -> Tensor:
    c = torch.arange(doc.shape[1])
    return c[:, None] - c + 49


def grouped(m: Model, x: Tensor, doc: Tensor, change: Callable[[Tensor], Tensor] = lambda a: a) -> Tensor:
    q, k, v = heads(m, x)
    a = change(einsum("bqkgd,bskd->bkgqs", q, k) * 0.4)
    a = a.masked_fill(~allowed(doc)[:, None, None], -math.inf)
    return einsum("bkgqs,bskd->bqkgd", a.softmax(-1), v)


def heads_first(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2)
    a = einsum("... h g n d, ... h s d -> ... h g n s", q, k) / 2 + additive(doc)[:, None, None]
    return einsum("...hgns,...hsd->...hgnd", a.softmax(-1), v).permute(0, 3, 1, 2, 4)


def groups_first(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    bias = m.bias.transpose(0, 1)[:, :, distance(doc)]  # a number for every head, which has a gradient
    a = einsum("bqhgd,bkhd->bghqk", q, k) + bias + additive(doc)[:, None, None]
    return einsum("bghqk,bkhd->bqghd", a.softmax(-1), v)


def matmul(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]
    a = torch.matmul(q, k.transpose(-1, -2)) + additive(doc)[:, None, None]
    return (a.softmax(-1) @ v).permute(0, 3, 1, 2, 4)


def queries_in_front(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q = q.flatten(2, 3)
    k, v = (t.repeat_interleave(G, 2) for t in (k, v))
    a = einsum("bthd,bshd->bsht", k, q).masked_fill(~allowed(doc)[:, :, None], -math.inf)  # keys stand first
    return einsum("bthd,bsht->bshd", v, a.softmax(-1))


def one_key_head(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, one = m.q(x).unflatten(-1, (KV * G, D)), m.one(x)
    a = einsum("bshd,btd->bhst", q, one) + additive(doc)[:, None]
    return einsum("bhst,btd->bshd", a.softmax(-1), one)


def latent(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    """As DeepSeek writes it: one latent for keys and values of all heads, one rotary key."""
    q, q2 = m.q(x).unflatten(-1, (KV * G, D)), m.q2(x).unflatten(-1, (KV * G, R))
    one, k2 = m.one(x), m.k2(x)
    a = (einsum("bshc,btc->bsht", q, one) + einsum("bshr,btr->bsht", q2, k2)) * 0.3
    a += additive(doc).unsqueeze(2)
    return einsum("bsht,btc->bshc", a.softmax(-1, dtype=torch.float64), one)


def own_scales(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q2, k2 = m.q2(x).unflatten(-1, (KV, G, R)), m.k2(x)
    a = 0.3 * einsum("bqkgd,bskd->bkgqs", q, k) - einsum("bqkgr,bsr->bkgqs", q2, k2) / 1.7
    a = torch.add(a, einsum("bqkgd,bsd->bkgqs", q, m.one(x)), alpha=0.6)
    a = (5 * torch.tanh(a / 5)).masked_fill(~allowed(doc)[:, None, None], -math.inf)
    return einsum("bkgqs,bskd->bqkgd", a.softmax(-1), v)


def two_matmuls(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q = q.flatten(2, 3).transpose(1, 2)
    k, v = (t.transpose(1, 2).repeat_interleave(G, 1) for t in (k, v))
    a = (q @ k.mT + k @ q.mT).masked_fill(~allowed(doc)[:, None], -math.inf)
    return (a.softmax(-1) @ v).transpose(1, 2)


#: name: (the attention, its key/value heads, the numbers in a row of them)
FORMS: dict[str, tuple[Attend, int, int]] = {
    "grouped": (grouped, KV, KV * 2 * D),
    "soft cap": (lambda m, x, doc: grouped(m, x, doc, lambda a: 3 * torch.tanh(a / 3)), KV, KV * 2 * D),
    "heads first": (heads_first, KV, KV * 2 * D),
    "groups first": (groups_first, KV, KV * 2 * D),
    "matmul of five dimensions": (matmul, KV, KV * 2 * D),
    "queries in front of heads": (queries_in_front, KV, KV * 2 * D),
    "one key head": (one_key_head, 1, 2 * D),
    "latent": (latent, 1, D + R + D),
    "own scales": (own_scales, KV, KV * (3 * D + R)),
    "two matmuls": (two_matmuls, KV * G, KV * G * 3 * D),
}


# --- what looks like it ---------------------------------------------------------------------------------


def other_query_heads(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    """The second product has one query head for all."""
    q, k, v = heads(m, x)
    more = einsum("bqd,bsd->bqs", m.one(x), m.one(x).tanh())
    a = einsum("bqkgd,bskd->bkgqs", q, k) + more[:, None, None] + additive(doc)[:, None, None]
    return einsum("bkgqs,bskd->bqkgd", a.softmax(-1), v)


def other_pairs(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    """The second product is of keys and queries."""
    q, k, v = heads(m, x)
    a = einsum("bqkgd,bskd->bkgqs", q, k) + einsum("bskgd,bqkd->bkgqs", q.sin(), k).mT
    a = a + einsum("bqd,bsd->bsq", m.one(x), m.k2(x).repeat(1, 1, 2))[:, None, None]
    return einsum("bkgqs,bskd->bqkgd", (a + additive(doc)[:, None, None]).softmax(-1), v)


def summed_over_queries(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    a = einsum("bqkgd,bskd->bkgqs", q, k) + additive(doc)[:, None, None]
    return einsum("bkgqs,bqkd->bskgd", a.softmax(-1), v)


def softmax_over(dim: int) -> Attend:
    def attend(m: Model, x: Tensor, doc: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        a = einsum("bqkgd,bskd->bkgqs", q, k).masked_fill(~allowed(doc)[:, None, None], -9.0)
        return einsum("bkgqs,bskd->bqkgd", a.softmax(dim), v)

    return attend


def contracts_tokens(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    state = einsum("bskd,bske->bkde", k.softmax(-1), v)
    return einsum("bqkgd,bkde->bqkge", q.softmax(-1), state)


def one_batch_row(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    a = einsum("bqkgd,skd->bkgqs", q, k[0]) + additive(doc)[:, None, None]
    return einsum("bkgqs,bskd->bqkgd", a.softmax(-1), v)


def learned_scale_of_one(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    a = einsum("bqkgd,bskd->bkgqs", q, k) + m.number * einsum("bqkgd,bskd->bkgqs", q.sin(), k)
    return einsum("bkgqs,bskd->bqkgd", (a + additive(doc)[:, None, None]).softmax(-1), v)


def with_a_bias(m: Model, x: Tensor, doc: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).reshape(-1, doc.shape[1], D) for t in heads(m, x)[0].unbind(3))
    a = torch.bmm(q, k.mT) + additive(doc).repeat_interleave(KV, 0)
    return torch.baddbmm(v.sin(), a.softmax(-1), v).unflatten(0, (-1, KV)).transpose(1, 2)


def without_gradient_of(part: str) -> Attend:
    """No gradient passes through a part of it."""

    def attend(m: Model, x: Tensor, doc: Tensor) -> Tensor:
        q, k, v = heads(m, x)
        q, k = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2)
        with torch.set_grad_enabled(part != "keys"):
            k = k.repeat_interleave(G, 1).permute(0, 1, 3, 2)
        with torch.set_grad_enabled(part != "a product"):
            more = q.sin() @ k
        a = q @ k + more + additive(doc)[:, None]
        with torch.set_grad_enabled(part != "softmax"):
            weights = a.softmax(-1)
        return (weights @ v.transpose(1, 2).repeat_interleave(G, 1)).transpose(1, 2)

    return attend


#: name: (what is written, how many attentions are found in it, whether it runs on own tokens)
MISSES: dict[str, tuple[Attend, int, bool]] = {
    "other query heads": (other_query_heads, 0, False),
    "other pairs": (other_pairs, 0, False),
    "summed over queries": (summed_over_queries, 0, False),
    "softmax over queries": (softmax_over(-2), 0, False),
    "softmax over groups": (softmax_over(2), 0, False),
    "contracts tokens": (contracts_tokens, 0, True),
    "one batch row of keys": (one_batch_row, 0, False),
    "a learned scale of one": (learned_scale_of_one, 0, False),
    "with a bias": (with_a_bias, 0, False),
    "keys without gradient": (without_gradient_of("keys"), 1, True),
    "a product without gradient": (without_gradient_of("a product"), 1, False),
    "softmax without gradient": (without_gradient_of("softmax"), 0, False),
}
