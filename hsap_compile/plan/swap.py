"""Swaps of equally long windows of columns between groups, until none has much more area than the mean.

Shapes: G groups, n pieces; A pairs of a heavy and a light group, C = 2 CANDIDATES ends of pieces of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsap_compile.plan.attended import Area, Bools, Floats, Ints, table
from hsap_compile.plan.fill import LIMIT, PATIENCE

CANDIDATES = 10  # pieces of a group that a swap considers
ROUNDS = 16
STALLED = 3  # rounds in a row that took off less than a part 1 - PROGRESS of what is over LIMIT
PROGRESS = 0.9
CUT_ROWS = 16  # what one more piece costs, in rows: it makes slices and sends shorter


@dataclass(frozen=True, eq=False)
class Spread:
    """Intervals of columns [start, stop) and the groups that hold them. All (n,) int64."""

    group: Ints
    start: Ints
    stop: Ints

    def append(self, group: Ints, start: Ints, stop: Ints) -> Spread:
        return Spread(np.append(self.group, group), np.append(self.start, start), np.append(self.stop, stop))


@dataclass(frozen=True, eq=False)
class Reach:
    """How far the queries of a document see: to estimate the rows that a piece needs.

    units (K + 1,) columns between which nothing is attended; lo, hi the widest band of all masks.
    """

    units: Ints
    lo: int
    hi: int

    def rows(self, start: Ints, stop: Ints) -> Ints:
        """(n,) keys that the queries of each piece [start, stop) see outside of it, at most."""
        unit = np.searchsorted(self.units[:-1], start, side="right") - 1
        low = np.maximum(self.units[unit], start - self.hi)
        high = np.minimum(self.units[unit + 1], stop - self.lo)
        return np.where(start < stop, high - low - (stop - start), 0)


@dataclass(frozen=True, eq=False)
class _Ends:
    """Both ends of candidate pieces as places to cut a window from. All (pairs of groups, 2 CANDIDATES)."""

    piece: Ints
    size: Ints
    tail: Bools  # the window is at the end of the piece
    start: Ints
    stop: Ints
    low: Ints  # the piece's unit
    high: Ints
    density: Floats  # attended pairs of the outermost column
    slope: Floats  # their growth per column inwards


def swap(pieces: Spread, area: Area, reach: Reach, groups: int, price: float) -> Spread:
    """Swap windows until no group is above LIMIT, or nothing helps."""
    over, stalled = math.inf, 0
    mean = max(1.0, int(area.total[-1]) / groups)
    for round in range(ROUNDS):
        before = area.before(table(pieces.start, pieces.stop))
        inside = before[1] - before[0]
        load = np.bincount(pieces.group, inside, groups).astype(np.float64)
        order = load.argsort(kind="stable")
        heavy = order[::-1][: int((load > LIMIT * mean).sum())]
        lights = order[: groups - len(heavy)][: groups // 2]
        heavy = heavy[: len(lights)]
        last, over = over, float((load[heavy] - LIMIT * mean).sum())
        stalled = stalled + 1 if over > PROGRESS * last else 0
        if len(heavy) == 0 or stalled == STALLED:
            break
        light = np.roll(lights, -stalled)[: len(heavy)]  # other partners, where these did not help
        urgency = PATIENCE * 2.0**round / price
        order = np.lexsort((-inside, pieces.group))
        pieces = _swap_once(pieces, area, reach, load, order, heavy, light, price, urgency)
    return pieces


def _swap_once(
    pieces: Spread,
    area: Area,
    reach: Reach,
    load: Floats,
    order: Ints,
    heavy: Ints,
    light: Ints,
    price: float,
    urgency: float,
) -> Spread:
    """Do the best swap of each heavy group with its light one.

    `urgency` is what a pair over LIMIT costs, in rows.
    """
    first = np.searchsorted(pieces.group[order], np.arange(len(load) + 1))
    x, y = (_ends(pieces, area, reach, order, first, g) for g in (heavy, light))
    x_meets, y_meets = _meets(x, y), _meets(y, x)

    # gain(n) = slope n^2 / 2 + rest n is what the heavy group loses by n columns
    gap = (load[heavy] - load[light])[:, None, None]
    need = (load[heavy] - LIMIT * load.mean())[:, None, None]
    most = np.minimum(x.size[:, :, None], y.size[:, None, :]).astype(np.float64)
    slope = x.slope[:, :, None] - y.slope[:, None, :]
    rest = x.density[:, :, None] - y.density[:, None, :] - slope / 2
    too_much = (slope * most / 2 + rest) * most > gap - need
    root = rest + np.sqrt(np.maximum(rest * rest + 2 * slope * need, 0))
    n = np.where(
        too_much & (root > 0), np.minimum(np.ceil(2 * need / np.where(root > 0, root, 1)), most), most
    )
    gain = (slope * n / 2 + rest) * n
    rows = _rows(x, x_meets, n, reach, (slice(None), slice(None), None))
    rows += _rows(y, y_meets, n, reach, (slice(None), None, slice(None)))
    cuts = (n < x.size[:, :, None]).astype(np.float64) + (n < y.size[:, None, :])
    score = rows + CUT_ROWS * cuts + urgency * np.maximum(need - gain, 0)
    dear = price * rows > PATIENCE * np.minimum(gain, need)
    score[(gain <= 0) | (gain >= gap) | (n <= 0) | dear] = np.inf
    score = score.reshape(len(heavy), -1)
    best = np.argmin(score, axis=1)
    at = np.flatnonzero(np.isfinite(score[np.arange(len(heavy)), best]))
    i, j = np.divmod(best[at], y.size.shape[1])
    window = n.reshape(len(heavy), -1)[at, best[at]].astype(np.int64)

    # the estimate takes densities as linear in a piece: what is done is counted exactly
    begin = np.stack(
        [np.where(e.tail[at, k], e.stop[at, k] - window, e.start[at, k]) for e, k in ((x, i), (y, j))]
    )
    moved = area.before(begin + window) - area.before(begin)
    gained = moved[0] - moved[1]
    good = (gained > 0) & (gained < (load[heavy] - load[light])[at])
    if not good.any():
        return pieces
    at, i, j, window, begin = at[good], i[good], j[good], window[good], begin[:, good]
    start, stop = pieces.start.copy(), pieces.stop.copy()
    for e, k, b in ((x, i, begin[0]), (y, j, begin[1])):
        piece, tail = e.piece[at, k], e.tail[at, k]
        stop[piece[tail]] = b[tail]
        start[piece[~tail]] = (b + window)[~tail]
    group = np.concatenate((pieces.group, light[at], heavy[at]))
    start, stop = np.append(start, begin.ravel()), np.append(stop, (begin + window).ravel())
    some = start < stop
    return Spread(group[some], start[some], stop[some])


def _ends(pieces: Spread, area: Area, reach: Reach, order: Ints, first: Ints, group: Ints) -> _Ends:
    count = (first[group + 1] - first[group])[:, None]
    at, half = np.arange(CANDIDATES), CANDIDATES // 2  # those with most area, and some of all the others
    others = half + (at - half) * (count - half) // (CANDIDATES - half)
    at = np.where((at >= half) & (count > CANDIDATES), others, at)
    some = at < count
    piece = order[np.where(some, first[group][:, None] + at, 0)]
    start, stop = (np.where(some, v[piece], 0) for v in (pieces.start, pieces.stop))
    size = stop - start
    before = area.before(np.stack((start, start + 1, stop - 1, stop)))
    head, tail = before[1] - before[0], before[3] - before[2]
    slope = (tail - head) / np.maximum(size - 1, 1)
    unit = np.searchsorted(reach.units, start, side="right") - 1
    low, high = reach.units[unit], reach.units[unit + 1]

    def twice(at_tail: Any, at_head: Any) -> Any:
        return np.concatenate((at_tail, at_head), axis=1)

    is_tail = np.ones(some.shape, np.bool_)
    return _Ends(
        twice(piece, piece),
        twice(size, size),
        twice(is_tail, ~is_tail),
        twice(start, start),
        twice(stop, stop),
        twice(low, low),
        twice(high, high),
        twice(tail.astype(np.float64), head.astype(np.float64)),
        twice(-slope, slope),
    )


def _meets(x: _Ends, y: _Ends) -> Bools:
    """Whether a window goes to a group that holds the columns next to it, of the same unit."""
    half = y.start.shape[1] // 2
    edge = np.where(x.tail, x.stop, x.start)
    after = (edge[:, :, None] == y.start[:, None, :half]).any(axis=2)
    before = (edge[:, :, None] == y.stop[:, None, :half]).any(axis=2)
    return np.where(x.tail, after, before) & (edge > x.low) & (edge < x.high)


def _rows(e: _Ends, meets: Bools, n: Floats, reach: Reach, axes: Any) -> Any:
    """Rows more that both groups need when a window of n columns moves, as if they held no more of the unit.

    A piece [a, b) needs the keys of [lowest(a), highest(b)) but its own.
    """
    start, stop, low, high, size, tail = (v[axes] for v in (e.start, e.stop, e.low, e.high, e.size, e.tail))

    def lowest(a: Any) -> Any:
        return np.maximum(low, a - reach.hi)

    def highest(b: Any) -> Any:
        return np.minimum(high, b - reach.lo)

    begin = np.where(tail, stop - n, start)
    end = begin + n
    below, above = lowest(begin), highest(end)
    giver = np.where(tail, highest(begin) - above + n, below - lowest(end) + n)
    giver = np.where(n >= size, -(above - below - size), giver)
    beside = np.where(tail, lowest(stop) - below - n, above - highest(start) - n)
    return giver + np.where(meets[axes], beside, above - below - n)
