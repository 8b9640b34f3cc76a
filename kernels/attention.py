"""Partial attention on CPU: slices of queries against slices of keys, one softmax per query row.

Shapes: R own rows, C remote rows, Hq query heads, Hkv key/value heads (query head i reads key head
i // (Hq // Hkv)), D / Dv head sizes, M slices, N blocks of one run.

``hsap::attend`` runs ATen's flash kernel on views of the rows: one call for slices that are equally long and
equally spaced, several for a causal slice whose hidden half is worth leaving out (see slices.py).  Slices
whose logits are an index formula take a dense path in blocks.  What slices say about the same query row is
merged by log-sum-exp.

float16 and bfloat16 are computed in float32, converted run by run: one rounding at the end is more exact than
one per slice, and ATen's own half precision is slower or equal (float16: forward 2 to 4, backward 11 to 40
times; bfloat16: equal, 3 times slower backward at 64 tokens).  The exception is bfloat16 backward over 1024
and more tokens on a CPU that multiplies bfloat16, which is 1.25 times faster than this (torch 2.13,
AVX512-BF16, one thread).

Memory beside the results: one run's operands where they are converted, one call's results, a mask of
64 x 1024 for causal slices, and for other bands masks of at most 2**22 elements each, one of each distinct
shape.  Nothing grows with the square of the rows.  Half-precision results that several slices share are first
summed up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsap_compile.kernels import formula_blocks
from hsap_compile.kernels.attend import BACKWARD as BACKWARD
from hsap_compile.kernels.attend import OP as OP
from hsap_compile.kernels.attend import compute_dtype, with_gradient_of_lse
from hsap_compile.kernels.formula_blocks import Formula
from hsap_compile.kernels.slices import BAND as BAND
from hsap_compile.kernels.slices import CAUSAL as CAUSAL
from hsap_compile.kernels.slices import FULL as FULL
from hsap_compile.kernels.slices import MOD as MOD
from hsap_compile.kernels.slices import STAIR_TOKENS, STEP, Cover, Plan, Run, Span, plan

_FAR = 256.0  # |lse| from which float32 cannot tell exp(logit - lse) to 1e-5: see _log_mass

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# ---------------------------------------------------------------------------------------------------
# Operands
# ---------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """With last stride 1: the kernel reads any other silently wrong."""
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


# The kernel reads keys and values again for every block of queries.  From this many keys on, a copy with each
# head's rows side by side pays (torch 2.13, AVX512: 0.97 of the time at 4096 tokens, nothing at 1024).
_LONG = 2048


@dataclass(frozen=True, slots=True)
class _Operands:
    """Rows, and their blocks as the kernel takes them: in the computed dtype and of one head size."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_remote: Tensor
    v_remote: Tensor
    scale: float
    size: int

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None, scale: float,
        grad_out: Tensor | None = None,
    ) -> _Operands:  # fmt: skip
        """The kernel wants one head size: ``size`` is the largest."""
        k_far = k[:0] if k_remote is None else k_remote
        v_far = v[:0] if v_remote is None else v_remote
        size = max(x.shape[2] for x in (q, v, grad_out) if x is not None)
        return cls(_dense(q), _dense(k), _dense(v), _dense(k_far), _dense(v_far), scale, size)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.q.dtype)

    def plan(self, slices: Tensor) -> Plan:
        rows, heads, _ = self.q.shape
        return plan(slices, rows, self.k_remote.shape[0], heads, heads * self.size)

    def read(self, x: Tensor, span: Span) -> Tensor:
        """Blocks (N, heads, length, size) of rows ``x``: a view, unless they have to be converted."""
        blocks = span.of(x)
        if blocks.dtype != self.dtype:
            blocks = blocks.to(self.dtype, memory_format=torch.contiguous_format)
        missing = self.size - blocks.shape[-1]  # zeros change neither the products nor what they weigh
        return torch.nn.functional.pad(blocks, (0, missing)) if missing else blocks

    def run(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, Hq, nq, size), k and v (N, Hkv, nk, size)."""
        k, v = (self.k_remote, self.v_remote) if run.remote else (self.k, self.v)
        k, v = self.read(k, run.k), self.read(v, run.k)
        if run.k.length >= _LONG:
            k, v = k.contiguous(), v.contiguous()
        return self.read(self.q, run.q), k, v


def _part(x: Tensor, first: int, length: int) -> Tensor:
    """Rows of blocks (N, heads, rows, ...)."""
    return x if length == x.shape[2] else x.narrow(2, first, length)


class _Masks:
    """The additive masks of bands, each distinct one built once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._built: dict[tuple[int, ...], Tensor] = {}

    def of(self, run: Run, first: int, queries: int, keys: int) -> Tensor | None:
        """What hides keys in this call of a run, unless the kernel does by itself."""
        if run.kind == BAND:
            return self._band(queries, keys, run.lo, run.hi)
        if run.kind != CAUSAL or first == 0:
            return None
        # of [0 | causal], as many columns left of the diagonal as there are keys before the first query
        longest = STAIR_TOKENS[1]
        stairs = self._band(STEP, longest, STEP - longest, STEP)
        return stairs[:queries, longest - STEP - first :][:, :keys]

    def _band(self, queries: int, keys: int, lo: int, hi: int) -> Tensor:
        """0 where lo <= i - j <= hi, else -inf."""
        key = (queries, keys, lo, hi)
        if key not in self._built:
            distance = torch.arange(queries)[:, None] - torch.arange(keys)
            outside = (distance < lo) | (distance > hi)
            zeros = torch.zeros(outside.shape, dtype=self._dtype)
            self._built[key] = zeros.masked_fill_(outside, -torch.inf)
        return self._built[key]


def _zero_rows(x: Tensor, holes: tuple[tuple[int, int], ...], value: float) -> Tensor:
    for start, stop in holes:
        x[start:stop] = value
    return x


def _formula_of(
    plan: Plan,
    mod: str,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    tokens: int,
    dtype: torch.dtype,
) -> Formula | None:
    """The formula, where a slice or a sink needs it."""
    needed = any(run.kind == MOD for run in plan.runs)
    if not mod and needed:
        raise ValueError("hsap::attend: a slice of kind MOD, but mod is empty; pass formula.dumps(...)")
    index = Formula.ready(mod, rows, remote_rows, heads, leaves, tokens, dtype) if mod else None
    return index if needed or (index is not None and index.sink is not None) else None


# ---------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------


@torch.library.impl("hsap::attend", "cpu")
@torch.autocast("cpu", enabled=False)  # the products inside are in the computed dtype
def _attend(
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
    x = _Operands.of(q, k, v, k_remote, v_remote, scale)
    plan = x.plan(slices)
    index = _formula_of(plan, mod, rows, remote_rows, heads, leaves, tokens, x.dtype)
    masks = _Masks(x.dtype)
    has_sink = index is not None and index.sink is not None
    total = _Merge(plan.queries, q, v.shape[2], has_sink)
    for run in plan.runs:
        q_run, k_run, v_run = x.run(run)
        if index is not None and run.kind == MOD:
            parts = formula_blocks.forward(index, run, q_run[0], k_run[0], v_run[0], scale)
            total.add(run.q, *(y[None] for y in parts))
            continue
        for first, queries, keys in run.calls():
            out, lse = _flash_forward(
                _part(q_run, first, queries), _part(k_run, 0, keys), _part(v_run, 0, keys), 0.0,
                run.kind == CAUSAL and first == 0, attn_mask=masks.of(run, first, queries, keys), scale=scale,
            )  # fmt: skip
            total.add(run.q.part(first, queries), out, lse, None)
    found, lse = total.out, total.lse()
    if index is not None and has_sink:
        found, lse = formula_blocks.sink_forward(index, found, lse)
    return found.to(q.dtype), lse


class _Merge:
    """Softmax-weighted means of what runs say about the same rows."""

    def __init__(self, cover: Cover, q: Tensor, size: int, rescaled: bool) -> None:
        shape, wide = (cover.rows, q.shape[1]), compute_dtype(q.dtype)
        out = q.new_empty(*shape, size, dtype=wide if cover.shared or rescaled else q.dtype)
        self.out = _zero_rows(out, cover.holes, 0)
        self._peak = _zero_rows(q.new_empty(shape, dtype=wide), cover.holes, -math.inf)
        self._mass = None
        if cover.shared:
            self._mass = _zero_rows(q.new_ones(shape, dtype=wide), cover.holes, 0)

    def add(self, span: Span, out: Tensor, peak: Tensor, mass: Tensor | None) -> None:
        """Blocks out (N, Hq, nq, D), peak and mass (N, Hq, nq): lse = peak + log(mass); mass None means 1."""
        out, total = out[..., : self.out.shape[2]], span.of(self.out)
        if span.alone:
            total.copy_(out)
            span.of(self._peak).copy_(peak if mass is None else peak + mass.log())
            return
        assert self._mass is not None
        old_peak, old_mass = span.of(self._peak), span.of(self._mass)
        top = torch.maximum(old_peak, peak)
        base = top.masked_fill(top == -math.inf, 0)
        old = old_mass * (old_peak - base).exp_()
        new = (peak - base).exp_()
        new = new if mass is None else new.mul_(mass)
        both = old + new
        some = both.masked_fill(both == 0, 1)
        total.mul_((old / some)[..., None]).addcmul_(out, (new / some)[..., None])
        old_peak.copy_(top)
        old_mass.copy_(both)

    def lse(self) -> Tensor:
        return self._peak if self._mass is None else self._peak + self._mass.log()


# ---------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------


@torch.library.impl("hsap::attend_backward", "cpu")
@torch.autocast("cpu", enabled=False)
@torch.no_grad()  # there is no autograd kernel above this one: the formula's gradient is taken inside
def _attend_backward(
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
    grad_out, out = with_gradient_of_lse(grad_out, grad_lse, out)
    x = _Operands.of(q, k, v, k_remote, v_remote, scale, grad_out)
    plan = x.plan(slices)
    index = _formula_of(plan, mod, rows, remote_rows, heads, leaves, tokens, x.dtype)
    softmax = _softmax(x, index, plan, grad_out, out, lse)
    sums = [] if index is None else [torch.zeros_like(index.leaves[i]) for i in wanted]
    if index is not None and index.sink is not None:
        delta = (softmax.grad.to(x.dtype) * softmax.out).sum(-1)
        formula_blocks.sink_backward(index, delta, lse, wanted, sums)
    masks = _Masks(x.dtype)
    d_q = _Sum(plan.queries, q)
    own, remote = (_Sum(plan.keys, k), _Sum(plan.keys, v)), (_Sum(plan.remote, k), _Sum(plan.remote, v))
    for run in plan.runs:
        if index is not None and run.kind == MOD:
            q_run, k_run, v_run = (y[0] for y in x.run(run))
            dq, dk, dv = formula_blocks.backward(
                index, run, q_run, k_run, v_run, scale, softmax.block(x, run), wanted, sums
            )
            d_q.add(run.q, dq[None])
            dk, dv = dk[None], dv[None]
        else:
            dk, dv = _flash_backward_run(x, masks, run, softmax, d_q)
        for total, block in zip(remote if run.remote else own, (dk, dv), strict=True):
            total.add(run.k, block)
    return (
        d_q.total(),
        own[0].total(),
        own[1].total(),
        remote[0].total(),
        remote[1].total(),
        formula_blocks.leaf_grads(leaves, wanted, sums),
    )


@dataclass(frozen=True, slots=True)
class _Softmax:
    """What the backward knows about the softmax of every row."""

    grad: Tensor  # (R, Hq, at least Dv)
    out: Tensor  # as grad
    lse: Tensor  # (R, Hq), +inf where a row has no key: exp(logit - lse) is then 0, not NaN
    log_mass: Tensor | None  # (R, Hq): see _log_mass

    def block(self, x: _Operands, run: Run) -> formula_blocks.Softmax:
        log_mass = None if self.log_mass is None else run.q.of(self.log_mass)[0]
        grad, out = (x.read(y, run.q)[0] for y in (self.grad, self.out))
        return formula_blocks.Softmax(grad, out, run.q.of(self.lse)[0], log_mass)


def _softmax(
    x: _Operands, index: Formula | None, plan: Plan, grad_out: Tensor, out: Tensor, lse: Tensor
) -> _Softmax:
    if index is None:  # every row of a slice then has a key
        return _Softmax(_dense(grad_out), _dense(out), lse, None)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    far = _log_mass(x, index, plan, lse) if index.soft and index.sink is None else None
    return _Softmax(_dense(grad_out), _dense(out), lse, far)


def _log_mass(x: _Operands, index: Formula, plan: Plan, lse: Tensor) -> Tensor | None:
    """What rounding took from lse: log(sum(exp(logit - lse))), in rows where it took a lot.

    A row of n logits that are all finfo.min has lse finfo.min, its log(n) is lost; without this the
    weights of such a row would sum to n.  None when there is no such row, which is the usual case.  Only for
    formulas whose masked logits are finite: their attentions are never split (overlap.py), so that every row
    has all its keys in this call.
    """
    far = (lse.abs() > _FAR) & lse.isfinite()
    for run in plan.runs:
        if run.kind != MOD:  # here the sum would lack a part
            run.q.of(far).fill_(False)
    if not far.any():
        return None
    mass = torch.zeros_like(lse)
    for run in plan.runs:
        if run.kind == MOD and run.q.of(far).any():
            q, k, _ = x.run(run)
            logits = index.logits(formula_blocks.scores(q[0], k[0], x.scale), run, index.leaves)
            run.q.of(mass).add_(logits.sub(run.q.of(lse)[0, ..., None]).exp_().sum(-1))
    return mass.log().masked_fill_(~far, 0)


class _Sum:
    """Rows (rows, heads, size), summed up from the blocks of runs."""

    def __init__(self, cover: Cover, like: Tensor) -> None:
        self._dtype = like.dtype
        dtype = compute_dtype(like.dtype) if cover.shared else like.dtype
        self._total = _zero_rows(like.new_empty(cover.rows, *like.shape[1:], dtype=dtype), cover.holes, 0)

    def add(self, span: Span, blocks: Tensor) -> None:
        """Add ``blocks`` (N, heads, length, at least size) at ``span``."""
        blocks = blocks[..., : self._total.shape[2]]
        if span.alone:
            span.of(self._total).copy_(blocks)
            return
        for which, part in span.disjoint():
            part.of(self._total).add_(blocks[which])

    def total(self) -> Tensor:
        return self._total.to(self._dtype)


def _flash_backward_run(
    x: _Operands, masks: _Masks, run: Run, softmax: _Softmax, d_q: _Sum
) -> tuple[Tensor, Tensor]:
    """Adds to d_q, gives dk and dv (N, Hkv, nk, size): exact for the run's part of a softmax, because out and
    lse are those of the whole."""
    q, k, v = x.run(run)
    grad, out, lse = x.read(softmax.grad, run.q), x.read(softmax.out, run.q), run.q.of(softmax.lse)
    sums: tuple[Tensor, ...] = ()
    for first, queries, keys in run.calls():  # the one with all keys first
        dq, *parts = _flash_backward(
            *(_part(y, first, queries) for y in (grad, q)), _part(k, 0, keys), _part(v, 0, keys),
            *(_part(y, first, queries) for y in (out, lse)), 0.0, run.kind == CAUSAL and first == 0,
            attn_mask=masks.of(run, first, queries, keys), scale=x.scale,
        )  # fmt: skip
        d_q.add(run.q.part(first, queries), dq)
        for total, part in zip(sums, parts, strict=False):
            total[:, :, :keys].add_(part)
        sums = sums or tuple(parts)
    return sums[0], sums[1]
