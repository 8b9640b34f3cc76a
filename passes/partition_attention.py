"""Pass 8: every canonical attention -> exchanges and one operator over this rank's slices.

before: o = attention(q, k, v)                             (B, H, n, D): this rank's tokens, all heads
after:  a, s = tokens of documents that this rank has whole, and the others
        o_a = attend(q[a], k[a], v[a], slices of a)        all heads, nothing is sent
        q, k, v = all_to_all(heads of q, k, v [s])         (B * N, H / g, D): the group's s, own heads
        k', v' = all_to_all(k, v [rows other groups need]) (C, Hkv / g, D), in one or more stages
        o_s = attend(q, k, v, k', v', slices)
        o = cat(o_a, all_to_all(o_s) back)                 (B, H, n, D)

g is the size of a group (IntraSP), N its tokens that take part, C the rows received from other groups
(InterSP).  An exchange whose level has size 1 is not there; where g is 1, all tokens are s.  Key/value heads
that g does not divide are repeated just enough.  What differs between ranks and batches is in tables, which
the new graph takes as inputs; each part of it may be empty.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, guard_at_most, hint_of
from hsap_compile.errors import Refused, module_of, where
from hsap_compile.graph import Builder, ancestors, placeholders, remove_dead
from hsap_compile.kernels import attention, copies, dense, exchange
from hsap_compile.kernels.flex import TABLES as FLEX_TABLES
from hsap_compile.kernels.flex import FlexAttention, Keys, inline
from hsap_compile.masks import Mask
from hsap_compile.passes._bands import check_site
from hsap_compile.passes._random import is_random
from hsap_compile.passes._tables import Tables
from hsap_compile.plan import MeshShape, ReceiveLimit

aten = torch.ops.aten

_MOST_STAGES = 64


@dataclass(frozen=True)
class PlannedMask:
    """One of the graph's distinct masks.  ``leaves``: the nodes its formulas read, None for those that only
    the logits need; ``plannable``: whether they are computed from inputs alone, so that the host can read
    them before the step; ``batch``: rows of the attentions that have it."""

    mask: Mask
    leaves: tuple[Node | None, ...]
    plannable: bool
    batch: int

    @property
    def read(self) -> list[Node]:
        """What the host reads."""
        return [leaf for leaf in self.leaves if leaf is not None] if self.plannable else []


@dataclass(frozen=True)
class Traffic:
    """What one attention sends, in bytes a row: ``kv`` for a row that another group needs, ``heads_in``
    and ``heads_out`` for a token (all B rows of it) that goes to, and comes back from, one other rank of
    the group.  ``mask`` is its index.  The backward sends the same again."""

    mask: int
    kv: int
    heads_in: int
    heads_out: int


@dataclass(frozen=True)
class Site:
    """Where an attention stands in the model, its mask, the tensors that the mask reads and where the model
    makes each of them."""

    at: str
    module: str
    heads: int
    kv_heads: int
    mask: Mask
    leaves: tuple[Node, ...]
    reads: tuple[str, ...]

    @classmethod
    def of(cls, node: Node) -> Site:
        """``node`` calls the canonical operator."""
        operands = _operands(node)
        heads, kv_heads = (int(x.meta["val"].shape[1]) for x in operands[:2])
        mask, reads = node.meta["mask"], node.meta["reads"]
        return cls(where(node), module_of(node), heads, kv_heads, mask, tuple(operands[3]), reads)


@dataclass(frozen=True)
class Partitioned:
    """``masks`` in table order; ``traffic`` and ``sites`` have one entry an attention; ``limit``: of the
    rows that one of them receives."""

    masks: tuple[PlannedMask, ...]
    traffic: tuple[Traffic, ...]
    sites: tuple[Site, ...]
    limit: ReceiveLimit


def partition_attention(
    module: GraphModule,
    mode: Any,
    mesh: MeshShape,
    group: str,
    tokens: sympy.Expr,
    length: tuple[int, int, int] | int,
    *,
    kernel: str = "slices",
    kernel_options: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Partitioned:
    """Rewrite every canonical attention of ``module`` (in place) for one rank of ``mesh``.

    ``tokens``: how many tokens this rank holds of a row.  An attention over anything else (whole tokens,
    other sequences) stays the dense operator.  ``length``: S, or of which input which dimension S is, plus
    how much.  ``kernel``: "slices" and "varlen" write ``hsap::attend``, and "varlen" refuses what is not
    bands; "flex" writes flex attention with ``kernel_options``.  ``most``: bytes of received rows that an
    attention may hold at a time; a longer row than the stages are made for compiles again.
    """
    sites = [n for n in module.graph.nodes if n.target is dense.OP and _over(n, tokens)]
    device = sites[0].meta["val"].device if sites else torch.device("cpu")
    tables = Tables(module.graph, mode, device)
    writers: dict[int, FlexAttention] = {}
    keys: list[tuple[str, tuple[Node, ...], int]] = []
    planned: list[PlannedMask] = []
    traffic: list[Traffic] = []
    found: list[Site] = []
    inferred: dict[Hashable, Any] = {}
    for site in sites:
        _check_heads(site, mesh)
    limit = _receive_limit(sites, mesh, _length_of(module, length), most)
    row = _row(mode, sites, module, length)
    # beside others, tokens may be scattered so that even this mask is left to its formula
    plain = all(site.meta["mask"].by_columns for site in sites)
    for site in sites:
        mask: Mask = site.meta["mask"]
        operands = _operands(site)
        leaves = tuple(operands[3])
        key = (operands[4], leaves, _batch(site))
        if key not in keys:
            keys.append(key)
            planned.append(_planned(mask, leaves, _batch(site)))
        if kernel == "varlen":
            plannable = planned[keys.index(key)].plannable
            check_site(site, operands[0], operands[2], operands[6], mask, plannable)
        with module.graph.inserting_before(site):
            build = Builder(module.graph, mode, site, inferred)
            index = keys.index(key)
            if kernel == "flex" and index not in writers:
                writers[index] = _writer(tables, index, mask, leaves, kernel_options or {})
            attention_site = _Site(
                build, tables, mesh, group, site, index, writers.get(index), limit.stages, row, plain
            )
            result = attention_site.rewritten()
        traffic.append(attention_site.traffic())
        found.append(Site.of(site))
        site.replace_all_uses_with(result)
        module.graph.erase_node(site)
    remove_dead(module)
    return Partitioned(tuple(planned), tuple(traffic), tuple(found), limit)


def _length_of(module: GraphModule, length: tuple[int, int, int] | int) -> Any:
    """S, a number or a symbolic one."""
    if isinstance(length, int):
        return length
    position, dim, more = length
    return placeholders(module)[position].meta["val"].shape[dim] + more


def _row(mode: Any, sites: Sequence[Node], module: GraphModule, length: tuple[int, int, int] | int) -> Any:
    """S, a number or a node in front of all ``sites``."""
    if isinstance(length, int) or not sites:
        return length
    position, dim, more = length
    with module.graph.inserting_before(sites[0]):
        build = Builder(module.graph, mode, sites[0])
        size = build.size(placeholders(module)[position], dim)
        return build(operator.add, size, more) if more else size


def _writer(
    tables: Tables, index: int, mask: Mask, leaves: Sequence[Node], options: Mapping[str, Any]
) -> FlexAttention:
    def table(name: str) -> Node:
        return tables((index, name), *FLEX_TABLES[name])

    return FlexAttention(table, mask, leaves, options)


def _receive_limit(sites: Sequence[Node], mesh: MeshShape, length: Any, most: int | None) -> ReceiveLimit:
    """So many stages that the rows of all other groups fit, whatever the documents."""
    if most is None or not sites or mesh.inter == 1:
        return ReceiveLimit()
    batch, row = max(map(_batch, sites)), max(_row_bytes(site, mesh) for site in sites)
    rows = most // (2 * row)  # of a stage: one is attended to while the next one travels
    if rows < 1:
        raise Refused(
            'option "received" has no room for two rows',
            got=f"{most} bytes, and a key and a value of {row} bytes",
            wanted=f"{2 * row} bytes or more, for one row that is attended to and one that travels",
            do="pass more bytes: a few MiB at least, so that stages are not too many",
            at=where(sites[0]),
        )

    def longest(stages: int) -> int:
        """The S of which every rank has all rows of other groups in so many stages."""
        fits = rows * max(2, stages) // batch - mesh.intra  # a group has a column less than its part at most
        return fits * mesh.inter // (mesh.inter - 1)

    stages = 1
    while hint_of(length) > longest(stages):
        stages *= 2
    if stages > _MOST_STAGES:
        raise Refused(
            'option "received" asks for too many stages',
            got=f"{stages} stages, of {rows} rows of {row} bytes each, for {hint_of(length)} tokens a row",
            wanted=f"at most {_MOST_STAGES}: each is an exchange and a call of the kernel in every attention",
            do=f"pass {most * -(-stages // _MOST_STAGES)} bytes or more",
            at=where(sites[0]),
        )
    guard_at_most(length, longest(stages))
    return ReceiveLimit(stages, rows)


def _over(site: Node, tokens: sympy.Expr) -> bool:
    """Whether queries and keys are this rank's tokens."""
    return all(expr_of(x.meta["val"].shape[2]) == tokens for x in _operands(site)[:2])


def _operands(site: Node) -> Any:
    return site.args


def _check_heads(site: Node, mesh: MeshShape) -> None:
    heads = int(_operands(site)[0].meta["val"].shape[1])
    if heads % mesh.intra:
        possible = [g for g in range(1, mesh.size + 1) if mesh.size % g == heads % g == 0]
        raise Refused(
            f"{heads} query heads cannot be split over a group of {mesh.intra} ranks",
            got=f"intra={mesh.intra}",
            wanted=f"one of {possible}",
            do='pass options={"intra": ...} with one of these',
            at=where(site),
        )


def _repeats(site: Node, intra: int) -> int:
    """How often each key/value head is repeated so that a group's ranks get whole heads."""
    heads, kv_heads = (int(x.meta["val"].shape[1]) for x in _operands(site)[:2])
    per_head = heads // kv_heads
    return next(r for r in range(1, per_head + 1) if per_head % r == 0 and (kv_heads * r) % intra == 0)


def _row_bytes(site: Node, mesh: MeshShape) -> int:
    """Of the keys and values of a row, of the heads that one rank has."""
    k, v = (x.meta["val"] for x in _operands(site)[1:3])
    heads = int(k.shape[1]) * _repeats(site, mesh.intra) // mesh.intra
    return heads * int(k.shape[3] + v.shape[3]) * int(k.dtype.itemsize)


def _batch(site: Node) -> int:
    return int(_operands(site)[0].meta["val"].shape[0])


def _planned(mask: Mask, leaves: tuple[Node, ...], batch: int) -> PlannedMask:
    compared = {i for sides in mask.alike for side in sides for i in formula.leaves_of(side)}
    if not _from_inputs([leaves[i] for i in compared]):
        mask = mask.told_apart()
    structural = {i for expr in mask.structure for i in formula.leaves_of(expr)}
    read = tuple(leaf if i in structural else None for i, leaf in enumerate(leaves))
    return PlannedMask(mask, read, _from_inputs([leaf for leaf in read if leaf is not None]), batch)


def _from_inputs(leaves: list[Node]) -> bool:
    return not any(
        (n.op == "placeholder" and (n.meta.get("parameter") or "table" in n.meta))
        or n.target in (exchange.GATHER, exchange.SUM_RANKS, exchange.BROADCAST, exchange.SHARD)
        or is_random(n)
        for n in ancestors(leaves)
    )


class _Site:
    """The rewrite of one attention."""

    def __init__(
        self,
        build: Builder,
        tables: Tables,
        mesh: MeshShape,
        group: str,
        site: Node,
        index: int,
        flex: FlexAttention | None,
        stages: int,
        row: Any,
        plain: bool,
    ) -> None:
        self.build, self.tables, self.mesh, self.group, self.flex = build, tables, mesh, group, flex
        self.site, self.index, self.stages = site, index, range(stages)
        self.row, self.plain = row, plain
        operands = _operands(site)
        self.q, self.k, self.v, self.leaves, _, self.scale, self.lse = operands
        self.batch, self.heads = (int(s) for s in self.q.meta["val"].shape[:2])
        self.kv_heads = int(self.k.meta["val"].shape[1])
        self.widths = tuple(int(x.meta["val"].shape[3]) for x in (self.q, self.k, self.v))
        self.width = int(site.meta["val"].shape[3])  # of the result

    def rewritten(self) -> Node:
        build, operands = self.build, (self.q, self.k, self.v)
        n = build.size(self.q, 2)
        if self.mesh.intra == 1:
            return self._columns(self._shared([self._rows(x) for x in operands], n), n)
        alone, rows = build.size(self._alone_columns(), 0), build.size(self._group_columns(), 0)
        there = build(operator.mul, build(operator.sub, n, alone), self.mesh.intra)  # rows at the other ranks
        repeats = _repeats(self.site, self.mesh.intra)
        parts = build(copies.SPLIT_HEADS, operands, alone, self.mesh.intra, [1, repeats, repeats])
        *mine, sent = (build(operator.getitem, parts, i) for i in range(4))
        out_alone = self._attend_alone(mine, alone)
        out = self._shared(self._heads_in(sent, rows), rows)
        back = self._heads_out(out, there, rows)
        joined = build(copies.JOIN_HEADS, [out_alone], back, self.batch, n, self.mesh.intra, [1])
        return build(operator.getitem, joined, 0)

    def _shared(self, operands: list[Node], rows: Any) -> Node:
        """(B * rows, heads, Dv): the attention of the tokens that other ranks have a part in."""
        q, k, v = operands
        k_remote, v_remote = self._needed_rows(k, v) if self.mesh.inter > 1 else (None, None)
        if self.flex is not None:
            far = [Keys("remote", k_remote, v_remote)] if k_remote and v_remote else []
            return self._flex(self.flex, q, [Keys("own", k, v), *far])
        slices = self.tables((self.index, "slices"), torch.zeros(11, 7, dtype=torch.int64), (0,))
        columns = self._group_columns() if self.mesh.size > 1 else None
        return self._attend(q, k, v, k_remote, v_remote, slices, columns, rows)

    def _attend_alone(self, operands: list[Node], rows: Any) -> Node:
        q, k, v = operands
        if self.flex is not None:
            return self._flex(self.flex, q, [Keys("alone", k, v)])
        slices = self.tables((self.index, "alone_slices"), torch.zeros(13, 7, dtype=torch.int64), (0,))
        return self._attend(q, k, v, None, None, slices, self._alone_columns(), rows)

    def traffic(self) -> Traffic:
        g, size = self.mesh.intra, self.q.meta["val"].dtype.itemsize
        heads, kv = self.heads // g, _row_bytes(self.site, self.mesh)
        heads_in = self.batch * (heads * self.widths[0] * size + kv)
        return Traffic(self.index, kv, heads_in, self.batch * heads * self.width * size)

    def _rows(self, x: Node) -> Node:
        """(B, H, n, D) -> (B * n, H, D)."""
        build = self.build
        moved = build(aten.permute.default, x, [0, 2, 1, 3])
        heads, width = (int(s) for s in x.meta["val"].shape[1::2])
        return build(aten.reshape.default, moved, [-1, heads, width])

    def _columns(self, out: Node, n: Any) -> Node:
        """(B * n, H, D) -> (B, H, n, D)."""
        heads, width = (int(s) for s in out.meta["val"].shape[1:])
        shaped = self.build(aten.reshape.default, out, [self.batch, n, heads, width])
        return self.build(aten.permute.default, shaped, [0, 2, 1, 3])

    def _group_columns(self) -> Node:
        return self.tables("group_columns", torch.arange(5), (0,))

    def _alone_columns(self) -> Node:
        return self.tables("alone_columns", torch.arange(3), (0,))

    def _head_splits(self) -> Node:
        return self.tables("head_splits", torch.zeros(2, self.mesh.size, dtype=torch.int64), ())

    def _heads_in(self, sent: Node, rows: Any) -> list[Node]:
        """What this rank sends of q, k and v -> (B * rows, H / g, D) of the group's tokens."""
        build, g = self.build, self.mesh.intra
        kv_heads = self.kv_heads * _repeats(self.site, g)
        heads = [self.heads // g, kv_heads // g, kv_heads // g]
        widths = [self.batch * count * width for count, width in zip(heads, self.widths, strict=True)]
        got = build(exchange.ALL_TO_ALL, sent, self._head_splits(), rows, False, self.group)
        parts = build(aten.split_with_sizes.default, got, widths, 1)
        result = []
        for i, (count, width) in enumerate(zip(heads, self.widths, strict=True)):
            part = build(operator.getitem, parts, i)
            part = build(aten.reshape.default, part, [rows, self.batch, count, width])
            moved = build(aten.permute.default, part, [1, 0, 2, 3])
            result.append(build(aten.reshape.default, moved, [-1, count, width]))
        return result

    def _heads_out(self, out: Node, there: Any, rows: Any) -> Node:
        """(B * rows, H / g, D) of the group's tokens -> this rank's ones, the heads of each rank in turn."""
        build = self.build
        count, width = self.heads // self.mesh.intra, self.width
        out = build(aten.reshape.default, out, [self.batch, rows, count, width])
        out = build(aten.permute.default, out, [1, 0, 2, 3])
        out = build(aten.reshape.default, out, [rows, self.batch * count * width])
        return build(exchange.ALL_TO_ALL, out, self._head_splits(), there, True, self.group)

    def _needed_rows(self, k: Node, v: Node) -> tuple[Node, Node]:
        """The keys and values that come from other groups."""
        received = [self._exchanged(k, v, stage) for stage in self.stages]
        k_remote, v_remote = (self._together([pair[i] for pair in received]) for i in (0, 1))
        return k_remote, v_remote

    def _exchanged(self, k: Node, v: Node, stage: int) -> list[Node]:
        build = self.build
        count = int(k.meta["val"].shape[1])
        widths = [count * self.widths[1], count * self.widths[2]]
        rows, splits = torch.zeros(7, dtype=torch.int64), torch.zeros(2, self.mesh.size, dtype=torch.int64)
        sent = build(copies.PACK, k, v, self.tables((self.index, "send_rows", stage), rows, (0,)), None)
        splits_table = self.tables((self.index, "splits", stage), splits, ())
        arriving = build.size(self._arriving(stage), 0)
        got = build(exchange.ALL_TO_ALL, sent, splits_table, arriving, False, self.group)
        parts = build(aten.split_with_sizes.default, got, widths, 1)
        return [
            build(aten.reshape.default, build(operator.getitem, parts, i), [-1, count, self.widths[1 + i]])
            for i in range(2)
        ]

    def _together(self, parts: list[Node]) -> Node:
        return parts[0] if len(parts) == 1 else self.build(copies.TOGETHER, parts)

    def _arriving(self, stage: int) -> Node:
        return self.tables((self.index, "remote", stage), torch.zeros(9, 2, dtype=torch.int64), (0,))

    def _remote(self) -> Node:
        return self._together([self._arriving(stage) for stage in self.stages])

    def _flex(self, flex: FlexAttention, q: Node, parts: list[Keys]) -> Node:
        heads = self._head_numbers(q)
        return self._result(*flex.attend(self.build, q, parts, heads, self.row, self.scale))

    def _result(self, out: Node, lse: Node) -> Node:
        """(rows, H, Dv), or more columns."""
        return inline(self.build, dense.packed, out, lse) if self.lse else out

    def _attend(
        self,
        q: Node,
        k: Node,
        v: Node,
        k_remote: Node | None,
        v_remote: Node | None,
        slices: Node,
        columns: Node | None,
        rows: Any,
    ) -> Node:
        """``columns`` (rows,) of the batch that the rows of q, k, v are; None: all, in order."""
        build = self.build
        mask: Mask = self.site.meta["mask"]
        leaves: list[Node] = list(self.leaves)
        positions, remote, heads, logits = None, None, None, ""
        tokens: Any = 0
        if self.plain:
            leaves = []
        else:
            logits = formula.dumps(mask.logits)
            positions, heads, tokens = self._positions(q, columns, rows), self._head_numbers(q), self.row
            remote = self._remote() if k_remote is not None else None
        result = build(
            attention.OP, q, k, v, k_remote, v_remote, slices, positions, remote, heads, leaves, logits,
            tokens, self.scale,
        )  # fmt: skip
        return self._result(*(build(operator.getitem, result, i) for i in (0, 1)))

    def _positions(self, q: Node, columns: Node | None, rows: Any) -> Node:
        """(B * rows, 2): batch row and column of every query row."""
        build, device = self.build, q.meta["val"].device
        if columns is None:
            columns = build(aten.arange.default, rows, dtype=torch.int64, device=device)
        batch = build(aten.arange.default, self.batch, dtype=torch.int64, device=device)
        grid = [self.batch, rows]
        b = build(aten.expand.default, build(aten.unsqueeze.default, batch, 1), grid)
        c = build(aten.expand.default, build(aten.unsqueeze.default, columns, 0), grid)
        return build(aten.reshape.default, build(aten.stack.default, [b, c], 2), [-1, 2])

    def _head_numbers(self, q: Node) -> Node:
        """The numbers of q's heads among all: this rank's part of them, or all."""
        build, device = self.build, q.meta["val"].device
        count = int(q.meta["val"].shape[1])
        heads = build(aten.arange.default, count, dtype=torch.int64, device=device)
        if count == self.heads:
            return heads
        position = self.tables("position", torch.zeros(1, dtype=torch.int64), ())
        return build(aten.add.Tensor, heads, build(aten.mul.Tensor, position, count))
