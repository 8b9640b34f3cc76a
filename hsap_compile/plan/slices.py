"""Which query rows attend to which key rows: rectangles, each with a rule.

A rectangle's rows are contiguous in the query buffer and in columns, and so are its keys, so that the band is
a function of the local difference i - j. In work, rectangles are a (7, n) int64 array: query columns [a, b),
what to add to a column to get its query row, key columns [c, d), what to add to get its key row, and a kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsap_compile.plan.attended import (
    UNBOUNDED,
    Bools,
    Ints,
    Runs,
    Structure,
    answered,
    overlaps,
    ranges,
    span,
    table,
    unanswered,
    within,
)

FULL = 0  # everything allowed
CAUSAL = 1  # square; j <= i
BAND = 2  # lo <= i - j <= hi
MOD = 3  # the mask's formula decides

MIN_BLOCK = 128  # query rows: a shorter block of a window costs more in launches than it saves in area
# Rectangles beyond which interleaved labels or validity, which make them in the square of their number, are
# left to the formula. Documents that do not interleave make few rectangles a piece, and always stay exact.
MAX_EXACT = 1 << 15
MAX_EXACT_PER_PIECE = 4


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Intervals of columns with one label (or row) that are contiguous in a buffer.

    label (n,); rows (3, n): first column, the column behind the last, and buffer row minus column.
    """

    label: Ints
    rows: Ints


@dataclass(frozen=True, eq=False)
class _Family:
    """Queries, keys of the same labels, the band between them, and the range of keys that each may reach."""

    queries: _Pieces
    keys: _Pieces
    lo: int
    hi: int
    first: Ints
    last: Ints

    @property
    def size(self) -> int:
        return int((self.last - self.first).sum())

    def rects(self) -> Ints:
        """Of kind MOD, which is always right, clipped and in blocks."""
        q, k = ranges(self.first, self.last)
        kind = np.full((1, len(q)), MOD)
        rects = np.concatenate((self.queries.rows[:, q], self.keys.rows[:, k], kind))
        return _blocks(_clip(rects, self.lo, self.hi), self.lo, self.hi)


@dataclass(frozen=True, eq=False)
class Buffer:
    """Intervals [start, stop) of the row line, sorted, and where they lie: buffer row minus position."""

    start: Ints
    stop: Ints
    offset: Ints


def slices(s: Structure, own: Buffer, received: Buffer) -> Ints:
    """(M, 7) int64 rows q_start, q_stop, k_start, k_stop, kind, lo, hi, sorted by q_start then k_start.

    Args:
        s: the mask.
        own: the rows of one group, queries and keys.
        received: the keys it receives.
    """
    lo, hi = s.mask.band
    if len(own.start) == 0:
        return np.empty((0, 7), np.int64)
    held = _joined(own, received)
    queries = _labelled(s.queries, own, s.stride)
    keys = queries if held is own and s.keys is s.queries else _labelled(s.keys, held, s.stride)
    families = [_family(queries, keys, lo, hi, s.stride)]
    if s.mask.soft:
        everything = _pieces(*_all_rows(s), held, s.stride)
        unmet = _pieces(*unanswered(s), own, s.stride)
        families.append(_family(unmet, everything, -UNBOUNDED, UNBOUNDED, s.stride))
    pieces = len(queries.label) + len(keys.label)
    exact = sum(f.size for f in families) <= max(MAX_EXACT, MAX_EXACT_PER_PIECE * pieces)
    if not exact and s.mask.soft:
        rows = _pieces(*_all_rows(s), own, s.stride)
        families = [_family(rows, everything, -UNBOUNDED, UNBOUNDED, s.stride)]
    elif not exact:
        rows = _pieces(*answered(s), own, s.stride)
        families = [_family(rows, _pieces(*_all_rows(s), held, s.stride), lo, hi, s.stride)]

    rects, *others = (f.rects() for f in families)
    if exact and not s.mask.residual:
        rects = _by_kind(rects, lo, hi)
    found = _finish(np.concatenate((rects, *others), axis=1), s)
    order = (found[0] * (found[2].max(initial=0) + 1) + found[2]).argsort(kind="stable")
    return np.ascontiguousarray(found[:, order].T)


def _joined(own: Buffer, received: Buffer) -> Buffer:
    if len(received.start) == 0:
        return own
    start = np.concatenate((own.start, received.start))
    order = start.argsort()
    stop, offset = np.concatenate((own.stop, received.stop)), np.concatenate((own.offset, received.offset))
    return Buffer(start[order], stop[order], offset[order])


def _labelled(runs: Runs, buffer: Buffer, stride: int) -> _Pieces:
    """What of the runs lies in the buffer, in the runs' order."""
    line = runs.row * stride
    first, last = line + runs.start, line + runs.stop
    i, j = overlaps(first, last, buffer.start, buffer.stop)
    start, stop, line = np.maximum(first[i], buffer.start[j]), np.minimum(last[i], buffer.stop[j]), line[i]
    return _Pieces(runs.label[i], table(start - line, stop - line, buffer.offset[j] + line))


def _pieces(start: Ints, stop: Ints, buffer: Buffer, stride: int) -> _Pieces:
    """What of the intervals of the row line lies in the buffer; its label is its row."""
    row = start // stride
    return _labelled(Runs(row, start - row * stride, stop - row * stride, row), buffer, stride)


def _all_rows(s: Structure) -> tuple[Ints, Ints]:
    start = np.arange(s.mask.batch) * s.stride
    return start, start + s.mask.tokens


def _family(queries: _Pieces, keys: _Pieces, lo: int, hi: int, stride: int) -> _Family:
    base, key_base = queries.label * stride, keys.label * stride
    start, stop, _ = queries.rows
    start, stop = base + within(start - hi, stride - 1), base + within(stop - lo, stride - 1)
    first, last = span(start, stop, key_base + keys.rows[0], key_base + keys.rows[1])
    return _Family(queries, keys, lo, hi, first, np.where(start < stop, last, first))


def _clip(rects: Ints, lo: int, hi: int) -> Ints:
    """Drop the query rows and then the keys that the band leaves empty."""
    a, b, q_offset, c, d, k_offset, kind = rects
    a, b = np.maximum(a, c + lo), np.minimum(b, d + hi)
    c, d = np.maximum(c, a - hi), np.minimum(d, b - lo)
    return table(a, b, q_offset, c, d, k_offset, kind)[:, (a < b) & (c < d)]


def _binds(rects: Ints, lo: int, hi: int) -> tuple[Bools, Bools]:
    """Whether each side of the band cuts into a rectangle."""
    a, b, _, c, d, _, _ = rects
    return a - (d - 1) < lo, b - 1 - c > hi


def _blocks(rects: Ints, lo: int, hi: int) -> Ints:
    """Cut the queries of a window into blocks of its width, so that a band covers half of its rectangle."""
    if hi - lo >= UNBOUNDED:
        return rects
    low, high = _binds(rects, lo, hi)
    block = max(MIN_BLOCK, hi - lo + 1)
    count = np.where(low & high, -((rects[0] - rects[1]) // block), 1)
    if np.all(count == 1):
        return rects
    i, t = ranges(np.zeros_like(count), count)
    rects, cut = rects[:, i], count[i] > 1
    start = np.where(cut, rects[0] + t * block, rects[0])
    rects[1] = np.where(cut, np.minimum(rects[1], start + block), rects[1])
    rects[0] = start
    return _clip(rects, lo, hi)


def _by_kind(rects: Ints, lo: int, hi: int) -> Ints:
    """Clipped rectangles cut into parts of one kind each.

    Keys left of t are cut by the upper side of the band only, the others by the lower side only:

             c   s   t     d
          a  █ █ █ █ ▙           left of t:  FULL rows [a, e) and keys [s, t), BAND for the corner between
             █ █ █ █ █ ▙         right of t: CAUSAL square down to row f, FULL below
          e  ▜ █ █ █ █ █ ▙
          f    ▜ █ █ █ █ █
    """
    low, high = _binds(rects, lo, hi)
    wide = low & high & (rects[1] - rects[0] > hi - lo + 1)  # a narrow window: both sides cut the same keys
    windows, rects, low = rects[:, wide], rects[:, ~wide], low[~wide]
    windows[6] = BAND
    a, b, q_offset, c, d, k_offset, _ = rects
    t, f = np.where(low, a - lo, d), np.where(low, d + lo, a)
    s, e = np.minimum(np.maximum(b - 1 - hi, c), t), np.minimum(np.maximum(c + hi, a), b)
    first, last = (f, a, a, e, a), (b, f, e, b, b)
    k_first, k_last = (t, t, c, c, s), (d, d, s, s, t)
    kinds = np.array([FULL, CAUSAL, FULL, BAND, FULL]).repeat(len(a))
    rows = (*first, *last, *[q_offset] * 5, *k_first, *k_last, *[k_offset] * 5, kinds)
    parted = np.concatenate(rows).reshape(7, -1)
    return _clip(np.concatenate((windows, parted), axis=1), lo, hi)


def _finish(rects: Ints, s: Structure) -> Ints:
    """(7, n) the rows of rectangles, their kinds, and the bands between rows."""
    lo, hi = s.mask.band
    a, b, q_offset, c, d, k_offset, kind = rects
    band = kind == BAND  # from columns to local rows
    low = np.where(band, lo if s.mask.lo is None else lo - (a - c), 0)
    high = np.where(band, hi if s.mask.hi is None else hi - (a - c), 0)
    return table(a + q_offset, b + q_offset, c + k_offset, d + k_offset, kind, low, high)
