"""What one attention makes every rank do, whatever the strategy: pairs, bytes and seconds in the same units.

Shapes: P ranks, T stages. Ranks of a group stand side by side: rank r is in group r // intra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from hsap_compile.plan.attended import Ints
from hsap_compile.plan.cost import BACKWARD, AttentionShape, CostModel
from hsap_compile.plan.pieces import Band

Floats = npt.NDArray[np.float64]
Level = Literal["intra", "inter"]
Pass = Literal["forward", "backward"]
LEVELS: tuple[Level, ...] = ("intra", "inter")
PASSES: tuple[Pass, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Setting:
    """One packed row on a mesh: all that a strategy is told.

    Attributes:
        lengths: tokens of each document, in the row's order.
        inter: groups.
        intra: ranks of each.
        band: (lo, hi) of `lo <= q - k <= hi` inside each document; None is unbounded.
        shape: heads and sizes.
    """

    lengths: tuple[int, ...]
    inter: int
    intra: int
    band: Band = (0, None)
    shape: AttentionShape = AttentionShape()

    @property
    def ranks(self) -> int:
        return self.inter * self.intra

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def group(self) -> Ints:
        """(P,) group of each rank."""
        return np.arange(self.ranks) // self.intra


@dataclass(frozen=True, eq=False)
class Stage:
    """Attention and exchanges that need nothing of one another and run side by side.

    Attributes:
        pairs: (P,) attended pairs times the fraction of the heads.
        sent, received: (2, P) bytes at each of `LEVELS`.
        remote: whether the keys came from another rank (or group, where heads are split).
    """

    pairs: Floats
    sent: Ints
    received: Ints
    remote: bool = False

    @property
    def backward(self) -> Stage:
        """Gradients go the way back."""
        return Stage(self.pairs, self.received, self.sent, self.remote)


def stage(setting: Setting, pairs: Floats | Ints | None = None, *moved: Ints, remote: bool = False) -> Stage:
    """A stage from matrices (P, P) of bytes [from, to]."""
    sent, received = np.zeros((2, setting.ranks), np.int64), np.zeros((2, setting.ranks), np.int64)
    near = setting.group[:, None] == setting.group
    for matrix in moved:
        for level, here in enumerate((near, ~near)):
            sent[level] += (matrix * here).sum(axis=1)
            received[level] += (matrix * here).sum(axis=0)
    work = np.zeros(setting.ranks) if pairs is None else np.asarray(pairs, np.float64)
    return Stage(work, sent, received, remote)


@dataclass(frozen=True, eq=False)
class Moved:
    """Bytes that each rank sends and receives. (P,) int64 each."""

    sent: Ints
    received: Ints


@dataclass(frozen=True, eq=False)
class Spent:
    """Predicted seconds of one attention's forward or backward on each rank. (P,) each.

    `own` and `remote` are attention on keys that a rank holds and on keys that it receives; `intra` and
    `inter` are exchanges; `total` is less than their sum where they hide one another.
    """

    own: Floats
    remote: Floats
    intra: Floats
    inter: Floats
    total: Floats


@dataclass(frozen=True, eq=False)
class Predicted:
    """Seconds of one layer under a cost model: its attention's two passes, and everything else."""

    forward: Spent
    backward: Spent
    linear: Floats

    @property
    def attention(self) -> float:
        """Forward and backward on the slowest rank."""
        return float((self.forward.total + self.backward.total).max())

    @property
    def layer(self) -> float:
        """Attention and all the rest, on the slowest rank of each."""
        return self.attention + float(self.linear.max())


@dataclass(frozen=True, eq=False)
class Span:
    """What each rank does from `start` to `stop`, (P,) seconds: attention or the exchange of a level."""

    kind: Literal["own", "remote"] | Level
    start: Floats
    stop: Floats


@dataclass(frozen=True, eq=False)
class Load:
    """One attention on every rank.

    Attributes:
        tokens: (P,) rows that each rank holds, padding included.
        forward: stages, one after the other.
        backward: theirs.
    """

    tokens: Ints
    forward: tuple[Stage, ...]
    backward: tuple[Stage, ...]

    @cached_property
    def area(self) -> Floats:
        """(P,) attended pairs times the fraction of heads that each rank computes in the forward."""
        return np.sum([s.pairs for s in self.forward], axis=0)

    @cached_property
    def bytes(self) -> dict[tuple[Level, Pass], Moved]:
        """By level and pass."""
        result = {}
        for name, stages in zip(PASSES, (self.forward, self.backward), strict=True):
            sent, received = (
                np.sum([getattr(s, way) for s in stages], axis=0) for way in ("sent", "received")
            )
            for i, level in enumerate(LEVELS):
                result[level, name] = Moved(sent[i], received[i])
        return result

    def most_bytes(self, level: Level) -> int:
        """Sent, forward and backward, by the rank that sends most. As much is received."""
        return int(np.sum([self.bytes[level, name].sent for name in PASSES], axis=0).max())

    def predicted(self, cost: CostModel) -> Predicted:
        """Under `cost`, whose shape must be the one that was counted with."""
        return Predicted(
            _timed(self.forward, cost, 1.0),
            _timed(self.backward, cost, BACKWARD),
            cost.linear_seconds(self.tokens.astype(np.float64)),
        )

    def timeline(self, cost: CostModel) -> list[Span]:
        """The forward under `cost`, as it would run on ranks that do not wait for each other."""
        return [span for spans, _ in _spans(self.forward, cost, 1.0) for span in spans]


def there_and_back(tokens: Ints, *forward: Stage) -> Load:
    """The backward runs the stages in reverse order; each gradient is as large as what was sent."""
    return Load(tokens, forward, tuple(s.backward for s in reversed(forward)))


def _spans(stages: Sequence[Stage], cost: CostModel, passes: float) -> Iterator[tuple[list[Span], Floats]]:
    """Of every stage, what it does and when it ends on each rank."""
    now = np.zeros(stages[0].pairs.shape)
    for s in stages:
        work = cost.attention_seconds(s.pairs, passes)
        most = np.maximum(s.sent, s.received).astype(np.float64)
        intra, inter = cost.intra.seconds(most[0]), cost.inter.seconds(most[1])
        between = now + inter  # what comes from afar is passed on
        yield (
            [
                Span("remote" if s.remote else "own", now, now + work),
                Span("inter", now, between),
                Span("intra", between, between + intra),
            ],
            now := now + cost.side_by_side(work, intra + inter),
        )


def _timed(stages: Sequence[Stage], cost: CostModel, passes: float) -> Spent:
    spent = {kind: np.zeros(stages[0].pairs.shape) for kind in ("own", "remote", "intra", "inter")}
    total = np.zeros(stages[0].pairs.shape)
    for spans, total in _spans(stages, cost, passes):  # noqa: B007 (the last is used)
        for span in spans:
            spent[span.kind] = spent[span.kind] + span.stop - span.start
    return Spent(**spent, total=total)
