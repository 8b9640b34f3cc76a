"""Which group holds which columns: equal token counts, even area, few key/value rows.

Token counts are a hard rule and LIMIT a promise; under both, rows between groups are kept few:

  1. documents with much area, largest first: whole where one group can take it, else over just enough groups,
     in zigzag halves where plain parts are uneven;
  2. all others, whole: to the group that would be lightest if its room were filled with the average of what
     is left;
  3. token counts are made equal by moving short documents and heads of documents: a causal document without
     its first n tokens needs n rows;
  4. groups above LIMIT swap windows of equal length with light ones: those that need the fewest rows.

Shapes: G groups, D documents (or atoms: what lies between two cuts).
"""

from __future__ import annotations

import bisect
import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsap_compile.plan.attended import Area, Bools, Floats, Ints

LIMIT = 1.015  # of the mean area; the issue allows 1.02 and groups of several ranks need some of it inside
LONG = 0.3  # of the mean area: from here on a document may have to be split
TRIES = 4  # light groups that are looked at before a document goes where it does not fit
OVERFILL = 32  # and it goes there only if it is at most this part of a group's tokens, else it is split
CANDIDATES = 10  # pieces of a group that a swap considers
ROUNDS = 16
CUT_ROWS = 16  # what one more piece costs, in rows: it makes slices and sends shorter
# All groups wait for one that is over LIMIT, and rows travel while attention runs: area over LIMIT may cost
# this often its own time in rows. With 8, packs of short documents stay at 1.03; without a bound, a window's
# halo is sent again and again for what is hardly any work.
PATIENCE = 64


@dataclass(frozen=True, eq=False)
class Pieces:
    """Intervals of columns [start, stop) and their groups. All (n,) int64."""

    group: Ints
    start: Ints
    stop: Ints

    def append(self, group: Ints, start: Ints, stop: Ints) -> Pieces:
        return Pieces(np.append(self.group, group), np.append(self.start, start), np.append(self.stop, stop))


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


def balance(area: Area, cuts: Ints, reach: Reach, shares: Ints, price: float) -> Pieces:
    """Spread the atoms between `cuts` (D + 1,) over groups that hold `shares` (G,) tokens each.

    `price`: pairs that one group could attend in the time in which it receives a row.
    """
    fill = _Fill(area, cuts, reach, shares, price)
    _place_long(fill)
    _place_short(fill)
    return _swap(_even(fill), area, reach, shares, price)


class _Fill:
    """Groups while they are being filled: `room` tokens are free, and `load` is the area of what is held."""

    def __init__(self, area: Area, cuts: Ints, reach: Reach, shares: Ints, price: float) -> None:
        self.area, self.cuts, self.reach, self.price = area, cuts, reach, price
        self.room, self.load = shares.copy(), np.zeros(len(shares))
        self.most = int(shares.max())
        self.mean = max(1.0, int(area.total[-1]) / len(shares))
        self.sizes, self.pairs = np.diff(cuts), np.diff(area.before(cuts))
        self.owner = np.full(len(self.sizes), -1)
        self.parts: list[tuple[Ints, Ints, Ints]] = []  # group, start, stop of split atoms
        long = (self.pairs >= LONG * self.mean) | (self.sizes > self.most)
        order = np.lexsort((-self.sizes, -self.pairs))
        self.long, self.short = order[long[order]], order[~long[order]]
        # the least area that a number of tokens may have, by the atoms of least density
        order = np.argsort(self.pairs / self.sizes, kind="stable")
        self.least_tokens = np.append(0, np.cumsum(self.sizes[order]))
        self.least_pairs = np.append(0, np.cumsum(self.pairs[order]))

    def excess(self, room: Ints, load: Floats) -> float:
        """How much area is too much if the rest is spread as well as can be: 0 or less fits.

        Groups that can pay least for a token get the cheapest ones.
        """
        left = LIMIT * self.mean - load
        order = np.argsort(left / np.maximum(room, 0.5))
        tokens = np.cumsum(room[order])
        return float(np.max(np.interp(tokens, self.least_tokens, self.least_pairs) - np.cumsum(left[order])))


def _place_long(fill: _Fill) -> None:
    room, load, limit = fill.room, fill.load, LIMIT * fill.mean
    tokens, pairs = int(fill.sizes.sum()), int(fill.pairs.sum())
    for atom in fill.long.tolist():
        n, area = int(fill.sizes[atom]), int(fill.pairs[atom])
        tokens, pairs = tokens - n, pairs - area
        density = pairs / max(tokens, 1)
        end = load + density * room  # area of each group when it is full
        g = int(np.argmin(end))
        if room[g] >= n and end[g] + area - density * n <= limit:
            fill.owner[atom] = g
            room[g] -= n
            load[g] += area
            continue
        chosen = _ways(fill, n, area, np.argsort(end, kind="stable"))
        if len(chosen) == 1 and room[chosen[0]] >= n:
            fill.owner[atom] = chosen[0]
            room[chosen] -= n
            load[chosen] += area
        else:
            _split(fill, atom, chosen)


def _ways(fill: _Fill, n: int, area: int, light: Ints) -> Ints:
    """The groups over which to split a document: as few as fit, or those that fit best."""
    groups = len(light)
    best, fewest = light, math.inf
    ways = max(1, -(-n // fill.most), math.ceil(area / (LIMIT * fill.mean)))
    while ways < groups:
        part = -(-n // ways)
        chosen = light[fill.room[light] >= part][:ways]
        if len(chosen) == ways:
            room, load = fill.room.copy(), fill.load.copy()
            room[chosen] -= part
            load[chosen] += area / ways
            excess = fill.excess(room, load)
            if excess < fewest - 1e-3 * fill.mean:
                best, fewest = chosen, excess
            if excess <= 0:
                break
        ways += max(1, ways // 8)
    return best


def _split(fill: _Fill, atom: int, groups: Ints) -> None:
    """Spread an atom over `groups`, evenly as far as there is room."""
    n, ways, room = int(fill.sizes[atom]), len(groups), np.maximum(fill.room[groups], 0)
    part = np.minimum(n // ways + (np.arange(ways) < n % ways), room)
    for i in np.argsort(part - room, kind="stable"):  # what was over goes where most room is left
        part[i] += min(n - part.sum(), room[i] - part[i])
    start, half = fill.cuts[atom], part // 2
    edges = start + np.append(0, np.cumsum(part))
    zigzag = start + np.append(0, np.cumsum(np.append(half, (part - half)[::-1])))
    pairs = np.diff(fill.area.before(edges))
    uneven = pairs.max() - LIMIT * pairs.mean()
    if uneven > 0:
        plain, more = (fill.reach.rows(e[:-1], e[1:]).sum() for e in (edges, zigzag))
        if PATIENCE * uneven * ways > fill.price * (more - plain):  # a group takes one half from each end
            edges, groups = zigzag, np.append(groups, groups[::-1])
            pairs = np.diff(fill.area.before(edges))
    np.subtract.at(fill.room, groups, np.diff(edges))
    np.add.at(fill.load, groups, pairs)
    some = np.diff(edges) > 0
    fill.parts.append((groups[some], edges[:-1][some], edges[1:][some]))


def _place_short(fill: _Fill) -> None:
    """Python lists and a heap: a numpy call for each document would take longer than all the rest."""
    sizes, pairs = fill.sizes[fill.short], fill.pairs[fill.short]
    tokens_left = np.cumsum(sizes[::-1])[::-1] - sizes
    pairs_left = np.cumsum(pairs[::-1])[::-1] - pairs
    densities = (pairs_left / np.maximum(tokens_left, 1)).tolist()
    room, load = fill.room.tolist(), fill.load.tolist()
    groups, tolerable = len(room), fill.most // OVERFILL
    heap: list[tuple[float, int]] = []
    owner = []
    for i, (n, area) in enumerate(zip(sizes.tolist(), pairs.tolist(), strict=True)):
        if i % groups == 0 or not heap:
            density = densities[i]
            heap = [(load[g] + density * room[g], g) for g in range(groups) if room[g] > 0]
            heapq.heapify(heap)
        g = heap[0][1]
        if room[g] < n:
            lightest = heapq.nsmallest(TRIES if n <= tolerable else groups, heap)
            fits = [x for x in lightest if room[x[1]] >= n]
            if not fits and n > tolerable:
                fill.room[:], fill.load[:] = room, load
                ways = 2
                while sum(room[x[1]] * ways >= n for x in lightest) < ways < len(lightest):
                    ways += 1
                some = [x[1] for x in lightest if room[x[1]] * ways >= n][:ways]
                _split(fill, int(fill.short[i]), np.array(some if len(some) == ways else range(groups)))
                room, load, heap = fill.room.tolist(), fill.load.tolist(), []
                owner.append(-1)
                continue
            chosen = fits[0] if fits else max(lightest, key=lambda x: room[x[1]])
            g = chosen[1]
            heap[heap.index(chosen)] = (-math.inf, g)
            heapq.heapify(heap)
        owner.append(g)
        room[g] -= n
        load[g] += area
        if room[g] > 0:
            heapq.heapreplace(heap, (load[g] + density * room[g], g))
        else:
            heapq.heappop(heap)
    fill.owner[fill.short] = owner
    fill.room[:], fill.load[:] = room, load


def _even(fill: _Fill) -> Pieces:
    """All pieces; groups that hold too many tokens give short documents and heads to those with room."""
    whole = np.flatnonzero(fill.owner >= 0)
    pieces = Pieces(fill.owner[whole], fill.cuts[whole], fill.cuts[whole + 1])
    for part in fill.parts:
        pieces = pieces.append(*part)
    room = fill.room.tolist()
    split = np.arange(len(pieces.group)) >= len(whole)
    order = np.lexsort((pieces.stop - pieces.start, ~split, pieces.group))
    first = np.searchsorted(pieces.group[order], np.arange(len(room) + 1))
    takers = sorted((g for g in range(len(room)) if room[g] > 0), key=lambda g: -room[g])
    heads: list[tuple[int, int, int]] = []
    for giver in np.flatnonzero(fill.room < 0).tolist():
        held = order[first[giver] : first[giver + 1]]  # parts of documents, then whole ones, by length
        at, sizes = held.tolist(), (pieces.stop[held] - pieces.start[held]).tolist()
        least = int(split[held].sum())  # the shortest whole document
        while room[giver] < 0:
            taker = takers[0]
            n = min(-room[giver], room[taker])
            least = min(least, len(at) - 1)
            i = max(least, bisect.bisect_right(sizes, n, least) - 1)
            start = int(pieces.start[at[i]])
            if sizes[i] <= n:
                n = sizes.pop(i)
                pieces.group[at.pop(i)] = taker
            else:
                heads.append((taker, start, start + n))
                pieces.start[at[i]] += n
                sizes[i] -= n
            room[giver] += n
            room[taker] -= n
            if room[taker] == 0:
                takers.pop(0)
    return pieces.append(*np.array(heads).T) if heads else pieces


# --- swaps ---


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


def _swap(pieces: Pieces, area: Area, reach: Reach, shares: Ints, price: float) -> Pieces:
    """Swap windows until no group is above LIMIT, or nothing helps."""
    groups, offset = len(shares), 0
    mean = max(1.0, int(area.total[-1]) / groups)
    for round in range(ROUNDS):
        inside = np.diff(area.before(np.stack((pieces.start, pieces.stop))), axis=0)[0]
        load = np.bincount(pieces.group, inside, groups).astype(np.float64)
        order = np.argsort(load, kind="stable")
        heavy = order[::-1][: int(np.sum(load > LIMIT * mean))]
        lights = order[: groups - len(heavy)][: groups // 2]
        heavy = heavy[: len(lights)]
        if len(heavy) == 0:
            break
        light = np.roll(lights, -offset)[: len(heavy)]
        urgency = PATIENCE * 2.0**round / price
        pieces, done = _swap_once(pieces, area, reach, load, heavy, light, price, urgency)
        offset += not done
    return pieces


def _swap_once(
    pieces: Pieces,
    area: Area,
    reach: Reach,
    load: Floats,
    heavy: Ints,
    light: Ints,
    price: float,
    urgency: float,
) -> tuple[Pieces, bool]:
    """The best swap of each heavy group with its light one, and whether there was any.

    `urgency` is what a pair over LIMIT costs, in rows.
    """
    size = pieces.stop - pieces.start
    order = np.lexsort((-size, pieces.group))
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
        return pieces, False
    at, i, j, window, begin = at[good], i[good], j[good], window[good], begin[:, good]
    start, stop = pieces.start.copy(), pieces.stop.copy()
    for e, k, b in ((x, i, begin[0]), (y, j, begin[1])):
        piece, tail = e.piece[at, k], e.tail[at, k]
        stop[piece[tail]] = b[tail]
        start[piece[~tail]] = (b + window)[~tail]
    group = np.concatenate((pieces.group, light[at], heavy[at]))
    start, stop = np.append(start, begin.ravel()), np.append(stop, (begin + window).ravel())
    some = start < stop
    return Pieces(group[some], start[some], stop[some]), True


def _ends(pieces: Pieces, area: Area, reach: Reach, order: Ints, first: Ints, group: Ints) -> _Ends:
    count = (first[group + 1] - first[group])[:, None]
    at = np.arange(CANDIDATES)
    at = np.where(count > CANDIDATES, at * count // CANDIDATES, at)  # of all lengths
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
