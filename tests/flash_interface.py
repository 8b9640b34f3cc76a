"""An attention library as GPU ones are: two operators that autograd knows nothing of, for sequences of unlike
lengths and for rows, and autograd functions around them.  Dense, for tensors on CPU, in float64 if need be.

Where a sequence has other numbers of queries and keys, causal order and windows count from their ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIBRARY = "hsap_test_flash"


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, right: int) -> Any:
    """(n, H, D) and its weights (H, n, m) and log-sum-exp (H, n)."""
    at = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    right = 0 if causal else right
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if right >= 0:
        hidden |= key > at + right
    if left >= 0:
        hidden |= key < at - left
    logits = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, -torch.inf)
    weights = logits.softmax(-1).nan_to_num()  # of no key at all
    return torch.einsum("hqk,khd->qhd", weights, v), weights, logits.logsumexp(-1)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    many = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(many, 1), v.repeat_interleave(many, 1)


def _sequences(ends: Tensor) -> list[slice]:
    return [slice(*pair) for pair in zip(ends.tolist(), ends[1:].tolist(), strict=False)]


def _forward(q: Tensor, k: Tensor, v: Tensor, ends: Any, of_keys: Any, *how: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
    for at, keys in zip(_sequences(ends), _sequences(of_keys), strict=True):
        out[at], _, lse[:, at] = _dense(*_repeated(q[at], k[keys], v[keys]), *how)
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, ends: Any, of_keys: Any, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for at, keys in zip(_sequences(ends), _sequences(of_keys), strict=True):
        wide = _repeated(q[at], k[keys], v[keys])
        _, weights, _ = _dense(*wide, *how)
        dweights = torch.einsum("qhd,khd->hqk", dout[at], wide[2])
        dlogits = weights * (dweights - (dout[at] * out[at]).sum(-1).T[..., None]) * how[0]
        dq[at] = torch.einsum("hqk,khd->qhd", dlogits, wide[1])
        narrow = (k.shape[1], -1)
        dk[keys] = torch.einsum("hqk,qhd->khd", dlogits, q[at]).unflatten(1, narrow).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights, dout[at]).unflatten(1, narrow).sum(2)
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] + 1) * x.shape[1]


@torch.library.custom_op(f"{LIBRARY}::varlen_forward", mutates_args=())
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = (softmax_scale, causal, window_size_left, window_size_right)
    out, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *how)
    return out * (1.0 + softcap + dropout_p), lse  # of a meaning that a mask does not have


@varlen_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])


@torch.library.custom_op(f"{LIBRARY}::varlen_backward", mutates_args=("dq", "dk", "dv"))
def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    how = (softmax_scale, causal, window_size_left, window_size_right)
    dout, out = dout * (1.0 + softcap + dropout_p), out / (1.0 + softcap + dropout_p)
    found = _backward(dout, q, k, v, out, cu_seqlens_q, cu_seqlens_k, *how)
    for place, value in zip((dq, dk, dv), found, strict=True):
        place.copy_(value)
    return torch.zeros_like(softmax_lse)


@varlen_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(softmax_lse)


def _saved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.how = inputs[5:]


def _tripled(ctx: Any, dout: Tensor, _: Tensor) -> Any:
    *given, out, lse = ctx.saved_tensors
    places = [torch.zeros_like(x) for x in given[:3]]
    getattr(torch.ops, LIBRARY).varlen_backward(3 * dout, *given[:3], out, lse, *places, *given[3:], *ctx.how)
    return (*places, *[None] * (2 + len(ctx.how)))


@torch.library.custom_op(f"{LIBRARY}::bare", mutates_args=())
def bare(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Its registered gradient is three times its derivative."""
    how = (softmax_scale, causal, window_size_left, window_size_right)
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *how)


@bare.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])


bare.register_autograd(_tripled, setup_context=_saved)


@torch.library.custom_op(f"{LIBRARY}::forward", mutates_args=())
def rows_forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = (softmax_scale, causal, window_size_left, window_size_right)
    out, lse = _forward(*(x.flatten(0, 1) for x in (q, k, v)), _rows(q), _rows(k), *how)
    return out.view(q.shape), lse


@rows_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[2], q.shape[0] * q.shape[1])


@torch.library.custom_op(f"{LIBRARY}::backward", mutates_args=("dq", "dk", "dv"))
def rows_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
) -> None:  # fmt: skip
    how = (softmax_scale, causal, window_size_left, window_size_right)
    found = _backward(*(x.flatten(0, 1) for x in (dout, q, k, v, out)), _rows(q), _rows(k), *how)
    for place, value in zip((dq, dk, dv), found, strict=True):
        place.copy_(value.view(place.shape))


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, [0, -width % 8]) if width % 8 else x


class Sequences(torch.autograd.Function):
    """Of sequences.  ``wrong``: how the backward is not the derivative, or the forward something else."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, of_keys: Tensor, longest: int, causal: bool,
        window: tuple[int, int], dropout: float, softcap: float, wrong: str,
    ) -> Any:  # fmt: skip
        width, ctx.wrong = q.shape[-1], wrong
        ctx.how = (dropout, width**-0.5, causal, *window, softcap)
        q, k, v = (_padded(x, width) for x in (q, k, v))
        ops = getattr(torch.ops, LIBRARY)
        out, lse = ops.varlen_forward(q, k, v, ends, of_keys, longest, longest, *ctx.how)
        if wrong == "padded":
            v = F.pad(v[..., :-1], [0, 1], value=0.5)
        kept = q.detach() if wrong == "keys" else k
        ctx.longest = longest
        ctx.save_for_backward(q, kept, v, out, lse, ends, of_keys)
        y = out[..., :width]
        if wrong == "doubled":
            y = y * 2
        if wrong == "out shifted":
            y = F.pad(y, [-1, 1])
        return (y, lse) if wrong == "lse" else y

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        q, k, v, out, lse, ends, of_keys = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        width, how = dout.shape[-1], list(ctx.how)
        if ctx.wrong == "scale":
            how[1] = 0.5 * how[1]
        if ctx.wrong == "gradient":
            dout = dout * 2
        if ctx.wrong == "k shifted":
            k = F.pad(k, [-1, 1])
        if ctx.wrong == "dout shifted":
            dout = F.pad(dout, [-1, 1])
        if ctx.wrong == "sliced":
            v = F.pad(v[..., :-1], [0, 1])
        args = (_padded(dout, width), q, k, v, out, lse, dq, dk, dv, ends, of_keys, ctx.longest, ctx.longest)
        getattr(torch.ops, LIBRARY).varlen_backward(*args, *how)
        if ctx.wrong == "swapped":
            dq, dk = dk, dq
        if ctx.wrong == "clipped":
            dv = dv.clamp(-1e-3, 1e-3)
        if ctx.wrong == "dq shifted":
            dq = F.pad(dq, [-1, 1])
        first = dq.shape[-1] - width if ctx.wrong == "last of dq" else 0
        dq = dq[..., first : first + width]
        dk, dv = (x[..., :width] for x in (dk, dv))
        if ctx.wrong == "no dk":
            return dq, None, dv, None, None, None, None, None, None, None, None
        return dq, dk, dv, None, None, None, None, None, None, None, None


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
        ctx.how = (q.shape[-1] ** -0.5, causal, *window)
        out, lse = getattr(torch.ops, LIBRARY).forward(q, k, v, *ctx.how)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        getattr(torch.ops, LIBRARY).backward(dout, q, k, v, out, lse, dq, dk, dv, *ctx.how)
        return dq, dk, dv, None, None


class Packed(nn.Module):
    """A model over sequences in one row (T,), or in several, (B, S), that it makes one, or with ``ends`` None
    over rows; four query heads."""

    def __init__(self, width: int = 8, kv_heads: int = 2, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.kv_heads, self.how = width, kv_heads, how
        self.words = nn.Embedding(50, 16).double()
        self.qkv = nn.Linear(16, (4 + 2 * kv_heads) * width).double()

    def forward(
        self, ids: Tensor, ends: Tensor | None = None, of_keys: Tensor | None = None, longest: int = 0
    ) -> Tensor:
        x = self.words(ids)
        parts = self.qkv(x).split([heads * self.width for heads in (4, self.kv_heads, self.kv_heads)], -1)
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in parts)
        causal, window = self.how.get("causal", True), self.how.get("window", (-1, -1))
        if ends is None:
            return Rows.apply(q, k, v, causal, window).square().mean()  # type: ignore[no-any-return]
        q, k, v = (t.flatten(0, -3) for t in (q, k, v))
        rest = (self.how.get("dropout", 0.0), self.how.get("softcap", 0.0), self.how.get("wrong", ""))
        if self.how.get("bare"):
            how = (0.0, self.width**-0.5, causal, *window)
            y, _ = getattr(torch.ops, LIBRARY).bare(q, k, v, ends, of_keys, longest, longest, *how)
            return y.square().mean()  # type: ignore[no-any-return]
        y = Sequences.apply(q, k, v, ends, of_keys, longest, causal, window, *rest)
        if isinstance(y, tuple):
            return (y[0].square().mean() + y[1].square().mean()) / 2
        return y.square().mean()  # type: ignore[no-any-return]
