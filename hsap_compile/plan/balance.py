"""Which group holds which columns: equal token counts, even area, few key/value rows.

Token counts are a hard rule and LIMIT a promise; under both, rows between groups are kept few:

  1. documents are placed (`fill`); one with much area is split over just enough groups, in zigzag halves
     where plain parts are uneven;
  2. token counts are made equal by moving short documents and heads of documents: a causal document without
     its first n tokens needs n rows;
  3. groups above LIMIT swap windows of equal length with light ones, those that need fewest rows (`swap`);
  4. with few documents this is done once more, with long ones split into parts of even area from their end,
     and the faster of the two is taken (`slowest`).

Shapes: G groups, D documents (or atoms: what lies between two cuts).
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np

from hsap_compile.plan.attended import Area, Floats, Ints, table
from hsap_compile.plan.fill import LIMIT, PATIENCE, TOLERANCE, Fill
from hsap_compile.plan.slowest import Price, slowest
from hsap_compile.plan.swap import Reach, Spread, swap

FEW = 64  # cuts: with more, a second placement takes longer than it saves
WORTH = 1.01  # so much faster must it be: it has more and shorter pieces
ALIKE = 0.98  # of the area that the emptiest group can take: groups that get their parts at once
OVERFILL = 32  # a group's tokens over this: so much too much it may hold until counts are made equal


def balance(area: Area, cuts: Ints, reach: Reach, shares: Ints, price: Price) -> Spread:
    """Spread the atoms between `cuts` (D + 1,) over groups that hold `shares` (G,) tokens each.

    With few atoms another way to split long ones is tried too. It is taken where its slowest group is faster
    and none has more area than LIMIT allows, or than in the first way.
    """
    found = []
    for way in (_Groups, _Tails) if len(cuts) <= FEW else (_Groups,):
        fill = way(area, cuts, reach, shares, price.row)
        fill.place()
        found.append(swap(_even(fill), area, reach, len(shares), price.row))
    if len(found) == 1:
        return found[0]
    loads = [_load(spread, area, len(shares)) for spread in found]
    first, other = (slowest(s, load, reach, price) for s, load in zip(found, loads, strict=True))
    even = loads[1].max() <= max(LIMIT * loads[0].mean(), loads[0].max())
    return found[1] if even and WORTH * other < first else found[0]


def _load(spread: Spread, area: Area, groups: int) -> Floats:
    before = area.before(table(spread.start, spread.stop))
    return np.bincount(spread.group, before[1] - before[0], groups).astype(np.float64)


class _Groups(Fill):
    """`parts`: (group, start, stop) of the atoms that are split."""

    def __init__(self, area: Area, cuts: Ints, reach: Reach, shares: Ints, price: float) -> None:
        before = area.before(cuts)
        sizes, pairs = cuts[1:] - cuts[:-1], before[1:] - before[:-1]
        limit = LIMIT * max(1.0, int(area.total[-1]) / len(shares))
        room, load = shares.astype(np.float64), np.zeros(len(shares))
        super().__init__(sizes, pairs, room, load, limit, int(shares.max()) // OVERFILL)
        self.area, self.cuts, self.reach, self.price, self.most = area, cuts, reach, price, int(shares.max())
        self.parts: list[tuple[Ints, Ints, Ints]] = []

    def state(self) -> tuple[Any, ...]:
        return *super().state(), self.parts.copy()

    def restore(self, state: tuple[Any, ...]) -> None:
        super().restore(state)
        self.parts = state[3].copy()

    def divide(self, document: int, light: Ints, most: float | None = None) -> None:
        """Over as few groups as fit; where none fits, more groups must be worth their number."""
        n, area = int(self.sizes[document]), int(self.pairs[document])
        chosen, least = np.arange(len(self.room)), math.inf
        ways = 2 if most is None else max(1, -(-n // self.most), math.ceil(area / most))
        tolerable = TOLERANCE * self.limit + (
            0.0 if most is None else max(0.0, self.excess(self.room, self.load))
        )
        while ways < len(self.room):
            part = -(-n // ways)
            some = light[self.room[light] >= part - (self.overfill if ways == 1 else 0)][:ways]
            if len(some) == ways:
                excess = 0.0 if most is None else self.excess_with(some, part, area / ways)
                if excess + ways * TOLERANCE * self.limit < least:
                    chosen, least = some, excess + ways * TOLERANCE * self.limit
                if excess <= tolerable:
                    chosen = some
                    break
            ways += max(1, ways // 8)
        if len(chosen) == 1:
            self.put(document, int(chosen[0]))
        else:
            self._split(document, chosen)

    def _split(self, atom: int, groups: Ints) -> None:
        """Spread an atom over `groups`, evenly as far as there is room."""
        n, ways = int(self.sizes[atom]), len(groups)
        room = np.maximum(self.room[groups], 0).astype(np.int64)
        part = np.minimum(n // ways + (np.arange(ways) < n % ways), room)
        if part.sum() < n:
            for i in np.argsort(part - room, kind="stable"):  # what was over goes where most room is left
                part[i] += min(n - part.sum(), room[i] - part[i])
        start, half = self.cuts[atom], part // 2
        edges = start + _sums(part)
        zigzag = start + _sums(np.concatenate((half, (part - half)[::-1])))
        before = self.area.before(edges)
        pairs = before[1:] - before[:-1]
        uneven = pairs.max() - LIMIT * pairs.mean()
        if uneven > 0:
            plain, more = (self.reach.rows(e[:-1], e[1:]).sum() for e in (edges, zigzag))
            if PATIENCE * uneven * ways > self.price * (more - plain):  # one half from each end
                edges, groups = zigzag, np.append(groups, groups[::-1])
                pairs = np.diff(self.area.before(edges))
        sizes = edges[1:] - edges[:-1]
        self.room -= np.bincount(groups, sizes, len(self.room))
        self.load += np.bincount(groups, pairs, len(self.load))
        some = sizes > 0
        self.parts.append((groups[some], edges[:-1][some], edges[1:][some]))


class _Tails(_Groups):
    """Long atoms give parts of even area from their end to the lightest groups; the head stays to be placed.

    The head needs no rows, and the parts of a causal document fewer than zigzag halves; but these parts have
    many pairs and few tokens, and other atoms must fill their groups.
    """

    def state(self) -> tuple[Any, ...]:
        return *super().state(), self.sizes.copy(), self.pairs.copy()

    def restore(self, state: tuple[Any, ...]) -> None:
        super().restore(state)
        self.sizes, self.pairs = (x.copy() for x in state[4:])

    def divide(self, document: int, light: Ints, most: float | None = None) -> None:
        edges = None if most is None else self._edges(document, light, most)
        if edges is None or len(edges) == 1:
            return super().divide(document, light, most)
        groups, pairs = light[: len(edges) - 1], self.area.before(edges)
        self.room[groups] += np.diff(edges)
        self.load[groups] -= np.diff(pairs)
        self.parts.append((groups, edges[1:], edges[:-1]))
        self.sizes[document] -= edges[0] - edges[-1]
        self.pairs[document] -= pairs[0] - pairs[-1]

    def _edges(self, document: int, light: Ints, most: float) -> Ints:
        """From the end down to where the head ends: between them are parts for the first ones of the groups
        `light`, as long as these are about as empty as the first and have room, up to area `most`."""
        start = int(self.cuts[document])
        stop = start + int(self.sizes[document])
        left = np.maximum(most - self.load[light], 0)
        alike = int(np.argmin(np.append(left >= ALIKE * left[0], False)))
        left = left[: min(alike, max(1, int(self.pairs[document] / most)))]
        first, last = self.area.before(np.array([start, stop]))
        edges = np.append(stop, self.area.where(np.maximum(last - np.cumsum(left), first)))
        room = self.room[light[: len(left)]].astype(np.int64)
        fits = np.append(True, np.cumprod((-np.diff(edges) > 0) & (-np.diff(edges) <= room)).astype(np.bool_))
        return edges[fits]


def _sums(values: Ints) -> Ints:
    """(n + 1,) the sums of the values before each, and of all."""
    result = np.zeros(len(values) + 1, np.int64)
    values.cumsum(out=result[1:])
    return result


def _even(fill: _Groups) -> Spread:
    """All pieces; groups that hold too many tokens give short documents and heads to those with room."""
    whole = (fill.owner >= 0).nonzero()[0]
    held = fill.owner[whole], fill.cuts[whole], fill.cuts[whole] + fill.sizes[whole]
    pieces = Spread(*(np.concatenate(x) for x in zip(held, *fill.parts, strict=True)))
    room = fill.room.astype(np.int64).tolist()
    split = np.arange(len(pieces.group)) >= len(whole)
    order = np.lexsort((pieces.stop - pieces.start, ~split, pieces.group))
    first = pieces.group[order].searchsorted(np.arange(len(room) + 1))
    takers = sorted((g for g in range(len(room)) if room[g] > 0), key=lambda g: -room[g])
    heads: list[tuple[int, int, int]] = []
    for giver in np.flatnonzero(fill.room < 0).tolist():
        own = order[first[giver] : first[giver + 1]]  # parts of documents, then whole ones, by length
        at, sizes = own.tolist(), (pieces.stop[own] - pieces.start[own]).tolist()
        least = int(split[own].sum())  # the shortest whole document
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
