"""Which documents of a group live alone on one of its ranks and take no part in the head exchange.

Heads of all other columns are exchanged, and their area is even whoever holds them. So what counts is that
the area of alone documents is even, and how many columns are left to exchange:

  1. documents that lie in the group are placed whole (`fill`), and shared where that does not fit;
  2. while one has area over the limit, the slowest rank shares one of its documents or swaps it with the
     lightest rank, whichever helps it most; of all states on the way that one counts in which the slowest
     rank is fastest.

Shapes: M ranks of a group, K units (documents, or several that touch the same columns).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsap_compile.plan.attended import Floats, Ints
from hsap_compile.plan.fill import NOBODY, PATIENCE, Fill

STEPS = 16  # times the ranks of a group
LEAST_GAIN = 1e-3  # of the limit
DEAR = 0.5  # of the limit: where exchanging heads costs more, sharing less is tried as well


@dataclass(frozen=True, eq=False)
class Group:
    """One group's part of a batch.

    Attributes:
        quota: (M,) columns of each rank.
        sizes: (K,) columns of each unit that lies in the group.
        pairs: (K,) its area.
        area: of the whole group, these units and all else.
        limit: what one rank should have at most.
        price: pairs that a rank could attend in the time in which a column's heads are exchanged.
    """

    quota: Ints
    sizes: Ints
    pairs: Ints
    area: float
    limit: float
    price: float


class _Ranks(Fill):
    """Ranks of a group; what is shared is spread over all of them."""

    def __init__(self, group: Group) -> None:
        ranks = len(group.quota)
        room = group.quota - (group.quota.sum() - group.sizes.sum()) / ranks
        load = np.full(ranks, (group.area - group.pairs.sum()) / ranks)
        super().__init__(group.sizes, group.pairs, room, load, group.limit, 0)

    def divide(self, document: int, light: Ints, most: float | None = None) -> None:
        n, area, ranks = self.sizes[document], self.pairs[document], len(self.room)
        some = light[self.room[light] >= n][:1]
        if most is not None and len(some) and self.excess_with(some, n, area) <= 0:
            self.put(document, int(some[0]))
        else:
            self.room -= n / ranks
            self.load += area / ranks


def choose(group: Group) -> Ints:
    """(K,) the rank (0..M-1) that holds each unit alone, or NOBODY."""
    if len(group.sizes) == 0:
        return np.empty(0, np.int64)
    best = _filled(group)
    if group.price * best.exchanged.max() > DEAR * group.limit:  # whole wherever there is room
        loose = _filled(dataclasses.replace(group, limit=math.inf), group)
        best = min(best, loose, key=lambda state: state.slowness(state.area, state.exchanged).max())
    return best.member


def _filled(group: Group, real: Group | None = None) -> _State:
    fill = _Ranks(group)
    fill.place()
    return _shared(real or group, fill.owner)


def share(group: Group, member: Ints) -> Ints:
    """(K,) `member` with NOBODY for those units that are better shared."""
    return _shared(group, member).member


def _shared(group: Group, member: Ints) -> _State:
    state = _State(group, member)
    best, fewest = state.member.copy(), math.inf
    for _ in range(STEPS * len(group.quota)):
        seconds = state.slowness(state.area, state.exchanged)
        slowest = int(np.argmax(seconds))
        if seconds[slowest] < fewest:
            best, fewest = state.member.copy(), float(seconds[slowest])
        if state.area.max() <= group.limit or not state.improve(slowest, seconds):
            break
    return _State(group, best)


class _State:
    """Who holds what alone, and the area and exchanged columns of each rank that follow."""

    def __init__(self, group: Group, member: Ints) -> None:
        ranks, held = len(group.quota), member != NOBODY
        tokens, pairs = (
            np.bincount(member[held], values[held], ranks) for values in (group.sizes, group.pairs)
        )
        self.group, self.member = group, member.copy()
        self.area = pairs + (group.area - pairs.sum()) / ranks
        self.exchanged = group.quota - tokens

    def slowness(self, area: Any, exchanged: Any) -> Any:
        """Time of ranks in pairs; what is over the limit counts more."""
        over = np.maximum(area - self.group.limit, 0)
        return area + PATIENCE * over + self.group.price * exchanged

    def improve(self, slowest: int, seconds: Floats) -> bool:
        """Share one of a rank's units, or swap one with the fastest rank, whichever makes it faster."""
        group, lightest = self.group, int(np.argmin(self.area))
        mine, theirs = (np.flatnonzero(self.member == r) for r in (slowest, lightest))
        if len(mine) == 0:
            return False
        n, pairs, ranks = group.sizes[mine], group.pairs[mine], len(group.quota)
        shared = self.slowness(self.area[slowest] - pairs * (1 - 1 / ranks), self.exchanged[slowest] + n)
        # the last one gives nothing back
        n_back, pairs_back = (np.append(values[theirs], 0) for values in (group.sizes, group.pairs))
        more, less = n[:, None] - n_back, pairs[:, None] - pairs_back
        swapped = np.maximum(
            self.slowness(self.area[slowest] - less, self.exchanged[slowest] + more),
            self.slowness(self.area[lightest] + less, self.exchanged[lightest] - more),
        )
        room = (self.exchanged[slowest] + more >= 0) & (self.exchanged[lightest] - more >= 0)
        swapped = np.where(room & (lightest != slowest), swapped, np.inf)
        i, j = np.unravel_index(np.argmin(swapped), swapped.shape)
        if min(swapped[i, j], shared.min()) > seconds[slowest] - LEAST_GAIN * group.limit:
            return False
        if swapped[i, j] <= shared.min():
            self._move(int(mine[i]), lightest)
            if j < len(theirs):
                self._move(int(theirs[j]), slowest)
        else:
            self._move(int(mine[np.argmin(shared)]), NOBODY)
        return True

    def _move(self, unit: int, to: int) -> None:
        group, source = self.group, self.member[unit]
        self.member[unit] = to
        self.area[source] -= group.pairs[unit]
        self.exchanged[source] += group.sizes[unit]
        if to == NOBODY:
            self.area += group.pairs[unit] / len(group.quota)
        else:
            self.area[to] += group.pairs[unit]
            self.exchanged[to] -= group.sizes[unit]
