"""Who holds which tokens of which document, and what follows: attended pairs, and key/value rows to send.

Shapes: n pieces, D documents, P parties (ranks, or groups of them). A mask is a band `lo <= q - k <= hi`
inside every document, None for an unbounded side. Everything is counted exactly, in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hsap_compile.plan.attended import UNBOUNDED, Ints, overlaps, ranges, union

Band = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Intervals of documents, which together cover every token once. All (n,) int64.

    Attributes:
        document: ascending.
        start, stop: counted from the start of the document, ascending in each; no piece is empty.
        party: who holds it.
    """

    document: Ints
    start: Ints
    stop: Ints
    party: Ints

    @cached_property
    def size(self) -> Ints:
        """(n,) tokens of each piece."""
        return self.stop - self.start

    @cached_property
    def lengths(self) -> Ints:
        """(D,) tokens of each document."""
        return self.stop[np.append(np.flatnonzero(np.diff(self.document)), len(self.document) - 1)]

    def of(self, party: Ints) -> Pieces:
        """The same intervals, held by others: `party` (n,)."""
        return Pieces(self.document, self.start, self.stop, party)


def cut(lengths: Sequence[int] | Ints, edges: Ints, party: Ints) -> Pieces:
    """Cut a row of documents at `edges` (m + 1,), from 0 to its end; `party` (m,) holds what is between."""
    ends = np.cumsum(np.asarray(lengths, np.int64))
    points = np.unique(np.concatenate(([0], ends, edges)))
    start, stop = points[:-1], points[1:]
    document = np.searchsorted(ends, start, side="right")
    begin = (ends - lengths)[document]
    held = np.asarray(party)[np.searchsorted(edges, start, side="right") - 1]
    return Pieces(document, start - begin, stop - begin, held)


def pairs(a: Ints, b: Ints, c: Ints, d: Ints, band: Band) -> Ints:
    """Pairs of a query in [a, b) and a key in [c, d) that the band allows. (n,) each."""
    lo = -UNBOUNDED if band[0] is None else band[0]
    hi = UNBOUNDED if band[1] is None else band[1]
    return _apart(a, b, c, d, lo) - _apart(a, b, c, d, hi + 1)


def _apart(a: Ints, b: Ints, c: Ints, d: Ints, least: int) -> Ints:
    """Pairs with q - k >= least."""
    return (
        _triangle(b - least - c)
        - _triangle(b - least - d)
        - _triangle(a - least - c)
        + _triangle(a - least - d)
    )


def _triangle(x: Ints) -> Ints:
    x = np.maximum(x, 0)
    return x * (x + 1) // 2


def total_pairs(p: Pieces, band: Band) -> Ints:
    """(n,) pairs of the queries of each piece."""
    return pairs(p.start, p.stop, np.zeros_like(p.start), p.lengths[_dense(p.document)], band)


def pair_matrix(p: Pieces, parties: int, band: Band) -> Ints:
    """(P, P) int64 [who has the queries, who has the keys]."""
    q, k = _together(p.document)
    count = pairs(p.start[q], p.stop[q], p.start[k], p.stop[k], band)
    return _sums(p.party[q] * parties + p.party[k], count, parties**2).reshape(parties, parties)


def own_pairs(p: Pieces, band: Band) -> Ints:
    """(n,) pairs of each piece's queries with keys that the same party holds."""
    order = np.lexsort((p.document, p.party))
    q, k = _together(p.party[order] * (p.document.max(initial=0) + 1) + p.document[order])
    q, k = order[q], order[k]
    return _sums(q, pairs(p.start[q], p.stop[q], p.start[k], p.stop[k], band), len(order))


def rows_needed(p: Pieces, parties: int, band: Band) -> Ints:
    """(P, P) int64 [from, to]: the rows that a party's queries attend to and another party holds."""
    lo, hi = (
        bound if bound is not None else sign * UNBOUNDED for bound, sign in zip(band, (-1, 1), strict=True)
    )
    document, lengths = _dense(p.document), p.lengths
    line = int(lengths.max()) + 1  # of one document; touching ones do not join
    whole = line * len(lengths)  # of one party
    base, length = p.party * whole + document * line, lengths[document]
    start, stop = union(base + np.clip(p.start - hi, 0, length), base + np.clip(p.stop - lo, 0, length))
    to, shift = start // whole, start // whole * whole
    held = document * line
    i, j = overlaps(start - shift, stop - shift, held + p.start, held + p.stop)
    away = to[i] != p.party[j]
    i, j = i[away], j[away]
    first = np.maximum((start - shift)[i], (held + p.start)[j])
    last = np.minimum((stop - shift)[i], (held + p.stop)[j])
    return _sums(p.party[j] * parties + to[i], last - first, parties**2).reshape(parties, parties)


def least_rows(lengths: Sequence[int] | Ints, share: int, band: Band, most: float | None = None) -> int:
    """The fewest rows that any placement can send between parties that hold at most `share` tokens each.

    Let the parties of a document of L tokens be ordered by the last token each holds. All that the earlier
    ones hold lies before the j-th from the end, at least L - j * share tokens; of these it needs the nearest
    `hi`, or all in a mask without limit. A mask without a lower limit needs all of the others' tokens.

    most: attended pairs of each party at most, where that is known. In a causal mask without a window the
    last j parties have no more than j * most pairs, so that what lies before them is also so many tokens, m,
    that m * (m + 1) is at least L * (L + 1) - 2 * j * most.
    """
    lo, hi = band
    total = 0
    for n, times in zip(*np.unique(np.asarray(lengths, np.int64), return_counts=True), strict=True):
        parties = n // share
        if most is not None and band == (0, None):
            parties = max(parties, int(n * (n + 1) / 2 / most))
        j = np.arange(1, parties + 1)
        missing = n - j * share
        if most is not None and band == (0, None):
            before = np.sqrt(np.maximum(4 * (n * (n + 1.0) - 2 * j * most) + 1, 1))
            missing = np.maximum(missing, np.ceil((before - 1) / 2 - 1e-6).astype(np.int64))
        missing = missing[missing > 0]
        if lo is None and hi is None:
            missing = np.full(len(missing), n)
        total += int(times) * int(np.minimum(missing, UNBOUNDED if hi is None else hi).sum())
    return total


def _dense(document: Ints) -> Ints:
    """Documents numbered from 0 without gaps."""
    return np.cumsum(np.diff(document, prepend=document[:1]) != 0)


def _together(key: Ints) -> tuple[Ints, Ints]:
    """All index pairs with equal keys; the keys are sorted."""
    first = np.searchsorted(key, key, side="left")
    return ranges(first, np.searchsorted(key, key, side="right"))


def _sums(index: Ints, values: Ints, size: int) -> Ints:
    # exact: a sum of pairs is below 2**53
    return np.bincount(index, weights=values, minlength=size).astype(np.int64)
