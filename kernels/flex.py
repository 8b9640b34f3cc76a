"""Partial attention as flex attention, for which Inductor generates the Triton kernels.

Shapes: R own rows, C received rows, Hq query heads, Hkv key/value heads, D / Dv head sizes, L leaves.

``FlexAttention`` writes into a graph what ``hsap::attend`` computes, as flex attention over rows that are
padded to whole blocks.  Which blocks are computed comes from the plan (``blocks.rank_tables``).  The
sizes of those tables are the sizes of everything here, and they are unbacked: other documents, lengths and
numbers of received rows run the same kernels.  Inside a partial block the mask's own formula decides, with
what depends on a query row alone or a key row alone evaluated once a row, in front of the kernel:

    leaf0(b, q) == leaf0(b, k) and k <= q   ->   x0[m] == y0[n] and y1[n] <= x1[m]

Own and received keys are two nodes, merged by log-sum-exp, so that the first can run while rows travel.

The other kernel of CUDA is varlen.py, flash attention over sequences: half precision, documents and windows
only.
"""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile import formula
from hsap_compile._torch import FLEX_ATTENTION, flex_block_mask, flex_kernel_options, trace_aten
from hsap_compile.graph import Builder
from hsap_compile.kernels.blocks import AT_LEAST, BLOCK, BLOCK_TABLES
from hsap_compile.masks import MASKED, Mask

aten = torch.ops.aten

_NARROWEST = 16  # head size of Triton's matrix product
_LOWEST = -1e30  # a finite logit this low masks: see _bottom


def _table_examples() -> dict[str, tuple[torch.Tensor, tuple[int, ...], int]]:
    rows = torch.zeros(AT_LEAST * BLOCK, 2, dtype=torch.int64)
    number, indices = (torch.zeros(s, dtype=torch.int32) for s in ((1, 1, 5), (1, 1, 5, 7)))
    examples: dict[str, tuple[torch.Tensor, tuple[int, ...], int]] = {}
    for part in ("own", "remote", "alone"):
        examples[f"{part}_rows"] = rows, (0,), AT_LEAST * BLOCK
        for name in BLOCK_TABLES:
            example = (indices, (2, 3)) if name.endswith("indices") else (number, (2,))
            examples[f"{part}_{name}"] = *example, AT_LEAST
    return examples


#: For every table of ``blocks.rank_tables``: an example, its dynamic dimensions, and their least size.
TABLES = _table_examples()


class Keys(NamedTuple):
    """A part of an attention's keys: ``part`` names its tables (own, remote, alone); k (C, Hkv, D),
    v (C, Hkv, Dv)."""

    part: str
    k: Node
    v: Node


class FlexAttention:
    """Writes the attentions with one mask into a graph.

    Args:
        table: the graph's input for a name of ``TABLES``.
        mask, leaves: the mask, and what its formula reads.
        kernel_options: see torch.nn.attention.flex_attention.FlexKernelOptions.

    Raises:
        Refused: an unknown kernel option.
    """

    def __init__(
        self,
        table: Callable[[str], Node],
        mask: Mask,
        leaves: Sequence[Node],
        kernel_options: Mapping[str, Any],
    ) -> None:
        self.table, self.mask, self.leaves = table, mask, tuple(leaves)
        self.options = flex_kernel_options(kernel_options)
        self._written: dict[Any, _Mods] = {}  # layers share what depends on the mask alone

    def attend(
        self, build: Builder, q: Node, parts: Sequence[Keys], heads: Node | None, tokens: Any, scale: float
    ) -> tuple[Node, Node]:
        """Write an attention over rows; returns (out (R, Hq, Dv), lse (R, Hq) natural, in float32).

        Differentiable in q, k, v and, where the logits are a formula, in its floating leaves.  The lse of a
        query without keys is -inf; that of one whose keys are all masked by a finite value is this.

        Args:
            q: (R, Hq, D); their rows are those of the keys of ``parts[0]``.
            parts: one or two.
            heads: (Hq,) number of each head in the formula, the same for all attentions over these parts;
                needed when the formula reads ``h``.
            tokens: S, a number or a node.
        """
        of = _Formula(build, self.mask, heads, self.leaves, tokens)
        padded = build(operator.mul, build.size(self.table(f"{parts[0].part}_kv_num_blocks"), 2), BLOCK)
        queries = _heads_first(build, q, padded)
        answered = None
        if self.mask.soft:
            detached = _heads_first(build, build(aten.detach.default, q), padded)
            hard = []
            for part, *pair in parts:
                keys = Keys(part, *(build(aten.detach.default, x) for x in pair))
                hard.append(self._part(of, detached, padded, parts[0].part, keys, None, scale)[1])
            answered = inline(build, _answered, *hard)
        found = [self._part(of, queries, padded, parts[0].part, keys, answered, scale) for keys in parts]
        out, lse = found[0] if len(found) == 1 else inline(build, merge, *found[0], *found[1])
        if answered is not None:
            numbers = self.mask.logits.atoms(sympy.Number)
            masked = max((float(x) for x in numbers if x <= _LOWEST and x.is_finite), default=_LOWEST)
            lse = inline(build, functools.partial(_of_masked, masked=masked), lse, answered)
        width = int(parts[0].v.meta["val"].shape[2])
        return _rows(build, out, q, padded, width), _rows(build, lse, q, padded, None)

    def _part(
        self,
        of: _Formula,
        queries: Node,
        padded: Node,
        first: str,
        keys: Keys,
        answered: Node | None,
        scale: float,
    ) -> tuple[Node, Node]:
        """The queries over one part: (out (1, Hq, padded, Dv), lse (1, Hq, padded), natural)."""
        build, part = of.build, keys.part
        tables = [self.table(f"{part}_{name}") for name in BLOCK_TABLES]
        padded_k = build(operator.mul, build.size(tables[4], 2), BLOCK)
        key = (part, answered is None, queries.meta["val"].dtype)
        if key not in self._written:
            rows = self.table(f"{first}_rows"), self.table(f"{part}_rows")
            self._written[key] = of.mods(queries, *rows, answered)
        mods = self._written[key]
        score_mod, mask_mod = (_module(build, name) for name in (mods.score, mods.mask))
        result = build(
            FLEX_ATTENTION,
            queries,
            _heads_first(build, keys.k, padded_k),
            _heads_first(build, keys.v, padded_k),
            score_mod,
            flex_block_mask((padded, padded_k), tables, BLOCK, mask_mod),
            scale,
            self.options,
            (*(() if answered is None else (answered,)), *mods.score_buffers),
            mods.mask_buffers,
        )
        lse = build(aten.mul.Tensor, build(operator.getitem, result, 1), math.log(2))
        return build(operator.getitem, result, 0), lse


def _heads_first(build: Builder, x: Node, padded: Any) -> Node:
    """(rows, H, D) -> (1, H, padded, D) with zeros in the rows and widths that were not there.

    Rows are padded while they are flat: undoing that, the backward names their number.  Knowing it from the
    padding alone, torch 2.14 writes a backward that uses it undefined.
    """
    heads, width = (int(size) for size in x.meta["val"].shape[1:])
    if width < _NARROWEST:
        x = build(aten.constant_pad_nd.default, x, [0, _NARROWEST - width])
        width = _NARROWEST
    padding = build(operator.sub, padded, build.size(x, 0))
    x = build(aten.reshape.default, x, [-1, heads * width])
    x = build(aten.constant_pad_nd.default, x, [0, 0, 0, padding])
    x = build(aten.reshape.default, x, [-1, heads, width])
    return build(aten.unsqueeze.default, build(aten.permute.default, x, [1, 0, 2]), 0)


def _rows(build: Builder, x: Node, q: Node, padded: Node, width: int | None) -> Node:
    """(1, Hq, padded, ...) -> (R, Hq, ...), the last dimension cut to ``width``."""
    x = build(aten.squeeze.dim, x, 0)
    if width is not None and width < int(x.meta["val"].shape[2]):
        x = build(aten.slice.Tensor, x, 2, 0, width)
    x = build(aten.permute.default, x, [1, 0, 2] if width is not None else [1, 0])
    rows = build.size(q, 0)
    sizes = [rows, build(operator.sub, padded, rows)]  # that of a slice would be min(R, padded)
    return build(operator.getitem, build(aten.split_with_sizes.default, x, sizes, 0), 0)


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax from two over the same queries; out (..., Dv), lse (...), -inf where there is no key."""
    peak = torch.maximum(lse, other_lse).detach()
    base = torch.where(peak == -torch.inf, 0.0, peak)
    weight, other = (lse - base).exp(), (other_lse - base).exp()
    mass = weight + other
    some = torch.where(mass == 0, 1.0, mass)
    total = out * (weight / some)[..., None] + other_out * (other / some)[..., None]
    return total.to(out.dtype), torch.where(mass == 0, -torch.inf, base + some.log())


# A row whose logits are all finfo.min attends to everything alike.  Flex attention cannot hold that: its
# logits are multiplied by log2(e), which overflows, and its backward needs lse to tell n such keys from one.
# So a first run, without gradients, finds the queries that have a key (their lse is finite when the masked
# logits are -inf); for the others the masked logits are 0, which is the same softmax.


def _hard(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value > _LOWEST, value, -torch.inf)


def _bottom(value: torch.Tensor, constant: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """``constant``: ``value`` detached.  In here, torch 2.14 would trace an alias instead."""
    zero = value - constant  # score + finfo.min has the gradient of the score
    masked = torch.where((value > -torch.inf) & ~answered, zero, -torch.inf)
    return torch.where(value > _LOWEST, value, masked)


def _of_masked(lse: torch.Tensor, answered: torch.Tensor, masked: float) -> torch.Tensor:
    """lse (1, Hq, padded), where nothing answers that of masked logits: the number of keys is lost in it."""
    return torch.where(answered | (lse == -torch.inf), lse, masked)


def _answered(*lse: torch.Tensor) -> torch.Tensor:
    """(Hq, padded): whether a query has a key in one of the parts."""
    found = [x[0] > -torch.inf for x in lse]
    return found[0] if len(found) == 1 else found[0] | found[1]


# --- formulas ------------------------------------------------------------------------------------------


class _Mods(NamedTuple):
    """Names of a score_mod and a mask_mod in the graph's module, and the tensors that each reads."""

    score: str
    score_buffers: tuple[Node, ...]
    mask: str
    mask_buffers: tuple[Node, ...]


class _Formula:
    """An attention's mask and what it reads."""

    def __init__(
        self, build: Builder, mask: Mask, heads: Node | None, leaves: tuple[Node, ...], tokens: Any
    ) -> None:
        self.build, self.mask, self.heads, self.leaves, self.tokens = build, mask, heads, leaves, tokens

    def mods(self, queries: Node, q_rows: Node, k_rows: Node, answered: Node | None) -> _Mods:
        """Write what decides on one pair.  ``answered`` is what the score_mod reads first."""
        build, mask, rows = self.build, self.mask, {"m": q_rows, "n": k_rows}
        score = _Mod(build, queries, ("score", "b", "h", "m", "n"))
        allowed = _Mod(build, queries, ("b", "h", "m", "n"))
        q_row, k_row = (inline(build, lambda r: r[:, 0].to(torch.int32), x) for x in rows.values())
        pair = allowed.inline(torch.eq, allowed.load(q_row, "m"), allowed.load(k_row, "n"))
        value = score.indices["score"]
        if not mask.residual and not mask.soft:  # the logits are the score wherever they do not mask
            leaves = tuple(build(aten.detach.default, x) for x in self.leaves)
            reading = _Formula(build, mask, self.heads, leaves, self.tokens)
            logits = allowed.value(mask.logits.xreplace({formula.score: sympy.Integer(0)}), reading, rows)
            pair = allowed.inline(lambda p, x: p & (x > MASKED), pair, logits)
        else:
            known = None if answered is None else score.load(answered, "h", "m")
            value = score.value(mask.logits, self, rows)
            if formula.score not in mask.logits.free_symbols:  # flex attention wants a gradient of it
                value = score.inline(lambda x, s: torch.where(s == s, x, s), value, score.indices["score"])
            if known is not None:
                value = score.inline(_bottom, value, score.build(aten.detach.default, value), known)
            elif mask.soft:
                value = score.inline(_hard, value)
        skipped = 0 if answered is None else 1
        return _Mods(
            score.finish(value), tuple(score.buffers[skipped:]), allowed.finish(pair), tuple(allowed.buffers)
        )

    def rowwise(
        self, expr: sympy.Basic, rows: Mapping[str, Node], work: torch.dtype
    ) -> tuple[Node, tuple[str, ...]]:
        """``expr``, which does not read both q and k, for every row of its side (m or n): the values, and
        the names of the indices that they are read with."""
        free = expr.free_symbols
        side = "n" if formula.k in free else "m"
        by_head, by_row = formula.h in free, bool(free & {formula.b, formula.q, formula.k, formula.S})
        small = expr in (formula.q, formula.k, formula.b, formula.h)  # fits int32
        if by_head and self.heads is None:
            raise ValueError(f"the formula {expr} reads h; pass heads")
        operands = [rows[side], self.tokens, *([self.heads] if by_head else []), *self.leaves]

        def evaluate(rows: torch.Tensor, tokens: Any, *rest: torch.Tensor) -> torch.Tensor:
            heads, leaves = (rest[0], rest[1:]) if by_head else (None, rest)
            values = {"b": rows[:, 0], "q": rows[:, 1], "k": rows[:, 1], "S": tokens}
            size = [rows.shape[0]] if by_row else []
            if heads is not None:
                values["h"] = heads[:, None] if by_row else heads
                size = [heads.shape[0], *size]
            result = _evaluate(expr, values, leaves, work, rows.device)
            if result.is_floating_point():
                result = result.to(work)
            elif small:
                result = result.to(torch.int32)
            return result.expand(size).contiguous()

        indices = (("h",) if by_head else ()) + ((side,) if by_row else ())
        return inline(self.build, evaluate, *operands), indices


class _Mod:
    """A score_mod or mask_mod while it is written: a graph of one pair's indices and the tensors it reads."""

    def __init__(self, build: Builder, q: Node, indices: Sequence[str]) -> None:
        value = q.meta["val"]
        self.main, self.mode = build, build.mode
        self.work = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.graph = Graph()
        self.build = Builder(self.graph, self.mode)
        self.indices: dict[str, Node] = {}
        self.buffers: list[Node] = []
        self._inputs: dict[Node, Node] = {}
        for name in indices:
            self.indices[name] = self.graph.placeholder(name)
            dtype = value.dtype if name == "score" else torch.int32
            self.indices[name].meta["val"] = self._scalar(value.device, dtype)
        self._last = self.indices[indices[-1]]

    def _scalar(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty((), dtype=dtype, device=device)

    def inline(self, function: Callable[..., Any], *args: Node) -> Node:
        return inline(self.build, function, *args)

    def load(self, tensor: Node, *indices: str | Node) -> Node:
        """An element of a tensor of the main graph."""
        if tensor not in self._inputs:
            with self.graph.inserting_after(self._last):
                self._last = self.graph.placeholder(f"x{len(self.buffers)}")
            self.buffers.append(tensor)
            self._inputs[tensor] = self._last
        at = tuple(self.indices[i] if isinstance(i, str) else i for i in indices)
        node = self.graph.call_function(operator.getitem, (self._inputs[tensor], at))
        value = tensor.meta["val"]
        node.meta["val"] = self._scalar(value.device, value.dtype)
        return node

    def value(self, expr: sympy.Basic, of: _Formula, rows: Mapping[str, Node]) -> Node:
        """``expr`` for one pair.  What one row alone decides is evaluated outside; so the same tensor is
        never read at two places, for which flex attention has no gradient."""
        bound: dict[sympy.Basic, Node] = {}
        for part in _rowwise(expr):
            tensor, indices = of.rowwise(part, rows, self.work)
            bound[part] = self.load(tensor, *indices)
        if "score" in self.indices:
            score = self.indices["score"]
            bound[formula.score] = self.inline(lambda s: s.to(self.work), score)
        names = {part: sympy.Symbol(f"value{i}") for i, part in enumerate(bound)}
        values = {names[part].name: node for part, node in bound.items()}
        expr = expr.xreplace(names)
        while (leaf := _innermost_leaf(expr)) is not None:
            number = formula.leaf_index(leaf)
            assert number is not None
            at = [self._evaluated(i, values) for i in leaf.args]
            symbol = sympy.Symbol(f"value{len(values)}")
            values[symbol.name] = self.load(of.leaves[number], *at)
            expr = expr.xreplace({leaf: symbol})
        score_name = names.get(formula.score)
        for total in [e for e in sympy.preorder_traversal(expr) if isinstance(e, sympy.Add)]:
            # score + (10000 * allowed - 10000) and not (score - 10000) + ..., which loses digits of the score
            rest = [term for term in total.args if score_name not in term.free_symbols]
            if 1 < len(rest) < len(total.args):
                symbol = sympy.Symbol(f"value{len(values)}")
                values[symbol.name] = self._evaluated(sympy.Add(*rest), values)
                summed = sympy.Add(symbol, *[term for term in total.args if term not in rest])
                expr = expr.xreplace({total: summed})
        return self._evaluated(expr, values)

    def _evaluated(self, expr: sympy.Basic, values: Mapping[str, Node]) -> Node:
        names = [s.name for s in expr.free_symbols]
        like = self.indices["m"]

        def evaluate(like: torch.Tensor, *found: torch.Tensor) -> torch.Tensor:
            return _evaluate(expr, dict(zip(names, found, strict=True)), (), self.work, like.device)

        return self.inline(evaluate, like, *[values[name] for name in names])

    def finish(self, result: Node) -> str:
        """Put the module into the main graph's; returns its name."""
        self.graph.output(result)
        module = GraphModule(torch.nn.Module(), self.graph)
        root: Any = self.main.graph.owning_module
        # the name says what is in it: it stands in the code that ranks compare and caches hash
        name = f"flex_{zlib.crc32(module.code.encode()):08x}"
        if not hasattr(root, name):
            root.add_submodule(name, module)
        return name


def _module(build: Builder, name: str) -> Node:
    node = build.graph.get_attr(name)
    node.meta["val"] = getattr(build.graph.owning_module, name)
    return node


def _rowwise(expr: sympy.Basic) -> list[sympy.Basic]:
    """The largest parts of ``expr`` that read indices, but neither the score nor both q and k."""
    free = expr.free_symbols
    if not free:
        return []
    if formula.score in free or {formula.q, formula.k} <= free:
        found: dict[sympy.Basic, None] = {}
        for argument in expr.args:
            found.update(dict.fromkeys(_rowwise(argument)))
        return list(found)
    return [expr]


def _innermost_leaf(expr: sympy.Basic) -> sympy.Basic | None:
    for e in sympy.postorder_traversal(expr):
        if formula.leaf_index(e) is not None:
            return e
    return None


def _evaluate(
    expr: sympy.Basic,
    values: Mapping[str, Any],
    leaves: Sequence[torch.Tensor],
    work: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """``formula.evaluate`` without constants that tracing would keep as tensors of the graph."""
    numbers: dict[sympy.Basic, sympy.Symbol] = {}

    def named(e: sympy.Basic) -> sympy.Basic:
        if e.is_number and not isinstance(e, sympy.logic.boolalg.BooleanAtom):
            return numbers.setdefault(e, sympy.Symbol(f"number{len(numbers)}"))
        return e

    def cases(e: sympy.Basic) -> sympy.Basic:
        if isinstance(e, sympy.Piecewise):
            return sympy.Piecewise(*[(named(value), condition) for value, condition in e.args])
        return e.func(*map(named, e.args))

    expr = expr.replace(lambda e: isinstance(e, sympy.Piecewise | sympy.Max | sympy.Min), cases)

    def full(number: Any) -> torch.Tensor:
        if isinstance(number, bool):
            return torch.full((), number, device=device)
        kind = torch.int64 if isinstance(number, int) else work
        return torch.full((), number, dtype=kind, device=device)

    constants = {s.name: full(int(e) if e.is_Integer else float(e)) for e, s in numbers.items()}
    result = formula.evaluate(expr, {**values, **constants}, leaves)
    return result if isinstance(result, torch.Tensor) else full(result)


def inline(build: Builder, function: Callable[..., Any], *args: Any) -> Any:
    """Append the operators that ``function`` runs on ``args`` (nodes, numbers); its result as nodes."""
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    inputs, copies = iter(args), {}
    graph = trace_aten(build.mode, function, values)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "output":
            return map_arg(node.args[0], lambda n: copies[n])
        else:
            copies[node] = build(node.target, *_copied(node.args, copies), **_copied(node.kwargs, copies))
    raise AssertionError("a graph without an output")


def _copied(args: Any, copies: Mapping[Node, Any]) -> Any:
    return map_arg(args, lambda n: copies[n])
