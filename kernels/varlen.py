"""Partial attention on CUDA: ATen's flash attention over sequences of unlike lengths.

Shapes: R own rows, C remote rows, Hq query heads, Hkv key/value heads, D / Dv head sizes, M slices, T query
rows of a call.

It computes ``hsap::attend`` over slices that are full, causal or bands, by the operators that
torch.nn.attention.varlen calls; no formula is evaluated.  ``sequences.py`` makes a few calls of the slices.
Rows that lie together are read in place, others are gathered.  What calls say about the same query row is
merged by log-sum-exp, in float32, as in flex.py; the gradients that several sequences give to one row are
added up in float32.  A backward is given the merged out and lse, so that each call gives its exact part.

The two operators, as torch 2.13 has them (nobody has run this on a GPU yet):
    - float16 and bfloat16; q, k and v of one head size, a multiple of 8 up to 256.  Others are padded by
      zeros, which change neither products nor what they weigh.
    - cumulative lengths are int32 on the device, the longest sequences are numbers on the host.  Both are
      made inside of our operator, so that other documents neither compile again nor wait for the device.
    - lse is (Hq, T) in float32, natural.
    - a call in which no sequence has more than one query swaps queries and heads (``_LEAST``).
    - the backward adds up dq in no fixed order, unless torch.use_deterministic_algorithms asks for one, and
      holds in float32 128 rows of dq for every sequence, beside those that there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsap_compile._torch import without_autocast
from hsap_compile.kernels import formula_blocks
from hsap_compile.kernels.attend import compute_dtype, with_gradient_of_lse
from hsap_compile.kernels.flex import merge
from hsap_compile.kernels.formula_blocks import Formula
from hsap_compile.kernels.sequences import CAUSE, Calls, Rows, calls

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # head size

_MULTIPLE = 8  # of head sizes
_LOAD_BYTES = 16  # that the kernel reads at once: where rows and heads begin is a multiple of it
# Where the longest sequence has one query, ATen's kernel takes each to have exactly one, and swaps query
# heads with queries.  A longest one of two queries is a bound as well, and leaves that path alone.
_LEAST = 2

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


class _Operands(NamedTuple):
    """Rows as the kernel takes them: (rows, heads, size) of one size, with last stride 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_remote: Tensor
    v_remote: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None,
        grad_out: Tensor | None = None,
    ) -> _Operands:  # fmt: skip
        size = max(x.shape[2] for x in (q, v, grad_out) if x is not None)
        size = -(-size // _MULTIPLE) * _MULTIPLE
        k_far = k[:0] if k_remote is None else k_remote
        v_far = v[:0] if v_remote is None else v_remote
        return cls(*(_padded(x, size) for x in (q, k, v, k_far, v_far)))

    @property
    def size(self) -> int:
        return self.q.shape[2]

    def keys(self, call: _Call) -> tuple[Tensor, Tensor]:
        """k and v of a call."""
        k, v = (self.k_remote, self.v_remote) if call.remote else (self.k, self.v)
        return call.k.read(k), call.k.read(v)


def _padded(x: Tensor, size: int) -> Tensor:
    x = x.detach()
    if x.shape[2] < size:
        return torch.nn.functional.pad(x, (0, size - x.shape[2]))
    begin = (x.data_ptr(), *(step * x.itemsize for step in x.stride()[:2]))
    readable = x.stride(2) == 1 and not any(place % _LOAD_BYTES for place in begin)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


class _Rows(NamedTuple):
    """``Rows`` on the device."""

    start: int
    size: int
    numbers: Tensor | None

    def all_of(self, x: Tensor) -> bool:
        """Whether these are the rows of ``x``, in order."""
        return self.numbers is None and self.size == x.shape[0]

    def read(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.start, self.size) if self.numbers is None else x.index_select(0, self.numbers)

    def write(self, x: Tensor, rows: Tensor) -> None:
        """None of the rows occurs twice."""
        if self.numbers is None:
            x.narrow(0, self.start, self.size).copy_(rows)
        else:
            x[self.numbers] = rows.to(x.dtype)

    def add(self, x: Tensor, rows: Tensor) -> None:
        if self.numbers is None:
            x.narrow(0, self.start, self.size).add_(rows)
        else:
            x.index_add_(0, self.numbers, rows.to(x.dtype))


class _Call(NamedTuple):
    """``Call`` on the device."""

    remote: bool
    q: _Rows
    k: _Rows
    lengths: tuple[Any, ...]  # cumulative ones of queries and keys, longest of both
    window: dict[str, int]
    causal: bool
    first: bool


def _on(device: torch.device, found: Calls) -> Iterator[_Call]:
    """The calls with their tables on the device, in one copy that nobody waits for."""
    if not found.calls:
        return
    tables: list[Any] = []
    for call in found.calls:
        tables += [call.q_ends, call.k_ends, call.q.numbers, call.k.numbers]
    sizes = [0 if x is None else len(x) for x in tables]
    flat = torch.from_numpy(np.concatenate([x for x in tables if x is not None]))
    flat = flat.to(torch.int32)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = iter(flat.split(sizes))
    for call in found.calls:
        q_ends, k_ends, q, k = (next(parts) for _ in range(4))
        longest_q, longest_k = call.longest
        left, right = call.window
        yield _Call(
            call.remote,
            _placed(call.q, q),
            _placed(call.k, k),
            (q_ends, k_ends, max(longest_q, _LEAST), longest_k),
            {} if call.window == CAUSE else {"window_size_left": left, "window_size_right": right},
            call.window == CAUSE,
            call.first,
        )


def _placed(rows: Rows, numbers: Tensor) -> _Rows:
    return _Rows(rows.start, rows.size, None if rows.numbers is None else numbers)


def _sink(
    mod: str,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    tokens: int,
    dtype: torch.dtype,
) -> Formula | None:
    """The formula, where it has a sink; nothing else of it is needed."""
    if not mod or formula_blocks.read(mod).sink is None:
        return None
    return Formula.ready(mod, rows, remote_rows, heads, leaves, tokens, dtype)


# ---------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    slices: Tensor,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    mod: str,
    tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with without_autocast():
        x = _Operands.of(q, k, v, k_remote, v_remote)
        found = calls(slices, q.shape[0], x.k_remote.shape[0])
        wide = compute_dtype(q.dtype)
        sink = _sink(mod, rows, remote_rows, heads, leaves, tokens, wide)
        total = _Merge(q, v.shape[2], wide if found.shared_queries or sink is not None else q.dtype)
        for call in _on(q.device, found):
            out, lse = _forward(
                call.q.read(x.q), *x.keys(call), *call.lengths, 0.0, call.causal, False, scale=scale,
                **call.window,
            )[:2]  # fmt: skip
            total.add(call, out, lse.t())
        out, lse = total.total()
        if sink is not None:
            out, lse = formula_blocks.sink_forward(sink, out, lse)
        return out.to(q.dtype).contiguous(), lse.contiguous()


class _Merge:
    """Softmax-weighted means of what calls say about the same rows; out (R, Hq, Dv), lse (R, Hq)."""

    def __init__(self, q: Tensor, size: int, dtype: torch.dtype) -> None:
        self._q, self._size, self._dtype = q, size, dtype
        self._found: tuple[Tensor, Tensor] | None = None

    def add(self, call: _Call, out: Tensor, lse: Tensor) -> None:
        """out (T, Hq, at least Dv), lse (T, Hq) of the call's rows."""
        out = out[..., : self._size]
        if self._found is None and call.q.all_of(self._q):
            self._found = out.to(self._dtype), lse
            return
        total = self.total()
        if not call.first:
            old, old_lse = (call.q.read(x) for x in total)
            out, lse = merge(old, old_lse, out.to(self._dtype), lse)
        for x, rows in zip(total, (out, lse), strict=True):
            call.q.write(x, rows)

    def total(self) -> tuple[Tensor, Tensor]:
        """0 and -inf in rows that no call has."""
        if self._found is None:
            rows = self._q.shape[:2]
            out = self._q.new_zeros(*rows, self._size, dtype=self._dtype)
            lse = self._q.new_full(rows, -math.inf, dtype=compute_dtype(self._q.dtype))
            self._found = out, lse
        return self._found


# ---------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()  # there is no autograd kernel above this one: a sink's gradient is taken inside
def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    slices: Tensor,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    mod: str,
    tokens: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    with without_autocast():
        grad_out, out = with_gradient_of_lse(grad_out, grad_lse, out)
        x = _Operands.of(q, k, v, k_remote, v_remote, grad_out)
        found = calls(slices, q.shape[0], x.k_remote.shape[0])
        wide = compute_dtype(q.dtype)
        sink = _sink(mod, rows, remote_rows, heads, leaves, tokens, wide)
        sums = [] if sink is None else [torch.zeros_like(sink.leaves[i]) for i in wanted]
        if sink is not None:
            delta = (grad_out.to(wide) * out).sum(-1)
            formula_blocks.sink_backward(sink, delta, lse, wanted, sums)
        grad, out = (_padded(y, x.size) for y in (grad_out, out))
        d_q = _Sum(q, found.shared_queries)
        d_own = [_Sum(y, found.shared_keys) for y in (k, v)]
        k_far, v_far = (y[:0] if z is None else z for y, z in ((k, k_remote), (v, v_remote)))
        d_far = [_Sum(y, found.shared_remote) for y in (k_far, v_far)]
        nothing = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)  # of dropout, and unused
        for call in _on(q.device, found):
            *rows_of, lse_T = (call.q.read(y) for y in (grad, x.q, out, lse))
            dq, dk, dv = _backward(
                rows_of[0], rows_of[1], *x.keys(call), rows_of[2], lse_T.t().contiguous(), *call.lengths, 0.0,
                call.causal, *nothing, scale=scale, **call.window,
            )  # fmt: skip
            d_q.add(call.q, dq)
            for total, part in zip(d_far if call.remote else d_own, (dk, dv), strict=True):
                total.add(call.k, part)
        dk, dv, dk_far, dv_far = (total.total() for total in (*d_own, *d_far))
        return d_q.total(), dk, dv, dk_far, dv_far, formula_blocks.leaf_grads(leaves, wanted, sums)


class _Sum:
    """(rows, heads, size) as ``like``, summed up from what calls give to some of the rows."""

    def __init__(self, like: Tensor, shared: bool) -> None:
        self._like = like
        self._dtype = compute_dtype(like.dtype) if shared else like.dtype
        self._total: Tensor | None = None

    def add(self, rows: _Rows, part: Tensor) -> None:
        """part (rows, heads, at least size)"""
        part = part[..., : self._like.shape[2]]
        if self._total is None and rows.all_of(self._like):
            self._total = part.to(self._dtype)
        else:
            self._total = self._begun()
            rows.add(self._total, part)

    def _begun(self) -> Tensor:
        shape = self._like.shape
        return self._like.new_zeros(shape, dtype=self._dtype) if self._total is None else self._total

    def total(self) -> Tensor:
        return self._begun().to(self._like.dtype).contiguous()


torch.library.impl("hsap::attend", "cuda", attend)
torch.library.impl("hsap::attend_backward", "cuda", attend_backward)
