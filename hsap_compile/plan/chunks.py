"""Which rows of a rank lie in a chunk: a part of a row of tokens whose ends depend on the length.

A loss or a layer that is computed chunk by chunk (``x.chunk(8, 1)``) is computed by every rank for the rows
that it has of each chunk.  Shapes: n columns of a rank, r of its rows in a chunk, S tokens a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sympy

from hsap_compile.plan.attended import Ints
from hsap_compile.plan.placement import LEAST

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)

NOTHING = -1  # the element that a made-up row is


@dataclass(frozen=True)
class Chunk:
    """The elements [first, stop) of a dimension of ``outer * length * inner``, whose element
    ``(o * length + t) * inner + i`` belongs to column ``start + t``: of the batch, or of the chunk ``of``.

    ``length``, ``first`` and ``stop`` are formulas of TOKENS, the columns of the batch.
    """

    outer: int
    length: sympy.Expr
    inner: int
    start: int
    first: sympy.Expr
    stop: sympy.Expr
    of: Chunk | None = None

    @property
    def name(self) -> str:
        """What it is, in letters, digits and underscores."""
        return re.sub(r"\W+", "_", f"chunk_{self.first}_to_{self.stop}")

    def rows(self, held: Ints, tokens: int) -> tuple[Ints, Ints]:
        """(r,) rows of a rank that has the columns ``held`` (n,), counted in its outer * n * inner, and (r,)
        which element of the chunk each of them is; NOTHING: a row that is made up, of a token that is in the
        chunk if the rank has one, or else in what it is a chunk of.  At least LEAST.  ``tokens``: TOKENS."""
        length, first, stop = (_number(x, tokens) for x in (self.length, self.first, self.stop))
        assert 0 <= first <= stop <= self.outer * length * self.inner, (self, tokens)
        token = held - self.start
        inside = (held >= 0) & (0 <= token) & (token < length)
        outer, inner = np.arange(self.outer)[:, None, None], np.arange(self.inner)
        element = (outer * length + token[:, None]) * self.inner + inner
        kept = inside[:, None] & (first <= element) & (element < stop)
        rows = np.flatnonzero(kept)
        elements = element.reshape(-1)[rows] - first
        missing = (0, max(LEAST - len(rows), 0))
        some = rows if len(rows) else np.flatnonzero(np.broadcast_to(inside[:, None], kept.shape))
        instead = some[0] if len(some) else 0
        return (
            np.pad(rows, missing, constant_values=instead),
            np.pad(elements, missing, constant_values=NOTHING),
        )


@dataclass(frozen=True)
class Joined:
    """Chunks that are a dimension's elements one after the other, put together again."""

    chunks: tuple[Chunk, ...]

    @property
    def name(self) -> str:
        return f"joined_{self.chunks[0].name}"

    def places(self, found: Sequence[tuple[Ints, Ints]], n: int) -> Ints:
        """(outer * n * inner,) where each row stands among those of all chunks, which are ``found`` (``rows``
        of each); 0 for one that is in none."""
        first = self.chunks[0]
        places = np.zeros(first.outer * n * first.inner, np.int64)
        before = 0
        for rows, elements in found:
            real = np.flatnonzero(elements != NOTHING)
            places[rows[real]] = before + real
            before += len(rows)
        return places


def chunk_tables(
    keys: Sequence[Chunk | Joined], columns: Ints, tokens: int
) -> dict[tuple[object, str], Ints]:
    """The tables of ``keys`` for a rank that has ``columns`` of ``tokens``."""
    known: dict[Chunk, tuple[Ints, Ints]] = {}

    def held(of: Chunk | None) -> Ints:
        return columns if of is None else rows(of)[1]

    def rows(chunk: Chunk) -> tuple[Ints, Ints]:
        if chunk not in known:
            known[chunk] = chunk.rows(held(chunk.of), tokens)
        return known[chunk]

    result: dict[tuple[object, str], Ints] = {}
    for key in keys:
        if isinstance(key, Joined):
            found = [rows(chunk) for chunk in key.chunks]
            result[key, "places"] = key.places(found, len(held(key.chunks[0].of)))
        else:
            result[key, "rows"], result[key, "elements"] = rows(key)
    return result


def _number(formula: sympy.Expr, tokens: int) -> int:
    return int(formula.xreplace({TOKENS: sympy.Integer(tokens)}))
