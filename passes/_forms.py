"""The local form of a value: which rows a rank holds, in which order, and what the numbers in them mean.

Most values hold the rows of this rank's columns.  Routing (mixture of experts) makes two other kinds:

* rows in the order of a sort (``Bag``): every rank sorts its own rows, so that the order is no part of the
  order that one process would have, but every row is computed from the same token;
* row numbers (``Points``), the permutation of that sort say, which count a rank's own rows.

Both may only be used where the result does not depend on who else is in the bag; see ``_routing``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node


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


@dataclass(frozen=True)
class Local:
    """The local form of a value.  ``order`` None: row i of its token dimension is column ``columns[i]`` of
    the batch.

    ``start``: the column of the value's first token; rows outside [start, start + length) are not part
    of the value (they hold other tokens' numbers) and are ignored by whatever sums or gathers.
    """

    node: Node
    start: int = 0
    order: Bag | Counts | None = None
    points: Points | None = None

    @property
    def routed(self) -> bool:
        """Whether this is not simply the rows of this rank's columns."""
        return self.order is not None or self.points is not None
