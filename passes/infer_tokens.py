"""Pass 4: which dimension of every value holds tokens.

after: ``node.meta["tokens"]`` is a ``TokenAxis`` for a value with exactly one token dimension, None for
a value without, and ``MANY`` for one with several or with one that is no plain run of tokens.

A dimension holds tokens when its size contains the sequence symbol S.  Sizes are ``outer * length``:
``outer`` rows that were folded in front (``view(B * S, ...)``), and a length of S, or S plus or minus a
constant after a slice or a pad.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
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
    """Dimension ``dim`` of size ``outer * length``: ``outer`` rows of ``length`` tokens each."""

    dim: int
    outer: int
    length: sympy.Expr


def infer_tokens(module: GraphModule, symbol: sympy.Symbol) -> None:
    """Annotate every node of ``module``; ``symbol`` is S."""
    for node in module.graph.nodes:
        node.meta["tokens"] = _tokens(node, symbol)


def _tokens(node: Node, symbol: sympy.Symbol) -> TokenAxis | Tokens | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    dims = [d for d, size in enumerate(value.shape) if symbol in expr_of(size).free_symbols]
    if not dims:
        return None
    if len(dims) > 1:
        return MANY
    size = sympy.expand(expr_of(value.shape[dims[0]]))
    outer = size.coeff(symbol, 1)
    length = sympy.expand(size / outer) if outer.is_Integer and outer > 0 else None
    if length is None or not (length - symbol).is_Integer:
        return MANY
    axis = TokenAxis(dims[0], int(outer), length)
    return axis if int(outer) == 1 or _folded_in_front(node, axis) else MANY


def _folded_in_front(node: Node, axis: TokenAxis) -> bool:
    """Whether the factor beside the tokens counts rows in front of them (B * S), not behind (S * K)."""
    if node.op != "call_function":
        return False
    operands = (node.args[0] if node.target is operator.getitem else node).all_input_nodes  # type: ignore
    sources = [n for n in operands if isinstance(n.meta.get("tokens"), TokenAxis)]
    if operator_name(node.target) in VIEWS:
        if len(sources) != 1:
            return False
        return rows_in_front(sources[0], sources[0].meta["tokens"]) == rows_in_front(node, axis)
    return any(s.meta["tokens"].outer == axis.outer for s in sources)


def rows_in_front(node: Node, axis: TokenAxis) -> sympy.Expr:
    """How many rows of tokens the dimensions up to ``axis`` hold: a view that keeps it keeps every row."""
    leading = [expr_of(size) for size in node.meta["val"].shape[: axis.dim]]
    return sympy.expand(axis.outer * sympy.prod(leading))
