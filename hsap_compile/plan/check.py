"""Proof that tables compute every attended pair exactly once, in time near to linear in their size.

  1. Columns: every rank has its count, every column one rank, and the tables of a group agree.
  2. Rows: what one rank sends to another is what that one expects, in the same order.
  3. Slices: no two overlap, each lies where the mask allows all of it, and together they hold as many pairs
     as the mask allows for these queries. So each allowed pair is in exactly one. Slices that a formula
     decides may hold more, of which only allowed pairs count.

Shapes: P ranks, S tokens a row, B rows, N rows of a buffer, M slices.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hsap_compile.plan.attended import Bools, Ints, Runs, Structure, area, keys_between, ranges, unanswered
from hsap_compile.plan.placement import unfold
from hsap_compile.plan.slices import BAND, CAUSAL, FULL, MOD

if TYPE_CHECKING:
    from hsap_compile.plan.tables import Exchange, Plan, RankTables


class BrokenPlan(RuntimeError):
    """Tables that do not compute what the masks say: a bug of the planner, or tables that were changed."""

    def __init__(self, what: str, got: object, wanted: object) -> None:
        super().__init__(
            f"plan: {what}.\n  got:    {got}\n  wanted: {wanted}\n"
            "  do:     nothing was computed with it; please report the documents' lengths and the mesh"
        )


def check(plan: Plan, tables: Sequence[RankTables]) -> None:
    """Raise `BrokenPlan` unless `tables`, one for each rank, compute the masks of `plan`."""
    _check_columns(plan, tables)
    for i, mask in enumerate(plan.masks):
        _check_rows(plan, tables, i)
        expected = _Expected(mask.structure)
        for r, t in enumerate(tables):
            at = f"mask {i}, rank {r}"
            mine = t.masks[i]
            received = [e.remote for e in mine.exchanges]
            _check_slices(f"{at}, shared rows", expected, t.group_columns, received, mine.slices)
            _check_slices(f"{at}, alone rows", expected, t.columns[: t.alone], [], mine.alone_slices)


def _require(good: bool, what: str, got: object, wanted: object) -> None:
    if not good:
        raise BrokenPlan(what, got, wanted)


# --- columns ---


def _check_columns(plan: Plan, tables: Sequence[RankTables]) -> None:
    mesh, tokens = plan.placement.mesh, plan.placement.tokens
    longest = -(-tokens // mesh.size)
    laid = np.full(mesh.size * longest, -1)
    for r, t in enumerate(tables):
        n, count = len(t.columns), tokens // mesh.size + (r < tokens % mesh.size)
        _require(n == count, f"rank {r} holds too few or too many columns", n, count)
        _require(0 <= t.alone <= n, f"rank {r} holds too many alone columns", t.alone, f"0..{n}")
        for part in (t.columns[: t.alone], t.columns[t.alone :]):
            ascending = bool(np.all(np.diff(part) > 0))
            _require(ascending, f"rank {r}: columns are out of order", part, "ascending")
        laid[r * longest : r * longest + count] = t.columns
    held = laid[laid >= 0]
    wrong = np.flatnonzero(np.bincount(held, minlength=tokens) != 1) if held.max() < tokens else held[:1]
    _require(
        len(held) == tokens and len(wrong) == 0, "a column is on no rank or on several", wrong[:5], "one"
    )
    for r, t in enumerate(tables):
        at = f"rank {r}: "
        if r == 0 or t.order is not tables[r - 1].order:  # ranks of one plan have one array
            place = unfold(t.order, tokens)
            good = bool(np.all((place >= 0) & (place < len(laid)))) and bool(
                np.all(laid[place] == np.arange(tokens))
            )
            _require(
                good, at + "order does not lead back to the row", "another column", "each column's place"
            )
        members = mesh.groups[mesh.group_of(r)[0]]
        shared = [tables[m].columns[tables[m].alone :] for m in members]
        good = np.array_equal(np.concatenate(shared), t.group_columns)
        _require(good, at + "the group's columns differ from its members'", t.group_columns, shared)
        splits = np.zeros((2, mesh.size), np.int64)
        splits[0, list(members)] = len(t.columns) - t.alone
        splits[1, list(members)] = [len(x) for x in shared]
        good = np.array_equal(splits, t.head_splits)
        _require(good, at + "the head exchange has other counts than columns", t.head_splits, splits)


# --- rows between groups ---


def _check_rows(plan: Plan, tables: Sequence[RankTables], i: int) -> None:
    stages = plan.masks[i].limit.stages
    for r, t in enumerate(tables):
        _require(
            len(t.masks[i].exchanges) == stages,
            f"mask {i}: rank {r} exchanges rows more or less often than others",
            len(t.masks[i].exchanges),
            stages,
        )
        received, most = int(t.masks[i].splits[1].sum()), plan.masks[i].capacity
        _require(received <= most, f"mask {i}: rank {r} receives more rows than fit", received, most)
    for stage in range(stages):
        at = f"mask {i}" if stages == 1 else f"mask {i}, stage {stage}"
        batch = plan.masks[i].structure.mask.batch
        _check_exchange(at, plan, batch, tables, [t.masks[i].exchanges[stage] for t in tables])


def _check_exchange(
    at: str, plan: Plan, batch: int, tables: Sequence[RankTables], parts: Sequence[Exchange]
) -> None:
    """`parts`: what each rank sends and receives at once."""
    mesh = plan.placement.mesh
    sent = np.stack([part.splits[0] for part in parts])
    got = np.stack([part.splits[1] for part in parts])
    for r, other in np.argwhere(sent != got.T).tolist():
        raise BrokenPlan(
            f"{at}: rank {r} and rank {other} disagree on how many rows go there",
            f"{sent[r, other]} sent, {got[other, r]} expected",
            "the same number",
        )
    for r, part in enumerate(parts):
        group, position = mesh.group_of(r)
        peers = [ranks[position] for g, ranks in enumerate(mesh.groups) if g != group]
        foreign = np.delete(sent[r], peers)
        _require(not foreign.any(), f"{at}: rank {r} sends to ranks that are no peers", foreign, 0)
        for name in ("send_rows", "remote"):
            length = len(getattr(part, name))
            total = int(part.splits[int(name == "remote")].sum())
            _require(length == total, f"{at}, rank {r}: {name} has another length than splits", length, total)
    stride = plan.placement.tokens
    out = []  # what each rank sends: row * S + column
    for r, (t, part) in enumerate(zip(tables, parts, strict=True)):
        n, rows = len(t.group_columns), part.send_rows
        inside = rows.size == 0 or (0 <= rows.min() and rows.max() < batch * n)
        _require(bool(inside), f"{at}: rank {r} sends rows that it does not hold", rows, f"0..{batch * n}")
        b, index = np.divmod(rows, max(1, n))
        out.append(b * stride + t.group_columns[index])
    ends = np.cumsum(sent, axis=1)
    for r, part in enumerate(parts):
        sources = np.flatnonzero(got[r]).tolist()
        arriving = [out[source][ends[source, r] - sent[source, r] : ends[source, r]] for source in sources]
        row, column = part.remote.T
        inside = bool(np.all((0 <= column) & (column < stride)))
        _require(inside, f"{at}: rank {r} receives rows that are none", column, f"columns 0..{stride - 1}")
        wanted = row * stride + column
        wrong = np.flatnonzero(np.concatenate([np.empty(0, np.int64), *arriving]) != wanted)
        if len(wrong):
            k = int(np.searchsorted(np.cumsum(got[r, sources]), wrong[0], side="right"))
            first = int(np.sum(got[r, sources[:k]]))
            raise BrokenPlan(
                f"{at}: rank {r} takes rows of rank {sources[k]} for others",
                f"(row, column) {np.stack(np.divmod(arriving[k][:3], stride), axis=1).tolist()}... sent",
                f"{part.remote[first : first + 3].tolist()}... as expected there",
            )


# --- slices ---


@dataclass(frozen=True, eq=False)
class _Places:
    """(N,) batch row and column of each row of a buffer, and how many breaks there are up to it."""

    batch: Ints
    column: Ints
    breaks: Ints

    @classmethod
    def of(cls, batch: Ints, column: Ints) -> _Places:
        breaks = np.cumsum((np.diff(column) != 1) | (np.diff(batch) != 0))
        return cls(batch, column, np.append(0, breaks)[: len(column)])

    def contiguous(self, start: Ints, stop: Ints) -> Bools:
        """Whether rows [start, stop) are neighbours in one batch row."""
        return self.breaks[start] == self.breaks[stop - 1]


class _Expected:
    """What a mask allows."""

    def __init__(self, s: Structure) -> None:
        self.structure, self.area = s, area([s])
        self.queries, self.keys = (
            runs.take(np.argsort(runs.row * s.stride + runs.start)) for runs in (s.queries, s.keys)
        )
        self.unanswered = np.zeros(s.mask.batch * s.stride, np.bool_)
        for start, stop in zip(*unanswered(s), strict=True):
            self.unanswered[start:stop] = True

    def document(self, runs: Runs, batch: Ints, start: Ints, stop: Ints) -> Ints:
        """The label that all of [start, stop) of a batch row has in `runs`, or -1."""
        if len(runs.row) == 0:
            return np.full(len(start), -1)
        stride = self.structure.stride
        line = runs.row * stride + runs.start
        i = np.maximum(np.searchsorted(line, batch * stride + start, side="right") - 1, 0)
        inside = (runs.row[i] == batch) & (runs.start[i] <= start) & (stop <= runs.stop[i])
        return np.where(inside, runs.label[i], -1)

    def counted(self, batch: Ints, query: Ints, start: Ints, stop: Ints) -> Ints:
        """Keys in [start, stop) of its row with which each query must be computed."""
        s = self.structure
        lo, hi = s.mask.band
        label = self.document(self.queries, batch, query, query + 1)
        first, last = np.maximum(start, query - hi), np.minimum(stop, query - lo + 1)
        count = np.where((label >= 0) & (first < last), keys_between(s, label, first, last), 0)
        everything = stop - start if s.mask.soft else np.zeros_like(start)
        return np.where(self.unanswered[batch * s.stride + query], everything, count)


def _check_slices(
    at: str, expected: _Expected, columns: Ints, exchanges: Sequence[Ints], slices: Ints
) -> None:
    """`exchanges`: the (b, column) that each one brings."""
    mask, n = expected.structure.mask, len(columns)
    real = slices[slices[:, 1] > slices[:, 0]]
    q0, q1, k0, k1, kind, low, high = real.T
    rows = mask.batch * n
    received = np.concatenate([np.empty((0, 2), np.int64), *exchanges])
    parts = rows + np.cumsum([0, *map(len, exchanges)])  # where each exchange's rows begin, and the end
    keys = rows + len(received)

    def refuse(good: Bools, what: str, wanted: object) -> None:
        bad = np.flatnonzero(~good)
        if len(bad):
            raise BrokenPlan(f"{at}: {what}", real[bad[0]].tolist(), wanted)

    good = (0 <= q0) & (q1 <= rows) & (0 <= k0) & (k0 < k1) & (k1 <= keys)
    good &= np.searchsorted(parts, k0, side="right") == np.searchsorted(parts, k1 - 1, side="right")
    good &= np.isin(kind, (FULL, CAUSAL, BAND, MOD)) & ((kind != CAUSAL) | (q1 - q0 == k1 - k0))
    refuse(
        good, "a slice is out of bounds", f"queries below {rows}, keys below {rows} or from there to {keys}"
    )
    row, column = np.repeat(np.arange(mask.batch), n), np.tile(columns, mask.batch)
    own = _Places.of(row, column)
    held = _Places.of(np.append(row, received[:, 0]), np.append(column, received[:, 1]))
    good = own.contiguous(q0, q1) & held.contiguous(k0, k1) & (own.batch[q0] == held.batch[k0])
    refuse(good, "rows of a slice are no neighbours", "columns in a run of one batch row")
    _check_apart(at, real)

    b, q, k, wide, deep = own.batch[q0], own.column[q0], held.column[k0], q1 - q0, k1 - k0
    exact = kind != MOD
    refuse(~exact | (not mask.residual), "a slice has no formula, but the mask has", "kind MOD")
    # the least and the greatest i - j of the pairs (i, j) of a slice
    least = np.where(kind == BAND, np.maximum(low, 1 - deep), np.where(kind == CAUSAL, 0, 1 - deep))
    most = np.where(kind == BAND, np.minimum(high, wide - 1), wide - 1)
    lo, hi = mask.band
    label = expected.document(expected.queries, b, q, q + wide)
    good = (label >= 0) & (label == expected.document(expected.keys, b, k, k + deep))
    good &= (q - k + least >= lo) & (q - k + most <= hi) & (least <= most)
    refuse(good | ~exact, "a slice holds pairs that the mask forbids", "allowed pairs only")

    i, row = ranges(np.where(exact, q1, q0), q1)  # each query of the slices that a formula decides
    count = expected.counted(own.batch[row], own.column[row], k[i], (k + deep)[i])
    opened, closed = (np.bincount(edge[exact], minlength=rows + 1) for edge in (q0, q1))
    answers = np.cumsum(opened - closed) + np.bincount(row, count, rows + 1)  # how often a query has a key
    total = int(np.sum(_pairs(wide, deep, least, most)[exact])) + int(count.sum())
    good = np.ones(len(real), np.bool_)
    good[i[answers[row] == 0]] = False
    refuse(good | mask.soft, "a query that attends to nothing is in a slice", "no slice for it")

    pairs = int(np.sum(expected.area.before(columns + 1) - expected.area.before(columns)))
    _require(total == pairs, f"{at}: slices hold more or fewer pairs than the mask allows", total, pairs)


def _check_apart(at: str, slices: Ints) -> None:
    """Sweep over the query rows: the key rows of the slices at one query are disjoint."""
    events = sorted(
        [(int(q0), 1, int(k0), int(k1)) for q0, _, k0, k1 in slices[:, :4]]
        + [(int(q1), 0, int(k0), int(k1)) for _, q1, k0, k1 in slices[:, :4]]
    )
    active: list[tuple[int, int]] = []
    for query, opens, k0, k1 in events:
        i = bisect.bisect_left(active, (k0, k1))
        if not opens:
            active.pop(i)
            continue
        for other in active[max(0, i - 1) : i + 1]:
            if other[0] < k1 and k0 < other[1]:
                raise BrokenPlan(
                    f"{at}: two slices hold the same pairs",
                    f"keys {(k0, k1)} and {other}, query {query}",
                    "one",
                )
        active.insert(i, (k0, k1))


def _pairs(wide: Ints, deep: Ints, least: Ints, most: Ints) -> Ints:
    """Pairs (i, j), i < wide and j < deep, with least <= i - j <= most."""

    def from_(least: Ints) -> Ints:
        edges = wide - least, wide - least - deep, -least, -least - deep
        a, b, c, d = (x * (x + 1) // 2 for x in np.maximum(edges, 0))
        return a - b - c + d

    return from_(least) - from_(most + 1)
