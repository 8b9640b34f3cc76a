"""The whole plan of one batch, and the tables that one rank's compiled graph takes as inputs.

Every rank derives the same plan from the same masks, with no communication. Shapes: P ranks, S tokens a row,
B rows, N shared columns of a group, n_a alone columns of a rank, T = ceil(S / P).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hsap_compile.plan.attended import Attended, Floats, Ints, Structure, area, starts, structure, table
from hsap_compile.plan.check import check
from hsap_compile.plan.cost import H100, CostModel
from hsap_compile.plan.placement import (
    Kind,
    MeshShape,
    Owned,
    Placement,
    expand,
    owned,
    owned_alone,
    place_structures,
)
from hsap_compile.plan.slices import Buffer, slices
from hsap_compile.plan.transfers import Transfers, transfers


@dataclass(frozen=True, eq=False)
class ReceiveLimit:
    """How a compiled graph receives the rows of one attention: in ``stages`` exchanges, of which a batch that
    needs more than two times ``rows`` fills as many as it takes to receive ``rows`` in each (and one more
    from each other group, because what a group sends is divided evenly). Two are held at a time: one that
    is attended to, one that travels."""

    stages: int = 1
    rows: int | None = None

    def filled(self, rows: int) -> int:
        """How many stages a batch fills whose busiest rank receives `rows`."""
        if self.rows is None or rows <= 2 * self.rows:
            return 1
        return min(self.stages, -(-rows // self.rows))


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows that one rank sends and receives at once.

    Attributes:
        send_rows: (Cs,) rows to send, in the group's row space, where (b, i-th shared column of the group) is
            row b * N + i. By destination rank, then by (b, column).
        splits: (2, P); [0, r] rows sent to rank r, [1, r] rows received from rank r.
        remote: (Cr, 2) (b, column) of each received row, by source rank, then by (b, column).
    """

    send_rows: Ints
    splits: Ints
    remote: Ints


@dataclass(frozen=True, eq=False)
class MaskTables:
    """What one rank does for one mask. All int64; what there is nothing of has 0 rows.

    Attributes:
        exchanges: one for each stage; the last ones may be empty on all ranks.
        slices: (M, 7) q_start, q_stop, k_start, k_stop, kind, lo, hi, sorted by q_start then k_start.
            Queries count rows of the group's row space; keys do too below B * N, and B * N + j is the j-th
            received row, of all stages in turn; no slice has rows of two. Query i may attend to key j, both
            counted from the start of the slice, by its kind:
            FULL always; CAUSAL iff j <= i (such slices are square); BAND iff lo <= i - j <= hi, +-2**31 for
            an unbounded side; MOD iff the mask's formula says so. Each allowed pair is in exactly one slice.
            MOD occurs for residual and soft masks, and where labels or validity interleave so much that there
            would be more than slices.MAX_EXACT other slices.
        alone_slices: (Ma, 7) the same over the rank's alone rows, where (b, i-th alone column) is row
            b * n_a + i, queries and keys.
    """

    exchanges: tuple[Exchange, ...]
    slices: Ints
    alone_slices: Ints

    @property
    def splits(self) -> Ints:
        """(2, P) rows sent to and received from each rank, in all stages."""
        return np.sum([e.splits for e in self.exchanges], axis=0)

    @property
    def remote(self) -> Ints:
        """(C, 2) (b, column) of each received row, in all stages."""
        return np.concatenate([e.remote for e in self.exchanges])


@dataclass(frozen=True, eq=False)
class RankTables:
    """What one rank holds and does. All int64.

    Attributes:
        columns: (n,) this rank's columns: the alone ones, ascending, then the shared ones, ascending.
        alone: n_a, how many of them are alone; 0 in groups of 1.
        group_columns: (N,) its group's shared columns, of each member in turn, ascending.
        order: (2, K) of the K runs of columns that lie together on a rank, from left to right: the first
            column, and how far the place of that column is from the one before it; see `placement.unfold`.
        head_splits: (2, P) rows of the head exchange within the group: [0, r] sent to and [1, r] received
            from member r, per batch row; 0 for other ranks.
        masks: the tables of each mask.
    """

    columns: Ints
    alone: int
    group_columns: Ints
    order: Ints
    head_splits: Ints
    masks: tuple[MaskTables, ...]


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """What all ranks do for one mask. `owned` are the shared rows."""

    structure: Structure
    placement: Placement
    owned: Owned
    transfers: Transfers
    limit: ReceiveLimit

    @cached_property
    def rows_sent(self) -> Ints:
        """(P, P) int64 [from, to]: KV rows between ranks."""
        mesh = self.placement.mesh
        result = np.zeros((mesh.size, mesh.size), np.int64)
        rows = self.transfers.rows(mesh.inter)
        for ranks in mesh.ranks.T:  # one position of every group
            result[np.ix_(ranks, ranks)] = rows
        return result

    @cached_property
    def area(self) -> Floats:
        """(P,) float64: attended pairs that each rank computes, times its share of the heads: all of them for
        alone queries, 1 / intra for the group's shared ones."""
        placement, mesh = self.placement, self.placement.mesh
        before = area([self.structure])
        pairs = before.before(placement.stop) - before.before(placement.start)
        alone = np.bincount(placement.rank, np.where(placement.shared, 0, pairs), mesh.size)
        shared = np.bincount(placement.group, np.where(placement.shared, pairs, 0), mesh.inter)
        return alone + shared[mesh.group] / mesh.intra

    @property
    def balance(self) -> float:
        """Largest area over mean area; 1 is perfect."""
        return _balance(self.area)

    @cached_property
    def capacity(self) -> int:
        """Rows that a receive buffer must hold on every rank."""
        return int(np.bincount(self.transfers.to, self.transfers.size, 1).max())

    @cached_property
    def _stages(self) -> list[Transfers]:
        parts = self.transfers.parts(self.limit.filled(self.capacity))
        return parts + [self.transfers.take(slice(0))] * (self.limit.stages - len(parts))

    def tables(self, rank: int) -> MaskTables:
        """This rank's part."""
        placement, batch = self.placement, self.structure.mask.batch
        mesh = placement.mesh
        group, position = mesh.group_of(rank)
        peers = mesh.ranks[:, position]  # the rank of every group that this rank exchanges KV with
        own = self.owned.of(group)
        rows = int((own.stop - own.start).sum())

        exchanges, received, base = [], [], rows
        for stage in self._stages:
            send = _by_rank(stage.sent_by(group), peers, by="to")
            i = own.start.searchsorted(send.start, side="right") - 1
            send_rows = expand(send.start + own.offset[i], send.stop + own.offset[i])
            receive = _by_rank(stage.sent_to(group), peers, by="source")
            splits = np.zeros((2, mesh.size), np.int64)
            np.add.at(splits[0], peers[send.to], send.size)
            np.add.at(splits[1], peers[receive.source], receive.size)
            row = receive.start // self.structure.stride
            line = row * self.structure.stride
            remote = np.zeros((int(receive.size.sum()), 2), np.int64)
            if batch > 1:
                remote[:, 0] = row.repeat(receive.size)
            remote[:, 1] = expand(receive.start - line, receive.stop - line)
            exchanges.append(Exchange(send_rows, splits, remote))
            received.append(_buffer(receive, base))
            base += len(remote)
        found = slices(self.structure, Buffer(own.start, own.stop, own.offset), _together(received))
        alone = owned_alone(placement, rank, batch)
        nothing = Buffer(*[np.empty(0, np.int64)] * 3)
        apart = slices(self.structure, Buffer(alone.start, alone.stop, alone.offset), nothing)
        return MaskTables(tuple(exchanges), found, apart)


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one batch: the same on every rank.

    Attributes:
        placement: who holds which columns.
        masks: per mask, `rows_sent` (P, P), `area` (P,) and `balance`.
    """

    placement: Placement
    masks: tuple[MaskPlan, ...]

    @property
    def area(self) -> Floats:
        """(P,) float64: attended pairs of each rank times its share of the heads, summed over masks."""
        return np.sum([m.area for m in self.masks], axis=0)

    @property
    def balance(self) -> float:
        """Largest area over mean area, all masks together; 1 is perfect."""
        return _balance(self.area)

    @property
    def exchanged(self) -> Ints:
        """(P,) int64: columns of each rank that take part in its group's head exchange, if it has one."""
        return self.placement.exchanged

    def tables(self, rank: int) -> RankTables:
        """The tables of one rank.

        Raises:
            ValueError: no such rank in the mesh.
        """
        placement = self.placement
        mesh = placement.mesh
        group, _ = mesh.group_of(rank)
        members = list(mesh.groups[group])
        head_splits = np.zeros((2, mesh.size), np.int64)
        head_splits[0, members] = self.exchanged[rank]
        head_splits[1, members] = self.exchanged[members]
        return RankTables(
            placement.columns_of(rank),
            int(placement.alone[rank]),
            placement.group_columns(group),
            self._order,
            head_splits,
            tuple(m.tables(rank) for m in self.masks),
        )

    def verify(self, tables: Sequence[RankTables] | None = None) -> None:
        """Prove that every attended pair is computed exactly once, and that sends match receives.

        Args:
            tables: those of all ranks, if not as planned.

        Raises:
            BrokenPlan: what is wrong, and where.
        """
        check(self, [self.tables(r) for r in range(self.placement.mesh.size)] if tables is None else tables)

    def digest(self) -> int:
        """A 32-bit number of all that the tables follow from: equal on ranks that were given the same."""
        placement, result = self.placement, zlib.crc32(repr(self.placement.mesh.groups).encode())
        arrays = [placement.rank, placement.shared, placement.start, placement.stop]
        for m in self.masks:
            mask, runs, t = m.structure.mask, (m.structure.queries, m.structure.keys), m.transfers
            said = (mask.batch, mask.tokens, mask.lo, mask.hi, mask.residual, mask.soft)
            result = zlib.crc32(repr(said).encode(), result)
            arrays += [x for r in runs for x in (r.row, r.start, r.stop, r.label)]
            arrays += [t.to, t.source, t.start, t.stop, np.array([m.limit.filled(m.capacity)])]
        for array in arrays:
            result = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(b",", result))
        return result

    @cached_property
    def _order(self) -> Ints:
        placement = self.placement
        rank, size = placement.rank, placement.stop - placement.start
        longest = -(-placement.tokens // placement.mesh.size)
        before = size.cumsum() - size
        opens = starts(rank)  # the pieces of a rank are side by side
        base = np.zeros(placement.mesh.size, np.int64)
        base[rank[opens]] = before[opens]
        first = rank * longest + before - base[rank]  # where the columns of each piece begin
        at = placement.start.argsort()
        first, behind = first[at], (first + size)[at]
        jump = first.copy()
        jump[1:] -= behind[:-1] - 1
        return table(placement.start[at], jump)


def make(
    masks: Sequence[Attended],
    mesh: MeshShape,
    kind: Kind = "balanced",
    cost: CostModel = H100,
    limit: ReceiveLimit = ReceiveLimit(),
) -> Plan:
    """Plan one batch whose attentions have these masks; `cost` decides what to trade for what.

    Raises:
        ValueError: as `place`.
    """
    structures = [structure(m) for m in masks]
    placement = place_structures(structures, mesh, kind, cost)
    own = {batch: owned(placement, batch) for batch in {s.mask.batch for s in structures}}
    held = [own[s.mask.batch] for s in structures]
    found = [MaskPlan(s, placement, o, transfers(s, o), limit) for s, o in zip(structures, held, strict=True)]
    return Plan(placement, tuple(found))


def _by_rank(t: Transfers, peers: Ints, by: str) -> Transfers:
    """Ordered by the rank at the other end, then along the row line."""
    return t.take(np.lexsort((t.start, peers[getattr(t, by)])))


def _buffer(received: Transfers, base: int) -> Buffer:
    """Where received rows lie, from row `base` on; neighbours in buffer and in columns are one interval."""
    start, stop = received.start, received.stop
    size = stop - start
    offset = base + size.cumsum() - size - start
    opens = np.ones(len(start) + 1, np.bool_)
    np.not_equal(start[1:], stop[:-1], out=opens[1:-1])
    start, stop, offset = start[opens[:-1]], stop[opens[1:]], offset[opens[:-1]]
    order = start.argsort()
    return Buffer(start[order], stop[order], offset[order])


def _together(buffers: Sequence[Buffer]) -> Buffer:
    start, stop, offset = (
        np.concatenate([getattr(b, name) for b in buffers]) for name in ("start", "stop", "offset")
    )
    order = np.argsort(start)
    return Buffer(start[order], stop[order], offset[order])


def _balance(area: Floats) -> float:
    return float(area.max() / area.mean()) if area.any() else 1.0
