"""Which rank holds which columns.

Token counts equal to +-1 on every rank are a hard rule; attended area is balanced over groups under it; cuts,
which cost traffic, are kept few under that. Inside a group all members hold all the group's columns after the
head exchange, so that only groups are balanced, and members are contiguous cuts of their group's columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from hsap_compile.plan.attended import (
    Area,
    Attended,
    Bools,
    Ints,
    Structure,
    area,
    structure,
    unanswered,
    union,
)

Kind = Literal["balanced", "contiguous"]

# A group may pass the mean area by this factor. On lognormal packs (12 to 600 documents, 4 to 64 groups) 1.02
# sends a tenth more KV rows than 1.05 and plans slower: every swap that cuts a document costs traffic.
SLACK = 1.05
CANDIDATES = 12  # longest pieces of a group that a swap considers
SWAPS_PER_GROUP = 4
BISECTIONS = 8  # a window's length to 1/256 of the shorter piece
MAX_ATOMS = 2048  # more, shorter documents than this are placed with their neighbours


@dataclass(frozen=True)
class MeshShape:
    """Ranks as `inter` groups of `intra` ranks.

    Attributes:
        groups: groups[i] lists the ranks of group i. Position j of a group exchanges KV rows with position j
            of every other group.

    Raises:
        ValueError: groups differ in size, or the ranks are not 0..P-1, each once.
    """

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(r for group in self.groups for r in group)
        if not ranks or len({len(g) for g in self.groups}) != 1 or ranks != list(range(len(ranks))):
            raise ValueError(
                f"MeshShape: got groups {self.groups}; wanted groups of one size that hold ranks "
                "0..P-1, each once: give a rectangular mesh, for example ((0, 1), (2, 3))"
            )

    @property
    def inter(self) -> int:
        return len(self.groups)

    @property
    def intra(self) -> int:
        return len(self.groups[0])

    @property
    def size(self) -> int:
        return self.inter * self.intra

    @cached_property
    def group(self) -> Ints:
        """(P,) int64 group of each rank."""
        result = np.empty(self.size, np.int64)
        for i, ranks in enumerate(self.groups):
            result[list(ranks)] = i
        return result

    def group_of(self, rank: int) -> tuple[int, int]:
        """(group, position in it) of a rank."""
        for i, group in enumerate(self.groups):
            if rank in group:
                return i, group.index(rank)
        raise ValueError(f"MeshShape: got rank {rank}; wanted 0..{self.size - 1}: use a rank of this mesh")


@dataclass(frozen=True, eq=False)
class Placement:
    """Which columns each rank holds; the same for every batch row.

    Columns are *alone* where every document of every row and mask that touches them lies on this one rank, so
    that they take no part in any exchange, and *shared* where the group exchanges heads.  With `intra` 1 all
    are shared.

    Attributes:
        mesh: the ranks.  Rank r holds S // P + (r < S % P) columns.
        tokens: S.
        rank: (n,) int64 of each piece.  Pieces are sorted by group, position in it, alone before shared, and
            start: as they lie on the ranks.
        shared: (n,) bool.
        start: (n,) int64 first column of each piece.
        stop: (n,) int64 the column behind it.
    """

    mesh: MeshShape
    tokens: int
    rank: Ints
    shared: Bools
    start: Ints
    stop: Ints

    @cached_property
    def columns(self) -> tuple[Ints, ...]:
        """Per rank, its columns: the alone ones, ascending, then the shared ones, ascending."""
        return tuple(self.columns_of(r) for r in range(self.mesh.size))

    def columns_of(self, rank: int) -> Ints:
        """(n,) columns of one rank."""
        i = self.rank == rank
        return expand(self.start[i], self.stop[i])

    def group_columns(self, group: int) -> Ints:
        """(N,) shared columns of a group: of each member in turn, ascending."""
        i = self.shared & (self.group == group)
        return expand(self.start[i], self.stop[i])

    @cached_property
    def group(self) -> Ints:
        """(n,) int64 group of each piece."""
        return self.mesh.group[self.rank]

    @cached_property
    def alone(self) -> Ints:
        """(P,) int64 alone columns of each rank."""
        return self._counts(~self.shared)

    @cached_property
    def exchanged(self) -> Ints:
        """(P,) int64 shared columns of each rank: they take part in the head exchange, where there is one."""
        return self._counts(self.shared)

    def _counts(self, pieces: Bools) -> Ints:
        size = np.where(pieces, self.stop - self.start, 0)
        return np.bincount(self.rank, weights=size, minlength=self.mesh.size).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Owned:
    """Where rows lie: maximal intervals sorted along the row line. All (n,) int64."""

    group: Ints
    start: Ints
    stop: Ints
    offset: Ints  # row in the group's row space minus position on the row line

    def of(self, group: int) -> Owned:
        i = self.group == group
        return Owned(self.group[i], self.start[i], self.stop[i], self.offset[i])


def owned(placement: Placement, batch: int) -> Owned:
    """The shared rows of all groups, on the row line of a batch of `batch` rows."""
    i = placement.shared
    return _laid(placement, placement.group[i], placement.start[i], placement.stop[i], batch)


def owned_alone(placement: Placement, rank: int, batch: int) -> Owned:
    """The alone rows of one rank; `group` is 0."""
    i = ~placement.shared & (placement.rank == rank)
    return _laid(placement, np.zeros_like(placement.rank[i]), placement.start[i], placement.stop[i], batch)


def _laid(placement: Placement, group: Ints, start: Ints, stop: Ints, batch: int) -> Owned:
    """Pieces in the order of their group's row space, groups ascending."""
    if len(start) == 0:
        return Owned(group, start, stop, start)
    touch = (start[1:] == stop[:-1]) & (group[1:] == group[:-1])
    opens, closes = np.append(True, ~touch), np.append(~touch, True)
    group, start, stop = group[opens], start[opens], stop[closes]
    size = stop - start
    total = np.bincount(group, weights=size).astype(np.int64)
    index = np.cumsum(size) - size - (np.cumsum(total) - total)[group]
    order = np.argsort(start)
    group, start, stop, index = group[order], start[order], stop[order], index[order]
    row = np.repeat(np.arange(batch), len(group))
    group, start, stop, index = (np.tile(x, batch) for x in (group, start, stop, index))
    line = row * (placement.tokens + 1)
    return Owned(group, line + start, line + stop, row * total[group] + index - line - start)


def place(masks: Sequence[Attended], mesh: MeshShape, kind: Kind = "balanced") -> Placement:
    """Assign columns to ranks.

    `contiguous` cuts [0, S) in the order of (group, position). `balanced`:
      1. cut [0, S) into documents: for several rows or masks, at the union of their boundaries; documents
         that interleave count as one;
      2. largest first, put each on the group whose remaining area per remaining token is the highest; one
         that is more than a group's share is split over as few groups as possible, into zigzag pairs where a
         plain cut is uneven; one that no longer fits is cut at the free space;
      3. swap windows of equal length between the most and the least loaded group until all are near the mean.

    Raises:
        ValueError: masks differ in batch or tokens, S < 2 P, or an unknown kind.
    """
    return place_structures([structure(m) for m in masks], mesh, kind)


def place_structures(structures: Sequence[Structure], mesh: MeshShape, kind: Kind) -> Placement:
    """`place` for masks that were read before."""
    sizes = {(s.mask.batch, s.mask.tokens) for s in structures}
    if len(sizes) != 1:
        raise ValueError(
            f"place: got masks of (batch, tokens) {sorted(sizes)}; wanted one or more masks of one batch: "
            "plan each batch by itself"
        )
    if kind not in ("balanced", "contiguous"):
        raise ValueError(f"place: got placement {kind!r}; wanted 'balanced' or 'contiguous': choose one")
    tokens, ranks = structures[0].mask.tokens, mesh.size
    if tokens < 2 * ranks:
        raise ValueError(
            f"place: got {tokens} tokens a row on {ranks} ranks; wanted at least {2 * ranks}, two a rank: "
            "use fewer ranks or a longer batch"
        )
    counts = tokens // ranks + (np.arange(ranks) < tokens % ranks)
    members = np.array(mesh.groups)
    shares = counts[members].sum(axis=1)
    ends = np.cumsum(shares)
    before = area(structures)
    if kind == "contiguous" or mesh.inter == 1:
        runs = tuple(np.array([[stop - n, stop]]) for n, stop in zip(shares, ends, strict=True))
    else:
        runs = _balance(before, _cuts(structures), shares)
    units = _units(structures)
    pieces = []
    for group, run in zip(mesh.groups, runs, strict=True):
        quota = counts[list(group)]
        member = _whole(units, run, quota) if kind == "contiguous" else _apart(before, units, run, quota)
        pieces.append(_members(np.array(group), quota, run, units, member))
    rank, shared, start, stop = np.concatenate(pieces, axis=1)
    return Placement(mesh, tokens, rank, shared.astype(np.bool_), start, stop)


def _whole(units: Ints, run: Ints, quota: Ints) -> Ints:
    """(K,) the member on whose contiguous part of `run` each unit lies whole, or -1."""
    if len(quota) == 1:
        return np.full(len(units) - 1, -1)
    (begin, end), ends = run[0], run[0, 0] + np.cumsum(quota)
    first = np.searchsorted(ends, units[:-1], side="right")
    last = np.searchsorted(ends, units[1:], side="left")
    return np.where((first == last) & (units[:-1] >= begin) & (units[1:] <= end), first, -1)


def _apart(before: Area, units: Ints, run: Ints, quota: Ints) -> Ints:
    """(K,) the member that holds each unit alone, or -1: the largest first, while none gets too much area."""
    member = np.full(len(units) - 1, -1)
    if len(quota) == 1:
        return member
    i = np.maximum(np.searchsorted(run[:, 0], units[:-1], side="right") - 1, 0)
    inside = np.flatnonzero((units[:-1] >= run[i, 0]) & (units[1:] <= run[i, 1]))
    sizes, areas = np.diff(units), np.diff(before.before(units))
    mean = np.sum(before.before(run[:, 1]) - before.before(run[:, 0])) / len(quota)
    room, load = quota.tolist(), [0] * len(quota)
    for u in inside[np.lexsort((-sizes[inside], -areas[inside]))].tolist():
        n, pairs = int(sizes[u]), int(areas[u])
        fits = [m for m in range(len(room)) if room[m] >= n and load[m] + pairs <= SLACK * mean]
        if fits:
            m = min(fits, key=load.__getitem__)
            member[u], room[m], load[m] = m, room[m] - n, load[m] + pairs
    for u in inside[np.argsort(-areas[inside], kind="stable")].tolist():
        m = load.index(max(load))  # an uneven rest is shared again
        if load[m] - sum(load) / len(load) <= (SLACK - 1) * mean:
            break
        if member[u] == m:
            member[u], load[m] = -1, load[m] - int(areas[u])
    return member


def _members(group: Ints, quota: Ints, run: Ints, units: Ints, member: Ints) -> Ints:
    """(4, n) rank, shared, start, stop of one group's pieces; what no member has alone is cut in order."""
    alone = np.flatnonzero(member >= 0)
    at, begin, end = member[alone], units[alone], units[alone + 1]
    left = quota - np.bincount(at, weights=end - begin, minlength=len(quota)).astype(np.int64)
    # what is left of the runs lies between the alone units
    start, stop = np.sort(np.append(run[:, 0], end)), np.sort(np.append(run[:, 1], begin))
    start, stop = start[start < stop], stop[start < stop]
    before, ends = np.cumsum(stop - start) - (stop - start), np.cumsum(left)
    edges = np.unique(np.concatenate((before, [0], ends)))
    i = np.searchsorted(before, edges[:-1], side="right") - 1
    first = start[i] + edges[:-1] - before[i] if len(start) else edges[:0]
    mine = np.searchsorted(ends, edges[:-1], side="right")
    at, shared = np.append(at, mine), np.repeat([0, 1], [len(alone), len(mine)])
    begin, end = np.append(begin, first), np.append(end, first + np.diff(edges))
    order = np.lexsort((begin, shared, at))
    return np.stack((group[at], shared, begin, end))[:, order]


def expand(start: Ints, stop: Ints) -> Ints:
    """All integers of the intervals, in order."""
    size = stop - start
    before = np.cumsum(size) - size
    return np.arange(size.sum()) + np.repeat(start - before, size)


def _cuts(structures: Sequence[Structure]) -> Ints:
    """Document boundaries, from 0 to S."""
    tokens = structures[0].mask.tokens
    ends = np.array([0, tokens])
    cuts = np.unique(np.concatenate([ends, *map(_boundaries, structures)]))
    if len(cuts) > MAX_ATOMS:
        _, first = np.unique(cuts * MAX_ATOMS // (tokens + 1), return_index=True)
        cuts = np.unique(np.append(cuts[first], ends))
    return cuts


def _boundaries(s: Structure) -> Ints:
    """Columns where a document of some row begins or ends, or several that interleave do."""
    row, first, last = _hulls(s)
    # a line twice as fine, on which documents that touch do not join
    line = 2 * row * s.stride
    start, stop = union(line + 2 * first, line + 2 * last - 1)
    return np.concatenate((start, stop + 1)) // 2 % s.stride


def _hulls(s: Structure) -> tuple[Ints, Ints, Ints]:
    """(row, first column, the column behind the last) of every document."""
    runs = (s.queries, s.keys)
    row, start, stop, label = (
        np.concatenate([getattr(r, name) for r in runs]) for name in ("row", "start", "stop", "label")
    )
    labels = int(label.max(initial=-1)) + 1
    rows, first, last = np.zeros(labels, np.int64), np.full(labels, s.stride), np.zeros(labels, np.int64)
    rows[label] = row
    np.minimum.at(first, label, start)
    np.maximum.at(last, label, stop)
    some = first < last
    return rows[some], first[some], last[some]


def _units(structures: Sequence[Structure]) -> Ints:
    """Columns from 0 to S between which no pair is attended: in no row, by no mask."""
    tokens = structures[0].mask.tokens
    ends = np.array([0, tokens])
    if any(s.mask.soft and len(unanswered(s)[0]) for s in structures):
        return ends  # some query attends to its whole row
    _, first, last = np.concatenate([_hulls(s) for s in structures], axis=1)
    start, stop = union(2 * first, 2 * last - 1)
    return np.unique(np.concatenate((ends, start // 2, (stop + 1) // 2)))


class _Fill:
    """Groups while they are being filled."""

    def __init__(self, area: Area, shares: Ints) -> None:
        self.area = area
        self.room: list[int] = shares.tolist()  # tokens still free
        self.load = [0] * len(shares)  # attended pairs
        self.mean = max(1.0, int(area.total[-1]) / len(shares))
        self.pieces: list[list[tuple[int, int]]] = [[] for _ in shares]

    def put(self, group: int, start: int, stop: int, pairs: int) -> None:
        if start < stop:
            self.pieces[group].append((start, stop))
            self.room[group] -= stop - start
            self.load[group] += pairs

    def put_cuts(self, groups: Sequence[int], edges: Ints) -> None:
        """The interval between each two edges on each group."""
        at, pairs = edges.tolist(), np.diff(self.area.before(edges)).tolist()
        for group, start, stop, n in zip(groups, at[:-1], at[1:], pairs, strict=True):
            self.put(group, start, stop, n)


def _balance(area: Area, cuts: Ints, shares: Ints) -> tuple[Ints, ...]:
    fill = _Fill(area, shares)
    room, load = fill.room, fill.load
    groups, most, limit = range(len(shares)), max(room), fill.mean * SLACK
    sizes, areas = np.diff(cuts), np.diff(area.before(cuts))
    order = np.lexsort((-sizes, -areas))
    for start, n, pairs in zip(
        cuts[order].tolist(), sizes[order].tolist(), areas[order].tolist(), strict=True
    ):
        ways = max(-(-n // most), math.ceil(pairs / limit))
        if ways > 1:
            _split(fill, start, n, pairs, min(ways, len(groups)))
            continue
        fits = [g for g in groups if room[g] >= n]
        light = [g for g in fits if load[g] + pairs <= limit]
        if light:
            fill.put(max(light, key=lambda g: (fill.mean - load[g]) / room[g]), start, start + n, pairs)
        elif fits:
            fill.put(min(fits, key=load.__getitem__), start, start + n, pairs)
        else:
            _spill(fill, start, n)
    _swap(fill)
    return tuple(np.stack(union(*np.array(p).T), axis=1) for p in fill.pieces)


def _spill(fill: _Fill, start: int, n: int) -> None:
    """Cut an interval that fits nowhere at the free space, the largest first."""
    room = np.array(fill.room)
    groups = np.argsort(-room, kind="stable")
    edges = start + np.minimum(n, np.concatenate(([0], np.cumsum(room[groups]))))
    fill.put_cuts(groups.tolist(), edges)


def _split(fill: _Fill, start: int, n: int, pairs: int, ways: int) -> None:
    """Spread a long document over at least `ways` groups, evenly as far as there is room."""
    room, load = np.array(fill.room), np.array(fill.load)
    while True:
        share = max(pairs / ways, 1.0)
        score = np.minimum((fill.mean - load) / share, 1.0) + np.minimum(room / (n / ways), 1.0)
        chosen = np.argsort(-score, kind="stable")[:ways]
        if ways == len(room) or np.all(room[chosen] >= -(-n // ways)):
            break
        ways += 1
    room = room[chosen]
    part = np.minimum(n // ways + (np.arange(ways) < n % ways), room)
    for i in np.argsort(part - room, kind="stable"):  # what was over goes where most room is left
        part[i] += min(n - part.sum(), room[i] - part[i])
    edges = start + np.concatenate(([0], np.cumsum(part)))
    plain = np.diff(fill.area.before(edges))
    if plain.max() > SLACK * plain.mean():  # zigzag: a group takes one half from each end
        half = part // 2
        edges = start + np.concatenate(([0], np.cumsum(np.concatenate((half, (part - half)[::-1])))))
        chosen = np.concatenate((chosen, chosen[::-1]))
    fill.put_cuts(chosen.tolist(), edges)


def _swap(fill: _Fill) -> None:
    """Swap equally long windows of the most and the least loaded group until none is far over the mean."""
    for _ in range(SWAPS_PER_GROUP * len(fill.room)):
        heavy, light = (fill.load.index(f(fill.load)) for f in (max, min))
        if fill.load[heavy] <= SLACK * fill.mean:
            return
        best = _best_swap(fill, heavy, light)
        if best is None:
            return
        (start, stop), (start_, stop_), n, gain = best
        fill.pieces[heavy].remove((start, stop))
        fill.pieces[light].remove((start_, stop_))
        fill.pieces[heavy] += [p for p in ((start, stop - n), (start_, start_ + n)) if p[0] < p[1]]
        fill.pieces[light] += [p for p in ((stop - n, stop), (start_ + n, stop_)) if p[0] < p[1]]
        fill.load[heavy] -= gain
        fill.load[light] += gain


def _best_swap(
    fill: _Fill, heavy: int, light: int
) -> tuple[tuple[int, int], tuple[int, int], int, int] | None:
    """(piece that gives its tail, piece that gives its head, window length, pairs moved), or None.

    A window is the whole of the shorter piece; where that would move too much, one that moves half the gap.
    """
    gap = fill.load[heavy] - fill.load[light]
    tails, heads = (
        sorted(fill.pieces[g], key=lambda p: (p[0] - p[1], p[0]))[:CANDIDATES] for g in (heavy, light)
    )
    i, j = np.divmod(np.arange(len(tails) * len(heads)), len(heads))
    (begin, stop), (start, end) = np.array(tails)[i].T, np.array(heads)[j].T
    size = np.minimum(stop - begin, end - start)
    fixed = fill.area.before(stop) + fill.area.before(start)

    def moved(n: Ints, at: Ints) -> Ints:
        tail, head = fill.area.before(np.stack((stop[at] - n, start[at] + n)))
        return fixed[at] - tail - head

    gain = moved(size, np.arange(len(size)))
    much = np.flatnonzero(gain >= gap)
    if len(much):
        low, high = np.zeros_like(much), size[much]
        for _ in range(BISECTIONS):
            middle = (low + high) // 2
            over = moved(middle, much) * 2 > gap
            low, high = np.where(over, low, middle), np.where(over, middle, high)
        size[much], gain[much] = low, moved(low, much)
    cuts = (size < stop - begin).astype(np.int64) + (size < end - start)
    cost = np.abs(gap / 2 - gain) + (SLACK - 1) * fill.mean * cuts
    cost[(gain <= 0) | (gain >= gap)] = np.inf
    best = int(np.argmin(cost))
    if not np.isfinite(cost[best]):
        return None
    return tails[i[best]], heads[j[best]], int(size[best]), int(gain[best])
