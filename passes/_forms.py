"""The local form of a value: which rows a rank holds, in which order, and what the numbers in them mean.

Most values hold the rows of this rank's columns.  Routing (mixture of experts) makes two other kinds:

* rows in the order of a sort (``Bag``): every rank sorts its own rows, so that the order is no part of the
  order that one process would have, but every row is computed from the same token;
* row numbers (``Points``), the permutation of that sort say, which count a rank's own rows.

Both may only be used where the result does not depend on who else is in the bag; see ``_routing``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Node

from hsap_compile.plan.chunks import Chunk


class NotLocal(Exception):
    """No rule computes this on local rows; the text says why."""


@dataclass(frozen=True, eq=False)
class Bag:
    """The order that sorting ``key`` (a node of the old graph, one number a row) gives."""

    key: Node


@dataclass(frozen=True)
class Counts:
    """How many of a rank's rows have each value of ``key``; ``cumulative``: or a smaller one."""

    key: Node
    cumulative: bool = False


@dataclass(frozen=True)
class Points:
    """Row numbers of ``space``: a layout (outer, length, inner) of rows in the order of columns, or a Bag.
    ``once``: every row of it is named exactly once."""

    space: Any
    once: bool = False


@dataclass(eq=False)
class Frame:
    """A row of ``length`` tokens of which this rank has some: the batch's, or a chunk of it.

    ``tables``: nodes of the new graph, by name: columns (n,), which of the tokens this rank has, -1 for a row
    that is made up; n; S, the length as a size; of the batch alone, ranks and order; of a chunk alone, places
    (n,), which of the rows of ``outer`` it has.  ``rows``: n as a symbol.  ``locals``: the local forms of
    values that have no home, by node and start.
    """

    length: sympy.Expr
    tables: dict[str, Any] = field(default_factory=dict)
    rows: Any = 0
    usual_start: int = 0
    locals: dict[tuple[Node, int], Node] = field(default_factory=dict)
    chunk: Chunk | None = None
    outer: Frame | None = None


class NoTables(dict[str, Any]):
    """A frame without all tables: what needs one that is missing is not local; ``why``."""

    def __init__(self, why: str, **tables: Any) -> None:
        super().__init__(tables)
        self.why = why

    def __missing__(self, name: str) -> Any:
        raise NotLocal(self.why)


@dataclass(frozen=True)
class Local:
    """The local form of a value.  ``order`` None: row i of its token dimension is column ``columns[i]`` of
    the batch.

    ``start``: the column of the value's first token; rows outside [start, start + length) are not part
    of the value (they hold other tokens' numbers) and are ignored by whatever sums or gathers.
    ``frame``: of which row these are columns; None until the sharder knows.
    """

    node: Node
    start: int = 0
    order: Bag | Counts | None = None
    points: Points | None = None
    frame: Frame | None = None

    @property
    def routed(self) -> bool:
        """Whether this is not simply the rows of this rank's columns."""
        return self.order is not None or self.points is not None
