"""Which rank holds which columns.

Token counts equal to +-1 on every rank are a hard rule; attended area is balanced over groups under it; cuts,
which cost traffic, are kept few under that. Inside a group all members hold all the group's columns after the
head exchange, so that only groups are balanced, and members are contiguous cuts of their group's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from hsap_compile.plan.alone import Group, choose, share
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
from hsap_compile.plan.balance import balance
from hsap_compile.plan.cost import H100, CostModel
from hsap_compile.plan.fill import LIMIT, NOBODY
from hsap_compile.plan.swap import Reach, Spread

Kind = Literal["balanced", "contiguous"]

INSIDE = 1.005  # of its group's mean area: a rank may have it even where the group is at LIMIT
MAX_ATOMS = 1 << 14  # more, shorter documents than this are placed with their neighbours


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


def place(
    masks: Sequence[Attended], mesh: MeshShape, kind: Kind = "balanced", cost: CostModel = H100
) -> Placement:
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
    return place_structures([structure(m) for m in masks], mesh, kind, cost)


def place_structures(
    structures: Sequence[Structure], mesh: MeshShape, kind: Kind, cost: CostModel
) -> Placement:
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
    shares = counts[np.array(mesh.groups)].sum(axis=1)
    before, units = area(structures), _units(structures)
    if kind == "contiguous" or mesh.inter == 1:
        ends = np.cumsum(shares)
        spread = Spread(np.arange(mesh.inter), ends - shares, ends)
    else:
        reach = Reach(units, *_widest(structures))
        spread = balance(before, _cuts(structures), reach, shares, _pairs_per_row(cost))
    pieces = []
    for g, group in enumerate(mesh.groups):
        run = np.stack(union(spread.start[spread.group == g], spread.stop[spread.group == g]))
        pieces.append(_within(before, units, run, counts[list(group)], kind, cost, mesh))
        pieces[-1][0] = np.array(group)[pieces[-1][0]]
    rank, shared, start, stop = np.concatenate(pieces, axis=1)
    return Placement(mesh, tokens, rank, shared.astype(np.bool_), start, stop)


def _pairs_per_row(cost: CostModel) -> float:
    """Pairs attended in the time in which a key/value row, and later its gradient, passes between groups."""
    seconds = 2 * cost.shape.kv_row_bytes / cost.inter.bandwidth_bytes_per_s
    return seconds / cost.attention_seconds(1.0)


def _pairs_per_column(cost: CostModel, ranks: int) -> float:
    """The same for a column's queries, keys, values and outputs, exchanged in a group."""
    row_bytes = 2 * cost.shape.query_row_bytes + cost.shape.kv_row_bytes
    seconds = 2 * row_bytes * (ranks - 1) / ranks / cost.intra.bandwidth_bytes_per_s
    return seconds / cost.attention_seconds(1.0)


def _within(
    area: Area, units: Ints, run: Ints, quota: Ints, kind: Kind, cost: CostModel, mesh: MeshShape
) -> Ints:
    """(4, n) member, shared, start, stop of one group's pieces; `run` (2, m) is what the group holds."""
    if mesh.intra == 1:
        return np.stack((np.zeros_like(run[0]), np.ones_like(run[0]), *run))
    i = np.maximum(np.searchsorted(run[0], units[:-1], side="right") - 1, 0)
    inside = np.flatnonzero((units[:-1] >= run[0, i]) & (units[1:] <= run[1, i]))
    start, stop = units[inside], units[inside + 1]
    total = float(np.sum(area.before(run[1]) - area.before(run[0])))
    group = Group(
        quota,
        stop - start,
        area.before(stop) - area.before(start),
        total,
        max(LIMIT * float(area.total[-1]) / mesh.size, INSIDE * total / mesh.intra),
        _pairs_per_column(cost, mesh.intra),
    )
    if kind == "contiguous":
        ends = run[0, 0] + np.cumsum(quota)
        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(ends, stop, side="left")
        member = share(group, np.where(first == last, first, NOBODY))
    else:
        member = choose(group)
    return _members(quota, run, start, stop, member)


def _members(quota: Ints, run: Ints, start: Ints, stop: Ints, member: Ints) -> Ints:
    """What of `run` (2, m) is in no unit [start, stop) with a member of its own is cut in order."""
    alone = member != NOBODY
    at, begin, end = member[alone], start[alone], stop[alone]
    left = quota - np.bincount(at, weights=end - begin, minlength=len(quota)).astype(np.int64)
    # what is left of the runs lies between the alone units
    first, last = np.sort(np.append(run[0], end)), np.sort(np.append(run[1], begin))
    first, last = first[first < last], last[first < last]
    before, ends = np.cumsum(last - first) - (last - first), np.cumsum(left)
    edges = np.unique(np.concatenate((before, [0], ends)))
    mine = np.searchsorted(ends, edges[:-1], side="right")
    if len(mine):
        i = np.searchsorted(before, edges[:-1], side="right") - 1
        begin = np.append(begin, first[i] + edges[:-1] - before[i])
        end = np.append(end, begin[len(at) :] + np.diff(edges))
    shared = np.repeat([0, 1], [len(at), len(mine)])
    at = np.append(at, mine)
    order = np.lexsort((begin, shared, at))
    return np.stack((at, shared, begin, end))[:, order]


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


def _widest(structures: Sequence[Structure]) -> tuple[int, int]:
    """(lo, hi) of a band that holds those of all masks."""
    bands = [s.mask.band for s in structures]
    return min(lo for lo, _ in bands), max(hi for _, hi in bands)


def _units(structures: Sequence[Structure]) -> Ints:
    """Columns from 0 to S between which no pair is attended: in no row, by no mask."""
    tokens = structures[0].mask.tokens
    ends = np.array([0, tokens])
    if any(s.mask.soft and len(unanswered(s)[0]) for s in structures):
        return ends  # some query attends to its whole row
    _, first, last = np.concatenate([_hulls(s) for s in structures], axis=1)
    start, stop = union(2 * first, 2 * last - 1)
    return np.unique(np.concatenate((ends, start // 2, (stop + 1) // 2)))
