"""Attentions written by hand: how people say which tokens see which, and what else they do to scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate import Step, Traced, traced
from strategies import dynamic, pack

H, D = 4, 6
Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: name -> (the attention, its key/value heads, those that are left, dense masks)
CASES: dict[str, tuple[Attend, int, int, int]] = {}
attention = F.scaled_dot_product_attention
PACKS = [[[3, 5, 1, 4], [13]], [[1, 1, 1], [2, 1]], [[8], [1, 7]]]


class Model(nn.Module):
    def __init__(self, attend: Attend, kv: int = H) -> None:
        super().__init__()
        self.attend, self.kv = attend, kv
        self.embed = nn.Embedding(17, 24)
        self.q, self.k, self.v = nn.Linear(24, H * D), nn.Linear(24, kv * D), nn.Linear(24, kv * D)
        self.slopes = nn.Buffer(0.5 ** torch.arange(1.0, H + 1))
        self.triangle = nn.Buffer(torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))
        self.relative, self.buckets = nn.Parameter(torch.randn(H, 129)), nn.Embedding(129, H)

    def forward(self, ids: Tensor, doc: Tensor, pos: Tensor) -> Tensor:
        x = self.embed(ids)
        b, s = ids.shape
        q, k, v = (f(x).view(b, s, -1, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.attend(self, q, k, v, doc, pos).transpose(1, 2).reshape(b, s, H * D)


def case(*, kv: int = H, left: int | None = None, dense_masks: int = 0) -> Callable[[Attend], Attend]:
    def add(attend: Attend) -> Attend:
        CASES[attend.__name__] = (attend, kv, kv if left is None else left, dense_masks)
        return attend

    return add


def batches() -> list[dict[str, Tensor]]:
    found = []
    for rows in PACKS:
        doc, pos = pack(rows)
        found.append({"ids": torch.randint(0, 17, doc.shape), "doc": doc, "pos": pos})
    return found


def error(got: Step, wanted: Step) -> float:
    """The largest difference, relative to the largest output or gradient: a bias of the keys has none."""
    assert set(got.gradients) == set(wanted.gradients)
    gradients = [(got.gradients[i], wanted.gradients[i]) for i in wanted.gradients]
    worst = 0.0
    for pairs in (list(zip(got.outputs, wanted.outputs, strict=True)), gradients):
        pairs = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
        assert all(a.dtype == b.dtype and a.isfinite().all() and b.isfinite().all() for a, b in pairs)
        scale = max((float(b.abs().max()) for _, b in pairs), default=1.0)
        worst = max([worst, *(float((a - b).abs().max()) / scale for a, b in pairs)])
    return worst


def trace(attend: Attend, kv: int = H) -> tuple[Traced, list[tuple[Any, ...]]]:
    """The traced call, and the arguments of calls with other packs."""
    model = Model(attend, kv).double()
    first, *others = batches()
    call = traced(model, dynamic(first))
    more = []
    for batch in others:
        known = {id(value): batch[name] for name, value in first.items()}
        s = batch["ids"].shape[1]
        more.append(tuple(s if isinstance(a, int) else known.get(id(a), a) for a in call.args))
    return call, more


def columns(q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])


def causal(q: Tensor) -> Tensor:
    return columns(q)[:, None] >= columns(q)


def packed(q: Tensor, doc: Tensor) -> Tensor:
    """(B, 1, S, S) bool: causal inside of documents."""
    return (doc[:, None, :, None] == doc[:, None, None, :]) & causal(q)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * (1 / math.sqrt(D))


# --- the operator ---------------------------------------------------------------------------------------


@case()
def positional(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, packed(q, doc))


@case()
def keywords_and_scale(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(query=q, key=k, value=v, attn_mask=packed(q, doc), scale=0.3)


@case()
def is_causal(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, is_causal=True)


@case()
def a_prefix_of_half_the_row(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    prefix = columns(q) * 2 < q.shape[-2]
    return attention(q, k, v, causal(q) | prefix)


@case()
def a_bias_counted_from_the_end(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    bias = m.slopes[:, None, None] * (q.shape[-2] - 1 - columns(q)) * causal(q)
    return attention(q, k, v, bias[None])


@case()
def everything(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v)


@case()
def without_batch(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return torch.stack([attention(q[i], k[i], v[i], packed(q, doc)[i]) for i in range(2)])


@case(left=2 * H)
def five_dimensions(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    slopes = m.slopes[:, None, None] * (columns(q)[:, None] - columns(q))
    mask = slopes.masked_fill(~packed(q, doc), -math.inf)
    return attention(q[None], k[None], v[None], mask[None])[0]


@case(kv=2)
def groups_of_heads(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    q, k, v = q.unflatten(1, (2, 2)), k[:, :, None], v[:, :, None].expand(-1, -1, 2, -1, -1)
    return attention(q, k, v, packed(q, doc)[:, None]).flatten(1, 2)


@case()
def of_an_attention(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    first = attention(q, k, v, packed(q, doc))
    return attention(first, attention(k, first, v), first, packed(q, doc))


@case()
def float_infinite(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    s = q.shape[2]
    return attention(q, k, v, q.new_zeros(2, 1, s, s).masked_fill(~packed(q, doc), -math.inf))


@case()
def float_lowest(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, (1.0 - packed(q, doc).double()) * torch.finfo(torch.float64).min)


@case()
def scores_above(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    """What is compared is the score before its factor."""
    scores = q @ k.mT
    kept = (scores > 0.1) | (columns(q)[:, None] == columns(q))
    return (scores * 0.35).masked_fill(~(kept & packed(q, doc)), -math.inf).softmax(-1) @ v


@case()
def window_over_positions(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = pos[:, :, None] - pos[:, None, :]
    return attention(q, k, v, ((d >= 0) & (d < 5) & (doc[:, :, None] == doc[:, None, :]))[:, None])


@case()
def chunks(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    same = torch.div(i[:, None], 4, rounding_mode="floor") == i // 4
    return attention(q, k, v, same & causal(q))


@case()
def distances_divided(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = columns(q)[:, None] - columns(q)
    return attention(q, k, v, (torch.div(d, 3, rounding_mode="floor") == 0) | (d / 3 == 1) | (d == 0))


@case(dense_masks=1)
def distances_truncated(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = columns(q)[:, None] - columns(q)
    return attention(q, k, v, ((d / 3).long() == 0) & (d >= 0))


@case()
def alpha(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    return attention(q, k, v, (torch.sub(i[:, None], i, alpha=2) >= 0) | (i == 0))


@case()
def booleans_multiplied_and_written_in_place(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    mask = (causal(q) * (doc[:, :, None] == doc[:, None])).clone()
    mask |= columns(q) == 0
    return attention(q, k, v, mask[:, None])


@case()
def key_padding(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, (doc < 2)[:, None, None, :] | (columns(q) == 0))


@case()
def a_float_per_key(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, (doc.double() * -0.3)[:, None, None, :].expand(-1, 1, q.shape[2], -1))


@case()
def distance(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, (columns(q)[:, None] - columns(q)).abs() <= 3)


@case()
def cut_from_a_larger_mask(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = torch.arange(q.shape[2] + 3)
    return attention(q, k, v, (i[:, None] >= i)[: q.shape[2], : q.shape[2]])


@case(dense_masks=1)
def tenths_apart(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    far = (i[:, None] - i).float() * 0.1  # 3 * 0.1 is more than 0.3
    return attention(q, k, v, (far <= 0.3) & (far >= 0.0))


@case()
def halves_apart(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    return attention(q, k, v, ((i[:, None] - i).float() * 0.5 - 1.25).abs() <= 1.5)


@case(dense_masks=1)
def apart_in_half_precision(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    far = (i[:, None] - i + 300).bfloat16()  # 301 is 300
    return attention(q, k, v, (far <= 300) & (far >= 297))


@case()
def hashed(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q).int()  # products wrap
    return attention(q, k, v, ((i[:, None] * 715827882 + i * 40503) % 7 < 4) | (i[:, None] == i))


@case(dense_masks=1)
def a_product_as_mask(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    one_hot = F.one_hot(doc, 9).double()
    return attention(q, k, v, (one_hot @ one_hot.mT > 0)[:, None])


# --- written out ----------------------------------------------------------------------------------------


@case()
def masked_fill(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return F.softmax(scores(q, k).masked_fill(~packed(q, doc), -math.inf), dim=-1) @ v


@case()
def where_a_constant(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    a = torch.where(packed(q, doc), torch.matmul(q, k.mT) / 3, torch.tensor(-math.inf))
    return torch.matmul(a.softmax(-1), v)


@case()
def where_the_lowest(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(packed(q, doc), scores(q, k), lowest).softmax(-1) @ v


@case()
def additive(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return torch.softmax(scores(q, k) + (1 - packed(q, doc).to(q.dtype)) * -10000.0, -1) @ v


def weighted(q: Tensor, doc: Tensor, pos: Tensor) -> Tensor:
    """(B, 1, S, S) float: zero or one, as a product with a floating mask of keys."""
    return packed(q, doc).to(q.dtype) * (pos != 2).to(q.dtype)[:, None, None, :]


@case()
def additive_weighted(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    bias = m.slopes[:, None, None] * (columns(q) - columns(q)[:, None])
    a = scores(q, k) + bias + (1 - weighted(q, doc, pos)) * torch.finfo(q.dtype).min
    return a.softmax(-1) @ v


@case()
def slopes_without_gradient(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = columns(q)[:, None] - columns(q)
    with torch.no_grad():
        far = m.relative[:, d + 64]
    a = scores(q, k) + 0.5 * m.relative.t().detach()[d + 64].permute(2, 0, 1) + far
    return a.masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v + m.relative.sum()


@case()
def straight_through(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    bias = m.relative[:, columns(q)[:, None] - columns(q) + 64]
    a = scores(q, k) + (bias * 3 - bias.detach() * 3 + bias.detach())
    return a.masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def without_gradient(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        y = scores(q, k).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v
    return y + v


@case()
def bits(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = columns(q)
    return attention(q, k, v, ((i[:, None] & 4) == (i & 4)) & ((i[:, None] >> 1 | 2) >= (i >> 1 | 2)))


@case(dense_masks=1)
def slices_from_the_end(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    near = (
        packed(q, doc)[..., -40:] & (columns(q) >= 0)[-1:] & m.triangle[:, :, -64:, -9:][..., :1, :1].bool()
    )
    return attention(q, k, v, near | torch.eye(q.shape[2], dtype=torch.bool))


@case()
def steps_apart(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    i = (columns(q) + 3) // 4
    return attention(q, k, v, (i[:, None] - i).abs() <= 1)


@case()
def filled_where_light(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return scores(q, k).masked_fill(weighted(q, doc, pos) < 0.5, -1e9).softmax(-1) @ v


@case()
def triangles(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    s = q.shape[2]
    same = (doc[:, None, :, None] == doc[:, None, None]).float()
    a = scores(q, k).masked_fill(torch.tril(torch.ones(s, s)) * same == 0, -1e9)
    return (a + torch.triu(torch.full((s, s), -math.inf), diagonal=1)).softmax(-1) @ v


@case()
def triangle_buffer(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    s = q.shape[2]
    a = scores(q, k).masked_fill(m.triangle[:, :, :s, :s] == 0, -math.inf)
    return a.masked_fill(doc[:, None, :, None] != doc[:, None, None], -math.inf).softmax(-1) @ v


@case()
def soft_cap(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return (5 * torch.tanh(scores(q, k) / 5)).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def sigmoid_scores(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return scores(q, k).sigmoid().masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def masks_by_score(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    a = scores(q, k)
    i = columns(q)
    return a.masked_fill((a < 0) & (i[:, None] != i), -math.inf).softmax(-1) @ v


@case()
def as_wide_as_the_scores(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    a = scores(q, k)
    far = torch.arange(a.size(-1)).to(a.dtype).log1p()
    allowed = torch.ones_like(a, dtype=torch.bool).tril()
    return (a + far).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@case()
def alibi(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    bias = m.slopes[:, None, None] * (columns(q) - columns(q)[:, None])
    return (scores(q, k) + bias).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def relative_bias(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = columns(q)[:, None] - columns(q)
    bias = m.relative[:, d + 64] + m.relative.t()[d + 64].permute(2, 0, 1)
    return (scores(q, k) + bias).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def relative_embedding(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    d = (columns(q)[:, None] - columns(q)).clamp(-4, 4) + 64
    bias = m.buckets(d).permute(2, 0, 1)[None]
    return (scores(q, k) + bias).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case()
def casts_and_idle_dropout(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    a = scores(q, k).masked_fill(~packed(q, doc), -math.inf).softmax(-1, dtype=torch.float64).to(q.dtype)
    return F.dropout(a, p=0.0) @ v


@case()
def keys_with_their_size_first(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    k = (k * 2).permute(0, 1, 3, 2).contiguous()
    return (q @ k).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v


@case(kv=H, left=2 * H)
def three_dimensions(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    q, k, v = (x.reshape(2 * H, -1, D) for x in (q, k, v))
    a = torch.bmm(q, k.transpose(1, 2)).masked_fill(~causal(q), -math.inf)
    return torch.bmm(a.softmax(-1), v).view(2, H, -1, D)


@case(kv=H, left=2 * H)
def bias_first(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    q, k, v = (x.reshape(2 * H, -1, D) for x in (q, k, v))
    bias = (m.slopes[:, None, None] * columns(q)[None, None]).repeat(2, 1, 1)
    a = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.7, alpha=0.3).masked_fill(~causal(q), -math.inf)
    return torch.bmm(a.softmax(-1), v).view(2, H, -1, D)


# --- fewer key/value heads ------------------------------------------------------------------------------


def repeat_kv(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d)


def tiled(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, None].expand(b, 2, h, s, d).reshape(b, 2 * h, s, d)


@case(kv=2)
def enable_gqa(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k, v, packed(q, doc), enable_gqa=True)


@case(kv=2)
def repeated(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, repeat_kv(k), repeat_kv(v), packed(q, doc))


@case(kv=2)
def repeated_written_out(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return scores(q, repeat_kv(k)).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ repeat_kv(v)


@case(kv=2)
def interleaved(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=-3), packed(q, doc))


@case(kv=2, left=4)
def interleaved_unevenly(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    k, v = (x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=4) for x in (k, v))
    return attention(q, k, v, packed(q, doc))


@case(kv=2, left=4)
def tiles(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, k.repeat(1, 2, 1, 1), tiled(v), packed(q, doc))


@case(kv=2, left=4)
def tiled_keys_and_repeated_values(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return attention(q, tiled(k), repeat_kv(v), packed(q, doc))


@case(kv=1)
def one_head_for_all(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
    return scores(q, k).masked_fill(~packed(q, doc), -math.inf).softmax(-1) @ v
