"""Filling parties (groups, or the ranks of one) with documents, those with the most area first.

  1. documents with much area: whole on the lightest party where what is left can still be spread evenly,
     else divided;
  2. all others, whole: on the party that would be lightest if its room were filled with the average of what
     is left; one that has no room anywhere is divided.

Shapes: G parties, D documents.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod

import numpy as np

from hsap_compile.plan.attended import Floats, Ints

LIMIT = 1.015  # of the mean area; the issue allows 1.02 and groups of several ranks need some of it inside
# All wait for the party that is over its limit, and rows travel while attention runs: area over the limit may
# cost this often its own time in exchanges. With 8, packs of short documents stay at 1.03; without a bound, a
# window's halo is sent again and again for what is hardly any work.
PATIENCE = 64

LONG = 0.3  # of the limit: from here on a document may have to be divided
TRIES = 4  # light parties that are looked at before a document goes where it does not fit

NOBODY = -1


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
        # the least area that a number of tokens may have
        order = np.argsort(pairs / sizes, kind="stable")
        self._tokens = np.append(0, np.cumsum(sizes[order]))
        self._pairs = np.append(0, np.cumsum(pairs[order]))

    @abstractmethod
    def divide(self, document: int, light: Ints, even: bool) -> None:
        """Place a document on several parties; `light` are those with room, the lightest first. Where the
        document has much area, what is left must be spread `even`."""

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
        order = np.argsort(left / np.maximum(room, 0.5))
        least = np.interp(np.cumsum(room[order]), self._tokens, self._pairs)
        return float(np.max(least - np.cumsum(left[order])))

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
        self._place_long(order[long])
        self._place_short(order[~long])

    def _place_long(self, documents: Ints) -> None:
        tokens, pairs = int(self.sizes.sum()), int(self.pairs.sum())
        for document in documents.tolist():
            n, area = int(self.sizes[document]), int(self.pairs[document])
            tokens, pairs = tokens - n, pairs - area
            density = pairs / max(tokens, 1)
            full = self.load + density * self.room  # area of each party when there is no room left
            party = int(np.argmin(full))
            if self.room[party] >= n and full[party] + area - density * n <= self.limit:
                self.put(document, party)
            else:
                self.divide(document, np.argsort(full, kind="stable"), even=True)

    def _place_short(self, documents: Ints) -> None:
        """Python lists and a heap: a numpy call for each document would take longer than all the rest."""
        sizes, pairs = self.sizes[documents], self.pairs[documents]
        tokens_left = np.cumsum(sizes[::-1])[::-1] - sizes
        pairs_left = np.cumsum(pairs[::-1])[::-1] - pairs
        densities = (pairs_left / np.maximum(tokens_left, 1)).tolist()
        room, load, parties = self.room.tolist(), self.load.tolist(), len(self.room)
        heap: list[tuple[float, int]] = []
        owner = []
        for i, (n, area) in enumerate(zip(sizes.tolist(), pairs.tolist(), strict=True)):
            if i % parties == 0 or not heap:
                density = densities[i]
                heap = [(load[p] + density * room[p], p) for p in range(parties) if room[p] > 0]
                heapq.heapify(heap)
            party = heap[0][1]
            if room[party] < n:
                fitting = n <= self.overfill
                light = heapq.nsmallest(TRIES if fitting else parties, heap)
                fits = [x for x in light if room[x[1]] >= n]
                if not fits and not fitting:
                    self.room[:], self.load[:] = room, load
                    self.divide(int(documents[i]), np.array([p for _, p in light]), even=False)
                    room, load, heap = self.room.tolist(), self.load.tolist(), []
                    owner.append(NOBODY)
                    continue
                chosen = fits[0] if fits else max(light, key=lambda x: room[x[1]])
                party = chosen[1]
                heap[heap.index(chosen)] = (-math.inf, party)
                heapq.heapify(heap)
            owner.append(party)
            room[party] -= n
            load[party] += area
            if room[party] > 0:
                heapq.heapreplace(heap, (load[party] + density * room[party], party))
            else:
                heapq.heappop(heap)
        self.owner[documents] = owner
        self.room[:], self.load[:] = room, load
