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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import sympy
import torch
from torch.fx import GraphModule, Node

from hsap_compile._torch import expr_of, operator_name


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


def infer_tokens(
    module: GraphModule, length: sympy.Expr, known: Mapping[Node, TokenAxis | Tokens | None] | None = None
) -> None:
    """Annotate every node of ``module``; ``length`` is S.  ``known``: of inputs, where sizes do not tell."""
    symbol = symbol_of(length)
    for node in module.graph.nodes:
        _settle_constants(node)
        node.meta["tokens"] = known[node] if known and node in known else _tokens(node, symbol)


def _tokens(node: Node, symbol: sympy.Basic) -> TokenAxis | Tokens | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    dims = [d for d, size in enumerate(value.shape) if symbol in expr_of(size).free_symbols]
    if not dims:
        return None
    if len(dims) > 1:
        return MANY
    size = expr_of(value.shape[dims[0]])
    factor = size.coeff(symbol, 1)
    length = sympy.expand(size / factor) if factor.is_Integer and factor > 0 else None
    if length is None or not (length - symbol).is_Integer:
        return MANY
    if factor == 1:
        return TokenAxis(dims[0], 1, length)
    return _folded(node, dims[0], int(factor), length) or MANY


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
