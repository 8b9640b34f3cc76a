"""What an attention mask allows on one batch, as runs of columns.

Shapes: B batch rows, S columns (tokens of one row), everything in tokens.

All later steps are joins of sorted, disjoint intervals on a line, so that nothing ever loops over tokens.
Two lines are used, both with stride S + 1 so that intervals of different rows (labels) never touch:

    row line      row * (S + 1) + column          where data lies
    label line    label * (S + 1) + column        who may attend to whom (a label belongs to one row)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

UNBOUNDED = 2**31  # a band limit that never binds; S is smaller


@dataclass(frozen=True, eq=False)
class Attended:
    """What one attention mask allows on one batch of B rows of S tokens.

    A query column q of row b may attend to key column k of the same row where all of these hold:
    `labels[b, q] == labels[b, k]`, `query_valid[b, q]`, `key_valid[b, k]`, `lo <= q - k <= hi`.

    Attributes:
        batch: B.
        tokens: S.
        labels: (B or 1, S) int64; None is one document per row. Equal labels need not be adjacent.
        key_valid: (B or 1, S) bool; None is all valid.
        query_valid: (B or 1, S) bool; None is all valid.
        lo: least `q - k`, in columns; None is unbounded. Causal is lo = 0.
        hi: greatest `q - k`; None is unbounded. A causal window of w tokens is lo = 0, hi = w - 1.
        starts: `starts(labels)`, where whoever read them has found it; else the planner does.
        residual: the mask has a part that must be evaluated element by element; the above is then necessary,
            not sufficient, and every slice is of kind MOD.
        soft: masked entries are finite, so a query row with no allowed key attends to all S keys of its row.
            With `residual`, only rows that have no allowed key by the above are known to be such rows.

    Raises:
        ValueError: a shape or type is not as above, or lo > hi.
    """

    batch: int
    tokens: int
    labels: Ints | None = None
    key_valid: Bools | None = None
    query_valid: Bools | None = None
    lo: int | None = None
    hi: int | None = None
    residual: bool = False
    soft: bool = False
    starts: Bools | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise ValueError(
                f"Attended: got batch={self.batch}, tokens={self.tokens}; wanted both at least 1: "
                "do not plan an empty batch"
            )
        bools = ("key_valid", "query_valid", "starts")
        for name, dtype in (("labels", np.int64), *((name, np.bool_) for name in bools)):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dtype != dtype or value.shape not in {(1, self.tokens), (self.batch, self.tokens)}:
                raise ValueError(
                    f"Attended.{name}: got {value.dtype} of shape {value.shape}; wanted {np.dtype(dtype)} of "
                    f"shape (1 or {self.batch}, {self.tokens}): convert or expand it"
                )
        if self.lo is not None and self.hi is not None and self.lo > self.hi:
            raise ValueError(
                f"Attended: got lo={self.lo} > hi={self.hi}, which allows nothing; wanted lo <= hi in "
                "lo <= q - k <= hi: give None for an unbounded side"
            )

    @property
    def band(self) -> tuple[int, int]:
        """(lo, hi) with +-UNBOUNDED for None."""
        return (-UNBOUNDED if self.lo is None else self.lo), (UNBOUNDED if self.hi is None else self.hi)


@dataclass(frozen=True, eq=False)
class Runs:
    """Maximal runs of columns [start, stop) of one label in one row. All arrays (n,) int64.

    `label` numbers (row, document) pairs; a label occurs in one row only.
    """

    row: Ints
    start: Ints
    stop: Ints
    label: Ints

    def take(self, index: Ints) -> Runs:
        return Runs(self.row[index], self.start[index], self.stop[index], self.label[index])


@dataclass(frozen=True, eq=False)
class Structure:
    """A mask as runs: valid queries sorted along the row line, valid keys sorted along the label line."""

    mask: Attended
    queries: Runs
    keys: Runs
    keys_before: Ints  # (n + 1,) keys in the runs before each run

    @property
    def stride(self) -> int:
        return self.mask.tokens + 1

    @cached_property
    def query_line(self) -> tuple[Ints, Ints]:
        """(start, stop) of the valid queries on the row line."""
        base = self.queries.row * self.stride
        return base + self.queries.start, base + self.queries.stop

    @cached_property
    def key_line(self) -> tuple[Ints, Ints]:
        """(start, stop) of the valid keys on the label line."""
        base = self.keys.label * self.stride
        return base + self.keys.start, base + self.keys.stop


# --- intervals on a line ---


def span(start: Ints, stop: Ints, others_start: Ints, others_stop: Ints) -> tuple[Ints, Ints]:
    """For each interval, the range [first, last) of the sorted disjoint others that it overlaps."""
    first = others_stop.searchsorted(start, side="right")
    last = others_start.searchsorted(stop, side="left")
    return first, np.maximum(first, last)


def ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Expand ranges: (index of the range, element) for every element of every [first, last)."""
    count = last - first
    owner = np.arange(len(first)).repeat(count)
    return owner, np.arange(len(owner)) + (last - count.cumsum())[owner]


def overlaps(start: Ints, stop: Ints, others_start: Ints, others_stop: Ints) -> tuple[Ints, Ints]:
    """Index pairs (interval, other) that overlap; the others are sorted and disjoint."""
    return ranges(*span(start, stop, others_start, others_stop))


def within(columns: Ints, tokens: int) -> Ints:
    """Columns between 0 and `tokens`; in a quarter of the time of np.clip."""
    return np.minimum(np.maximum(columns, 0), tokens)


def table(*rows: Ints) -> Ints:
    """(len(rows), n) of rows (n,); in a quarter of the time of np.stack."""
    return np.concatenate(rows).reshape(len(rows), -1)


def union(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """The union of intervals, sorted and disjoint, touching ones joined and empty ones dropped."""
    keep = start < stop
    start, stop = start[keep], stop[keep]
    if len(start) == 0:
        return start, stop
    order = start.argsort(kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    opens = np.ones(len(start) + 1, np.bool_)
    np.greater(start[1:], reach[:-1], out=opens[1:-1])
    return start[opens[:-1]], reach[opens[1:]]


def distinct(values: Ints) -> Ints:
    """Sorted, each once; several times as fast as np.unique, which hashes."""
    values = np.sort(values)
    return values[starts(values)]


def starts(values: Ints | Bools) -> Bools:
    """Whether each value differs, along the last dimension, from the one before it, as the first ones do."""
    result = np.ones(values.shape, np.bool_)
    np.not_equal(values[..., 1:], values[..., :-1], out=result[..., 1:])
    return result


# --- mask to runs ---


def structure(mask: Attended) -> Structure:
    """Read the mask's arrays once, in O(B S) vector operations."""
    queries = _runs(mask, mask.query_valid)
    keys = queries if mask.query_valid is mask.key_valid else _runs(mask, mask.key_valid)
    if np.any(keys.label[1:] < keys.label[:-1]):
        keys = keys.take(np.lexsort((keys.start, keys.label)))
    before = np.concatenate(([0], np.cumsum(keys.stop - keys.start)))
    return Structure(mask, queries, keys, before)


def _runs(mask: Attended, valid: Bools | None) -> Runs:
    tokens = mask.tokens
    opens = np.ones((1, 1), np.bool_) if valid is None else starts(valid)
    if mask.labels is not None:
        begins = starts(mask.labels) if mask.starts is None else mask.starts
        opens = begins if valid is None else opens | begins
    rows, at = len(opens), opens.ravel().nonzero()[0]
    row, start = np.divmod(at, tokens)
    stop = np.append(at[1:], rows * tokens) - row * tokens
    label, labels = np.zeros(len(at), np.int64), 1
    if mask.labels is not None:
        # every distinct label starts some run, so that queries and keys number labels alike
        label, labels = _numbered(mask.labels[row % len(mask.labels), start])
    if valid is not None:
        keep = valid[row % len(valid), start]
        row, start, stop, label = row[keep], start[keep], stop[keep], label[keep]
    if rows < mask.batch:
        n = len(row)
        row = np.repeat(np.arange(mask.batch), n)
        start, stop, label = (np.tile(x, mask.batch) for x in (start, stop, label))
    return Runs(row, start, stop, row * labels + label)


def _numbered(labels: Ints) -> tuple[Ints, int]:
    """((n,) the labels numbered in their order, without gaps; how many there are)."""
    order = labels.argsort(kind="stable")
    number = starts(labels[order]).cumsum()
    result = np.empty_like(order)
    result[order] = number - 1
    return result, int(number[-1])


def answered(s: Structure) -> tuple[Ints, Ints]:
    """The queries that have an allowed key, as sorted disjoint intervals on the row line."""
    lo, hi = s.mask.band
    base, tokens = s.keys.label * s.stride, s.mask.tokens
    start, stop = union(base + within(s.keys.start + lo, tokens), base + within(s.keys.stop + hi, tokens))
    q_base = s.queries.label * s.stride
    q, i = overlaps(q_base + s.queries.start, q_base + s.queries.stop, start, stop)
    shift = (s.queries.row * s.stride - q_base)[q]
    return union(
        np.maximum((s.queries.start + q_base)[q], start[i]) + shift,
        np.minimum((s.queries.stop + q_base)[q], stop[i]) + shift,
    )


def unanswered(s: Structure) -> tuple[Ints, Ints]:
    """The complement of `answered` in all B x S query rows."""
    start, stop = answered(s)
    rows = np.arange(s.mask.batch) * s.stride
    # every row's padding column counts as answered, so the gaps in between are what is left
    start, stop = union(np.append(start, rows + s.mask.tokens), np.append(stop, rows + s.stride))
    begin, end = np.concatenate(([0], stop[:-1])), start
    return begin[begin < end], end[begin < end]


# --- area ---


@dataclass(frozen=True, eq=False)
class Area:
    """Attended pairs per query column, summed over batch rows and masks: linear between the knots.

    knots (K + 1,) columns from 0 to S; total (K + 1,) pairs of the queries before each knot; first (K,) pairs
    of the query at each knot; slope (K,) their growth per column up to the next knot.
    """

    knots: Ints
    total: Ints
    first: Ints
    slope: Ints

    def before(self, columns: Ints) -> Ints:
        """Attended pairs of all query columns before each of `columns`."""
        i = self.knots[1:-1].searchsorted(columns, side="right")
        t = columns - self.knots[i]
        return self.total[i] + self.first[i] * t + self.slope[i] * (t * (t - 1) // 2)

    def where(self, pairs: Floats) -> Ints:
        """(n,) the columns before which there are nearest to so many attended pairs."""
        i = np.searchsorted(self.total[1:-1], pairs, side="right")
        more, slope = pairs - self.total[i], self.slope[i]
        linear = self.first[i] - slope / 2
        root = linear + np.sqrt(np.maximum(linear * linear + 2 * slope * more, 0))
        t = np.rint(2 * more / np.maximum(root, 0.5)).astype(np.int64)
        return self.knots[i] + np.clip(t, 0, self.knots[i + 1] - self.knots[i])


def area(structures: Sequence[Structure]) -> Area:
    """Exact; linear in the number of runs, however the labels interleave."""
    tokens = structures[0].mask.tokens
    edges = np.concatenate([np.zeros(1, np.int64), *map(_knots, structures)])
    knots = np.append(distinct(edges[(edges >= 0) & (edges < tokens)]), tokens)
    size = knots[1:] - knots[:-1]
    first, last = reduce(np.add, (_pairs(s, knots[:-1], knots[1:] - 1) for s in structures))
    slope = (last - first) // np.maximum(size - 1, 1)
    total = np.zeros_like(knots)
    np.cumsum((first + last) * size // 2, out=total[1:])
    return Area(knots, total, first, slope)


def _knots(s: Structure) -> Ints:
    edges = np.concatenate((s.queries.start, s.queries.stop))
    for shift in (s.mask.lo, s.mask.hi):
        if shift is not None and (shift or s.keys is not s.queries):
            edges = np.concatenate((edges, s.keys.start + shift, s.keys.stop + shift))
    # a soft mask jumps where the count is 0, which a linear piece may be at its ends only
    return np.concatenate((edges - 1, edges, edges + 1)) if s.mask.soft else edges


def _pairs(s: Structure, first: Ints, last: Ints) -> Ints:
    """(2, K) keys attended by the queries of the columns `first` and `last`, (K,) each, summed over batch
    rows. In every row both lie in one run of queries, or in none."""
    lo, hi = s.mask.lo, s.mask.hi
    columns = table(first, last)[:, None]
    at = np.arange(s.mask.batch)[:, None] * s.stride + first
    count = np.zeros((2, *at.shape), np.int64)
    if len(s.queries.row):
        start, stop = s.query_line
        q = np.maximum(start.searchsorted(at, side="right") - 1, 0)
        inside = (at >= start[q]) & (at < stop[q])
        below = np.zeros(1, np.int64) if hi is None else columns - hi
        behind = np.full(1, s.mask.tokens) if lo is None else columns - lo + 1
        count += keys_between(s, s.queries.label[q], below, behind) * inside
    if s.mask.soft:
        count = np.where(count == 0, s.mask.tokens, count)
    return count.sum(axis=1)


def keys_between(s: Structure, label: Ints, start: Ints, stop: Ints) -> Ints:
    """Keys of each label in columns [start, stop), for arrays that broadcast."""
    return _keys_before(s, label, stop) - _keys_before(s, label, start)


def _keys_before(s: Structure, label: Ints, column: Ints) -> Ints:
    """Keys before (label, column) on the label line."""
    at = label * s.stride + within(column, s.mask.tokens)
    if len(s.keys.row) == 0:
        return np.zeros_like(at)
    starts, stops = s.key_line
    i = starts.searchsorted(at, side="right") - 1
    return np.where(i < 0, 0, s.keys_before[i] + np.minimum(at, stops[i]) - starts[i])
