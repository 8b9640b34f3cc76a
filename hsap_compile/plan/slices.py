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


_Family = tuple[_Pieces, _Pieces, int, int]  # queries, keys of the same labels, and the band between them


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
    held = _joined(own, received)
    queries, keys = _labelled(s.queries, own, s.stride), _labelled(s.keys, held, s.stride)
    families = [(queries, keys, lo, hi)]
    everything = _pieces(*_all_rows(s), held, s.stride)
    if s.mask.soft:
        families.append((_pieces(*unanswered(s), own, s.stride), everything, -UNBOUNDED, UNBOUNDED))
    pieces = len(queries.label) + len(keys.label)
    exact = _count(families, s.stride) <= max(MAX_EXACT, MAX_EXACT_PER_PIECE * pieces)
    if not exact and s.mask.soft:
        families = [(_pieces(*_all_rows(s), own, s.stride), everything, -UNBOUNDED, UNBOUNDED)]
    elif not exact:
        families = [(_pieces(*answered(s), own, s.stride), everything, lo, hi)]

    rects, *others = (_blocks(_clip(_pairs(*f, s.stride), *f[2:]), *f[2:]) for f in families)
    parts = _by_kind(rects, lo, hi) if exact and not s.mask.residual else [(rects, MOD)]
    parts += [(r, MOD) for r in others]
    rows = np.concatenate([_finish(r, kind, s) for r, kind in parts])
    return rows[np.lexsort((rows[:, 2], rows[:, 0]))]


def _joined(own: Buffer, received: Buffer) -> Buffer:
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


def _reach(queries: _Pieces, keys: _Pieces, lo: int, hi: int, stride: int) -> tuple[Ints, Ints]:
    base, key_base = queries.label * stride, keys.label * stride
    start = base + np.clip(queries.start - hi, 0, stride - 1)
    stop = base + np.clip(queries.stop - lo, 0, stride - 1)
    first, last = span(start, stop, key_base + keys.start, key_base + keys.stop)
    return first, np.where(start < stop, last, first)


def _count(families: list[_Family], stride: int) -> int:
    spans = [_reach(*f, stride) for f in families]
    return sum(int((last - first).sum()) for first, last in spans)


def _pairs(queries: _Pieces, keys: _Pieces, lo: int, hi: int, stride: int) -> Ints:
    q, k = ranges(*_reach(queries, keys, lo, hi, stride))
    return np.stack(
        (queries.start[q], queries.stop[q], keys.start[k], keys.stop[k], queries.offset[q], keys.offset[k])
    )


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


def _by_kind(rects: Ints, lo: int, hi: int) -> list[tuple[Ints, int]]:
    """Cut clipped rectangles into parts of one kind each.

    Keys left of t are cut by the upper side of the band only, the others by the lower side only:

             c   s   t     d
          a  █ █ █ █ ▙           left of t:  FULL rows [a, e) and keys [s, t), BAND for the corner between
             █ █ █ █ █ ▙         right of t: CAUSAL square down to row f, FULL below
          e  ▜ █ █ █ █ █ ▙
          f    ▜ █ █ █ █ █
    """
    low, high = _binds(rects, lo, hi)
    wide = low & high & (rects[1] - rects[0] > hi - lo + 1)  # a narrow window: both sides cut the same keys
    a, b, c, d, q_offset, k_offset = rects[:, ~wide]
    t = np.where(low[~wide], np.minimum(a - lo, d), d)
    s = np.clip(b - 1 - hi, c, t)
    e = np.clip(c + hi, a, b)
    f = np.where(t < d, d + lo, a)

    def part(*sides: Ints) -> Ints:
        return _clip(np.stack((*sides, q_offset, k_offset)), -UNBOUNDED, UNBOUNDED)

    corner = _clip(part(e, b, c, s), lo, hi)
    return [
        (part(a, b, s, t), FULL),
        (part(a, e, c, s), FULL),
        (part(f, b, t, d), FULL),
        (part(a, f, t, d), CAUSAL),
        (corner, BAND),
        (rects[:, wide], BAND),
    ]


def _finish(rects: Ints, kind: int, s: Structure) -> Ints:
    lo, hi = s.mask.band
    a, b, c, d, q_offset, k_offset = rects
    low, high = np.zeros_like(a), np.zeros_like(a)
    if kind == BAND:  # from columns to local rows
        low = np.full_like(a, lo) if s.mask.lo is None else lo - (a - c)
        high = np.full_like(a, hi) if s.mask.hi is None else hi - (a - c)
    rows = (a + q_offset, b + q_offset, c + k_offset, d + k_offset)
    return np.stack((*rows, np.full_like(a, kind), low, high), axis=1)
