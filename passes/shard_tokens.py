"""Pass 5: rewrite the graph to run on this rank's tokens.

before: y = f(x, w)                  x (B, S, ..) whole on every rank
after:  y = f(shard(x), w)           x (B, n, ..), the rank's columns only

A value has up to two forms in the new graph: *whole* (the same on every rank) and *local* (this rank's
rows of its token dimension).  The old graph is read in order, and for every node

1. what depends on no parameter and no input with a gradient (positions, masks, label shifts) is cheap:
   nothing is emitted until somebody asks for one of its forms;
2. a rule for the operator's family emits the local form from local operands; a value that was whole is
   made local by ``shard``, whose transpose gathers its gradient;
3. where no rule holds, operands are gathered and the operator runs whole on every rank: right, slow, and
   reported with file and line (refused when strict); what follows on whole values is not reported again;
4. a sum over tokens is a local sum and ``sum_ranks``; a mean loss is a sum over a sum.

A parameter used by local operators has only this rank's share of its gradient: it is marked to be summed
over ranks (``meta["sum_gradient"]``).  Whole operators give every rank all of it: they read the parameter
through ``share``, which keeps it on one rank, so that the sum is right for both kinds of use.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import SET_GRAD_ENABLED, FloorDiv, call_name, expr_of
from hsap_compile.errors import Refused, module_of, where
from hsap_compile.graph import Builder, placeholders, remove_dead
from hsap_compile.kernels import dense, exchange
from hsap_compile.kernels.copies import LAID_OUT
from hsap_compile.passes._chunks import frame_read, operands_of
from hsap_compile.passes._custom_functions import overwriting
from hsap_compile.passes._families import no_rule, rule_for
from hsap_compile.passes._forms import Counts, Frame, Local, NotLocal
from hsap_compile.passes._inputs import write_inputs
from hsap_compile.passes._operands import args_of, cuts_gradient
from hsap_compile.passes._parameters import settle_parameters
from hsap_compile.passes._random import agreed, disagreed, is_random
from hsap_compile.passes._reindex import Longer, aligned, common_start, usual_start, within
from hsap_compile.passes._routing import by_rule, is_count, routed, sorts_rows, whole_counts
from hsap_compile.passes._totals import sum_of_sums
from hsap_compile.passes._two_forms import fits, gathered, rows_of_whole
from hsap_compile.passes.infer_tokens import MANY, TokenAxis, parts_of_tokens, symbol_of
from hsap_compile.plan.chunks import Chunk

aten = torch.ops.aten


@dataclass(frozen=True)
class Fallback:
    """An operator that runs on gathered tokens.  ``module``: whose forward it stands in, if it has a name."""

    operator: str
    reason: str
    at: str
    module: str = ""


@dataclass(frozen=True)
class Sharded:
    """What the pass made: the new graph's module, what it could not keep local, and the outputs that are this
    rank's rows; ``whole``: it has operators, and none is for one rank's rows."""

    module: GraphModule
    fallbacks: tuple[Fallback, ...]
    local_outputs: Mapping[int, Rows]
    whole: bool


class Rows(NamedTuple):
    """Rows of all columns of a rank in dimension ``dim``; those of the ``first`` columns of the batch, and of
    the ``behind`` last ones, are not part of the value."""

    dim: int
    first: int
    behind: int


@dataclass
class Sharder:
    """The state of one rewrite; rules get it and call ``local``, ``whole`` and ``emit``."""

    old: GraphModule
    mode: Any
    batch: Frame
    group: str
    strict: bool
    token_wise: Collection[str] = ()
    graph: Graph = field(default_factory=Graph)
    wholes: dict[Node, Any] = field(default_factory=dict)
    home: dict[Node, Local] = field(default_factory=dict)
    longer: dict[Node, Longer] = field(default_factory=dict)
    heavy: set[Node] = field(default_factory=set)
    sorts: list[Node] = field(default_factory=list)
    differentiable: set[Node] = field(default_factory=set)
    no_grad: set[Node] = field(default_factory=set)
    fallbacks: list[Fallback] = field(default_factory=list)
    inferred: dict[Hashable, Any] = field(default_factory=dict)
    symbols: dict[sympy.Expr, Node] = field(default_factory=dict)
    locally_used: set[Node] = field(default_factory=set)
    origin: Node | None = None
    frames: dict[Chunk, Frame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frame = self.batch

    @property
    def length(self) -> sympy.Expr:
        """How many tokens a row has in the frame of the operator that is rewritten: of the batch, S."""
        return self.frame.length

    @property
    def tables(self) -> dict[str, Any]:
        return self.frame.tables

    @property
    def symbol(self) -> sympy.Basic:
        """The size of inputs: S is that and a constant."""
        return symbol_of(self.length)

    @contextmanager
    def in_frame(self, frame: Frame) -> Iterator[None]:
        """Rewrite as if ``frame`` was the row."""
        was, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = was

    def frame_of(self, node: Node) -> Frame:
        """Of which row the local form of ``node`` is."""
        return self.home[node].frame or self.batch

    def slack(self, axis: TokenAxis) -> int:
        """How many tokens fewer than the frame's a value has."""
        slack = self.length - axis.length
        if not slack.is_Integer:
            raise NotLocal("tokens of chunks meet others")
        return int(slack)

    # --- emitting ---------------------------------------------------------------------------------

    def emit(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        """A new call of ``target``, its value inferred; where it comes from is kept."""
        made = Builder(self.graph, self.mode, self.origin, self.inferred)(target, *args, **kwargs)
        if any(n.graph is not self.graph for n in made.all_input_nodes):
            self.graph.erase_node(made)
            raise NotLocal("a number that depends on the length, where only constants are known")
        return made

    def size(self, expr: Any) -> Any:
        """A whole size: an int, or a node that computes it from the sizes of inputs."""
        expr = sympy.expand(expr) if isinstance(expr, sympy.Basic) else expr_of(expr)
        if expr.is_Integer:
            return int(expr)
        if expr in self.symbols:
            return self.symbols[expr]
        if isinstance(expr, FloorDiv):
            return self.emit(operator.floordiv, *(self.size(part) for part in expr.args))
        if not (expr.is_Add or expr.is_Mul):
            raise NotLocal(f"a size of {expr}")
        parts = [self.size(part) for part in reversed(expr.args)]  # numbers stand first in sympy
        combine = operator.add if expr.is_Add else operator.mul
        return functools.reduce(lambda a, b: self.emit(combine, a, b), parts)

    def local_shape(self, node: Node) -> list[Any]:
        """The sizes that the local form of ``node`` has."""
        axis = self.axis(node)
        shape = [s if isinstance(s, int) else None for s in node.meta["val"].shape]
        rows = self.tables["n"]
        if axis.folded:
            rows = self.emit(operator.mul, rows, axis.outer * axis.inner)
        return [
            rows if d == axis.dim else (size if size is not None else self.size(node.meta["val"].shape[d]))
            for d, size in enumerate(shape)
        ]

    # --- the two forms ----------------------------------------------------------------------------

    def axis(self, node: Node) -> TokenAxis:
        axis = node.meta["tokens"]
        if not isinstance(axis, TokenAxis):
            raise NotLocal(
                "a value with several token dimensions" if axis is MANY else "a value without tokens"
            )
        return axis

    def whole(self, node: Node) -> Any:
        """The form of ``node`` that is the same on every rank."""
        if node in self.wholes:
            return self.wholes[node]
        if node in self.home and not self.home[node].routed and node.target is not LAID_OUT:
            self.wholes[node] = gathered(self, node)
        elif node in self.home and node in self.heavy and is_count(node):
            self.wholes[node] = whole_counts(self, node)
        elif node in self.home or node in self.longer:  # its rows have no place in the caller's order
            if node in self.longer:
                self._report(node, "a value of more tokens than the batch has, of which no slice is taken")
            if is_random(node):  # drawn once already
                raise disagreed(node)
            self.wholes[node] = self._cut(node, self._recomputed(node))
        else:  # cheap
            self.wholes[node] = self._recomputed(node)
        return self.wholes[node]

    def _recomputed(self, node: Node) -> Any:
        if node.target in _SIZES and isinstance(node.meta["val"], torch.SymInt):
            try:
                return self.size(node.meta["val"])
            except NotLocal:  # no sum of products of inputs' sizes: read it from the whole value
                pass
        if node.target is operator.getitem and isinstance(parts := self.whole(args_of(node)[0]), tuple):
            return parts[args_of(node)[1]]
        args = map_arg((node.args, node.kwargs), self.whole)
        made = self.emit(node.target, *args[0], **args[1])
        if node.target is dense.OP:  # every rank computes all of it
            made.meta.update(partition=False, mask=node.meta["mask"], reads=node.meta["reads"])
        return agreed(self, node, made) if is_random(node) else made

    def unfolded(self, value: Node, shape: list[Any], axis: TokenAxis, rows: Any) -> tuple[Node, int]:
        """``value`` of ``shape`` with the tokens in a dimension of their own, and which that is."""
        parts = [axis.outer, rows, axis.inner]
        unfolded = [*shape[: axis.dim], *parts, *shape[axis.dim + 1 :]]
        return self.emit(aten.reshape.default, value, unfolded), axis.dim + 1

    def local(self, node: Node, start: int = 0) -> Node:
        """The form of ``node`` that holds this rank's rows; row i belongs to column ``columns[i]``."""
        home = self.home.get(node)
        if home is not None and home.frame is not self.frame:
            raise NotLocal("tokens of chunks meet others")
        if home is not None and home.start == start:
            return home.node
        if not 0 <= start <= self.slack(self.axis(node)):
            raise NotLocal("a value of more tokens than the batch has")
        key, known = (node, start), self.frame.locals
        if key not in known and home is not None:
            known[key] = aligned(self, node, start)
        elif key not in known:
            made = self._local_from_cheap(node, start) if node not in self.heavy else None
            known[key] = made if made is not None else rows_of_whole(self, node, start)
        return known[key]

    def _local_from_cheap(self, node: Node, start: int) -> Node | None:
        """Computed on local rows, when the operator can be; None otherwise."""
        axis = self.axis(node)
        if node.op != "call_function" or axis.length != self.length or start != 0:
            return None
        try:
            result = self.by_rule(node)
        except NotLocal:
            return None
        plain = isinstance(result, Local) and result.start == 0 and not result.routed
        return result.node if plain else None

    def tokens_at(self, columns: Node, axis: TokenAxis, start: int) -> Node:
        """The token that stands at each of ``columns``, or is nearest to it."""
        last = self.emit(operator.sub, self.size(axis.length), 1)
        return self.emit(aten.clamp.default, self.emit(aten.sub.Tensor, columns, start), 0, last)

    def operand(self, node: Node, start: int = 0) -> Any:
        """``node`` as an operand of a local operator: its rows, or, without tokens, the whole value."""
        tokens = node.meta.get("tokens")
        if tokens is MANY:
            raise NotLocal("a value with several token dimensions")
        if tokens is not None or node in self.home:
            return self.local(node, start)
        value = self.whole(node)
        if node not in self.differentiable:
            return value
        if node.op == "placeholder":
            self.locally_used.add(node)
            return value
        return self.spread(node)

    def spread(self, node: Node) -> Any:
        """A whole value without tokens of which every rank uses a part: what a rule changes before it meets
        local rows, which ``operand`` may only be where it meets them."""
        value, key = self.whole(node), (node, -1)
        if node not in self.differentiable:
            return value
        if key not in self.batch.locals:
            self.batch.locals[key] = self.emit(exchange.BROADCAST, value, self.group)
        return self.batch.locals[key]

    def start_of(self, *nodes: Node) -> int:
        """Where the local operands among ``nodes`` start, or are made to."""
        return common_start(self, nodes)

    def valid_rows(self, axis: TokenAxis, start: int, rank: int) -> Node | None:
        """(.., outer * n, ..) bool of ``rank`` dimensions: which rows are part of the value; None: all."""
        slack = self.slack(axis)
        valid: Any = within(self, (start, slack - start)) if slack or self.frame.chunk is not None else None
        if valid is None:
            return None
        if axis.folded:
            rows = self.emit(aten.unsqueeze.default, valid, 1)
            valid = self.emit(aten.repeat.default, rows, [axis.outer, axis.inner])
        shape = [1] * rank
        shape[axis.dim] = -1
        return self.emit(aten.reshape.default, valid, shape)

    # --- the walk ---------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        self.origin = node
        if node.op == "get_attr":
            self.wholes[node] = self._attribute(node)
            return
        if not is_random(node) and not any(n in self.heavy for n in node.all_input_nodes):
            if sorts_rows(node) or any(n in self.sorts for n in node.all_input_nodes):
                self.sorts.append(node)
            return  # cheap: emitted when asked for
        if isinstance(node.meta["val"], torch.SymInt | int):
            return  # so is a size, whatever it is the size of
        self.heavy.add(node)
        if parts_of_tokens(node):
            return  # each of them is a slice
        if self._is_whole(node):
            made = sum_of_sums(self, node)
            self.wholes[node] = self._detached(node, self._recomputed(node) if made is None else made)
            return
        try:
            result = by_rule(self, node)
        except NotLocal as reason:
            if any(self._is_rows(n) for n in operands_of(node)) or self._is_first(node):
                self._report(node, str(reason))
            self.wholes[node] = self._detached(node, self._recomputed(node))
            return
        if isinstance(result, Local):
            self.home[node] = replace(result, node=self._detached(node, result.node))
        elif isinstance(result, Longer):
            self.longer[node] = result
        else:
            self.wholes[node] = self._detached(node, result)

    def _is_rows(self, node: Node) -> bool:
        """Whether ``node`` is this rank's rows, which others must send to make it whole."""
        return node in self.home and node in self.heavy and not isinstance(self.home[node].order, Counts)

    def _is_first(self, node: Node) -> bool:
        """Whether tokens with a gradient begin here, of what has none: each one's is sent to every rank."""
        heavy = [n for n in node.all_input_nodes if n in self.heavy]
        learned = node in self.differentiable and isinstance(node.meta["tokens"], TokenAxis)
        return learned and all(n.meta.get("tokens") is None for n in heavy)

    def _is_whole(self, node: Node) -> bool:
        """Whether ``node`` has only one form: no tokens take part, or it is a size or a part of a tuple."""
        if not isinstance(node.meta["val"], torch.Tensor | tuple | list | dict):
            return True
        if node.target is operator.getitem:
            return node.args[0] not in self.home and not parts_of_tokens(args_of(node)[0])
        if any(n in self.home and isinstance(self.home[n].order, Counts) for n in node.all_input_nodes):
            return False
        return all(n.meta.get("tokens") is None for n in (node, *node.all_input_nodes))

    def by_rule(self, node: Node) -> Any:
        """The local form of ``node``, or a whole value.  Raises ``NotLocal``."""
        with self.in_frame(frame_read(self, node)):
            return self._by_rule_of_frame(node)

    def _by_rule_of_frame(self, node: Node) -> Any:
        rule = rule_for(node, self.token_wise)
        sorted_rows = any(n in self.home and self.home[n].routed for n in node.all_input_nodes)
        if rule is None and not sorted_rows:
            raise NotLocal(no_rule(node))
        try:
            result = routed(self, node, rule) if sorted_rows else rule(self, node)
        except Refused:
            raise
        except RuntimeError as error:  # shapes that do not fit, once rows of one rank meet whole tokens
            raise NotLocal(f"its local operands do not fit: {str(error).splitlines()[0]}") from error
        if isinstance(result, Longer):
            if self.frame.chunk is not None:
                raise NotLocal("a chunk of the tokens that becomes longer")
            return result
        if isinstance(result, Local) and result.frame is None:
            result = replace(result, frame=self.frame)
        with self.in_frame((isinstance(result, Local) and result.frame) or self.frame):
            axis = node.meta.get("tokens")
            if isinstance(result, Local) and isinstance(axis, TokenAxis):
                if not 0 <= result.start <= self.slack(axis):
                    raise NotLocal("a value of more tokens than the batch has")
            made = result.node if isinstance(result, Local) else result
            rows = isinstance(result, Local) and not isinstance(result.order, Counts)
            if not fits(self, node.meta["val"], map_arg(made, lambda n: n.meta["val"]), rows):
                raise NotLocal("its local result does not have one row for each token")
        return result

    def _attribute(self, node: Node) -> Node:
        new = self.graph.get_attr(str(node.target))
        new.meta["val"] = node.meta.get("val", getattr(self.old, str(node.target), None))
        return new

    def _detached(self, node: Node, new: Any) -> Any:
        if isinstance(new, tuple):
            return tuple(self._detached(node, part) for part in new)
        if node in self.differentiable:
            new = self._cut(node, new)
        if node in self.no_grad and isinstance(new.meta["val"], torch.Tensor):
            self.differentiable.discard(node)
        return new

    def _cut(self, node: Node, new: Any) -> Any:
        """``new``, without a gradient where ``node`` has none."""
        if node in self.no_grad and isinstance(new.meta["val"], torch.Tensor):
            return self.emit(aten.detach.default, new)
        return new

    def _report(self, node: Node, reason: str) -> None:
        fallback = Fallback(call_name(node), reason, where(node), module_of(node))
        if self.strict:
            raise Refused(
                f"{fallback.operator} cannot be computed on one rank's tokens ({reason})",
                got="strict=True and an operator that mixes tokens",
                wanted="operators that treat every token alone, attention, and losses",
                do="change the model there, or drop strict=True to compute it on gathered tokens",
                at=fallback.at,
            )
        self.fallbacks.append(fallback)


_SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)


def shard_tokens(
    module: GraphModule,
    mode: Any,
    length: sympy.Expr,
    group: str,
    *,
    columns: torch.Tensor,
    order: torch.Tensor,
    ranks: int,
    outputs: str,
    whole_outputs: int,
    strict: bool,
    token_wise: Collection[str] = (),
) -> Sharded:
    """``columns`` (n,) and ``order`` (2, K) are the fake tables that the new graph gets as inputs.  The last
    ``whole_outputs`` outputs are whole whatever ``outputs`` says.  ``token_wise``: what the user says is."""
    batch = Frame(length, {"ranks": ranks}, columns.shape[0], usual_start(module, length))
    sharder = Sharder(module, mode, batch, group, strict, token_wise)
    write_inputs(sharder, columns, order)
    grad = True
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is SET_GRAD_ENABLED:
            grad = bool(node.args[0])
            continue
        if node.meta.get("overwrites"):
            raise overwriting(node)
        number = isinstance(node.meta.get("val"), torch.SymInt | int)
        learned = not number and any(n in sharder.differentiable for n in node.all_input_nodes)
        if learned and not cuts_gradient(node):
            sharder.differentiable.add(node)
        if not grad:
            sharder.no_grad.add(node)
        sharder.visit(node)
    output = next(n for n in module.graph.nodes if n.op == "output")
    sharder.origin = None

    values: Any = output.args[0]
    asked = values[: len(values) - whole_outputs] if outputs == "local" else []
    rows = {i: _rows(sharder, n) for i, n in enumerate(asked) if isinstance(n, Node)}
    stay = {i: of_rank for i, of_rank in rows.items() if of_rank is not None}
    sharder.graph.output(
        [sharder.home[n].node if i in stay else map_arg(n, sharder.whole) for i, n in enumerate(values)]
    )
    settle_parameters(sharder)
    new = GraphModule(module, sharder.graph)
    for placeholder in placeholders(new):
        placeholder.meta.setdefault("tokens", None)
    remove_dead(new)
    for placeholder in [n for n in placeholders(new) if n.meta.get("table", "columns") != "columns"]:
        if not placeholder.users:  # nothing is gathered, or a rule gave up
            new.graph.erase_node(placeholder)
    new.recompile()
    whole = not sharder.home and any(n.op == "call_function" for n in sharder.heavy)
    return Sharded(new, tuple(sharder.fallbacks), stay, whole)


def _rows(sharder: Sharder, node: Node) -> Rows | None:
    """Where row i of the local form is column ``columns[i]`` and nothing else."""
    axis, home = node.meta.get("tokens"), sharder.home.get(node)
    if home is None or home.routed or not isinstance(axis, TokenAxis) or axis.folded:
        return None
    if home.frame is not sharder.batch:
        return None
    return Rows(axis.dim, home.start, sharder.slack(axis) - home.start)
