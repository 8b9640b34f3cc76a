"""From a table of slices to calls of flash attention over sequences of unlike lengths: integers only.

A call reads rows of the queries and of one buffer of keys, cut into sequences; query x of n sees key y of m
where ``x + (m - n) - left <= y <= x + (m - n) + right``, and -1 is any distance: windows stand at the last
query and key.  Everything that slices can say is calls with few windows, whatever the documents:

    (-1, -1)   all keys
    (-1, 0)    keys up to the diagonal: documents, and what a query has of its own document on this rank
    (w, 0)     and no further back than w: the mask's window, less what lies between a rank's own pieces
    (0, -1)    n x n, keys from the diagonal on: what a window leaves of keys before the queries

What one query row sees of a buffer is intervals of keys, whose ends stand still or move on with the row.
Slices are cut into stretches of rows over which they do one of the two; intervals that meet are one (blocks
of a window, pieces of a document that follow one another), and so are stretches that continue one another.
Every query of a sequence sees a key, and every key is seen: nothing rests on what a kernel makes of others.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hsap_compile.kernels.slices import BAND, CAUSAL, MOD, Slice, checked, trim

Ints = npt.NDArray[np.int64]
_Cuttable = TypeVar("_Cuttable", bound=tuple[Any, ...])

ALL, CAUSE, REST = (-1, -1), (-1, 0), (0, -1)  # windows: (left, right)


class Rows(NamedTuple):
    """``size`` rows of a buffer: from ``start`` on, or those that ``numbers`` (size,) names."""

    start: int
    size: int
    numbers: Ints | None


class Call(NamedTuple):
    """One call.  ``q_ends``, ``k_ends`` (sequences + 1,): where sequences begin and end among the rows.
    ``first``: no call before it has one of its query rows.  No query row occurs twice in a call."""

    window: tuple[int, int]
    remote: bool
    q: Rows
    k: Rows
    q_ends: Ints
    k_ends: Ints
    first: bool

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest sequences."""
        return int(np.diff(self.q_ends).max()), int(np.diff(self.k_ends).max())


class Calls(NamedTuple):
    """``shared_*``: whether a query row is in several calls, a key row of a buffer in several sequences."""

    calls: tuple[Call, ...]
    shared_queries: bool
    shared_keys: bool
    shared_remote: bool


def calls(table: Tensor, own: int, remote: int) -> Calls:
    """The calls for a table of slices over ``own`` and ``remote`` rows.

    Raises ``ValueError``: as ``slices.plan``, and for a slice that only the mask's formula decides.
    """
    rows = checked(table, own, remote)
    formulas = np.flatnonzero(rows[:, 4] == MOD)
    if len(formulas):
        raise ValueError(
            f"hsap::attend: slice {rows[formulas[0]].tolist()} is one that the mask's formula decides, "
            'expected full, causal or band (kind 0 to 2) on cuda; compile with attention="flex"'
        )
    return _calls(np.ascontiguousarray(rows).tobytes(), own, remote)


# All layers, and the backward, have the same tables.
@functools.lru_cache(maxsize=64)
def _calls(table: bytes, own: int, remote: int) -> Calls:
    stretches: dict[bool, list[_Stretch]] = {False: [], True: []}
    for q_start, q_stop, k_start, k_stop, kind, lo, hi in (
        np.frombuffer(table, np.int64).reshape(-1, 7).tolist()
    ):
        far = k_start >= own
        nq, nk = q_stop - q_start, k_stop - k_start
        if kind != BAND:
            lo, hi = 0 if kind == CAUSAL else -nk, nq
        band = trim(Slice(q_start, nq, k_start - own * far, nk, BAND, int(far), lo, hi))
        if band is not None:
            stretches[far].extend(_stretches(band))
    found = [
        (window, far, sequences)
        for far, those in stretches.items()
        for window, group in _by_window(_chains(_met(those))).items()
        for sequences in _apart(group)
    ]
    # the one with most rows first: what the others add to is then there
    found.sort(key=lambda c: -_queries(c[2]))
    seen, made = np.zeros(own, np.bool_), []
    for window, far, sequences in found:
        q, k = _rows((s.q0, s.q1) for s in sequences), _rows(x for s in sequences for x in s.keys)
        q_ends = np.cumsum([0, *(s.q1 - s.q0 for s in sequences)])
        k_ends = np.cumsum([0, *(s.size for s in sequences)])
        at = _numbers(q)
        made.append(Call(window, far, q, k, q_ends, k_ends, not seen[at].any()))
        seen[at] = True
    keys = [
        _twice([c.k for c in made if c.remote is far], rows) for far, rows in ((False, own), (True, remote))
    ]
    return Calls(tuple(made), not all(c.first for c in made), *keys)


# ---------------------------------------------------------------------------------------------------
# Stretches: query rows q0 up to q1; row q0 + i sees keys first + i * first_moves up to last + i * last_moves
# ---------------------------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    q0: int
    q1: int
    first: int
    first_moves: int
    last: int
    last_moves: int

    def part(self, q0: int, q1: int) -> _Stretch:
        on = q0 - self.q0
        first, last = self.first + on * self.first_moves, self.last + on * self.last_moves
        return _Stretch(q0, q1, first, self.first_moves, last, self.last_moves)


def _stretches(band: Slice) -> Iterator[_Stretch]:
    """``band`` is trimmed: each of its rows sees a key."""
    q, nq, k, nk, kind, _, lo, hi = band
    if kind != BAND:
        lo, hi = 0 if kind == CAUSAL else -nk, nq
    leaves = hi if hi < nq - 1 else nq  # from this row on, keys at the left are out of reach
    ends = nk + lo if lo > 1 - nk else 0  # and from this one on, all keys at the right are within
    at = sorted({0, nq, min(leaves, nq), min(max(ends, 0), nq)})
    for start, stop in zip(at, at[1:], strict=False):
        moves, grows = int(start >= leaves), int(start < ends)
        first, last = start - hi if moves else 0, start - lo if grows else nk - 1
        yield _Stretch(q + start, q + stop, k + first, moves, k + last, grows)


def _cut(intervals: Iterable[_Cuttable]) -> Iterator[tuple[list[tuple[int, int]], _Cuttable]]:
    """Each of ``intervals`` (q0, q1, ..) and its parts between where any of them begins or ends."""
    intervals = list(intervals)
    borders = sorted({x for s in intervals for x in s[:2]})
    for s in intervals:
        at = borders[bisect_left(borders, s[0]) : bisect_left(borders, s[1]) + 1]
        yield list(itertools.pairwise(at)), s


def _met(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """The same, cut where another begins or ends; those over the same rows whose keys meet are one."""
    over: dict[int, list[_Stretch]] = defaultdict(list)
    for at, s in _cut(stretches):
        for q0, q1 in at:
            over[q0].append(s.part(q0, q1))
    found = []
    for _, parts in sorted(over.items()):
        parts.sort(key=lambda s: s.first)
        joined = parts[:1]
        for s in parts[1:]:
            before = joined[-1]
            together = before.last_moves == s.first_moves or s.q1 - s.q0 == 1
            if before.last + 1 == s.first and together:
                joined[-1] = before._replace(last=s.last, last_moves=s.last_moves)
            else:
                joined.append(s)
        found += joined
    return found


@dataclass
class _Chain:
    """Stretches that continue one another, of which the first and the last are kept.  Whether the keys of one
    row move, nobody knows: ``first_moves`` and ``last_moves`` say what may be."""

    begin: _Stretch
    end: _Stretch
    first_moves: tuple[int, ...]
    last_moves: tuple[int, ...]

    @classmethod
    def of(cls, s: _Stretch) -> _Chain:
        return cls(s, s, *_moves(s))

    def go_on(self, s: _Stretch) -> bool:
        """Take in ``s``, which begins where this ends, if it is more of the same."""
        first_moves, last_moves = _moves(s)
        here = self.end.part(self.end.q1 - 1, self.end.q1)
        by, on = s.first - here.first, s.last - here.last
        if on not in self.last_moves or on not in last_moves:
            return False
        if by == on == 1 and len(self.first_moves) == len(first_moves) == 2:
            return False  # two documents of one token
        for moves in first_moves:
            # or: a window that no longer reaches back to where its keys begin
            starts = on == moves == 1 and 0 in self.first_moves and by in (0, 1)
            if (by == moves and moves in self.first_moves) or starts:
                self.end = s._replace(first_moves=moves, last_moves=on)
                self.first_moves, self.last_moves = (moves,), (on,)
                return True
        return False


def _moves(s: _Stretch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((0, 1), (0, 1)) if s.q1 - s.q0 == 1 else ((s.first_moves,), (s.last_moves,))


def _chains(stretches: Iterable[_Stretch]) -> list[_Chain]:
    """``stretches``, in order of rows, put together where they continue one another."""
    found: list[_Chain] = []
    ending: dict[tuple[int, int], _Chain] = {}  # by the next row, and the last key that it would see
    for s in stretches:
        chain = ending.get((s.q0, s.last))
        if chain is None or not chain.go_on(s):
            chain = _Chain.of(s)
            found.append(chain)
        last = chain.end.part(s.q1 - 1, s.q1).last
        ending.update({(s.q1, last + moves): chain for moves in chain.last_moves})
    return found


# ---------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------


class _Sequence(NamedTuple):
    q0: int
    q1: int
    keys: tuple[tuple[int, int], ...]  # intervals [start, stop)

    @property
    def size(self) -> int:
        """How many keys."""
        return sum(stop - start for start, stop in self.keys)


def _queries(sequences: Iterable[_Sequence]) -> int:
    return sum(s.q1 - s.q0 for s in sequences)


def _by_window(chains: Iterable[_Chain]) -> dict[tuple[int, int], list[_Sequence]]:
    found: dict[tuple[int, int], list[_Sequence]] = defaultdict(list)
    whole: list[tuple[int, int, tuple[int, int]]] = []
    for chain in chains:
        begin, end = chain.begin, chain.end
        q0, q1, first = begin.q0, end.q1, begin.first
        last = end.part(q1 - 1, q1).last
        n = q1 - q0
        if n == 1 or not (end.first_moves or end.last_moves):
            whole.append((q0, q1, (first, last + 1)))
        elif end.last_moves:
            window = (end.last - end.first, 0) if end.first_moves else CAUSE
            found[window].append(_Sequence(q0, q1, ((first, last + 1),)))
        else:
            found[REST].append(_Sequence(q0, q1, ((first, first + n),)))
            if first + n <= last:
                whole.append((q0, q1, (first + n, last + 1)))
    found[ALL] = _joined(whole)
    # rows without a gap are read as they lie: what fits stays among its neighbours
    if found[CAUSE]:
        _move(found, ALL, CAUSE, queries=1)
    windows = [w for w in found if w[0] > 0]
    for window in sorted(windows, key=lambda w: -_queries(found[w])):
        _move(found, CAUSE, window, keys=window[0] + 1)
        _move(found, ALL, window, queries=1, keys=window[0] + 1)
    return found


def _joined(whole: Iterable[tuple[int, int, tuple[int, int]]]) -> list[_Sequence]:
    """Of (q0, q1, keys): all that the same queries see is one sequence, and one call says it."""
    seen: dict[int, list[tuple[int, int]]] = defaultdict(list)
    stops = {}
    for at, (_, _, keys) in _cut(whole):
        for q0, q1 in at:
            seen[q0].append(keys)
            stops[q0] = q1
    found: list[_Sequence] = []
    for q0, parts in sorted(seen.items()):
        s = _Sequence(q0, stops[q0], tuple(sorted(parts)))
        if found and found[-1].q1 == s.q0 and found[-1].keys == s.keys:
            found[-1] = found[-1]._replace(q1=s.q1)
        else:
            found.append(s)
    return found


def _move(
    groups: dict[tuple[int, int], list[_Sequence]],
    old: tuple[int, int],
    new: tuple[int, int],
    queries: int | None = None,
    keys: int | None = None,
) -> None:
    """Sequences of at most so many queries and keys are as well of another window."""

    def fits(s: _Sequence) -> bool:
        return (queries is None or s.q1 - s.q0 <= queries) and (keys is None or s.size <= keys)

    groups[new] += [s for s in groups[old] if fits(s)]
    groups[old] = [s for s in groups[old] if not fits(s)]


def _apart(sequences: Iterable[_Sequence]) -> list[list[_Sequence]]:
    """In as many parts as it takes for no part to have a query row twice."""
    parts: list[list[_Sequence]] = []
    for s in sorted(sequences):
        for part in parts:
            if part[-1].q1 <= s.q0:
                part.append(s)
                break
        else:
            parts.append([s])
    return parts


def _rows(intervals: Iterable[tuple[int, int]]) -> Rows:
    start, stop = np.array(list(intervals), np.int64).T
    count = int((stop - start).sum())
    if (stop[:-1] == start[1:]).all():
        return Rows(int(start[0]), count, None)
    before = np.cumsum(stop - start) - (stop - start)
    return Rows(0, count, np.repeat(start - before, stop - start) + np.arange(count))


def _numbers(rows: Rows) -> Ints | slice:
    return slice(rows.start, rows.start + rows.size) if rows.numbers is None else rows.numbers


def _twice(reads: Sequence[Rows], rows: int) -> bool:
    """Whether a row of a buffer is read more than once."""
    times = np.zeros(rows, np.int64)
    for read in reads:
        times += np.bincount(np.arange(rows)[_numbers(read)], minlength=rows)
    return bool((times > 1).any())
