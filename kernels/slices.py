"""From a table of slices to runs, the calls of the kernel on CPU: integers, and views of rows.

A slice is a rectangle of logits: query rows x key rows of one buffer, own or received, and a kind.  Slices of
one kind and size that are equally spaced are one run of N blocks, read as strided views without a copy.
Documents of unlike lengths are a call each.  Gathering them into padded batches does not pay: at 8 heads of
64 it costs what it saves from 16 tokens on; with one head it wins below 32 tokens (3 times at 8).

Units: rows are tokens of a buffer; width is query heads times head size, the elements of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FULL, CAUSAL, BAND, MOD = range(4)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_COLUMNS = 7  # q_start, q_stop, k_start, k_stop, kind, lo, hi
_MOD_LOGITS = 2**20  # logits of one dense block: 4 MiB of float32, near the caches
_MOD_MIN_QUERIES = 64  # a dense block is cut along its keys before it has fewer queries than this
_MASK_LOGITS = 2**22  # elements of one band mask
_BAND_MIN_QUERIES = 64  # queries of one masked block, at least
_CALL_ELEMENTS = 2**18  # of q, in one call over several blocks, so that results stay near the caches
# ATen's causal kernel computes 512 keys at a time and hides those right of the diagonal: half the work on a
# document of up to 512 tokens.  Calls over STEP queries each leave it out (torch 2.13, AVX512: 1.5 times
# faster at 512 tokens, 1.15 at 128 and 1024, equal at 2048).
STEP = 64
STAIR_TOKENS = (128, 1024)  # lengths for which that pays; the last is a multiple of STEP
_STAIR_WORK = 2**23  # blocks x queries x keys x width from which that pays more than the further calls cost


class Span(NamedTuple):
    """``blocks`` blocks of ``length`` rows, ``step`` rows apart; alone: no other run touches them."""

    start: int
    length: int
    step: int
    blocks: int
    alone: bool

    def of(self, x: Tensor) -> Tensor:
        """Of ``x`` (rows, heads, ...), as a view (blocks, heads, length, ...)."""
        row, head, *rest = x.stride()
        size = (self.blocks, x.shape[1], self.length, *x.shape[2:])
        return x.as_strided(size, (self.step * row, head, row, *rest), x.storage_offset() + self.start * row)

    def part(self, start: int, length: int) -> Span:
        """These rows of every block."""
        return self._replace(start=self.start + start, length=length)

    def disjoint(self) -> Iterator[tuple[slice, Span]]:
        """Groups of blocks that do not overlap among themselves, and which blocks those are."""
        groups = 1 if self.blocks == 1 else -(-self.length // self.step)
        for i in range(min(groups, self.blocks)):
            which = slice(i, None, groups)
            count = len(range(i, self.blocks, groups))
            yield which, Span(self.start + i * self.step, self.length, groups * self.step, count, False)


class Run(NamedTuple):
    """Slices of one kind and size, equally spaced.  Keys count from the start of their own buffer."""

    kind: int
    remote: bool
    lo: int
    hi: int
    q: Span
    k: Span
    step: int  # queries of one call

    def calls(self) -> Iterator[tuple[int, int, int]]:
        """(first query, queries, keys, from the first) of every call, the one with all keys first.

        In a run of several calls, which is causal, query i of a call sees the keys up to first + i.
        """
        if self.step >= self.q.length:
            yield 0, self.q.length, self.k.length
            return
        for first in reversed(range(0, self.q.length, self.step)):
            queries = min(self.step, self.q.length - first)
            yield first, queries, first + queries


class Cover(NamedTuple):
    """What runs write of a buffer's rows."""

    rows: int
    holes: tuple[tuple[int, int], ...]  # (start, stop) rows that no run writes alone: they start at zero
    shared: bool  # some rows are written by several slices


class Plan(NamedTuple):
    runs: tuple[Run, ...]
    queries: Cover
    keys: Cover
    remote: Cover


def plan(table: Tensor, own: int, remote: int, heads: int, width: int) -> Plan:
    """The runs of a table of slices over ``own`` and ``remote`` rows.

    Args:
        table: (M, 7) int64 on cpu: q_start, q_stop, k_start, k_stop, kind, lo, hi; see plan/tables.py.
        heads: query heads.

    Raises:
        ValueError: the table has another form, or a slice that is not empty leaves the rows.
    """
    cuts = _cuts(checked(table, own, remote), own, heads)
    q, nq, k, nk, _, far, _, _ = cuts.T
    theirs = far == 1
    q_alone, k_alone = _alone(q, q + nq), np.zeros(len(cuts), np.bool_)
    for side in (theirs, ~theirs):
        k_alone[side] = _alone(k[side], (k + nk)[side])
    return Plan(
        tuple(_runs(cuts, q_alone, k_alone, width)),
        _cover(q, nq, q_alone, own),
        *(_cover(k[s], nk[s], k_alone[s], rows) for s, rows in ((~theirs, own), (theirs, remote))),
    )


def checked(table: Tensor, own: int, remote: int) -> Ints:
    """The slices that are not empty; a kernel would read outside of a buffer without a word.

    Raises ``ValueError`` as ``plan``.
    """
    if table.device.type != "cpu" or table.dtype != torch.int64 or table.shape[1:] != (_COLUMNS,):
        raise ValueError(
            f"hsap::attend: slices are {tuple(table.shape)} {table.dtype} on {table.device}, "
            f"expected (M, {_COLUMNS}) torch.int64 on cpu"
        )
    rows: Ints = table.numpy()
    q_start, q_stop, k_start, k_stop, kind = rows.T[:5]
    some = (q_start < q_stop) & (k_start < k_stop)
    inside = (q_start >= 0) & (q_stop <= own) & (k_start >= 0) & (k_stop <= own + remote)
    inside &= (k_stop <= own) | (k_start >= own)
    wrong = np.flatnonzero(some & ~(inside & (kind >= FULL) & (kind <= MOD)))
    if len(wrong):
        raise ValueError(
            f"hsap::attend: slice {wrong[0]} is {rows[wrong[0]].tolist()}, expected queries in [0, {own}), "
            f"keys in [0, {own}) or [{own}, {own + remote}), kind 0 to 3; pass the table of these rows"
        )
    return rows[some]


def _cuts(rows: Ints, own: int, heads: int) -> Ints:
    """(n, 8) blocks q, nq, k, nk, kind, remote, lo, hi; keys count from the start of their buffer."""
    q_start, q_stop, k_start, k_stop, kind, lo, hi = rows.T
    far = k_start >= own
    cuts = np.stack(
        (q_start, q_stop - q_start, k_start - own * far, k_stop - k_start, kind, far, lo, hi), axis=1
    )
    plain = kind <= CAUSAL
    cuts[plain, 6:] = 0
    if plain.all():
        return cuts
    others = [block for row in cuts[~plain].tolist() for block in _cut(Slice(*row), heads)]
    return np.concatenate((cuts[plain], np.array(others, np.int64).reshape(-1, 8)))


class Slice(NamedTuple):
    """Query rows from q, key rows from k of their own buffer; see plan/tables.py for kind, lo and hi."""

    q: int
    nq: int
    k: int
    nk: int
    kind: int
    remote: int
    lo: int
    hi: int


def _cut(cut: Slice, heads: int) -> Iterator[Slice]:
    return _cut_band(cut) if cut.kind == BAND else _cut_mod(cut, heads)


def _cut_mod(cut: Slice, heads: int) -> Iterator[Slice]:
    keys = min(cut.nk, max(1, _MOD_LOGITS // (heads * _MOD_MIN_QUERIES)))
    queries = max(1, _MOD_LOGITS // (heads * keys))
    for q in range(0, cut.nq, queries):
        for k in range(0, cut.nk, keys):
            size = (cut.q + q, min(queries, cut.nq - q), cut.k + k, min(keys, cut.nk - k))
            yield Slice(*size, MOD, cut.remote, 0, 0)


def _cut_band(cut: Slice) -> Iterator[Slice]:
    """A band in blocks of queries, so that a narrow band of a long document costs its width."""
    band = trim(cut)
    if band is None or band.kind != BAND:
        yield from () if band is None else (band,)
        return
    width = band.hi - band.lo + 1
    queries = max(_BAND_MIN_QUERIES, width // 4)
    queries = min(queries, max(1, _MASK_LOGITS // min(band.nk, queries + width)))
    for start in range(0, band.nq, queries):
        block = band._replace(
            q=band.q + start, nq=min(queries, band.nq - start), lo=band.lo - start, hi=band.hi - start
        )
        trimmed = trim(block)
        if trimmed is not None:
            yield trimmed


def trim(cut: Slice) -> Slice | None:
    """The same band without rows and keys that see nothing; FULL or CAUSAL where it is that.

    Every row that is left sees a key, which the kernel needs: it gives an empty row lse 0, not -inf.
    """
    q, nq, k, nk, _, remote, lo, hi = cut
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
    return Slice(q + q0, nq, k + k0, nk, kind, remote, lo, hi)


def _alone(start: Ints, stop: Ints) -> Bools:
    """Which of the intervals, none of them empty, overlap no other."""
    order = np.argsort(start, kind="stable")
    start, stop = start[order], stop[order]
    meets = start[1:] < np.maximum.accumulate(stop)[:-1]  # one that starts before it
    alone = np.ones(len(order), np.bool_)
    alone[order[1:]] = ~meets
    alone[order[:-1]] &= start[1:] >= stop[:-1]
    return alone


def _cover(start: Ints, length: Ints, alone: Bools, rows: int) -> Cover:
    start, length = start[alone], length[alone]
    order = np.argsort(start)
    start, stop = start[order], (start + length)[order]
    gaps = np.stack((np.concatenate(([0], stop)), np.concatenate((start, [rows]))), axis=1)
    holes = tuple((int(a), int(b)) for a, b in gaps[gaps[:, 0] < gaps[:, 1]])
    return Cover(rows, holes, not alone.all())


def _runs(cuts: Ints, q_alone: Bools, k_alone: Bools, width: int) -> Iterator[Run]:
    """Blocks that differ only in where they start, grouped while their starts are equally spaced."""
    cuts = np.concatenate((cuts, q_alone[:, None], k_alone[:, None]), axis=1)
    q, _, k, *alike = cuts.T
    order = np.lexsort((k, q, cuts[:, 1], *alike))
    cuts = cuts[order]
    gaps = np.diff(cuts, axis=0)
    joins = (np.delete(gaps, (0, 2), axis=1) == 0).all(1) & (cuts[1:, 4] != MOD)
    joins &= (gaps[:, 0] >= cuts[1:, 1]) & (gaps[:, 2] > 0)  # blocks of queries are written: no overlap
    for first, count in _stretches(gaps[:, 0::2][:, :2].tolist(), joins.tolist(), len(cuts)):
        q0, nq, k0, nk, kind, remote, lo, hi, q_single, k_single = cuts[first].tolist()
        # of one block the steps do not matter, but must be positive
        q_step, k_step = (gaps[first, 0].item(), gaps[first, 2].item()) if count > 1 else (nq, 1)
        most = max(1, _CALL_ELEMENTS // (max(nq, nk) * width))
        for i in range(0, count, most):
            n = min(most, count - i)
            q_span = Span(q0 + i * q_step, nq, q_step, n, bool(q_single))
            k_span = Span(k0 + i * k_step, nk, k_step, n, bool(k_single))
            stairs = kind == CAUSAL and nq == nk and STAIR_TOKENS[0] <= nq <= STAIR_TOKENS[1]
            stairs = stairs and n * nq * nk * width >= _STAIR_WORK
            yield Run(kind, bool(remote), lo, hi, q_span, k_span, STEP if stairs else nq)


def _stretches(gaps: Sequence[Sequence[int]], joins: Sequence[bool], count: int) -> Iterator[tuple[int, int]]:
    """(first, count) of maximal stretches with equal gaps, greedily."""
    i = 0
    while i < count:
        last = i
        while last < count - 1 and joins[last] and gaps[last] == gaps[i]:
            last += 1
        yield i, last - i + 1
        i = last + 1


# ---------------------------------------------------------------------------------------------------
# Some of the slices
# ---------------------------------------------------------------------------------------------------

torch.library.define("hsap::slices_of", "(Tensor slices, SymInt start, SymInt stop, SymInt shift) -> Tensor")


@torch.library.impl("hsap::slices_of", "cpu")
def _slices_of(slices: Tensor, start: int, stop: int, shift: int) -> Tensor:
    """Of ``slices`` (M, 7), those whose keys are rows from ``start`` up to ``stop``, counted from ``shift``
    on; the others are made empty, so that M stays."""
    chosen = (slices[:, 2:3] >= start) & (slices[:, 2:3] < stop)
    moved = slices.clone()
    moved[:, 2:4] -= shift
    return torch.where(chosen, moved, 0)


@torch.library.register_fake("hsap::slices_of")
def _slices_of_fake(slices: Tensor, start: int, stop: int, shift: int) -> Tensor:
    return torch.empty_like(slices)


OF_KEYS = torch.ops.hsap.slices_of.default
