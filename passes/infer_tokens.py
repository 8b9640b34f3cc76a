"""Pass 4: which dimension of every value holds tokens.

after: ``node.meta["tokens"]`` is a ``TokenAxis`` for a value with exactly one token dimension, None for
a value without, and ``MANY`` for one with several or with one that is no plain run of tokens.

A dimension holds tokens when its size contains the symbol of the inputs' length.  Sizes are
``outer * length * inner``: ``outer`` rows that were folded in front (``view(B * S, ..)``), ``inner`` behind
(``view(S * B, ..)``), and a length of S, or S plus or minus a constant after a slice or a pad.  S itself is
the inputs' length, or a constant more (a prompt in front) or fewer (inputs that are cut).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import expr_of, hint_of, operator_name
from hsap_compile.graph import arguments


class Tokens(Enum):
    """The value has token dimensions, but not one plain one."""

    MANY = "many"


MANY = Tokens.MANY

VIEWS = frozenset(
    f"aten::{name}" for name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as")
)


@dataclass(frozen=True)
class TokenAxis:
    """Dimension ``dim``, of size ``outer * length * inner``; its element ``(o * length + t) * inner + i``
    belongs to token t."""

    dim: int
    outer: int
    length: sympy.Expr
    inner: int = 1

    @property
    def layout(self) -> tuple[int, sympy.Expr, int]:
        """What two values must share to be combined token by token."""
        return self.outer, self.length, self.inner

    @property
    def folded(self) -> bool:
        """Whether the dimension holds more than tokens."""
        return self.outer * self.inner != 1


def symbol_of(length: sympy.Expr) -> sympy.Basic:
    """The symbol of ``length``, which is that and a constant."""
    (symbol,) = length.free_symbols
    return symbol


#: What changes the length of a row without looking at its tokens.
_OF_ROWS = frozenset(
    f"aten::{name}"
    for name in (
        "slice select cat pad constant_pad_nd roll diff unfold conv1d convolution slice_scatter"
        " select_scatter"
    ).split()
)
_LONGER = 0.25  # keys that are longer than the queries by more than this share do not make all rows longer


def longest_row(module: GraphModule, attended: Sequence[Any], symbol: sympy.Basic, ranks: int) -> sympy.Expr:
    """S, a constant more or fewer than ``symbol``, the inputs' length: the longest of ``attended``, the
    numbers of queries, and, on several ranks, of the rows that parameters take part in.  What is only padded
    to be cut does not count."""
    found = set[int]().union(*(_more(size, symbol) for size in attended))
    queries, learned = max([0, *found]), set[Node]()
    for node in module.graph.nodes if ranks > 1 else ():
        value = node.meta.get("val")
        if node.op == "placeholder":
            tensor = isinstance(value, torch.Tensor)
            divided = node.meta["parameter"] or (tensor and (value.requires_grad or are_vectors(value)))
        else:
            divided = not learned.isdisjoint(node.all_input_nodes)
        if not divided:
            continue
        learned.add(node)
        shape = value.shape if isinstance(value, torch.Tensor) and not _passes_by(node) else ()
        sizes = [size for size in shape if symbol in expr_of(size).free_symbols]
        more = _more(sizes[0], symbol) if len(sizes) == 1 else set()
        if all(m <= queries + _LONGER * (hint_of(sizes[0]) - m) for m in more):
            found |= more
    return symbol + max(found, default=0)


def _more(size: Any, symbol: sympy.Basic) -> set[int]:
    """How much more than the inputs' length, if a constant."""
    difference = expr_of(size) - symbol
    return {int(difference)} if difference.is_Integer else set()


def _passes_by(node: Node) -> bool:
    """Whether rows are made by, and for, nothing but changes of their length."""
    return all(operator_name(n.target) in _OF_ROWS or n.op == "output" for n in (node, *node.users))


def are_vectors(value: torch.Tensor) -> bool:
    """Whether an input that has tokens is more than a number of each."""
    return value.is_floating_point() and value.dim() > 2


def infer_tokens(
    module: GraphModule, length: sympy.Expr, known: Mapping[Node, TokenAxis | Tokens | None] | None = None
) -> None:
    """Annotate every node of ``module``; ``length`` is S.  ``known``: of inputs, where sizes do not tell."""
    lengths = [symbol_of(length)]
    if not (length - lengths[0]).is_Integer:  # a chunk's
        lengths.append(length)
    for node in module.graph.nodes:
        _settle_constants(node)
        node.meta["tokens"] = known[node] if known and node in known else _tokens(node, lengths)


def _tokens(node: Node, lengths: list[sympy.Expr]) -> TokenAxis | Tokens | None:
    """``lengths``: that of rows, and those of their chunks so far."""
    value, symbol = node.meta.get("val"), lengths[0]
    if not isinstance(value, torch.Tensor):
        return None
    dims = [d for d, size in enumerate(value.shape) if symbol in expr_of(size).free_symbols]
    if not dims:
        return None
    if len(dims) > 1:
        return MANY
    size = expr_of(value.shape[dims[0]])
    found = next((times for length in lengths if (times := multiple(size, length)) is not None), None)
    if found is None:
        if size.free_symbols != {symbol} or not _is_chunk(node, dims[0]):
            return MANY
        lengths.append(size)
        found = 1, size
    factor, length = found
    if factor == 1:
        return TokenAxis(dims[0], 1, length)
    return _folded(node, dims[0], factor, length) or MANY


def multiple(size: sympy.Expr, length: sympy.Expr) -> tuple[int, sympy.Expr] | None:
    """k and l, where ``size`` is k * l, and l is ``length`` and a constant."""
    term, factor = next(t for t in length.as_coefficients_dict().items() if t[0] != 1)
    k = size.coeff(term) / factor
    if not (k.is_Integer and k > 0):
        return None
    rest = sympy.expand(size - k * length) / k
    return (int(k), length + rest) if rest.is_Integer else None


_SPLITS = frozenset(f"aten::{name}" for name in ("chunk", "split", "split_with_sizes", "tensor_split"))


def parts_of_tokens(node: Node) -> bool:
    """Whether ``node`` is several values, parts of a row of tokens, one after the other."""
    if operator_name(node.target) not in _SPLITS:
        return False
    given = arguments(node)
    axis = given["self"].meta.get("tokens")
    return isinstance(axis, TokenAxis) and given["dim"] % given["self"].meta["val"].dim() == axis.dim


def _is_chunk(node: Node, dim: int) -> bool:
    """Whether ``node`` is a part of a row of tokens, in dimension ``dim``."""
    if node.target is operator.getitem:
        return parts_of_tokens(node.all_input_nodes[0])
    if operator_name(node.target) != "aten::slice":
        return False
    given = arguments(node)
    axis = given["self"].meta.get("tokens")
    return isinstance(axis, TokenAxis) and given["step"] == 1 and axis.dim == dim


_CONSTANTS = frozenset(
    f"aten::{name}" for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
)


def _settle_constants(node: Node) -> None:
    """A constant (or a draw) of B * S rows may have its rows in any order: in that of its first partner."""
    for constant in node.all_input_nodes:
        if operator_name(constant.target) not in _CONSTANTS or constant.meta.get("tokens") is not MANY:
            continue
        for other in node.all_input_nodes:
            axis = other.meta.get("tokens")
            if isinstance(axis, TokenAxis):
                sizes = [expr_of(size) for size in constant.meta["val"].shape]
                size = expr_of(other.meta["val"].shape[axis.dim])
                if sizes.count(size) == 1:
                    constant.meta["tokens"] = replace(axis, dim=sizes.index(size))


def _folded(node: Node, dim: int, factor: int, length: sympy.Expr) -> TokenAxis | None:
    """Whether the factor beside the tokens counts rows in front of them (B * S), behind (S * K), or both."""
    if node.op != "call_function":
        return None
    operands: list[Node] = node.all_input_nodes
    if node.target is operator.getitem:
        operands = operands[0].all_input_nodes
    sources = [n for n in operands if isinstance(n.meta.get("tokens"), TokenAxis)]
    name = operator_name(node.target)
    if name in _REPEATS and sources:
        return _REPEATS[name](sources, dim, factor, length)
    if name not in VIEWS:
        known = (s.meta["tokens"] for s in sources)
        return next(
            (replace(k, dim=dim) for k in known if k.outer * k.inner == factor and k.length == length), None
        )
    if len(sources) != 1:
        return None
    in_front = rows_in_front(sources[0], sources[0].meta["tokens"])
    outer = in_front / rows_in_front(node, TokenAxis(dim, 1, length))
    if not outer.is_Integer or factor % int(outer):
        return None
    return TokenAxis(dim, int(outer), length, factor // int(outer))


def _joined(sources: list[Node], dim: int, factor: int, length: sympy.Expr) -> TokenAxis | None:
    """cat: rows of tokens one after the other, if they all have the same rows behind a token."""
    axes = [s.meta["tokens"] for s in sources]
    inner = axes[0].inner
    if any(a.inner != inner or a.length != length for a in axes) or factor % inner:
        return None
    return TokenAxis(dim, factor // inner, length, inner)


def _in_front(sources: list[Node], dim: int, factor: int, length: sympy.Expr) -> TokenAxis | None:
    """repeat: more rows in front."""
    axis = sources[0].meta["tokens"]
    known = axis.length == length and factor % axis.inner == 0
    return TokenAxis(dim, factor // axis.inner, length, axis.inner) if known else None


def _behind(sources: list[Node], dim: int, factor: int, length: sympy.Expr) -> TokenAxis | None:
    """repeat_interleave: more rows behind."""
    axis = sources[0].meta["tokens"]
    known = axis.length == length and factor % axis.outer == 0
    return TokenAxis(dim, axis.outer, length, factor // axis.outer) if known else None


_REPEATS = {"aten::cat": _joined, "aten::repeat": _in_front, "aten::repeat_interleave": _behind}


def rows_in_front(node: Node, axis: TokenAxis) -> sympy.Expr:
    """How many rows of tokens the dimensions up to ``axis`` hold: a view that keeps it keeps every row."""
    leading = [expr_of(size) for size in node.meta["val"].shape[: axis.dim]]
    return sympy.expand(axis.outer * sympy.prod(leading))
