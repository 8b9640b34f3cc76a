"""Filling parties (groups, or the ranks of one) with documents, those with the most area first.

  1. documents with much area: whole on the lightest party where what is left can still be spread evenly,
     else divided;
  2. all others, whole: on the party that would be lightest if its room were filled with the average of what
     is left; one that has no room anywhere is divided.

Shapes: G parties, D documents.
"""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from hsap_compile.plan.attended import Floats, Ints, table

LIMIT = 1.015  # of the mean area; 1.02 is promised, and groups of several ranks need some of it inside
# All wait for the party that is over its limit, and rows travel while attention runs: area over the limit may
# cost this often its own time in exchanges. With 8, packs of short documents stay at 1.03; without a bound, a
# window's halo is sent again and again for what is hardly any work.
PATIENCE = 64

LONG = 0.3  # of the limit: from here on a document may have to be divided
# Each long document takes as few parties as its area allows, as if those after it could be spread like sand.
# Where they then do not fit, all are placed again, each with at most this part of the limit on a party.
TARGETS = (1.0, 0.97, 0.94, 0.9, 0.85)
TOLERANCE = 0.002  # of the limit

NOBODY = -1

_Party = tuple[float, int, float, float]  # what a heap orders it by, its number, room, load


class Fill(ABC):
    """Parties while they are being filled.

    Attributes:
        sizes, pairs: (D,) tokens and area of each document.
        room: (G,) tokens that are still free.
        load: (G,) area of what is held.
        limit: area of a party.
        overfill: tokens by which a party may be filled too much.
        owner: (D,) the party that holds each document whole, or NOBODY.
    """

    def __init__(self, sizes: Ints, pairs: Ints, room: Floats, load: Floats, limit: float, overfill: int):
        self.sizes, self.pairs, self.room, self.load = sizes, pairs, room, load
        self.limit, self.overfill = limit, overfill
        self.owner = np.full(len(sizes), NOBODY)

    @abstractmethod
    def divide(self, document: int, light: Ints, most: float | None = None) -> None:
        """Place a document on several parties; `light` are those with room, the lightest first. A long one
        has at most area `most` on each, and what is left must still be spread evenly; of such a one a part
        may be left, which `sizes` and `pairs` then say."""

    def put(self, document: int, party: int) -> None:
        """Place a document whole."""
        self.owner[document] = party
        self.room[party] -= self.sizes[document]
        self.load[party] += self.pairs[document]

    def excess(self, room: Floats, load: Floats) -> float:
        """How much area is over the limit when the rest is spread as well as can be; none at 0 or less.

        The parties that can pay least for a token get the cheapest ones.
        """
        left = self.limit - load
        order = (left / np.maximum(room, 0.5)).argsort()
        least = np.interp(room[order].cumsum(), *self._cheapest)
        return float((least - left[order].cumsum()).max())

    def excess_with(self, parties: Ints, n: float, area: float) -> float:
        """The same after `n` tokens with this area more on each of `parties`."""
        room, load = self.room.copy(), self.load.copy()
        room[parties] -= n
        load[parties] += area
        return self.excess(room, load)

    def place(self) -> None:
        """Place all documents."""
        order = np.lexsort((-self.sizes, -self.pairs))
        long = (self.pairs[order] >= LONG * self.limit) | (self.sizes[order] > self.room.max())
        if long.any():
            self._place_evenly(order[long])
        self._place_short(order[~long])

    def _place_evenly(self, documents: Ints) -> None:
        """Place long documents so that what is left can be spread evenly, or as nearly as any target does."""
        order = (self.pairs / self.sizes).argsort(kind="stable")
        self._cheapest = np.zeros((2, len(order) + 1))  # tokens, and the least area that so many may have
        table(self.sizes[order], self.pairs[order]).cumsum(axis=1, out=self._cheapest[:, 1:])
        empty, best, least = self.state(), None, math.inf
        for target in TARGETS:
            self._place_long(documents, target * self.limit)
            excess = self.excess(self.room, self.load)
            if excess <= TOLERANCE * self.limit:
                return
            if excess < least:
                best, least = self.state(), excess
            self.restore(empty)
        assert best is not None
        self.restore(best)

    def state(self) -> tuple[Any, ...]:
        """What `restore` needs to come back to now."""
        return self.room.copy(), self.load.copy(), self.owner.copy()

    def restore(self, state: tuple[Any, ...]) -> None:
        self.room, self.load, self.owner = (x.copy() for x in state[:3])

    def _place_long(self, documents: Ints, most: float) -> None:
        tokens, pairs = int(self.sizes.sum()), int(self.pairs.sum())
        todo = [(-int(self.pairs[d]), i, d) for i, d in enumerate(documents.tolist())]  # a heap: it is sorted
        while todo:
            _, i, document = heapq.heappop(todo)
            n, area = int(self.sizes[document]), int(self.pairs[document])
            tokens, pairs = tokens - n, pairs - area
            density = pairs / max(tokens, 1)
            full = self.load + density * self.room  # area of each party when there is no room left
            party = int(np.argmin(full))
            if self.room[party] + self.overfill >= n and full[party] + area - density * n <= self.limit:
                self.put(document, party)
                continue
            self.divide(document, full.argsort(kind="stable"), most)
            left, area_left = int(self.sizes[document]), int(self.pairs[document])
            if 0 < left < n:
                tokens, pairs = tokens + left, pairs + area_left
                heapq.heappush(todo, (-area_left, i, document))

    def _place_short(self, documents: Ints) -> None:
        """Python floats in heaps: a numpy call for each document would take longer than all the rest."""
        sizes, pairs = self.sizes[documents].astype(np.float64), self.pairs[documents].astype(np.float64)
        parties = len(self.room)
        tokens_left, pairs_left = ((x.sum() - x.cumsum())[::parties] for x in (sizes, pairs))
        densities = (pairs_left / np.maximum(tokens_left, 1)).tolist()
        todo = zip(sizes.tolist(), pairs.tolist(), strict=True)
        owner: list[int] = []
        # parties by how much area they will have; those without room for the document at hand, by room
        light, full = self._lightest(0.0), list[_Party]()
        for density in densities:
            light = [(held + density * room, party, room, held) for _, party, room, held in light + full]
            heapq.heapify(light)
            full = []
            for n, area in itertools.islice(todo, parties):
                while full and full[0][2] >= n:
                    _, party, room, held = heapq.heappop(full)
                    heapq.heappush(light, (held + density * room, party, room, held))
                while light and light[0][2] < n:
                    _, party, room, held = heapq.heappop(light)
                    heapq.heappush(full, (-room, party, room, held))
                if light:
                    _, party, room, held = light[0]
                    room -= n
                    held += area
                    heapq.heapreplace(light, (held + density * room, party, room, held))
                    owner.append(party)
                elif n <= self.overfill + full[0][2]:
                    _, party, room, held = full[0]
                    heapq.heapreplace(full, (n - room, party, room - n, held + area))
                    owner.append(party)
                else:
                    self._hold(full)
                    by_load = sorted((held + density * room, p) for _, p, room, held in full if room > 0)
                    self.divide(int(documents[len(owner)]), np.array([p for _, p in by_load], np.int64))
                    light, full = self._lightest(density), []
                    heapq.heapify(light)
                    owner.append(NOBODY)
        self.owner[documents] = owner
        self._hold(light + full)

    def _lightest(self, density: float) -> list[_Party]:
        """All parties by the area that they will have when their room is filled with this density."""
        held = zip(self.room.tolist(), self.load.tolist(), strict=True)
        return [(load + density * room, party, room, load) for party, (room, load) in enumerate(held)]

    def _hold(self, parties: list[_Party]) -> None:
        """Take over what parties have by now."""
        for _, party, room, load in parties:
            self.room[party], self.load[party] = room, load
