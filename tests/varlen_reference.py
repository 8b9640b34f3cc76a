"""ATen's flash attention over sequences, by its documentation and dense, for tensors on CPU.

``reference_kernels()`` puts it in the place of the two operators, and our kernel of CUDA in the place of that
of CPU: everything of ours runs, in float64 if need be.  It insists on what the real ones insist on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hsap_compile.kernels import varlen

calls: list[tuple[str, int, int, bool]] = []  # of every call: its name, sequences, query rows, causal


def _logits(q: Tensor, k: Tensor, scale: float, left: int, right: int) -> Tensor:
    """(Hq, nq, nk), -inf outside of the window, which stands at the last query and key."""
    nq, nk = q.shape[0], k.shape[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q, k) * scale
    at = torch.arange(nq)[:, None] + nk - nq
    key = torch.arange(nk)
    hidden = torch.zeros(nq, nk, dtype=torch.bool)
    if left >= 0:
        hidden |= key < at - left
    if right >= 0:
        hidden |= key > at + right
    return found.masked_fill(hidden, -torch.inf)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int,
    dropout: float, causal: bool, left: int | None, right: int | None,
) -> tuple[list[tuple[slice, slice]], int, int]:  # fmt: skip
    assert q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == v.dim() == 3 and dropout == 0.0
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256 and q.shape[2] % 8 == 0
    assert q.shape[1] % k.shape[1] == 0 and k.shape[:2] == v.shape[:2]
    for x in (q, k, v):
        places = (x.data_ptr(), *(s * x.itemsize for s in x.stride()[:2]))
        assert x.stride(2) == 1 and not any(place % 16 for place in places)
    for ends, rows, longest in ((q_ends, q.shape[0], max_q), (k_ends, k.shape[0], max_k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends[0] == 0 and ends[-1] == rows
        assert (ends.diff() > 0).all() and ends.diff().max() <= longest
    assert max_q > 1 and max_k == k_ends.diff().max(), "the kernel takes another path, or leaves keys out"
    left, right = (-1 if x is None else x for x in (left, right))
    right = 0 if causal else right
    if left >= max_k:
        left = -1
    if right >= max_k:
        right = -1
    at = [list(zip(e.tolist(), e[1:].tolist(), strict=False)) for e in (q_ends, k_ends)]
    return [(slice(*a), slice(*b)) for a, b in zip(*at, strict=True)], left, right


def forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not any(x is not None for x in others.values()) and not return_debug_mask and scale is not None
    parts, left, right = _checked(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, window_size_left,
        window_size_right,
    )  # fmt: skip
    calls.append(("forward", len(parts), query.shape[0], is_causal))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=wide)
    for q, k in parts:
        logits = _logits(query[q].to(wide), key[k].to(wide), scale, left, right)
        lse[:, q] = logits.logsumexp(-1)
        assert lse[:, q].isfinite().all(), "a query without a key"
        weights = (logits - lse[:, q, None]).exp()
        values = value[k].to(wide).repeat_interleave(query.shape[1] // value.shape[1], 1)
        out[q] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    state = query.new_zeros(2, dtype=torch.uint64)
    return out, lse, state, state[0], query.new_empty(0)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts, left, right = _checked(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, window_size_left,
        window_size_right,
    )  # fmt: skip
    assert grad_out.dtype == out.dtype == query.dtype and grad_out.shape == out.shape == query.shape
    assert grad_out.stride(2) == out.stride(2) == 1 and scale is not None
    assert logsumexp.shape == (query.shape[1], query.shape[0]) and logsumexp.is_contiguous()
    calls.append(("backward", len(parts), query.shape[0], is_causal))
    wide = logsumexp.dtype
    assert wide == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    group = query.shape[1] // key.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    for q, k in parts:
        qs, ks, vs, grad, o = (x.to(wide) for x in (query[q], key[k], value[k], grad_out[q], out[q]))
        weights = (_logits(qs, ks, scale, left, right) - logsumexp[:, q, None]).exp()
        d_weights = torch.einsum("qhd,khd->hqk", grad, vs.repeat_interleave(group, 1))
        d_logits = weights * (d_weights - (grad * o).sum(-1).T[..., None]) * scale
        dq[q] = torch.einsum("hqk,khd->qhd", d_logits, ks.repeat_interleave(group, 1)).to(dq.dtype)
        for total, left_side, right_side in ((dk, d_logits, qs), (dv, weights, grad)):
            found = torch.einsum("hqk,qhd->khd", left_side, right_side)
            total[k] = found.unflatten(1, (-1, group)).sum(2).to(total.dtype)
    return dq, dk, dv


@contextlib.contextmanager
def reference_kernels() -> Iterator[list[tuple[str, int, int, bool]]]:
    """``hsap::attend`` on CPU is that of CUDA, over the two functions above, whose calls are listed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(varlen, "DEVICES", ("cpu",))
        patch.setattr(varlen, "DTYPES", (*varlen.DTYPES, torch.float32, torch.float64))
        calls.clear()
        for space, name, function in (
            ("aten", "_flash_attention_forward", forward),
            ("aten", "_flash_attention_backward", backward),
            ("hsap", "attend", varlen.attend),
            ("hsap", "attend_backward", varlen.attend_backward),
        ):
            library = torch.library.Library(space, "IMPL")
            stack.callback(library._destroy)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators,  other operators may")
                library.impl(name, function, "CPU", allow_override=True)
        yield calls
