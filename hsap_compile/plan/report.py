"""``make_plan``: the plan of one packed row as a person wants to see it, before anything runs.

Shapes: P ranks, S tokens. Bytes and seconds are of one attention of one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from hsap_compile.plan.attended import Attended, Bools, Ints
from hsap_compile.plan.cost import H100, AttentionShape, CostModel
from hsap_compile.plan.drawing import page, save_png
from hsap_compile.plan.load import (
    PASSES,
    Floats,
    Level,
    Load,
    Moved,
    Pass,
    Predicted,
    Setting,
    stage,
    there_and_back,
)
from hsap_compile.plan.picture import picture
from hsap_compile.plan.pieces import Band, Pieces, cut, least_rows, own_pairs, total_pairs
from hsap_compile.plan.placement import Kind, MeshShape
from hsap_compile.plan.strategies import STRATEGIES, head_exchange
from hsap_compile.plan.tables import Plan, make
from hsap_compile.plan.text import described

NEAR = 1.02  # a mesh is chosen when no other can be faster than by this

Mask = Literal["causal", "full"] | tuple[Literal["window"], int]


@dataclass(frozen=True)
class Bound:
    """What a plan has against the least that any plan can have."""

    least: float
    got: float

    @property
    def gap(self) -> float:
        """got / least - 1; infinite where nothing would do and something is there."""
        if self.got <= self.least:
            return 0.0
        return self.got / self.least - 1 if self.least else float("inf")


@dataclass(frozen=True)
class LowerBound:
    """Of any placement with equal token counts on this mesh.

    area: of the busiest rank; the mean is the least. inter_bytes, intra_bytes: sent by all ranks together in
    one forward; a document longer than a group's share must be cut, and one longer than a rank's share must
    share its heads (see `pieces.least_rows`).
    """

    area: Bound
    inter_bytes: Bound
    intra_bytes: Bound


@dataclass(frozen=True, eq=False)
class PlanReport:
    """What `make_plan` returns.

    Attributes:
        setting: documents, mesh, mask and heads.
        cost: the machine.
        placement: how tokens were placed.
        plan: the plan itself, whose `tables` a compiled graph runs.
    """

    setting: Setting
    cost: CostModel
    placement: Kind
    plan: Plan

    @cached_property
    def held(self) -> Pieces:
        """The intervals of documents that each rank holds, as arrays."""
        return self._cut.of(self.plan.placement.rank[self._cut.party])

    @cached_property
    def shared(self) -> Bools:
        """(n,) for each interval of `held`, whether its group computes it together, each rank some heads."""
        return self.plan.placement.shared[self._cut.party]

    @cached_property
    def _cut(self) -> Pieces:
        """Held by the pieces of the placement."""
        start = self.plan.placement.start
        order = np.argsort(start)
        return cut(self.setting.lengths, np.append(start[order], self.setting.tokens), order)

    @property
    def pieces(self) -> tuple[tuple[int, int, int, int], ...]:
        """(document, start, stop, rank), start and stop within the document: every token once."""
        p = self.held
        return tuple(
            zip(p.document.tolist(), p.start.tolist(), p.stop.tolist(), p.party.tolist(), strict=True)
        )

    @property
    def area(self) -> Floats:
        """(P,) attended pairs that each rank computes, times the fraction of the heads that it has."""
        return self.load.area

    @property
    def rows_received(self) -> Ints:
        """(P,) key/value rows that cross a group boundary to each rank, with the heads that it has."""
        return self.plan.masks[0].rows_sent.sum(axis=0)

    @property
    def bytes(self) -> dict[tuple[Level, Pass], Moved]:
        """["intra" or "inter", "forward" or "backward"]: `sent` and `received`, (P,) each."""
        return self.load.bytes

    @property
    def predicted_seconds(self) -> Predicted:
        """`forward` and `backward` by what is done, per rank, and `attention` and `layer` as a whole."""
        return self.load.predicted(self.cost)

    @property
    def least_seconds(self) -> float:
        """Of one layer on these ranks, whatever the mesh and the plan: even shares, and nothing sent."""
        return self.cost.attention_seconds(self.lower_bound.area.least) + self.cost.linear_seconds(
            self.setting.tokens / self.setting.ranks
        )

    @cached_property
    def load(self) -> Load:
        """The same as other strategies are counted."""
        setting, p, ways = self.setting, self.held, self.setting.intra
        groups = p.of(p.party // ways)
        total, own = (
            np.bincount(groups.party, f(groups, setting.band), setting.inter).repeat(ways)
            for f in (total_pairs, own_pairs)
        )
        alone_pairs = np.bincount(p.party, total_pairs(p, setting.band) * ~self.shared, setting.ranks)
        shared = own - alone_pairs.reshape(-1, ways).sum(axis=1).repeat(ways)
        tokens = np.bincount(p.party, p.size, setting.ranks).astype(np.int64)
        heads_in, heads_out = head_exchange(setting, self.plan.exchanged, setting.group)
        rows = self.plan.masks[0].rows_sent * setting.shape.kv_share_bytes(ways)
        return there_and_back(
            tokens,
            stage(setting, alone_pairs, heads_in),
            stage(setting, shared / ways, rows),
            stage(setting, (total - own) / ways, remote=True),
            stage(setting, None, heads_out),
        )

    @cached_property
    def matrices(self) -> tuple[Ints, Ints]:
        """(P, P) bytes [from, to] of the forward: of heads, there and back, and of keys and values."""
        there, back = head_exchange(self.setting, self.plan.exchanged, self.setting.group)
        rows = self.plan.masks[0].rows_sent * self.setting.shape.kv_share_bytes(self.setting.intra)
        return there + back, rows

    @cached_property
    def lower_bound(self) -> LowerBound:
        s, shape = self.setting, self.setting.shape
        rows = least_rows(s.lengths, -(-s.tokens // s.ranks) * s.intra, s.band)
        long = sum(n for n in s.lengths if n > -(-s.tokens // s.ranks))
        row_bytes = 2 * shape.query_row_bytes // s.intra + shape.kv_share_bytes(s.intra)
        sent = {level: float(self.bytes[level, PASSES[0]].sent.sum()) for level in ("intra", "inter")}
        return LowerBound(
            Bound(float(self.area.mean()), float(self.area.max())),
            Bound(float(rows * shape.kv_row_bytes), sent["inter"]),
            Bound(float(long * (s.intra - 1) * row_bytes), sent["intra"]),
        )

    def compare(self) -> dict[str, Load | str]:
        """This plan as "hsap" and every one of `STRATEGIES` on the same row, or why there is none."""
        result: dict[str, Load | str] = {"hsap": self.load}
        for name, strategy in STRATEGIES.items():
            try:
                result[name] = strategy(self.setting)
            except ValueError as error:
                result[name] = str(error)
        return result

    def verify(self) -> None:
        """Prove from the tables of all ranks that every attended pair is computed once, by whoever has its
        rows, and that what is sent is what is received.

        Raises:
            BrokenPlan: it is not so, and where.
        """
        self.plan.verify()

    def save_html(self, path: str | Path) -> None:
        """A page that draws the plan, in light or dark, with the text of `print`; needs no network."""
        drawing = picture(self)
        Path(path).write_text(page(f"hsap plan: {self.setting.ranks} ranks", drawing, str(self)), "utf-8")

    def save_png(self, path: str | Path) -> None:
        """The same picture. Raises ValueError without matplotlib."""
        save_png(picture(self), path)

    def __str__(self) -> str:
        return described(self)


def make_plan(
    lengths: Sequence[int],
    inter: int | None = None,
    intra: int | None = None,
    *,
    ranks: int | None = None,
    placement: Kind = "balanced",
    query_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype_bytes: int = 2,
    mask: Mask = "causal",
    cost: CostModel = H100,
) -> PlanReport:
    """Plan one packed row of documents: where every token lives, who computes and sends what, what it costs.

    Args:
        lengths: tokens of each document, in order.
        inter: groups of ranks, between which keys and values travel.
        intra: ranks of a group, among which heads are exchanged.
        ranks: how many there are; with neither inter nor intra the cost model chooses both, so that by its
            own prediction no other choice is faster by more than `NEAR`.
        placement: "balanced", or "contiguous" to keep the row's order.
        query_heads, kv_heads, head_dim, dtype_bytes: of the model's attention.
        mask: inside documents: "causal", "full", or ("window", w): the last w tokens.
        cost: the machine, for predicted seconds and the choice of the mesh.

    Raises:
        ValueError: an argument is not as above, or there are fewer than two tokens a rank.
    """
    whole = tuple(int(n) for n in lengths)
    if not whole or min(whole) < 1:
        got = f"documents of {[n for n in whole if n < 1][:3]} tokens" if whole else "no documents"
        raise ValueError(
            f"make_plan: got {got}; wanted one or more documents of at least 1 token: leave empty ones out"
        )
    shape = AttentionShape(query_heads, kv_heads, head_dim, dtype_bytes)
    machine = dataclasses.replace(cost, shape=shape)
    band = _band(mask)
    best: PlanReport | None = None
    for mesh in _meshes(inter, intra, ranks, machine):
        if best is not None and best.predicted_seconds.layer <= NEAR * best.least_seconds:
            break  # no other mesh can be faster by more than that
        report = _planned(Setting(whole, *mesh, band, shape), machine, placement)
        if best is None or report.predicted_seconds.layer < best.predicted_seconds.layer:
            best = report
    assert best is not None
    return best


def _planned(setting: Setting, cost: CostModel, placement: Kind) -> PlanReport:
    labels = np.repeat(np.arange(len(setting.lengths)), setting.lengths)[None]
    lo, hi = setting.band
    mask = Attended(1, setting.tokens, labels, lo=lo, hi=hi)
    ranks = np.arange(setting.ranks).reshape(setting.inter, setting.intra)
    groups = MeshShape(tuple(tuple(row) for row in ranks.tolist()))
    return PlanReport(setting, cost, placement, make([mask], groups, placement, cost))


def _meshes(
    inter: int | None, intra: int | None, ranks: int | None, cost: CostModel
) -> list[tuple[int, int]]:
    """(inter, intra) that are possible; one, where the caller names them."""
    for name, value in (("inter", inter), ("intra", intra), ("ranks", ranks)):
        if value is not None and value < 1:
            raise ValueError(f"make_plan: got {name}={value}; wanted at least 1: give a number of ranks")
    if inter is None and intra is None and ranks is None:
        raise ValueError(
            "make_plan: got no mesh; wanted inter and intra, or ranks: give ranks alone to have the cost "
            "model choose the other two"
        )
    if ranks is None:
        inter, intra = inter or 1, intra or 1
        ranks = inter * intra
    elif inter is not None:
        intra = intra or ranks // inter or 1
    if intra is None:
        possible = [g for g in range(1, ranks + 1) if ranks % g == 0 and cost.shape.splits(g)]
        # the largest groups first: fewer are planned faster
        return [(ranks // g, g) for g in reversed(possible) if g <= cost.ranks_per_host]
    if ranks % intra or (inter is not None and inter * intra != ranks):
        raise ValueError(
            f"make_plan: got inter={inter}, intra={intra}, ranks={ranks}; wanted inter x intra = ranks: "
            "leave one of them out"
        )
    if not cost.shape.splits(intra):
        heads = cost.shape.query_heads
        these = ", ".join(str(g) for g in range(1, ranks + 1) if ranks % g == heads % g == 0)
        raise ValueError(
            f"make_plan: got groups of {intra} ranks for {heads} query heads; wanted a divisor of {heads}: "
            f"intra may be {these}"
        )
    return [(ranks // intra, intra)]


def _band(mask: Mask) -> Band:
    if mask == "causal":
        return 0, None
    if mask == "full":
        return None, None
    if isinstance(mask, tuple) and len(mask) == 2 and mask[0] == "window" and mask[1] >= 1:
        return 0, mask[1] - 1
    raise ValueError(
        f'make_plan: got mask={mask!r}; wanted "causal", "full" or ("window", tokens) with at least 1 token: '
        "choose one"
    )
