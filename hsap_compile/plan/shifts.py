"""Which rows each rank needs of others where every token reads tokens at fixed distances.

A shift, a roll and a convolution along the tokens are one thing here: row c of the result reads rows c + k of
a value, for a few static k.  Shapes: P ranks, n columns of a rank, K distances, S tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsap_compile.plan.attended import Ints, overlaps, union
from hsap_compile.plan.placement import Placement, expand
from hsap_compile.plan.transfers import Transfers

#: (a, b): columns [a, S - b).
Range = tuple[int, int]


@dataclass(frozen=True)
class Shift:
    """Column c in ``into`` reads columns c + k in ``source``, k of ``offsets``; elsewhere nothing.

    ``wraps``: ``source`` is a ring of columns, and ``into`` the same.  Columns outside of ``into`` are no
    part of the result.  They read themselves, a token's numbers: integers may divide.
    """

    offsets: tuple[int, ...]
    source: Range
    into: Range
    wraps: bool = False

    @property
    def name(self) -> str:
        """Tells it from any other, in letters, digits and underscores."""
        numbers = (*self.source, *self.into, *self.offsets)
        return "_".join(["ring" if self.wraps else "shift", *(f"{k}".replace("-", "m") for k in numbers)])

    def reads(self, columns: Ints, tokens: int) -> Ints:
        """(n, K) the columns that ``columns`` (n,) read, -1 for none."""
        first, stop = _columns(self.source, tokens)
        start, end = _columns(self.into, tokens)
        found = columns[:, None] + np.array(self.offsets, np.int64)
        if self.wraps:
            found = first + (found - first) % max(stop - first, 1)
        result = np.where((first <= found) & (found < stop), found, -1)
        return np.where(((start <= columns) & (columns < end))[:, None], result, columns[:, None])


@dataclass(frozen=True, eq=False)
class ShiftTables:
    """What one rank sends, receives and reads for a shift. All int64.

    Attributes:
        send: (Cs,) rows of its own to send, by destination rank, then by column.
        splits: (2, P); [0, r] rows sent to rank r, [1, r] rows received from rank r.
        arriving: (Cr,) column of each received row, by source rank, then by column.
        index: (n, K) where each own row finds what it reads: own rows, then received ones, then one row of
            nothing.
    """

    send: Ints
    splits: Ints
    arriving: Ints
    index: Ints


def shifted(placement: Placement, shift: Shift) -> Transfers:
    """The columns that ranks (``to`` and ``source`` of the result) send: each that another rank lacks, once
    whatever the number of distances."""
    tokens, line = placement.tokens, placement.tokens + 1
    first, stop = _columns(shift.source, tokens)
    into, end = _columns(shift.into, tokens)
    length = max(stop - first, 1)
    to, start, last = [], [], []
    for offset in shift.offsets:
        low = np.maximum(placement.start, into) + offset
        high = np.maximum(np.minimum(placement.stop, end) + offset, low)
        if shift.wraps:  # a piece crosses the seam at most once
            high -= low
            low = first + (low - first) % length
            high += low
            to.append(placement.rank)
            start.append(np.full_like(low, first))
            last.append(high - length)
        to.append(placement.rank)
        start.append(np.maximum(low, first))
        last.append(np.minimum(high, stop))
    some = [a < b for a, b in zip(start, last, strict=True)]
    base = np.concatenate([r[s] * line for r, s in zip(to, some, strict=True)])
    wanted = (np.concatenate([x[s] for x, s in zip(xs, some, strict=True)]) for xs in (start, last))
    lows, highs = union(*(base + x for x in wanted))
    ranks = lows // line
    lows, highs = lows - ranks * line, highs - ranks * line
    order = np.argsort(placement.start)
    held_start, held_stop, holder = placement.start[order], placement.stop[order], placement.rank[order]
    i, j = overlaps(lows, highs, held_start, held_stop)
    away = ranks[i] != holder[j]
    i, j = i[away], j[away]
    found = ranks[i], holder[j], np.maximum(lows[i], held_start[j]), np.minimum(highs[i], held_stop[j])
    order = np.lexsort((found[2], found[1], found[0]))
    return Transfers(*(x[order] for x in found))


def shift_tables(placement: Placement, shift: Shift, rank: int) -> ShiftTables:
    """This rank's part."""
    moved, own = shifted(placement, shift), placement.columns_of(rank)
    sent, received = moved.sent_by(rank), moved.sent_to(rank)
    splits = np.zeros((2, placement.mesh.size), np.int64)
    np.add.at(splits[0], sent.to, sent.size)
    np.add.at(splits[1], received.source, received.size)
    arriving = expand(received.start, received.stop)
    held = np.concatenate((own, arriving))
    reads = shift.reads(own, placement.tokens)
    index = np.where(reads < 0, len(held), _where(held, np.maximum(reads, 0)))
    return ShiftTables(_where(own, expand(sent.start, sent.stop)), splits, arriving, index)


def _columns(of: Range, tokens: int) -> tuple[int, int]:
    return of[0], max(tokens - of[1], of[0])


def _where(held: Ints, columns: Ints) -> Ints:
    """Where each of ``columns`` stands in ``held``; anything for one that does not."""
    order = np.argsort(held)
    return order[np.minimum(np.searchsorted(held, columns, sorter=order), len(held) - 1)]
