"""How long the slowest group takes for one attention: what placements are compared by.

Shapes: G groups, n pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsap_compile.plan.attended import UNBOUNDED, Floats, Ints, union
from hsap_compile.plan.cost import BACKWARD, FORWARD_AND_BACKWARD, CostModel
from hsap_compile.plan.pieces import Pieces, own_pairs
from hsap_compile.plan.swap import Reach, Spread


@dataclass(frozen=True)
class Price:
    """Time in attended pairs of one group.

    Attributes:
        row: in which a key/value row, and later its gradient, passes between groups.
        overlap: of the shorter of attention and exchange that run side by side, the part that is hidden.
    """

    row: float
    overlap: float

    @classmethod
    def of(cls, cost: CostModel) -> Price:
        seconds = 2 * cost.shape.kv_row_bytes / cost.inter.bandwidth_bytes_per_s
        return cls(seconds / cost.attention_seconds(1.0), cost.overlap)


def slowest(spread: Spread, load: Floats, reach: Reach, price: Price) -> float:
    """Time of the slowest group in pairs, forward and backward, as `load.Load` counts it: attention on own
    keys runs beside the exchange, the rest after it. `load`: (G,) attended pairs of each group."""
    rows, own = _moved(spread, reach, len(load))
    exchange, own = price.row * rows, np.minimum(own, load)
    hidden = sum(np.minimum(own * passes / FORWARD_AND_BACKWARD, exchange / 2) for passes in (1.0, BACKWARD))
    return float(np.max(load + exchange - price.overlap * hidden))


def _moved(spread: Spread, reach: Reach, groups: int) -> tuple[Ints, Ints]:
    """(G,) rows that each group sends or receives, whichever are more, and pairs that it attends to on keys
    of its own."""
    order = np.argsort(spread.start)
    group, start, stop = spread.group[order], spread.start[order], spread.stop[order]
    unit = np.searchsorted(reach.units, start, side="right") - 1
    low, high = reach.units[unit], reach.units[unit + 1]
    line = 2 * int(reach.units[-1])  # of a group, so fine that units do not touch
    first, last = np.maximum(low, start - reach.hi), np.minimum(high, stop - reach.lo)
    seen, end = union(group * line + 2 * first, group * line + 2 * last - 1)
    held = np.bincount(group, stop - start, groups)
    received = np.bincount(seen // line, (end + 1 - seen) // 2, groups) - held
    seen, end = np.sort(seen % line // 2), np.sort((end % line + 1) // 2)
    seers = _beyond(seen, stop) - _beyond(seen, start) - _beyond(end, stop) + _beyond(end, start)
    sent = np.bincount(group, seers, groups) - held
    band = tuple(None if abs(bound) >= UNBOUNDED else bound for bound in (reach.lo, reach.hi))
    own = own_pairs(Pieces(unit, start - low, stop - low, group), (band[0], band[1]))
    return np.maximum(sent, received), np.bincount(group, own, groups)


def _beyond(points: Ints, columns: Ints) -> Ints:
    """(n,) how far the columns are beyond all the points before them, together; points are sorted."""
    count = np.searchsorted(points, columns)
    return count * columns - np.append(0, np.cumsum(points))[count]
