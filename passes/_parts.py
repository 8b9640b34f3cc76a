"""An attention over own and received keys as a sum of parts, in a graph that has no gradient any more.

before: o, l = attend(q, k, v, k', v', slices)            k', v' have just been received
after:  o1, l1 = attend(q, k, v, own slices)              while they travel
        o2, l2 = attend(q, k', v', slices of k')
        o, l = o1 exp(l1 - l) + o2 exp(l2 - l), log(exp(l1) + exp(l2))

and the backward: the gradients of received rows first, which travel back while own keys are worked on.

Where rows arrive in stages, each is a part, and is not asked for before the second one before it is done
with: at a time, two stages of rows are held, and two of gradients.

before: k'i, v'i = rows i of all_to_all(pack(k, v, i))    for all stages i
        o = attend(q, k, v, together(k'0, k'1, ..), together(v'0, v'1, ..), slices)
after:  o0 = attend(q, k, v, own slices)
        k'i, v'i = .. pack(k, v, i, after o(i - 1)) ..    while stage i - 1 is attended to
        o(i + 1) = o(i) and attend(q, k'i, v'i, slices of k'i), merged

before: d_k'0, d_k'1, .. = apart(d_k'); d_k = .. + unpack(all_to_all(d_k'0, d_v'0)) + unpack(..) + ..
after:  t0 = unpack(all_to_all(d_k'0, d_v'0)) as soon as these are known, t1 = unpack(.., added to t0), ..

An attention whose masked logits are finite keeps one operator (the softmax of a row that sees nothing does
not fit the one number l, see formula_blocks.forward), and so does one with a sink, which counts once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from hsap_compile._torch import fake_mode_of
from hsap_compile.graph import Builder, ancestors
from hsap_compile.kernels import attention, copies, exchange, formula_blocks
from hsap_compile.kernels.slices import OF_KEYS

aten = torch.ops.aten


def builder_at(graph: Graph, node: Node) -> Builder:
    """Writes in the place of ``node``."""
    values = [n.meta["val"] for n in node.all_input_nodes]
    return Builder(graph, fake_mode_of(values), node)


def forward_in_parts(graph: Graph, node: Node) -> None:
    """Rewrite one ``hsap::attend``."""
    args: Any = node.args
    if not _is_a_sum(args, 3):
        return
    stages = _stages(node, args[3], args[4], args[7])
    with graph.inserting_before(node):
        part = _Part(builder_at(graph, node), attention.OP, args[:3], args[5], args[6], args[8:])
        out, lse = part(None)
        for i, stage in enumerate(stages):
            if i > 0:
                _ask_later(node, stages[i + 1 : i + 2], after=out)
            out, lse = _merged(part.build, out, lse, *part(stage))
        wanted = node.meta["val"][0].dtype
        if out.meta["val"].dtype != wanted:
            out = part.build(aten.to.dtype, out, wanted)
    _replace(graph, node, [out, lse])
    _erase_unread(graph, args[3:5])


def backward_in_parts(graph: Graph, node: Node) -> None:
    """Rewrite one ``hsap::attend_backward``."""
    args: Any = node.args
    if not _is_a_sum(args, 4) or args[-1]:  # the last one asks for gradients of leaves
        return
    stages = _stages(node, args[4], args[5], args[8])
    returns = _returns(node, len(stages))
    if len(returns) < len(stages):
        stages = [_Stage(args[4], args[5], args[8])]
    with graph.inserting_before(node):
        part = _Part(builder_at(graph, node), attention.BACKWARD, args[:4], args[6], args[7], args[9:])
        d_q: Any = None
        for i, stage in enumerate(stages):
            if i > 0:
                _ask_later(node, stages[i + 1 : i + 2], after=d_q)
            more, _, _, *theirs = part(stage)
            d_q = more if d_q is None else part.build(aten.add.Tensor, d_q, more)
            if len(stages) > 1:
                _send_back(node, returns[i], theirs)
            if i > 0:
                _take_in(node, returns[i - 1], returns[i])
        mine = part(None)
        d_q = part.build(aten.add.Tensor, mine[0], d_q)
    _erase_unread(graph, [apart for back in returns[:1] for apart in back.aparts])
    _replace(graph, node, [d_q, *mine[1:3], *theirs, None])  # of leaves, none is wanted
    _erase_unread(graph, args[4:6])


def _is_a_sum(args: tuple[Any, ...], received: int) -> bool:
    """Whether rows are received (argument ``received``), and a softmax is the sum of its parts."""
    logits = args[received + 7]
    if args[received] is None or not logits:
        return args[received] is not None
    parts = formula_blocks.read(logits)
    return parts.sink is None and not parts.soft


class _Stage(NamedTuple):
    """Rows that arrive together: k (C, Hkv, D), v (C, Hkv, Dv), and their (b, column) where a formula needs
    it."""

    k: Node
    v: Node
    rows: Node | None


class _Part:
    """Writes calls for the own keys (None) and for stages, these in turn.  ``operands``: those in front of
    the received rows, q, k and v last; ``rest``: those behind their columns."""

    def __init__(
        self,
        build: Builder,
        target: Any,
        operands: Sequence[Node],
        slices: Node,
        rows: Node | None,
        rest: Sequence[Any],
    ) -> None:
        self.build, self.target = build, target
        self.operands, self.slices, self.rows, self.rest = operands, slices, rows, rest
        self._own = self._stop = build.size(operands[-3], 0)

    def __call__(self, stage: _Stage | None) -> list[Node]:
        build, k, v, far = self.build, None, None, None
        if stage is None:
            chosen = build(OF_KEYS, self.slices, 0, self._own, 0)
        else:
            first, self._stop = self._stop, build(operator.add, self._stop, build.size(stage.k, 0))
            chosen = build(OF_KEYS, self.slices, first, self._stop, build(operator.sub, first, self._own))
            k, v, far = stage
        found = build(self.target, *self.operands, k, v, chosen, self.rows, far, *self.rest)
        results = 2 if self.target is attention.OP else 5
        return [build(operator.getitem, found, i) for i in range(results)]


def _merged(build: Builder, out1: Node, lse1: Node, out2: Node, lse2: Node) -> list[Node]:
    """One softmax of two, out in the precision of lse."""
    peak = build(aten.maximum.default, lse1, lse2)
    peak = build(aten.where.ScalarOther, build(aten.gt.Scalar, peak, -math.inf), peak, 0.0)
    masses = [build(aten.exp.default, build(aten.sub.Tensor, x, peak)) for x in (lse1, lse2)]
    mass = build(aten.add.Tensor, *masses)
    lse = build(aten.add.Tensor, build(aten.log.default, mass), peak)
    some = build(aten.where.ScalarOther, build(aten.gt.Scalar, mass, 0.0), mass, 1.0)
    parts = []
    for out, part in ((out1, masses[0]), (out2, masses[1])):
        weight = build(aten.unsqueeze.default, build(aten.div.Tensor, part, some), 2)
        parts.append(build(aten.mul.Tensor, out, weight))
    return [build(aten.add.Tensor, *parts), lse]


def _replace(graph: Graph, node: Node, parts: Sequence[Node | None]) -> None:
    for user in list(node.users):
        part = parts[user.args[1]]  # type: ignore[index]
        if part is not None:
            user.replace_all_uses_with(part)
        graph.erase_node(user)
    graph.erase_node(node)


def _erase_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


# --- stages --------------------------------------------------------------------------------------------


class _Return(NamedTuple):
    """How the gradients of a stage's rows go back to their ranks: ``gradients`` of k and v, which ``aparts``
    tell from other stages'; ``exchange``; ``unpack``, and the ``sums`` with other gradients of k and v."""

    aparts: tuple[Node, ...]
    gradients: tuple[Node, ...]
    exchange: Node
    unpack: Node
    sums: tuple[Node, ...]


def _stages(node: Node, k: Node, v: Node, rows: Node | None) -> list[_Stage]:
    """In which the received keys and values of ``node`` arrive; one where they are kept."""
    joined: list[Any] = [x for x in (k, v, rows) if x is not None]
    alone = all(set(x.users) == {node} for x in (k, v))
    if not alone or any(x.target is not copies.TOGETHER for x in joined):
        return [_Stage(k, v, rows)]
    k_parts, v_parts, *at = (x.args[0] for x in joined)
    return [_Stage(*x) for x in zip(k_parts, v_parts, at[0] if at else [None] * len(k_parts), strict=True)]


def _ask_later(node: Node, following: Sequence[_Stage], after: Node) -> None:
    """Pack and send the rows of the stage in front of ``node``, when ``after`` has been computed."""
    for stage in following:
        pack: Any = stage.k
        while pack.target is not copies.PACK:  # from there, the way is one of first operands
            pack = pack.args[0]
        moved = {pack: None}
        for n in _from(pack.next, node):
            if n.target is not copies.TOGETHER and not moved.keys().isdisjoint(n.all_input_nodes):
                moved[n] = None
        pack.args = (*pack.args[:3], after)
        for n in moved:
            node.prepend(n)


def _returns(node: Node, stages: int) -> list[_Return]:
    """One for each stage, unless the gradients are read by something else."""
    aparts = tuple(user for result in _results(node, 3, 4) for user in result.users)
    if [n.target for n in aparts] != [copies.APART] * 2:
        return []
    found = []
    for stage in range(stages):
        gradients = tuple(n for apart in aparts for n in _results(apart, stage))
        exchanged = _reader(gradients, exchange.ALL_TO_ALL)
        unpack = exchanged and _reader([exchanged], copies.UNPACK)
        totals = _results(unpack, 0, 1) if unpack else []
        sums = tuple(user for total in totals for user in total.users)
        if exchanged and unpack and [n.target for n in sums] == [aten.add.Tensor] * 2:
            found.append(_Return(aparts, gradients, exchanged, unpack, sums))
    return found


def _send_back(node: Node, back: _Return, gradients: Sequence[Node]) -> None:
    """Send ``gradients`` in front of ``node``."""
    for old, new in zip(back.gradients, gradients, strict=True):
        old.replace_all_uses_with(new)
        node.graph.erase_node(old)
    _bring(node, back.exchange)


def _take_in(node: Node, back: _Return, following: _Return) -> None:
    """Add up what came back in front of ``node``, and what comes back in the following stage to that."""
    _bring(node, back.unpack)
    totals = _results(back.unpack, 0, 1)
    for total, added in zip(totals, back.sums, strict=True):
        node.prepend(total)
        (other,) = [x for x in added.all_input_nodes if x is not total]
        added.replace_all_uses_with(other)
        node.graph.erase_node(added)
    following.unpack.args = (*following.unpack.args[:5], *totals)


def _bring(node: Node, needed: Node) -> None:
    """Compute ``needed``, which stands behind ``node``, in front of it."""
    wanted = ancestors([needed])
    for n in [n for n in _from(node.next, needed.next) if n in wanted]:
        node.prepend(n)


def _reader(nodes: Iterable[Node], target: Any) -> Node | None:
    """The nearest call of ``target`` that reads ``nodes``."""
    reached = list(nodes)
    for n in reached:
        if n.target is target:
            return n
        reached += n.users
    return None


def _results(node: Node, *numbers: int) -> list[Node]:
    """These of what a call returns, where they are read."""
    return [n for number in numbers for n in node.users if n.args[1] == number]


def _from(first: Node, stop: Node) -> list[Node]:
    """The nodes of a graph from ``first`` up to ``stop``."""
    found = []
    while first is not stop:
        found.append(first)
        first = first.next
    return found
