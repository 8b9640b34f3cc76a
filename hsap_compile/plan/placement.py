"""Which rank holds which columns.

Token counts equal to +-1 on every rank are a hard rule; attended area is balanced over ranks under it; what
is sent is kept little under that. Three levels: documents alone on one rank send nothing, those shared in a
group exchange heads, those on several groups send keys and values.
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
    distinct,
    starts,
    structure,
    table,
    unanswered,
    union,
)
from hsap_compile.plan.balance import balance
from hsap_compile.plan.cost import H100, CostModel
from hsap_compile.plan.fill import LIMIT, NOBODY
from hsap_compile.plan.slowest import Price
from hsap_compile.plan.swap import Reach, Spread

Kind = Literal["balanced", "contiguous"]

LEAST = 2  # tokens of a rank: sizes 0 and 1 are special to many operators
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
    def ranks(self) -> Ints:
        """(inter, intra) int64 rank at each position of each group."""
        return np.array(self.groups)

    @cached_property
    def group(self) -> Ints:
        """(P,) int64 group of each rank."""
        return self.ranks.ravel().argsort() // self.intra

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
    opens = np.ones(len(start) + 1, np.bool_)
    np.not_equal(start[1:], stop[:-1], out=opens[1:-1])
    opens[1:-1] |= group[1:] != group[:-1]
    group, start, stop = group[opens[:-1]], start[opens[:-1]], stop[opens[1:]]
    size = stop - start
    ends = size.cumsum()
    held = np.bincount(group, size).astype(np.int64)
    index = ends - size - (held.cumsum() - held)[group] - start
    order = start.argsort()
    group, start, stop, index = (x[order] for x in (group, start, stop, index))
    row = np.arange(batch)[:, None]
    line = row * (placement.tokens + 1)
    rows = group + 0 * row, line + start, line + stop, row * held[group] + index - line
    return Owned(*(x.ravel() for x in rows))


def place(
    masks: Sequence[Attended], mesh: MeshShape, kind: Kind = "balanced", cost: CostModel = H100
) -> Placement:
    """Assign columns to ranks.

    `contiguous` cuts [0, S) in the order of (group, position). `balanced` spreads documents over groups; for
    several rows or masks these are cut at the union of their boundaries, and documents that interleave count
    as one (`balance`). In both, those documents of a group that lie, or fit, on one rank are alone there as
    far as that keeps its ranks even (`alone`); the rest is shared and cut in order. `cost` is the price of
    what is sent.

    Raises:
        ValueError: masks differ in tokens, S < 2 P, or an unknown kind.
    """
    return place_structures([structure(m) for m in masks], mesh, kind, cost)


def place_structures(
    structures: Sequence[Structure], mesh: MeshShape, kind: Kind, cost: CostModel
) -> Placement:
    """`place` for masks that were read before."""
    sizes = {s.mask.tokens for s in structures}
    if len(sizes) != 1:
        raise ValueError(
            f"place: got masks over {sorted(sizes)} tokens; wanted one or more masks over as many tokens: "
            "plan each batch by itself"
        )
    if kind not in ("balanced", "contiguous"):
        raise ValueError(f"place: got placement {kind!r}; wanted 'balanced' or 'contiguous': choose one")
    tokens, ranks = structures[0].mask.tokens, mesh.size
    if tokens < LEAST * ranks and ranks > 1:
        raise ValueError(
            f"place: got {tokens} tokens a row on {ranks} ranks; wanted at least {LEAST * ranks}, two a rank:"
            " use fewer ranks or a longer batch"
        )
    counts = tokens // ranks + (np.arange(ranks) < tokens % ranks)
    shares = counts[mesh.ranks].sum(axis=1)
    before, hulls = area(structures), _hulls(structures)
    units = _units(structures, hulls)
    if kind == "contiguous" or mesh.inter == 1:
        ends = np.cumsum(shares)
        spread = Spread(np.arange(mesh.inter), ends - shares, ends)
    else:
        reach = Reach(units, *_widest(structures))
        spread = balance(before, _cuts(structures, hulls, units), reach, shares, Price.of(cost))
    line = 2 * tokens  # of each group, so that groups do not touch
    runs = table(*union(spread.group * line + spread.start, spread.group * line + spread.stop))
    alone = np.empty((3, 0), np.int64)
    if mesh.intra > 1:
        alone = _alone(before, units, runs, line, counts, kind, cost, mesh)
    return _placed(mesh, tokens, runs, line, counts, alone)


def _pairs_per_column(cost: CostModel, ranks: int) -> float:
    """Pairs attended in the time in which a column's queries, keys, values and outputs, and later their
    gradients, are exchanged in a group."""
    row_bytes = 2 * cost.shape.query_row_bytes + cost.shape.kv_row_bytes
    seconds = 2 * row_bytes * (ranks - 1) / ranks / cost.intra.bandwidth_bytes_per_s
    return seconds / cost.attention_seconds(1.0)


def _alone(
    area: Area, units: Ints, runs: Ints, line: int, counts: Ints, kind: Kind, cost: CostModel, mesh: MeshShape
) -> Ints:
    """(3, n) rank, start, stop of what the ranks hold alone; `runs` (2, m) are the groups', on lines."""
    start = runs[0] % line
    order = start.argsort()
    group, start, stop = runs[0, order] // line, start[order], (runs[1] - 1)[order] % line + 1
    pairs = np.bincount(group, area.before(stop) - area.before(start), mesh.inter)
    i = start.searchsorted(units[:-1], side="right") - 1
    inside = (units[1:] <= stop[i]).nonzero()[0]
    inside = inside[group[i[inside]].argsort(kind="stable")]
    start, stop = units[inside], units[inside + 1]
    before = area.before(units)
    areas = before[inside + 1] - before[inside]
    group = group[i[inside]]
    first = group.searchsorted(np.arange(mesh.inter + 1)).tolist()
    mean, price = float(area.total[-1]) / mesh.size, _pairs_per_column(cost, mesh.intra)
    member = np.full(len(inside), NOBODY)
    for g, (held, quota) in enumerate(zip(pairs.tolist(), counts[mesh.ranks], strict=True)):
        mine = slice(first[g], first[g + 1])
        limit = max(LIMIT * mean, INSIDE * held / mesh.intra)
        part = Group(quota, (stop - start)[mine], areas[mine], held, limit, price)
        if kind == "contiguous":
            ends = runs[0, g] - g * line + np.cumsum(quota)
            at = np.searchsorted(ends, start[mine], side="right")
            whole = at == np.searchsorted(ends, stop[mine], side="left")
            member[mine] = share(part, np.where(whole, at, NOBODY))
        else:
            member[mine] = choose(part)
    some = member != NOBODY
    return table(mesh.ranks[group[some], member[some]], start[some], stop[some])


def _placed(mesh: MeshShape, tokens: int, runs: Ints, line: int, counts: Ints, alone: Ints) -> Placement:
    """What of the groups' `runs` no rank has alone is cut in order: each rank gets what its count lacks."""
    ranks = mesh.ranks.ravel()
    held = np.bincount(alone[0], alone[2] - alone[1], mesh.size).astype(np.int64)
    on = mesh.group[alone[0]] * line
    # what is left of the runs lies between the alone units
    first, last = (
        np.sort(np.concatenate(edges)) for edges in ((runs[0], alone[2] + on), (runs[1], alone[1] + on))
    )
    first, last = first[first < last], last[first < last]
    behind, ends = (last - first).cumsum(), (counts - held)[ranks].cumsum()
    before = behind - (last - first)
    edges = distinct(np.concatenate((before, [0], ends)))
    begin = edges[:-1]
    i = before.searchsorted(begin, side="right") - 1
    start = first[i] + begin - before[i] if len(begin) else begin
    stop = start + (edges[1:] - begin)
    position = ranks.argsort()
    at = np.append(position[alone[0]], ends.searchsorted(begin, side="right"))
    shared = np.arange(len(at)) >= alone.shape[1]
    start, stop = np.append(alone[1], start % line), np.append(alone[2], (stop - 1) % line + 1)
    order = ((2 * at + shared) * line + start).argsort()  # no two are equal
    return Placement(mesh, tokens, ranks[at[order]], shared[order], start[order], stop[order])


def unfold(order: Ints, tokens: int) -> Ints:
    """(S,) the place of each column in the concatenation over all ranks of their columns, each padded to T.

    In the compiled graph the same three operators make it, where something is gathered: it is larger than all
    that the host plans.
    """
    steps = np.ones(tokens, np.int64)
    steps[order[0]] = order[1]
    return np.cumsum(steps, out=steps)


def expand(start: Ints, stop: Ints) -> Ints:
    """All integers of the intervals, in order."""
    some = start < stop
    start, stop = start[some], stop[some]
    ends = (stop - start).cumsum()
    steps = np.ones(int(ends[-1]) if len(ends) else 0, np.int64)  # one array: it may be the longest of a rank
    steps[:1] = start[:1]
    steps[ends[:-1]] = start[1:] - stop[:-1] + 1
    return steps.cumsum(out=steps)


def _hulls(structures: Sequence[Structure]) -> tuple[Ints, Ints, Ints]:
    """(row, first column, the column behind the last) of every document; each mask has rows of its own."""
    rows, firsts, lasts, line = [], [], [], 0
    for s in structures:
        runs = (s.queries,) if s.keys is s.queries else (s.queries, s.keys)
        row, start, stop, label = (
            np.concatenate([getattr(r, name) for r in runs]) for name in ("row", "start", "stop", "label")
        )
        order = label.argsort(kind="stable")
        opens = starts(label[order]).nonzero()[0]
        rows.append(row[order[opens]] + line)
        firsts.append(np.minimum.reduceat(start[order], opens) if len(opens) else start)
        lasts.append(np.maximum.reduceat(stop[order], opens) if len(opens) else stop)
        line += s.mask.batch
    return np.concatenate(rows), np.concatenate(firsts), np.concatenate(lasts)


def _cuts(structures: Sequence[Structure], hulls: tuple[Ints, Ints, Ints], units: Ints) -> Ints:
    """Columns from 0 to S where a document of some row begins or ends, or several that interleave do."""
    tokens, stride = structures[0].mask.tokens, structures[0].stride
    row, first, last = hulls
    cuts = units
    if (
        row.any() or len(units) == 2
    ):  # several rows; or none is a unit where queries attend to their whole row
        cuts = _between(tokens, stride, row * stride + first, row * stride + last)
    if len(cuts) > MAX_ATOMS:
        kept = starts(cuts * MAX_ATOMS // (tokens + 1))
        kept[-1] = True
        cuts = cuts[kept]
    return cuts


def _units(structures: Sequence[Structure], hulls: tuple[Ints, Ints, Ints]) -> Ints:
    """Columns from 0 to S between which no pair is attended: in no row, by no mask."""
    tokens = structures[0].mask.tokens
    if any(s.mask.soft and len(unanswered(s)[0]) for s in structures):
        return np.array([0, tokens])  # some query attends to its whole row
    return _between(tokens, structures[0].stride, *hulls[1:])


def _between(tokens: int, stride: int, first: Ints, last: Ints) -> Ints:
    """Columns from 0 to S where intervals of the row line begin or end, or several that overlap do."""
    # a line twice as fine, on which intervals that touch do not join
    start, stop = union(2 * first, 2 * last - 1)
    return distinct(np.concatenate(([0, tokens], start // 2 % stride, (stop + 1) // 2 % stride)))


def _widest(structures: Sequence[Structure]) -> tuple[int, int]:
    """(lo, hi) of a band that holds those of all masks."""
    bands = [s.mask.band for s in structures]
    return min(lo for lo, _ in bands), max(hi for _, hi in bands)
