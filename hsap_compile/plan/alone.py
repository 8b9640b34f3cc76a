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
from functools import cached_property

import numpy as np

from hsap_compile.plan.attended import Floats, Ints
from hsap_compile.plan.fill import NOBODY, PATIENCE, Fill

STEPS = 16  # times the ranks of a group
DEAR = 0.5  # of the limit: where exchanging heads costs more, sharing less is tried as well

_WEIGHTS = np.array([[1.0], [1.0 + PATIENCE]])  # of area in the two times of a rank; see `_State.seconds`
_Times = tuple[float, float]


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

    @cached_property
    def columns(self) -> Floats:
        """(K + 1,) `sizes`; unit -1 is none."""
        return np.append(self.sizes, 0.0)

    @cached_property
    def by_moving(self) -> Floats:
        """(2, K + 1) by how much the times of a rank fall that gives a unit away."""
        return _WEIGHTS * np.append(self.pairs, 0) - self.price * self.columns

    @cached_property
    def by_sharing(self) -> Floats:
        """(2, K) the same where the unit is shared: exchanged, and attended by all."""
        return (1 - 1 / len(self.quota)) * _WEIGHTS * self.pairs - self.price * self.sizes

    def swapped(
        self, mine: Ints, theirs: Ints, my_times: _Times, their_times: _Times, exchanged: tuple[float, float]
    ) -> Floats:
        """[unit of mine, of theirs]: the longer time of two ranks when these are swapped; infinite where the
        columns that they exchange now, `exchanged`, have no room for that."""
        result = np.zeros((len(mine), len(theirs)))
        for my_time, their_time, moved in zip(my_times, their_times, self.by_moving, strict=True):
            less = moved[mine][:, None] - moved[theirs]
            np.maximum(result, my_time - less, out=result)
            np.maximum(result, their_time + less, out=result)
        more = self.columns[mine][:, None] - self.columns[theirs]
        result[(more < -exchanged[0]) | (more > exchanged[1])] = math.inf
        return result


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
    if group.price * max(best.exchanged) > DEAR * group.limit:  # whole wherever there is room
        loose = _filled(dataclasses.replace(group, limit=math.inf), group)
        best = min(best, loose, key=lambda state: max(map(max, state.seconds())))
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
    if max(state.area) <= group.limit:
        return state
    best, fewest = state.member.copy(), math.inf
    for _ in range(STEPS * len(group.quota)):
        seconds = state.seconds()
        longest = [max(pair) for pair in seconds]
        slowest = longest.index(max(longest))
        if longest[slowest] < fewest:
            best, fewest = state.member.copy(), longest[slowest]
        if max(state.area) <= group.limit or not state.improve(slowest, seconds):
            break
    return _State(group, best)


class _State:
    """Who holds what alone, and the area and exchanged columns of each rank that follow: lists, as ranks are
    few."""

    def __init__(self, group: Group, member: Ints) -> None:
        ranks = len(group.quota)
        tokens, pairs = (np.bincount(member + 1, x, ranks + 1)[1:] for x in (group.sizes, group.pairs))
        self.group, self.member = group, member.copy()
        self.area: list[float] = (pairs + (group.area - pairs.sum()) / ranks).tolist()
        self.exchanged: list[float] = (group.quota - tokens).tolist()

    def seconds(self) -> list[_Times]:
        """Two times of each rank in pairs, of which the longer counts: the first where its area is within the
        limit, the second where what is over it costs PATIENCE times as much again."""
        limit, price, held = self.group.limit, self.group.price, zip(self.area, self.exchanged, strict=True)
        within = [(area, area + price * columns) for area, columns in held]
        return [(time, time + PATIENCE * (area - limit)) for area, time in within]

    def improve(self, slowest: int, seconds: list[_Times]) -> bool:
        """Share one of a rank's units, or swap one with the lightest rank, whichever makes it faster."""
        group, lightest = self.group, self.area.index(min(self.area))
        mine = (self.member == slowest).nonzero()[0]
        if len(mine) == 0:
            return False
        within, over = seconds[slowest]
        shared = np.maximum(within - group.by_sharing[0, mine], over - group.by_sharing[1, mine])
        share, swap = int(shared.argmin()), math.inf
        if lightest != slowest:
            theirs = np.append((self.member == lightest).nonzero()[0], NOBODY)  # which gives nothing back
            room = self.exchanged[slowest], self.exchanged[lightest]
            swapped = group.swapped(mine, theirs, seconds[slowest], seconds[lightest], room)
            i, j = divmod(int(swapped.argmin()), len(theirs))
            swap = float(swapped[i, j])
        if min(swap, shared[share]) >= max(within, over):
            return False
        if swap > shared[share]:
            self._move(int(mine[share]), NOBODY)
            return True
        self._move(int(mine[i]), lightest)
        if theirs[j] != NOBODY:
            self._move(int(theirs[j]), slowest)
        return True

    def _move(self, unit: int, to: int) -> None:
        group, source = self.group, self.member[unit]
        size, pairs, ranks = float(group.sizes[unit]), float(group.pairs[unit]), len(group.quota)
        self.member[unit] = to
        self.area[source] -= pairs
        self.exchanged[source] += size
        if to == NOBODY:
            self.area = [area + pairs / ranks for area in self.area]
        else:
            self.area[to] += pairs
            self.exchanged[to] -= size
