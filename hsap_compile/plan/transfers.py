"""Which KV rows each group needs from which other group: exactly those that its queries may attend to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsap_compile.plan.attended import Bools, Ints, Structure, overlaps, unanswered, union, within
from hsap_compile.plan.placement import Owned


@dataclass(frozen=True, eq=False)
class Transfers:
    """Intervals [start, stop) of the row line that group `source` sends to group `to`. All arrays (n,) int64.

    Sorted by (to, source, start); each needed row is in exactly one interval, and an interval lies in one run
    of the sender's columns.
    """

    to: Ints
    source: Ints
    start: Ints
    stop: Ints

    @property
    def size(self) -> Ints:
        """(n,) int64 rows of each interval."""
        return self.stop - self.start

    def rows(self, groups: int) -> Ints:
        """(groups, groups) int64 [source, to]: rows sent."""
        count = np.bincount(self.source * groups + self.to, weights=self.size, minlength=groups * groups)
        return count.astype(np.int64).reshape(groups, groups)

    def sent_by(self, source: int) -> Transfers:
        """What a group sends, by `to`."""
        return self.take(np.flatnonzero(self.source == source))

    def sent_to(self, to: int) -> Transfers:
        """What a group receives, by `source`."""
        first, stop = np.searchsorted(self.to, (to, to + 1))
        return self.take(slice(first, stop))

    def parts(self, stages: int) -> list[Transfers]:
        """What is sent in each of so many stages: of what one group sends to another, about as many rows in
        each, in order."""
        if stages == 1:
            return [self]
        pair = self.to * (int(self.source.max(initial=0)) + 1) + self.source
        opens = np.diff(pair, prepend=-1) != 0
        which, before = np.cumsum(opens) - 1, np.cumsum(self.size) - self.size
        at = before - before[opens][which]  # of a pair's rows, those in front of each interval
        rows = np.bincount(which, self.size).astype(np.int64)[which]
        found = []
        for stage in range(stages):
            first, last = (np.clip(rows * s // stages - at, 0, self.size) for s in (stage, stage + 1))
            cut = Transfers(self.to, self.source, self.start + first, self.start + last)
            found.append(cut.take(first < last))
        return found

    def take(self, i: Ints | Bools | slice) -> Transfers:
        """Some of the intervals."""
        return Transfers(self.to[i], self.source[i], self.start[i], self.stop[i])


def transfers(s: Structure, own: Owned) -> Transfers:
    """1. Queries of each group reach intervals of the label line; 2. these hold keys; 3. keys have owners."""
    if np.all(own.group == own.group[:1]):
        nothing = np.empty(0, np.int64)
        return Transfers(nothing, nothing, nothing, nothing)
    line = s.mask.batch * s.stride  # length of the row line
    to, start, stop = _needed(s, own)
    start, stop = union(to * line + start, to * line + stop)
    to = start // line
    start, stop = start - to * line, stop - to * line
    i, j = overlaps(start, stop, own.start, own.stop)
    away = to[i] != own.group[j]
    i, j = i[away], j[away]
    to, source = to[i], own.group[j]
    start, stop = np.maximum(start[i], own.start[j]), np.minimum(stop[i], own.stop[j])
    order = ((to * (own.group.max() + 1) + source) * line + start).argsort()  # no two are equal
    return Transfers(to[order], source[order], start[order], stop[order])


def _needed(s: Structure, own: Owned) -> tuple[Ints, Ints, Ints]:
    """(group, start, stop) on the row line of the keys that a group's queries attend to, own ones too."""
    lo, hi = s.mask.band
    tokens, stride = s.mask.tokens, s.stride
    queries, keys = s.queries, s.keys
    i, j = overlaps(own.start, own.stop, *s.query_line)
    line = (queries.row * stride)[j]
    first = np.maximum(own.start[i] - line, queries.start[j])
    last = np.minimum(own.stop[i] - line, queries.stop[j])
    # the reaches of one group's queries in one document overlap: their union keeps the join below linear
    labels = max(queries.label.max(initial=0), keys.label.max(initial=0)) + 1
    base = (own.group[i] * labels + queries.label[j]) * stride
    start, stop = union(base + within(first - hi, tokens), base + within(last - lo, tokens))
    to = start // (labels * stride)
    start, stop = start - to * labels * stride, stop - to * labels * stride
    key_start, key_stop = s.key_line
    i, j = overlaps(start, stop, key_start, key_stop)
    shift = ((keys.row - keys.label) * stride)[j]
    to, start = to[i], np.maximum(start[i], key_start[j]) + shift
    stop = np.minimum(stop[i], key_stop[j]) + shift
    if s.mask.soft:
        i, _ = overlaps(own.start, own.stop, *unanswered(s))
        rows = own.start[i] // stride * stride
        to = np.concatenate((to, own.group[i]))
        start, stop = np.concatenate((start, rows)), np.concatenate((stop, rows + tokens))
    return to, start, stop
