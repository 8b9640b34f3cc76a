"""The values of a mask's elements as expressions: constants, truth values, choices among numbers, and what
pointwise operators make of them.

A truth value is a sympy Boolean; where a number is asked for, it is a choice between 1 and 0.  Arithmetic of
choices among numbers is a choice again (``of_choices``), so that masks stay readable and exact.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch.fx import Node

from hsap_compile import formula
from hsap_compile._torch import operator_name
from hsap_compile.formula import k, q, score
from hsap_compile.masks import exclusive


class NotLiftable(Exception):
    """No rule carries an index through this node."""

    def __str__(self) -> str:
        node = self.args[0]
        return operator_name(node.target) if isinstance(node, Node) else str(node)


def as_constant(value: Any) -> sympy.Basic:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value == int(value) and abs(value) < 2**31 else sympy.Float(value)
    raise NotLiftable(value)


def as_number(x: sympy.Basic) -> sympy.Expr:
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return sympy.Piecewise((sympy.Integer(1), x), (sympy.Integer(0), True))
    return x


def as_boolean(x: sympy.Basic) -> sympy.Basic:
    if isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol):
        return x
    return of_choices(sympy.Ne, x, sympy.Integer(0))


def cases_of(x: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Basic]] | None:
    """The values of a choice among numbers, each with its condition; None for anything else."""
    if x.is_number:
        return [(x, sympy.true)]
    if not isinstance(x, sympy.Piecewise):
        return None
    found: list[tuple[sympy.Expr, sympy.Basic]] = []
    for value, condition in exclusive(x):
        inner = cases_of(value)
        if inner is None:
            return None
        found += [(v, sympy.And(condition, c)) for v, c in inner]
    return found


def of_choices(function: Callable[..., Any], *operands: sympy.Basic) -> sympy.Basic:
    """``function`` of numbers; of choices among numbers it is a choice, so that masks stay readable and
    exact: ``score + (1 - mask) * -1e9`` must not add -1e9 to the score and take it away again."""
    values = [as_number(x) for x in operands]
    cases = [cases_of(x) for x in values]
    known = [c for c in cases if c is not None]
    if len(known) < len(cases) or math.prod(len(c) for c in known) not in range(2, 17):
        return function(*values)
    groups: dict[sympy.Basic, list[sympy.Basic]] = {}
    for combination in itertools.product(*known):
        result = function(*[value for value, _ in combination])
        groups.setdefault(result, []).append(sympy.And(*[condition for _, condition in combination]))
    if set(groups) <= {sympy.true, sympy.false}:
        return (
            _any(groups, sympy.true)
            if len(groups.get(sympy.true, [])) <= len(groups.get(sympy.false, []))
            else sympy.Not(_any(groups, sympy.false))
        )
    default = max(groups, key=lambda v: len(groups[v]))
    pieces = [(value, _any(groups, value)) for value in groups if value != default]
    return sympy.Piecewise(*pieces, (default, True))


def _any(groups: dict[sympy.Basic, list[sympy.Basic]], value: sympy.Basic) -> sympy.Basic:
    return sympy.Or(*groups.get(value, []))


def as_dtype(x: sympy.Basic, dtype: torch.dtype) -> sympy.Basic:
    """``x`` as a tensor of type ``dtype`` holds it, where it is a choice among numbers."""

    def rounded(number: sympy.Expr) -> sympy.Expr:
        return as_constant(float(torch.tensor(float(number), dtype=torch.float64).to(dtype)))

    cases = cases_of(as_number(x))
    if cases is None or any(value is sympy.nan for value, _ in cases):
        return x
    return of_choices(rounded, x) if len(cases) > 1 else rounded(as_number(x))


def comparison(relation: Any) -> Any:
    def exact(x: sympy.Expr, y: sympy.Expr) -> sympy.Basic:
        """x / 3 - y / 3 <= 1 as x - y <= 3: no division rounds."""
        fractions = {a for a in (x - y).atoms(sympy.Rational) if not a.is_Integer} if x.has(q, k) else ()
        if not fractions:
            return relation(x, y)
        _, whole = (x - y).primitive()
        return relation(whole, 0)

    return lambda x, y: of_choices(exact, x, y)


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def rounds(x: sympy.Basic, y: sympy.Basic, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the two sides of a comparison are numbers of a pair's columns that ``dtypes`` do not hold
    exactly, as (q - k) * 0.1: what is then less may depend on rounding, which a formula does elsewhere.
    Scores are continuous and meet no limit; what is read of a tensor is rounded already."""
    sides = [as_number(side) for side in (x, y)]
    if any(side.has(score) for side in sides):
        return False
    bare = [
        side.replace(lambda e: formula.leaf_index(e) is not None, lambda e: sympy.Dummy()) for side in sides
    ]
    of_columns = [side for side in bare if side.has(q, k) and cases_of(side) is None]
    if not of_columns or not any(dtype.is_floating_point for dtype in dtypes):
        return False
    return any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes) or any(
        _digits(number) > 8 for side in of_columns for number in side.atoms(sympy.Float)
    )


def _digits(number: sympy.Float) -> int:
    """The binary digits of a number: with a few, its product with a column is exact."""
    return float(number).as_integer_ratio()[0].bit_length()


def _logical(on_booleans: Any) -> Any:
    return lambda *xs: on_booleans(*[as_boolean(x) for x in xs])


def choice(condition: Any, yes: Any, no: Any) -> sympy.Basic:
    condition = as_boolean(condition)
    if all(isinstance(x, sympy.logic.boolalg.Boolean) and not isinstance(x, sympy.Symbol) for x in (yes, no)):
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.Piecewise((as_number(yes), condition), (as_number(no), True))


def _numeric(function: Callable[..., Any]) -> Any:
    return lambda *operands: of_choices(function, *operands)


def _equal(x: Any, y: Any) -> sympy.Basic:
    booleans = [
        isinstance(v, sympy.logic.boolalg.Boolean) and not isinstance(v, sympy.Symbol) for v in (x, y)
    ]
    return sympy.Equivalent(x, y) if all(booleans) else comparison(sympy.Eq)(x, y)


POINTWISE: dict[str, Any] = {
    "add": _numeric(operator.add),
    "sub": _numeric(operator.sub),
    "rsub": _numeric(lambda x, y: y - x),
    "mul": _numeric(operator.mul),
    "div": _numeric(operator.truediv),
    "floor_divide": _numeric(
        lambda x, y: x // y if x.is_Integer and y.is_Integer else formula.floordiv(x, y)
    ),
    "remainder": _numeric(sympy.Mod),
    "neg": _numeric(operator.neg),
    "abs": _numeric(sympy.Abs),
    "tanh": _numeric(sympy.tanh),
    "sigmoid": _numeric(lambda x: (sympy.tanh(x / 2) + 1) / 2),
    "exp": _numeric(sympy.exp),
    "minimum": _numeric(sympy.Min),
    "maximum": _numeric(sympy.Max),
    "eq": _equal,
    "ne": lambda x, y: sympy.Not(_equal(x, y)),
    "lt": comparison(sympy.Lt),
    "le": comparison(sympy.Le),
    "gt": comparison(sympy.Gt),
    "ge": comparison(sympy.Ge),
    "__and__": _logical(sympy.And),
    "bitwise_and": _logical(sympy.And),
    "logical_and": _logical(sympy.And),
    "__or__": _logical(sympy.Or),
    "bitwise_or": _logical(sympy.Or),
    "logical_or": _logical(sympy.Or),
    "bitwise_not": _logical(sympy.Not),
    "logical_not": _logical(sympy.Not),
    "where": choice,
    "masked_fill": lambda x, mask, value: choice(mask, value, x),
}
