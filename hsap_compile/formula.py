"""Index formulas: attention masks and score functions as expressions over (batch, head, query, key).

A formula is a sympy expression.  Its free symbols are the four indices below, ``score`` (the scaled
product of query and key, before any mask) and ``S`` (the tokens of a row); ``leaf0(b, k)`` stands for
``leaves[0][b, k]``, an element of a tensor that is passed next to the formula.  A formula travels
through the graph as text (``dumps`` / ``loads``), so an operator that carries one needs no registry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from sympy.printing.str import StrPrinter

b, h, q, k = sympy.symbols("b h q k", integer=True, nonnegative=True)
S = sympy.Symbol("S", integer=True, positive=True)
score = sympy.Symbol("score", real=True)

#: Integer division that rounds down, as ``//`` does.
floordiv = sympy.Function("floordiv")

#: sink(logits, extra), outermost in a formula: one more logit, of (b, h, q), whose value is zero.
sink = sympy.Function("sink")

_LEAF = "leaf"


def leaf(index: int, *position: Any) -> sympy.Expr:
    """The element of tensor number ``index`` at ``position`` (one expression a dimension)."""
    return sympy.Function(f"{_LEAF}{index}")(*position)


def leaf_index(expr: sympy.Basic) -> int | None:
    """The number of the tensor that ``expr`` reads, or None when it is not a leaf."""
    name = getattr(expr.func, "__name__", "")
    return int(name[len(_LEAF) :]) if name.startswith(_LEAF) and name[len(_LEAF) :].isdigit() else None


def without_sink(expr: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic | None]:
    """The logits of ``expr``, and its sink if it has one."""
    return (expr.args[0], expr.args[1]) if expr.func == sink else (expr, None)


def leaves_of(expr: sympy.Basic) -> tuple[int, ...]:
    """The numbers of the tensors that ``expr`` reads, ascending."""
    found = {leaf_index(e) for e in sympy.preorder_traversal(expr)}
    return tuple(sorted(i for i in found if i is not None))


def valued_leaves_of(expr: sympy.Basic) -> set[int]:
    """The numbers of the tensors whose values, and not only what is compared with them, are in ``expr``."""
    if isinstance(expr, Boolean):
        return set()
    number = leaf_index(expr)
    return set[int]().union(() if number is None else {number}, *map(valued_leaves_of, expr.args))


def renumber(expr: sympy.Basic, numbers: Mapping[int, int]) -> sympy.Basic:
    """``expr`` with its leaf ``i`` called ``numbers[i]``."""
    return expr.replace(
        lambda e: leaf_index(e) is not None,
        lambda e: leaf(numbers[leaf_index(e)], *e.args),  # type: ignore[index]
    )


def dumps(expr: sympy.Basic) -> str:
    """Text that ``loads`` turns back into the same expression."""
    return sympy.srepr(expr)


@functools.lru_cache(maxsize=1024)
def loads(text: str) -> sympy.Basic:
    """The expression that ``dumps`` wrote."""
    return sympy.sympify(text)


def readable(expr: sympy.Basic, names: Sequence[str] = ()) -> str:
    """``expr`` for a person, written as in Python; ``names[i]`` is what leaf ``i`` is called."""
    return _Readable(names).doprint(expr)


class _Readable(StrPrinter):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _print_Function(self, expr: Any) -> str:
        number = leaf_index(expr)
        if number is None:
            return str(super()._print_Function(expr))
        name = self.names[number] if number < len(self.names) else f"{_LEAF}{number}"
        return f"{name}[{', '.join(self._print(a) for a in expr.args)}]"

    def _print_Relational(self, expr: Any) -> str:
        return f"{self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)}"

    def _joined(self, expr: Any, word: str) -> str:
        parts = sorted(expr.args, key=sympy.default_sort_key)
        return word.join(
            f"({self._print(a)})" if a.args and not a.is_Relational else self._print(a) for a in parts
        )

    def _print_And(self, expr: Any) -> str:
        return self._joined(expr, " and ")

    def _print_Or(self, expr: Any) -> str:
        return self._joined(expr, " or ")

    def _print_Not(self, expr: Any) -> str:
        return f"not ({self._print(expr.args[0])})"

    def _print_ITE(self, expr: Any) -> str:
        condition, yes, no = (self._print(a) for a in expr.args)
        return f"({yes} if {condition} else {no})"

    def _print_Piecewise(self, expr: Any) -> str:
        *cases, (last, condition) = expr.args
        end = self._print(last) + ("" if condition is sympy.true else f" if {self._print(condition)}")
        return "(" + " else ".join([*(f"{self._print(v)} if {self._print(c)}" for v, c in cases), end]) + ")"

    def _print_Infinity(self, expr: Any) -> str:
        return "inf"

    def _print_NegativeInfinity(self, expr: Any) -> str:
        return "-inf"

    def _print_Float(self, expr: Any) -> str:
        return f"{float(expr):.6g}"


def evaluate(expr: sympy.Basic, values: Mapping[str, Any], leaves: Sequence[torch.Tensor | None] = ()) -> Any:
    """The value of ``expr`` under broadcasting.

    ``values`` maps the names of free symbols ("b", "h", "q", "k", "score", "S") to tensors or numbers
    that broadcast against one another.  Returns a tensor, or a number when nothing in it is a tensor.
    Differentiable in ``score`` and in floating leaves.
    """
    memo: dict[sympy.Basic, Any] = {}

    def value(e: sympy.Basic) -> Any:
        if e not in memo:
            memo[e] = _value(e)
        return memo[e]

    def _value(e: sympy.Basic) -> Any:
        if e.is_Symbol:
            return values[e.name]
        if e is sympy.true or e is sympy.false:
            return e is sympy.true
        if e.is_Integer:
            return int(e)
        if e.is_number:
            return float(e)
        number = leaf_index(e)
        if number is not None:
            return _load(leaves[number], [value(i) for i in e.args])
        if isinstance(e, sympy.Piecewise):
            *cases, (last, otherwise) = e.args
            if otherwise is not sympy.true:
                raise TypeError(f"the index formula {expr} says nothing where {otherwise} does not hold")
            result = value(last)
            for case, condition in reversed(cases):
                result = _where(value(condition), value(case), result)
            return result
        try:
            function = _FUNCTIONS[e.func]
        except KeyError:
            if e.func == floordiv:
                return _floordiv(*[value(a) for a in e.args])
            raise TypeError(
                f"cannot evaluate {e.func.__name__} in the index formula {expr}; "
                f"known: {', '.join(sorted(f.__name__ for f in _FUNCTIONS))}"
            ) from None
        operands = sorted(e.args, key=_size, reverse=True) if e.is_Add else e.args
        return function(*[value(a) for a in operands])

    return value(expr)


def _load(tensor: torch.Tensor | None, position: list[Any]) -> torch.Tensor:
    assert tensor is not None, "a formula reads a tensor that it was not given"
    return tensor[tuple(p if isinstance(p, torch.Tensor) else int(p) for p in position)]


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, bool):
        return yes if condition else no
    if not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor):
        # two numbers: torch.where would pick the default dtype, float64 keeps both exactly
        if isinstance(yes, float) or isinstance(no, float):
            yes = torch.tensor(float(yes), dtype=torch.float64)
    return torch.where(condition, yes, no)


def _floordiv(x: Any, y: Any) -> Any:
    return x // y


def _exact(x: Any, y: Any) -> tuple[Any, Any]:
    """Integers that meet a fraction in float64, as that of a number is: q / 3 of any q."""
    for number, tensor in ((x, y), (y, x)):
        if isinstance(number, float) and isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            return tuple(t.double() if t is tensor else t for t in (x, y))  # type: ignore[return-value]
    return x, y


def _size(term: sympy.Expr) -> float:
    """The number in front of a term.  A sum starts with the largest: in ``score - 1e9 + 1e9 * mask`` the mask
    is whole before the score comes, which -1e9 would otherwise round to nothing."""
    return abs(float(term.as_coeff_Mul()[0]))


def _add(x: Any, y: Any) -> Any:
    x, y = _exact(x, y)
    return x + y


def _multiply(x: Any, y: Any) -> Any:
    x, y = _exact(x, y)
    return x * y


def _power(x: Any, y: Any) -> Any:
    if isinstance(x, torch.Tensor) and not x.is_floating_point() and not (isinstance(y, int) and y >= 0):
        x = x.double()
    return x**y


def _fold(function: Any) -> Any:
    return lambda *values: functools.reduce(function, values)


def _unary(on_tensor: Any, on_number: Any) -> Any:
    return lambda x: on_tensor(x) if isinstance(x, torch.Tensor) else on_number(x)


def _extreme(on_tensors: Any, on_numbers: Any, side: str) -> Any:
    def both(x: Any, y: Any) -> Any:
        if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
            return on_numbers(x, y)
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return on_tensors(x, y)
        tensor, number = (x, y) if isinstance(x, torch.Tensor) else (y, x)
        return torch.clamp(tensor, **{side: number})  # a number may be symbolic

    return _fold(both)


_FUNCTIONS: dict[Any, Any] = {
    sympy.Add: _fold(_add),
    sympy.Mul: _fold(_multiply),
    sympy.Pow: _power,
    sympy.Mod: lambda x, y: x % y,
    sympy.floor: _unary(torch.floor, math.floor),
    sympy.Abs: _unary(torch.abs, abs),
    sympy.exp: _unary(torch.exp, math.exp),
    sympy.log: _unary(torch.log, math.log),
    sympy.tanh: _unary(torch.tanh, math.tanh),
    sympy.Max: _extreme(torch.maximum, max, "min"),
    sympy.Min: _extreme(torch.minimum, min, "max"),
    sympy.Eq: lambda x, y: x == y,
    sympy.Ne: lambda x, y: x != y,
    sympy.Lt: lambda x, y: x < y,
    sympy.Le: lambda x, y: x <= y,
    sympy.Gt: lambda x, y: x > y,
    sympy.Ge: lambda x, y: x >= y,
    sympy.And: _fold(lambda x, y: x & y),
    sympy.Or: _fold(lambda x, y: x | y),
    sympy.ITE: _where,
    sympy.Not: lambda x: not x if isinstance(x, bool) else ~x,
    sympy.Xor: _fold(lambda x, y: x ^ y),
    sympy.Equivalent: lambda x, y: x == y,
}
