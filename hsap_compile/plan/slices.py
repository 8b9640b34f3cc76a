"""Which query rows attend to which key rows: rectangles, each with a rule.

A rectangle's rows are contiguous in the query buffer and in columns, and so are its keys, so that the band is
a function of the local difference i - j. In work, rectangles are a (6, n) int64 array: query columns [a, b),
key columns [c, d), and what to add to a column to get its query row and its key row.
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
    unanswered,
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
    """Intervals of columns [start, stop) with one label (or row) that are contiguous in a buffer."""

    label: Ints
    start: Ints
    stop: Ints
    offset: Ints  # buffer row minus column


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
        queries, keys = self.queries, self.keys
        q, k = ranges(self.first, self.last)
        return np.stack(
            (
                queries.start[q],
                queries.stop[q],
                keys.start[k],
                keys.stop[k],
                queries.offset[q],
                keys.offset[k],
            )
        )


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
    queries, keys = _labelled(s.queries, own, s.stride), _labelled(s.keys, held, s.stride)
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

    rects, *others = (_blocks(_clip(f.rects(), f.lo, f.hi), f.lo, f.hi) for f in families)
    first = _by_kind(rects, lo, hi) if exact and not s.mask.residual else _as(rects, MOD)
    found = np.concatenate([_finish(*x, s) for x in (first, *(_as(r, MOD) for r in others))])
    return found[np.lexsort((found[:, 2], found[:, 0]))]


def _joined(own: Buffer, received: Buffer) -> Buffer:
    if len(received.start) == 0:
        return own
    order = np.argsort(np.concatenate((own.start, received.start)))
    start, stop, offset = (
        np.concatenate(x)[order]
        for x in (
            (own.start, received.start),
            (own.stop, received.stop),
            (own.offset, received.offset),
        )
    )
    return Buffer(start, stop, offset)


def _labelled(runs: Runs, buffer: Buffer, stride: int) -> _Pieces:
    """What of the runs lies in the buffer, in the runs' order."""
    line = runs.row * stride
    i, j = overlaps(line + runs.start, line + runs.stop, buffer.start, buffer.stop)
    start = np.maximum(runs.start[i], buffer.start[j] - line[i])
    stop = np.minimum(runs.stop[i], buffer.stop[j] - line[i])
    return _Pieces(runs.label[i], start, stop, buffer.offset[j] + line[i])


def _pieces(start: Ints, stop: Ints, buffer: Buffer, stride: int) -> _Pieces:
    """What of the intervals of the row line lies in the buffer; its label is its row."""
    row = start // stride
    return _labelled(Runs(row, start - row * stride, stop - row * stride, row), buffer, stride)


def _all_rows(s: Structure) -> tuple[Ints, Ints]:
    start = np.arange(s.mask.batch) * s.stride
    return start, start + s.mask.tokens


def _family(queries: _Pieces, keys: _Pieces, lo: int, hi: int, stride: int) -> _Family:
    base, key_base = queries.label * stride, keys.label * stride
    start = base + np.clip(queries.start - hi, 0, stride - 1)
    stop = base + np.clip(queries.stop - lo, 0, stride - 1)
    first, last = span(start, stop, key_base + keys.start, key_base + keys.stop)
    return _Family(queries, keys, lo, hi, first, np.where(start < stop, last, first))


def _clip(rects: Ints, lo: int, hi: int) -> Ints:
    """Drop the query rows and then the keys that the band leaves empty."""
    a, b, c, d, q_offset, k_offset = rects
    a, b = np.maximum(a, c + lo), np.minimum(b, d + hi)
    c, d = np.maximum(c, a - hi), np.minimum(d, b - lo)
    keep = (a < b) & (c < d)
    return np.stack((a, b, c, d, q_offset, k_offset))[:, keep]


def _binds(rects: Ints, lo: int, hi: int) -> tuple[Bools, Bools]:
    """Whether each side of the band cuts into a rectangle."""
    a, b, c, d = rects[:4]
    return a - (d - 1) < lo, b - 1 - c > hi


def _blocks(rects: Ints, lo: int, hi: int) -> Ints:
    """Cut the queries of a window into blocks of its width, so that a band covers half of its rectangle."""
    low, high = _binds(rects, lo, hi)
    block = max(MIN_BLOCK, hi - lo + 1)
    count = np.where(low & high, -((rects[0] - rects[1]) // block), 1)
    if np.all(count == 1):
        return rects
    i, t = ranges(np.zeros_like(count), count)
    a, b, c, d, q_offset, k_offset = rects[:, i]
    cut = count[i] > 1
    start = np.where(cut, a + t * block, a)
    stop = np.where(cut, np.minimum(b, start + block), b)
    return _clip(np.stack((start, stop, c, d, q_offset, k_offset)), lo, hi)


def _by_kind(rects: Ints, lo: int, hi: int) -> tuple[Ints, Ints]:
    """Clipped rectangles cut into parts of one kind each, and the kinds.

    Keys left of t are cut by the upper side of the band only, the others by the lower side only:

             c   s   t     d
          a  █ █ █ █ ▙           left of t:  FULL rows [a, e) and keys [s, t), BAND for the corner between
             █ █ █ █ █ ▙         right of t: CAUSAL square down to row f, FULL below
          e  ▜ █ █ █ █ █ ▙
          f    ▜ █ █ █ █ █
    """
    if rects.shape[1] == 0:
        return _as(rects, FULL)
    low, high = _binds(rects, lo, hi)
    wide = low & high & (rects[1] - rects[0] > hi - lo + 1)  # a narrow window: both sides cut the same keys
    parts = []
    if wide.any():
        parts.append(_as(rects[:, wide], BAND))
        rects, low, high = rects[:, ~wide], low[~wide], high[~wide]
    a, b, c, d, *offsets = rects
    t, f = d, a
    if low.any():
        t = np.where(low, np.minimum(a - lo, d), d)
        f = np.where(t < d, d + lo, a)
        parts += [_part(f, b, t, d, offsets, FULL), _part(a, f, t, d, offsets, CAUSAL)]
    s, e = c, b
    if high.any():
        s = np.clip(b - 1 - hi, c, t)
        e = np.clip(c + hi, a, b)
        corner, kinds = _part(e, b, c, s, offsets, BAND)
        corner = _clip(corner, lo, hi)
        parts += [_part(a, e, c, s, offsets, FULL), (corner, kinds[: corner.shape[1]])]
    parts.append(_part(a, b, s, t, offsets, FULL))
    return np.concatenate([r for r, _ in parts], axis=1), np.concatenate([k for _, k in parts])


def _part(a: Ints, b: Ints, c: Ints, d: Ints, offsets: list[Ints], kind: int) -> tuple[Ints, Ints]:
    """The rectangles that are not empty."""
    some = (a < b) & (c < d)
    return _as(np.stack((a, b, c, d, *offsets))[:, some], kind)


def _as(rects: Ints, kind: int) -> tuple[Ints, Ints]:
    return rects, np.full(rects.shape[1], kind)


def _finish(rects: Ints, kind: Ints, s: Structure) -> Ints:
    """The rows of rectangles."""
    lo, hi = s.mask.band
    a, b, c, d, q_offset, k_offset = rects
    band = kind == BAND  # from columns to local rows
    low = np.where(band, lo if s.mask.lo is None else lo - (a - c), 0)
    high = np.where(band, hi if s.mask.hi is None else hi - (a - c), 0)
    rows = (a + q_offset, b + q_offset, c + k_offset, d + k_offset, kind, low, high)
    return np.stack(rows, axis=1)
