"""Partial attention on CPU: slices of queries against slices of keys, one softmax per query row.

Shapes: R own rows, C remote rows, Hq query heads, Hkv key/value heads (query head i reads key head
i // (Hq // Hkv)), D / Dv head sizes, M slices, N blocks of one run, G = Hq // Hkv.

``hsap::attend`` runs ATen's flash kernel on views of the rows, batching slices that are equally long
and equally spaced; slices whose logits are an index formula take a chunked dense path.  What slices
say about the same query row is merged by log-sum-exp.  float16 and bfloat16 are computed in float32:
one rounding at the end is more exact than one per slice, and ATen's own half precision is slower or equal
(float16: forward 1.7, backward 10 times; bfloat16: equal, 2.8 times slower backward at 64 tokens).  The
exception is bfloat16 backward over thousands of tokens on a CPU that multiplies bfloat16, which is 1.6
times faster than this (torch 2.13, AVX512-BF16, one thread).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch
from torch import Tensor

from hsap_compile import formula

FULL, CAUSAL, BAND, MOD = range(4)

_SLICE_COLUMNS = 7  # q_start, q_stop, k_start, k_stop, kind, lo, hi
_MOD_LOGITS = 2**20  # logits of one dense block: 4 MiB of float32, near the caches
_MOD_MIN_QUERIES = 64  # a dense block is cut along its keys before it has fewer queries than this
_MASK_LOGITS = 2**22  # elements of one band mask
_BAND_MIN_QUERIES = 64  # queries of one masked block, at least
_FAR = 256.0  # |lse| from which float32 cannot tell exp(logit - lse) to 1e-5: see _log_mass

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# ---------------------------------------------------------------------------------------------------
# From slices to runs: pure integers
# ---------------------------------------------------------------------------------------------------


class _Slice(NamedTuple):
    """One rectangle of logits; keys count from the start of their own buffer."""

    q_start: int
    nq: int
    k_start: int
    nk: int
    kind: int
    remote: bool
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class _Span:
    """``count`` blocks of ``length`` rows, ``step`` rows apart; alone: no other run touches them."""

    start: int
    length: int
    step: int
    count: int
    alone: bool

    def of(self, x: Tensor) -> Tensor:
        """The blocks of ``x`` (rows, heads, ...) as a view (count, heads, length, ...)."""
        row, head, *rest = x.stride()
        size = (self.count, x.shape[1], self.length, *x.shape[2:])
        return x.as_strided(size, (self.step * row, head, row, *rest), x.storage_offset() + self.start * row)

    def disjoint(self) -> Iterator[tuple[slice, _Span]]:
        """The blocks in groups that do not overlap among themselves, and which blocks those are."""
        groups = 1 if self.count == 1 else -(-self.length // self.step)
        for i in range(min(groups, self.count)):
            blocks = slice(i, None, groups)
            count = len(range(i, self.count, groups))
            yield blocks, _Span(self.start + i * self.step, self.length, groups * self.step, count, False)


@dataclass(frozen=True, slots=True)
class _Run:
    """Slices of one kind and size, equally spaced: one call of the kernel."""

    kind: int
    remote: bool
    lo: int
    hi: int
    q: _Span
    k: _Span


@dataclass(frozen=True, slots=True)
class _Plan:
    """Runs, and the (start, stop) rows that no run writes alone: these start at zero."""

    runs: tuple[_Run, ...]
    q_holes: tuple[tuple[int, int], ...]
    k_holes: tuple[tuple[int, int], ...]
    remote_holes: tuple[tuple[int, int], ...]
    merges: bool


def _plan(slices: Tensor, own: int, remote: int, heads: int) -> _Plan:
    if slices.device.type != "cpu" or slices.dtype != torch.int64 or slices.shape[1:] != (_SLICE_COLUMNS,):
        raise ValueError(
            f"hsap::attend: slices are {tuple(slices.shape)} {slices.dtype} on {slices.device}, "
            f"expected (M, {_SLICE_COLUMNS}) torch.int64 on cpu"
        )
    cuts = [cut for row in slices.tolist() for cut in _cut(row, own, heads)]
    q_intervals = [(c.q_start, c.q_start + c.nq) for c in cuts]
    k_intervals = [(c.k_start, c.k_start + c.nk) for c in cuts]
    q_alone = _alone(q_intervals, range(len(cuts)))
    mine = [i for i, c in enumerate(cuts) if not c.remote]
    theirs = [i for i, c in enumerate(cuts) if c.remote]
    k_alone = _alone(k_intervals, mine) | _alone(k_intervals, theirs)
    return _Plan(
        runs=tuple(_runs(cuts, q_alone, k_alone)),
        q_holes=_holes([q_intervals[i] for i in q_alone], own),
        k_holes=_holes([k_intervals[i] for i in mine if i in k_alone], own),
        remote_holes=_holes([k_intervals[i] for i in theirs if i in k_alone], remote),
        merges=len(q_alone) < len(cuts),
    )


def _cut(row: Sequence[int], own: int, heads: int) -> Iterator[_Slice]:
    """The blocks that one slice is computed in."""
    q_start, q_stop, k_start, k_stop, kind, lo, hi = row
    nq, nk = q_stop - q_start, k_stop - k_start
    if nq <= 0 or nk <= 0:  # the kernel kills the process on an empty side
        return
    remote = k_start >= own
    cut = _Slice(q_start, nq, k_start - own if remote else k_start, nk, kind, remote, lo, hi)
    if kind == BAND:
        yield from _cut_band(cut)
    elif kind == MOD:
        yield from _cut_mod(cut, heads)
    else:
        yield cut._replace(lo=0, hi=0)


def _cut_mod(cut: _Slice, heads: int) -> Iterator[_Slice]:
    keys = min(cut.nk, max(1, _MOD_LOGITS // (heads * _MOD_MIN_QUERIES)))
    queries = max(1, _MOD_LOGITS // (heads * keys))
    for q, k in itertools.product(range(0, cut.nq, queries), range(0, cut.nk, keys)):
        yield cut._replace(
            q_start=cut.q_start + q,
            nq=min(queries, cut.nq - q),
            k_start=cut.k_start + k,
            nk=min(keys, cut.nk - k),
            lo=0,
            hi=0,
        )


def _cut_band(cut: _Slice) -> Iterator[_Slice]:
    """A band in blocks of queries, so that a narrow band of a long document costs its width."""
    band = _trim_band(cut)
    if band is None or band.kind != BAND:
        yield from () if band is None else (band,)
        return
    width = band.hi - band.lo + 1
    queries = max(_BAND_MIN_QUERIES, width // 4)
    queries = min(queries, max(1, _MASK_LOGITS // min(band.nk, queries + width)))
    for start in range(0, band.nq, queries):
        block = band._replace(
            q_start=band.q_start + start,
            nq=min(queries, band.nq - start),
            lo=band.lo - start,
            hi=band.hi - start,
        )
        trimmed = _trim_band(block)
        if trimmed is not None:
            yield trimmed


def _trim_band(cut: _Slice) -> _Slice | None:
    """The same band without rows and keys that see nothing; FULL or CAUSAL where it is that.

    Every row that is left sees a key, which the kernel needs: it gives an empty row lse 0, not -inf.
    """
    q_start, nq, k_start, nk, _, remote, lo, hi = cut
    lo, hi = max(lo, 1 - nk), min(hi, nq - 1)
    if lo > hi:
        return None
    q0, q1 = max(0, lo), min(nq, nk + hi)
    k0, k1 = max(0, -hi), min(nk, nq - lo)
    nq, nk, lo, hi = q1 - q0, k1 - k0, lo - q0 + k0, hi - q0 + k0
    kind = BAND
    if hi >= nq - 1 and lo <= 1 - nk:
        kind, lo, hi = FULL, 0, 0
    elif hi >= nq - 1 and lo == 0:
        kind, lo, hi = CAUSAL, 0, 0
    return _Slice(q_start + q0, nq, k_start + k0, nk, kind, remote, lo, hi)


def _alone(intervals: Sequence[tuple[int, int]], among: Iterable[int]) -> set[int]:
    """Which of the intervals ``among`` overlap no other of them."""
    alone, reach, furthest = set(among), -1, -1
    for i in sorted(alone, key=lambda i: intervals[i]):
        start, stop = intervals[i]
        if start < reach:  # then it overlaps the furthest so far, and so does all else it overlaps
            alone.discard(i)
            alone.discard(furthest)
        if stop > reach:
            reach, furthest = stop, i
    return alone


def _holes(intervals: Iterable[tuple[int, int]], size: int) -> tuple[tuple[int, int], ...]:
    """What disjoint intervals leave of [0, size)."""
    holes, reach = [], 0
    for start, stop in [*sorted(intervals), (size, size)]:
        if start > reach:
            holes.append((reach, start))
        reach = stop
    return tuple(holes)


def _runs(cuts: Sequence[_Slice], q_alone: set[int], k_alone: set[int]) -> Iterator[_Run]:
    """Slices that differ only in where they start, grouped while their starts are equally spaced."""
    alike: dict[tuple[int | bool, ...], list[tuple[int, int]]] = {}
    for i, c in enumerate(cuts):
        key = (c.kind, c.remote, c.nq, c.nk, c.lo, c.hi, i in q_alone, i in k_alone)
        alike.setdefault(key, []).append((c.q_start, c.k_start))
    for (kind, remote, nq, nk, lo, hi, q_single, k_single), starts in alike.items():
        for q, q_step, k, k_step, count in _spaced(starts, nq, batch=kind != MOD):
            q_span = _Span(q, nq, q_step, count, bool(q_single))
            yield _Run(kind, bool(remote), lo, hi, q_span, _Span(k, nk, k_step, count, bool(k_single)))


def _spaced(
    starts: Sequence[tuple[int, int]], nq: int, batch: bool
) -> Iterator[tuple[int, int, int, int, int]]:
    """(q_start, q_step, k_start, k_step, count) of maximal equally spaced stretches, greedily."""
    i = 0
    while i < len(starts):
        q, k = starts[i]
        q_step, k_step, count = nq, 1, 1  # of one block the steps do not matter, but must be positive
        if batch and i + 1 < len(starts):
            q_gap, k_gap = starts[i + 1][0] - q, starts[i + 1][1] - k
            if q_gap >= nq and k_gap > 0:  # blocks of queries must not overlap: they are written to
                q_step, k_step, count = q_gap, k_gap, 2
        while count > 1 and starts[i + count : i + count + 1] == [(q + count * q_step, k + count * k_step)]:
            count += 1
        yield q, q_step, k, k_step, count
        i += count


# ---------------------------------------------------------------------------------------------------
# Operands and results
# ---------------------------------------------------------------------------------------------------


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _ready(x: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """``x`` as the kernel takes it: computed dtype, last dimension of ``size`` and stride 1."""
    x = x.detach().to(dtype)
    if x.shape[-1] < size:  # zeros change neither the products nor what they weigh
        return torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, slots=True)
class _Operands:
    """Rows as the kernel takes them, q, k and v of one head size."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_remote: Tensor
    v_remote: Tensor
    scale: float

    @classmethod
    def ready(
        cls, q: Tensor, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None, scale: float
    ) -> _Operands:
        dtype, size = _compute_dtype(q.dtype), max(q.shape[2], v.shape[2])
        k_far = k[:0] if k_remote is None else k_remote
        v_far = v[:0] if v_remote is None else v_remote
        ready = [_ready(x, dtype, size) for x in (q, k, v, k_far, v_far)]
        return cls(ready[0], ready[1], ready[2], ready[3], ready[4], scale)

    def keys(self, run: _Run) -> tuple[Tensor, Tensor]:
        """Keys and values of a run (N, Hkv, nk, D)."""
        k, v = (self.k_remote, self.v_remote) if run.remote else (self.k, self.v)
        return run.k.of(k), run.k.of(v)


class _Masks:
    """The additive masks of bands, each distinct one built once."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._built: dict[tuple[int, ...], Tensor] = {}

    def of(self, run: _Run) -> Tensor | None:
        if run.kind != BAND:
            return None
        key = (run.q.length, run.k.length, run.lo, run.hi)
        if key not in self._built:
            distance = torch.arange(run.q.length)[:, None] - torch.arange(run.k.length)
            outside = (distance < run.lo) | (distance > run.hi)
            self._built[key] = self._like.new_zeros(outside.shape).masked_fill_(outside, -torch.inf)
        return self._built[key]


class _Sum:
    """Rows (rows, heads, size) summed up from the blocks of runs."""

    def __init__(self, rows: int, holes: tuple[tuple[int, int], ...], like: Tensor, size: int) -> None:
        self._shape = (rows, like.shape[1], size)
        self._holes = holes
        self._like = like
        self._total: Tensor | None = None

    def add(self, span: _Span, blocks: Tensor) -> None:
        """Add ``blocks`` (N, heads, length, at least size) at ``span``."""
        blocks = blocks[..., : self._shape[2]]
        if not self._holes and span.alone and span.count * span.length == self._shape[0]:
            self._total = blocks.transpose(1, 2).reshape(self._shape).contiguous()
            return
        if self._total is None:
            self._total = _zero_rows(self._like.new_empty(self._shape), self._holes, 0)
        if span.alone:
            span.of(self._total).copy_(blocks)
            return
        for which, part in span.disjoint():
            part.of(self._total).add_(blocks[which])

    def total(self, dtype: torch.dtype) -> Tensor:
        if self._total is None:
            return self._like.new_zeros(self._shape, dtype=dtype)
        return self._total.to(dtype)


def _zero_rows(x: Tensor, holes: tuple[tuple[int, int], ...], value: float) -> Tensor:
    for start, stop in holes:
        x[start:stop] = value
    return x


# ---------------------------------------------------------------------------------------------------
# Logits by a formula: dense blocks
# ---------------------------------------------------------------------------------------------------


def _fold(x: Tensor, span: _Span, groups: int) -> Tensor:
    """One block of query rows (R, Hq, D) as (Hkv, G * nq, D), so that one product serves a group."""
    block = x[span.start : span.start + span.length].unflatten(1, (groups, -1))
    return block.permute(1, 2, 0, 3).reshape(groups, -1, x.shape[2])


@dataclass(frozen=True, slots=True)
class _Formula:
    """A formula and what it reads; leaves are in the computed dtype or above, so are their gradients."""

    expr: sympy.Basic
    sink: sympy.Basic | None
    rows: Tensor | None
    remote_rows: Tensor | None
    heads: Tensor | None
    leaves: tuple[Tensor, ...]
    tokens: int

    @classmethod
    def ready(
        cls,
        mod: str,
        rows: Tensor | None,
        remote_rows: Tensor | None,
        heads: Tensor | None,
        leaves: Sequence[Tensor],
        tokens: int,
        dtype: torch.dtype,
    ) -> _Formula | None:
        if not mod:
            return None
        raised = [x.detach() for x in leaves]
        raised = [x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x for x in raised]
        expr, sink = formula.without_sink(formula.loads(mod))
        return cls(expr, sink, rows, remote_rows, heads, tuple(raised), tokens)

    def sinks(self, lse: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The sink of every query row and head (R, Hq), as ``lse``."""
        values: dict[str, Tensor | int] = {"S": self.tokens}
        if self.rows is not None:
            values |= {"b": self.rows[:, 0, None], "q": self.rows[:, 1, None]}
        if self.heads is not None:
            values["h"] = self.heads
        assert self.sink is not None
        return _as_dtype(formula.evaluate(self.sink, values, leaves), lse).expand(lse.shape)

    def logits(self, score: Tensor, run: _Run, leaves: Sequence[Tensor]) -> Tensor:
        """Logits (Hq, nq, nk) of a block with scaled products ``score`` of the same shape."""
        names = {symbol.name for symbol in self.expr.free_symbols}
        values: dict[str, Tensor | int] = {"score": score, "S": self.tokens}
        if names & {"b", "q"}:
            at = _block_rows(self.rows, "rows", run.q)
            values |= {"b": at[:, 0, None], "q": at[:, 1, None]}
        if "k" in names:
            keys = (self.remote_rows, "remote_rows") if run.remote else (self.rows, "rows")
            values["k"] = _block_rows(*keys, run.k)[:, 1]
        if "h" in names:
            if self.heads is None:
                raise ValueError("hsap::attend: the formula reads h, but heads is None; pass (Hq,) int64")
            values["h"] = self.heads[:, None, None]
        value = formula.evaluate(self.expr, values, leaves)
        return _as_dtype(value, score).expand(score.shape)


def _block_rows(rows: Tensor | None, name: str, span: _Span) -> Tensor:
    if rows is None:
        raise ValueError(
            f"hsap::attend: the formula reads positions, but {name} is None; pass (rows, 2) int64"
        )
    return rows[span.start : span.start + span.length]


def _as_dtype(value: Tensor | float, score: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return score.new_tensor(value)
    if value.dtype == torch.float64 and score.dtype != torch.float64:
        # a finite float64 below float32's range must not become -inf: that row would lose its keys
        lowest = torch.finfo(score.dtype).min
        return value.clamp(min=lowest).masked_fill(value == -torch.inf, -torch.inf).to(score.dtype)
    return value.to(score.dtype)


def _mod_score(x: _Operands, run: _Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled products (Hq, nq, nk) of a block, and its q (Hkv, G * nq, D), k, v (Hkv, nk, D)."""
    k, v = (y[0] for y in x.keys(run))
    q = _fold(x.q, run.q, k.shape[0])
    score = torch.bmm(q * x.scale, k.transpose(1, 2))
    return score.view(x.q.shape[1], run.q.length, run.k.length), q, k, v


def _mod_forward(x: _Operands, index: _Formula, run: _Run) -> tuple[Tensor, Tensor, Tensor]:
    """(out (1, Hq, nq, D), peak (1, Hq, nq), mass (1, Hq, nq)); lse = peak + log(mass).

    The two stay apart because they do not fit one float where the peak is as low as finfo.min.
    """
    score, _, k, v = _mod_score(x, run)
    logits = index.logits(score, run, index.leaves)
    peak = logits.amax(-1, keepdim=True)
    weight = logits.sub(peak.masked_fill(peak == -torch.inf, 0)).exp_()
    mass = weight.sum(-1, keepdim=True)
    out = torch.bmm(weight.reshape(k.shape[0], -1, run.k.length), v).view(*mass.shape[:2], -1)
    out.div_(mass.masked_fill(mass == 0, 1))
    return out[None], peak[None, ..., 0], mass[None, ..., 0]


@dataclass(frozen=True, slots=True)
class _Softmax:
    """What the backward knows about the softmax of every row, in the computed dtype."""

    grad: Tensor  # (R, Hq, D)
    out: Tensor  # (R, Hq, D)
    lse: Tensor  # (R, Hq), +inf where a row has no key: exp(logit - lse) is then 0, not NaN
    delta: Tensor | None  # (R, Hq): sum of grad * out, where some logits are a formula's
    log_mass: Tensor | None  # (R, Hq): see _log_mass

    def weights(self, logits: Tensor, run: _Run) -> Tensor:
        weight = logits.sub(run.q.of(self.lse)[0, ..., None])
        if self.log_mass is not None:
            weight.sub_(run.q.of(self.log_mass)[0, ..., None])
        return weight.exp_()


def _log_mass(x: _Operands, index: _Formula, plan: _Plan, lse: Tensor) -> Tensor | None:
    """What rounding took from lse: log(sum(exp(logit - lse))), in rows where it took a lot.

    A row of n logits that are all finfo.min has lse finfo.min, its log(n) is lost; without this the
    weights of such a row would sum to n.  None when there is no such row, which is the usual case.
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
            logits = index.logits(_mod_score(x, run)[0], run, index.leaves)
            run.q.of(mass).add_(logits.sub(run.q.of(lse)[0, ..., None]).exp_().sum(-1))
    return mass.log().masked_fill_(~far, 0)


def _mod_backward(
    x: _Operands, index: _Formula, run: _Run, softmax: _Softmax, wanted: Sequence[int], sums: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq (1, Hq, nq, D), dk, dv (1, Hkv, nk, D)) of a block; adds to ``sums`` of the wanted leaves."""
    score, q, k, v = _mod_score(x, run)
    leaves = list(index.leaves)
    with torch.enable_grad():
        score.requires_grad_()
        for i in wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        logits = index.logits(score, run, leaves)
    grad = _fold(softmax.grad, run.q, k.shape[0])
    weight = softmax.weights(logits.detach(), run)
    assert softmax.delta is not None
    d_logits = torch.bmm(grad, v.transpose(1, 2)).view_as(weight)
    d_logits.sub_(run.q.of(softmax.delta)[0, ..., None]).mul_(weight)
    sources = [score, *(leaves[i] for i in wanted)]
    grads: Sequence[Tensor | None] = [None] * len(sources)
    if logits.requires_grad:
        grads = torch.autograd.grad(logits, sources, d_logits, allow_unused=True)
    for total, part in zip(sums, grads[1:], strict=True):
        if part is not None:
            total.add_(part)
    d_values = torch.bmm(weight.reshape(k.shape[0], -1, run.k.length).transpose(1, 2), grad)
    if grads[0] is None:
        return torch.zeros_like(q).view(1, *score.shape[:2], -1), torch.zeros_like(k)[None], d_values[None]
    d_score = (grads[0] * x.scale).reshape(k.shape[0], -1, run.k.length)
    d_q = torch.bmm(d_score, k).view(1, *score.shape[:2], -1)
    return d_q, torch.bmm(d_score.transpose(1, 2), q)[None], d_values[None]


# ---------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------

_ATTEND = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_remote, Tensor? v_remote, Tensor slices, Tensor? rows, "
    "Tensor? remote_rows, Tensor? heads, Tensor[] leaves, str mod, SymInt tokens, float scale) "
    "-> (Tensor out, Tensor lse)"
)
# `wanted` numbers the leaves whose gradient is asked for: inside a compiled graph they do not say
_ATTEND_BACKWARD = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? k_remote, Tensor? v_remote, Tensor slices, "
    "Tensor? rows, Tensor? remote_rows, Tensor? heads, Tensor[] leaves, str mod, SymInt tokens, "
    "float scale, Tensor out, Tensor lse, int[] wanted) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_remote, Tensor dv_remote, Tensor[] dleaves)"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
torch.library.define("hsap::attend", _ATTEND, tags=_TAGS)
torch.library.define("hsap::attend_backward", _ATTEND_BACKWARD, tags=_TAGS)


def _formula_of(
    plan: _Plan,
    mod: str,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    tokens: int,
    dtype: torch.dtype,
) -> _Formula | None:
    index = _Formula.ready(mod, rows, remote_rows, heads, leaves, tokens, dtype)
    if not any(run.kind == MOD for run in plan.runs):
        return None if index is None or index.sink is None else index
    if index is None:
        raise ValueError("hsap::attend: a slice of kind MOD, but mod is empty; pass formula.dumps(...)")
    return index


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
    n, n_heads, size = q.shape[0], q.shape[1], v.shape[2]
    x = _Operands.ready(q, k, v, k_remote, v_remote, scale)
    plan = _plan(slices, n, x.k_remote.shape[0], n_heads)
    index = _formula_of(plan, mod, rows, remote_rows, heads, leaves, tokens, x.q.dtype)
    masks = _Masks(x.q)
    if len(plan.runs) == 1 and not plan.q_holes:  # the kernel's own output, without a copy
        out, peak, mass = _forward_run(x, index, masks, plan.runs[0])
        lse = peak if mass is None else peak + mass.log()
        out = out[..., :size].transpose(1, 2).reshape(n, n_heads, size)
        lse = lse.transpose(1, 2).reshape(n, n_heads)
    else:
        total = _Merge(plan, x.q, size)
        for run in plan.runs:
            total.add(run.q, *_forward_run(x, index, masks, run))
        out, lse = total.out, total.lse()
    if index is not None and index.sink is not None:
        together = torch.logaddexp(lse, index.sinks(lse, index.leaves))
        out, lse = out * (lse - together).exp()[..., None], together
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _forward_run(
    x: _Operands, index: _Formula | None, masks: _Masks, run: _Run
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out (N, Hq, nq, D), peak, mass (N, Hq, nq)) with lse = peak + log(mass); mass None means 1."""
    if index is not None and run.kind == MOD:
        return _mod_forward(x, index, run)
    k, v = x.keys(run)
    out, lse = _flash_forward(
        run.q.of(x.q), k, v, 0.0, run.kind == CAUSAL, attn_mask=masks.of(run), scale=x.scale
    )
    return out, lse, None


class _Merge:
    """Softmax-weighted means of several runs over the same rows, in the computed dtype."""

    def __init__(self, plan: _Plan, q: Tensor, size: int) -> None:
        n, heads = q.shape[:2]
        self.out = _zero_rows(q.new_empty(n, heads, size), plan.q_holes, 0)
        self._peak = _zero_rows(q.new_empty(n, heads), plan.q_holes, -math.inf)
        self._mass = _zero_rows(q.new_ones(n, heads), plan.q_holes, 0) if plan.merges else None

    def add(self, span: _Span, out: Tensor, peak: Tensor, mass: Tensor | None) -> None:
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


@torch.library.register_fake("hsap::attend")
def _attend_fake(
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
    n, n_heads, _ = q.shape
    return q.new_empty(n, n_heads, v.shape[2]), q.new_empty(n, n_heads, dtype=_compute_dtype(q.dtype))


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
    wanted: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    x = _Operands.ready(q, k, v, k_remote, v_remote, scale)
    n, n_remote, dtype = q.shape[0], x.k_remote.shape[0], x.q.dtype
    plan = _plan(slices, n, n_remote, q.shape[1])
    index = _formula_of(plan, mod, rows, remote_rows, heads, leaves, tokens, dtype)
    softmax = _softmax(x, index, plan, grad_out, out, lse)
    sums = [] if index is None else [torch.zeros_like(index.leaves[i]) for i in wanted]
    if index is not None and index.sink is not None:
        _sink_backward(index, softmax, lse, wanted, sums)
    masks = _Masks(x.q)
    d_q = _Sum(n, plan.q_holes, x.q, q.shape[2])
    own = [_Sum(n, plan.k_holes, x.k, y.shape[2]) for y in (k, v)]
    remote = [_Sum(n_remote, plan.remote_holes, x.k_remote, y.shape[2]) for y in (k, v)]
    for run in plan.runs:
        if index is not None and run.kind == MOD:
            dq, dk, dv = _mod_backward(x, index, run, softmax, wanted, sums)
        else:
            dq, dk, dv = _flash_backward_run(x, masks, run, softmax)
        d_q.add(run.q, dq)
        for total, blocks in zip(remote if run.remote else own, (dk, dv), strict=True):
            total.add(run.k, blocks)
    found = dict(zip(wanted, sums, strict=False))  # no sums where no slice has a formula
    return (
        d_q.total(q.dtype),
        own[0].total(k.dtype),
        own[1].total(v.dtype),
        remote[0].total(k.dtype),
        remote[1].total(v.dtype),
        [_leaf_grad(leaf, found.get(i), i in wanted) for i, leaf in enumerate(leaves)],
    )


def _sink_backward(
    index: _Formula, softmax: _Softmax, lse: Tensor, wanted: Sequence[int], sums: Sequence[Tensor]
) -> None:
    """A sink takes its weight times -(grad . out) of every row; adds to ``sums`` of the wanted leaves."""
    leaves = list(index.leaves)
    with torch.enable_grad():
        for i in wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        sinks = index.sinks(lse, leaves)
    if not sinks.requires_grad:
        return
    d_sinks = (softmax.grad * softmax.out).sum(-1).neg_().mul_((sinks.detach() - lse).exp_())
    grads = torch.autograd.grad(sinks, [leaves[i] for i in wanted], d_sinks, allow_unused=True)
    for total, part in zip(sums, grads, strict=True):
        if part is not None:
            total.add_(part)


def _softmax(
    x: _Operands, index: _Formula | None, plan: _Plan, grad_out: Tensor, out: Tensor, lse: Tensor
) -> _Softmax:
    dtype, size = x.q.dtype, x.q.shape[2]
    grad, out = _ready(grad_out, dtype, size), _ready(out, dtype, size)
    lse = lse.contiguous()
    if index is None:  # every row of a slice then has a key
        return _Softmax(grad, out, lse, None, None)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return _Softmax(grad, out, lse, (grad * out).sum(-1), _log_mass(x, index, plan, lse))


def _flash_backward_run(
    x: _Operands, masks: _Masks, run: _Run, softmax: _Softmax
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact for the part of a softmax, because out and lse are those of the whole."""
    k, v = x.keys(run)
    grad, q, out, lse = (run.q.of(y) for y in (softmax.grad, x.q, softmax.out, softmax.lse))
    return _flash_backward(
        grad, q, k, v, out, lse, 0.0, run.kind == CAUSAL, attn_mask=masks.of(run), scale=x.scale
    )


def _leaf_grad(leaf: Tensor, total: Tensor | None, wanted: bool) -> Tensor:
    if not wanted:
        return leaf.new_empty(0)
    return leaf.new_zeros(leaf.shape) if total is None else total.to(leaf.dtype).contiguous()


@torch.library.register_fake("hsap::attend_backward")
def _attend_backward_fake(
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
    wanted: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    n_remote = 0 if k_remote is None else k_remote.shape[0]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        k.new_empty(n_remote, *k.shape[1:]),
        v.new_empty(n_remote, *v.shape[1:]),
        [leaf.new_empty(leaf.shape if i in wanted else 0) for i, leaf in enumerate(leaves)],
    )


_TENSORS = ("q", "k", "v", "k_remote", "v_remote", "slices", "rows", "remote_rows", "heads")


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, leaves, ctx.mod, ctx.tokens, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, *leaves, out, lse)


def _backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
    n = len(_TENSORS)
    *inputs, out, lse = ctx.saved_tensors
    tensors, leaves = inputs[:n], inputs[n:]
    needs = ctx.needs_input_grad[n]
    wanted = [i for i, need in enumerate(needs) if need and leaves[i].is_floating_point()]
    dq, dk, dv, dk_remote, dv_remote, dleaves = torch.ops.hsap.attend_backward(
        grad_out, *tensors, leaves, ctx.mod, ctx.tokens, ctx.scale, out, lse, wanted
    )
    remote = (None, None) if tensors[3] is None else (dk_remote, dv_remote)
    found = [grad if i in wanted else None for i, grad in enumerate(dleaves)]
    return dq, dk, dv, *remote, None, None, None, None, found, None, None, None


torch.library.register_autograd("hsap::attend", _backward, setup_context=_setup_context)

OP = torch.ops.hsap.attend.default
BACKWARD = torch.ops.hsap.attend_backward.default
