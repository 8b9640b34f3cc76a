"""What an attention mask says, read from its formula.

``normalise`` takes the logits of an attention as a formula of ``score``, ``b``, ``h``, ``q`` and ``k``
(see ``formula``) and finds in it the parts a planner can use: equal labels (documents, chunks), bands
(causal, sliding window), valid keys and valid queries.  What it does not recognise stays in the formula,
which is then evaluated element by element: slower, never wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from hsap_compile import formula
from hsap_compile.formula import b, h, k, q, score

#: A finite score at or below this masks as -inf does: exp() of it underflows in every float type.
MASKED = -1e4

#: And so it does here whatever number of a tensor is added to it.
LOWEST = -1e30


@dataclass(frozen=True)
class Band:
    """``lo <= position(q) - position(k) <= hi``; None is unbounded.  ``position`` is a formula of (b, q)."""

    position: sympy.Expr
    lo: int | None
    hi: int | None

    def moved(self, by: int) -> Band:
        """The same of queries that stand ``by`` columns further behind; as much wider as it must be for every
        query to have the key of its own column: a row of zeros, of no key, may divide."""
        lo, hi = self.lo, self.hi
        return replace(
            self, lo=None if lo is None else min(lo + by, 0), hi=None if hi is None else max(hi + by, 0)
        )


@dataclass(frozen=True)
class Mask:
    """One attention's mask and score function.

    ``labels``, ``bands``, ``key_valid`` and ``query_valid`` are necessary conditions on an attended pair
    (formulas of (b, q), key_valid of (b, k)); with ``residual`` false they are sufficient as well and the
    logits are ``score`` wherever they hold.  ``soft``: masked logits are finite, so that a query that may
    attend to nothing attends to everything alike.  ``unread``: a condition is in the formula only, so that
    the structure does not tell which queries attend to nothing.  ``logits``: the whole formula, always right.
    ``alike``: formulas of (b, q) and of (b, k), of tensors of their own, which ``labels`` and ``bands`` take
    for one; a batch that tells them apart has the mask ``told_apart``.

    ``others``: how many columns of the batch stand in front of the attention's tokens, and behind them.  The
    structure counts the attention's tokens, from its first one; ``logits`` counts columns (see ``placed``).
    """

    logits: sympy.Expr
    labels: tuple[sympy.Expr, ...] = ()
    bands: tuple[Band, ...] = ()
    key_valid: sympy.Basic = sympy.true
    query_valid: sympy.Basic = sympy.true
    residual: bool = False
    soft: bool = False
    unread: bool = False
    alike: tuple[tuple[sympy.Expr, sympy.Expr], ...] = ()
    others: tuple[int, int] = (0, 0)

    @property
    def structure(self) -> tuple[sympy.Basic, ...]:
        """The formulas that the planner evaluates for every batch."""
        alike = itertools.chain.from_iterable(self.alike)
        positions = (band.position for band in self.bands)
        return (*self.labels, *positions, self.key_valid, self.query_valid, *alike)

    def told_apart(self) -> Mask:
        """The same without what only holds where ``alike`` does."""
        of_queries = {of_q for of_q, _ in self.alike}
        labels = tuple(label for label in self.labels if label not in of_queries)
        bands = tuple(band for band in self.bands if band.position not in of_queries)
        return replace(self, labels=labels, bands=bands, residual=True, unread=True, alike=())

    @property
    def by_columns(self) -> bool:
        """Whether columns alone decide: no tensor takes part and the formula is never needed."""
        of_columns = all(band.position == q for band in self.bands)
        return of_columns and not self.residual and not self.soft and not formula.leaves_of(self.logits)

    def readable(self, names: Sequence[str] = ()) -> str:
        """Which pairs (q, k) are attended, as in Python; ``names`` are those of the tensors that are read."""

        def text(expr: sympy.Basic) -> str:
            return formula.readable(expr, names)

        twins = dict(self.alike)

        def both(of_q: sympy.Expr) -> tuple[str, str]:
            return text(of_q), text(twins.get(of_q, of_q.xreplace({q: k})))

        parts = [" == ".join(both(label)) for label in self.labels]
        for band in self.bands:
            of_q, of_k = both(band.position)
            if band.lo == 0 and band.hi is None:
                parts.append(f"{of_q} >= {of_k}")
            else:
                low = "" if band.lo is None else f"{band.lo} <= "
                parts.append(f"{low}{of_q} - {of_k}" + ("" if band.hi is None else f" <= {band.hi}"))
        parts += [text(v) for v in (self.key_valid, self.query_valid) if v is not sympy.true]
        said = " and ".join(parts) or "every pair"
        return f"{said}; logits = {text(self.logits)}" if self.residual else said

    def __str__(self) -> str:
        return self.readable()


def placed(mask: Mask, queries: tuple[int, int], keys: tuple[int, int]) -> Mask:
    """``mask`` of an attention whose tokens are not all columns of the batch: so many others stand in front
    of them, and behind.  These are attended to by no token, and attend to something.

    To the formula they are the nearest token: it reads no tensor, and computes no number, that it would not
    for tokens.  Where keys are other columns than queries, of the structure are left bands over columns."""
    if queries == keys == (0, 0):
        return mask
    tokens = formula.S - sum(keys)

    def token(x: sympy.Expr, others: tuple[int, int]) -> sympy.Expr:
        return sympy.Min(sympy.Max(x - others[0], 0), formula.S - sum(others) - 1)

    def among(x: sympy.Expr, others: tuple[int, int]) -> sympy.Basic:
        first, behind = others
        return sympy.And(x >= first, x < formula.S - behind if behind else sympy.true)

    moved = {q: token(q, queries), k: token(k, keys), formula.S: tokens}
    logits, extra = (None if x is None else x.xreplace(moved) for x in formula.without_sink(mask.logits))
    allowed = sympy.Or(among(k, keys), sympy.Not(among(q, queries)))
    logits = sympy.Piecewise((logits, allowed), (-sympy.oo, True))
    if extra is not None:
        logits = formula.sink(logits, extra)
    if queries == keys:
        return replace(mask, logits=logits, others=queries)
    by = queries[0] - keys[0]
    bands = tuple(band.moved(by) for band in mask.bands if band.position == q)
    return Mask(logits, bands=bands, residual=True, soft=mask.soft, unread=True)


def normalise(logits: sympy.Expr) -> tuple[Mask, float]:
    """The mask of ``logits``, and the factor of ``score`` that was taken out of its formula."""
    logits, extra = formula.without_sink(logits)
    conditions: list[sympy.Basic] = []
    floors: list[sympy.Expr] = []
    base = _strip(logits, conditions, floors)
    scale, rest = base.as_coeff_Mul()
    # a condition on scores is one on what they are before the factor
    plain = rest == score and scale != 0 and not any(condition.has(score) for condition in conditions)
    if plain and scale != 1:
        logits = logits.xreplace({base: score})
    soft = any(f != -sympy.oo for f in floors)
    if extra is not None:
        logits = formula.sink(logits, extra)
    mask = Mask(logits, residual=not plain, soft=soft, unread=not plain and _may_mask(base))
    together = sympy.to_nnf(sympy.And(*conditions), simplify=False)
    # a set, which every process has in another order; ranks number documents by the order of labels
    for condition in sorted(sympy.And.make_args(together), key=sympy.default_sort_key):
        mask = _add(mask, condition)
    return mask, float(scale) if plain else 1.0


def _strip(expr: sympy.Expr, conditions: list[sympy.Basic], floors: list[sympy.Expr]) -> sympy.Expr:
    """``expr`` without the masks around it; their conditions and masked values are appended."""
    if isinstance(expr, sympy.Piecewise):
        cases = exclusive(expr)
        open_cases = [(value, condition) for value, condition in cases if not _masks(value)]
        if len(open_cases) == 1 and len(cases) > 1:
            ((value, condition),) = open_cases
            conditions.append(condition)
            floors.extend(masked for masked, _ in cases if _masks(masked))
            return _strip(value, conditions, floors)
    if isinstance(expr, sympy.Add):
        kept = []
        for term in expr.args:
            if term.has(score):
                kept.append(_strip(term, conditions, floors))
        biases = [term for term in expr.args if not term.has(score)]
        condition = _bias_condition(sympy.Add(*biases), floors)
        if condition is not None:
            conditions.append(condition)
            return sympy.Add(*kept)
        for bias in biases:  # a mask and a bias of another kind
            masked: list[sympy.Expr] = []
            condition = _bias_condition(bias, masked) if isinstance(bias, sympy.Piecewise) else None
            if condition is None or not all(value <= LOWEST for value in masked):
                kept.append(bias)
                continue
            conditions.append(condition)
            floors.extend(masked)
        return sympy.Add(*kept)
    return expr


def exclusive(expr: sympy.Piecewise) -> list[tuple[sympy.Expr, sympy.Basic]]:
    """The values of ``expr``, each with the condition under which it is that one."""
    cases, before = [], sympy.false
    for value, condition in expr.args:
        cases.append((value, sympy.And(condition, sympy.Not(before))))
        before = sympy.Or(before, condition)
    return cases


def _may_mask(base: sympy.Expr) -> bool:
    """Whether ``base`` may hold masked values of its own: it says so, or adds a tensor over tokens."""
    if not base.has(score) or any(_masks(n) for n in base.atoms(sympy.Number)):
        return True
    return any(
        formula.leaf_index(e) is not None and any(len(a.free_symbols & {q, k}) == 1 for a in e.args)
        for e in sympy.preorder_traversal(base)
    )


def _masks(value: sympy.Basic) -> bool:
    return bool(value.is_number) and (value == -sympy.oo or float(value) <= MASKED)


def _bias_condition(bias: sympy.Expr, floors: list[sympy.Expr]) -> sympy.Basic | None:
    """Where an additive mask is zero; None when it is not made of zeros and masking values alone."""
    if isinstance(bias, sympy.Piecewise):
        cases = exclusive(bias)
        if not all(value == 0 or _masks(value) for value, _ in cases):
            return None
        floors.extend(value for value, _ in cases if value != 0)
        return sympy.Or(*[condition for value, condition in cases if value == 0])
    found_atoms = {c for p in bias.atoms(sympy.Piecewise) for _, c in p.args if c is not sympy.true}
    atoms = sorted(found_atoms, key=sympy.default_sort_key)
    if not atoms or len(atoms) > 6:
        return None
    allowed = []
    found = []
    for truth in itertools.product((True, False), repeat=len(atoms)):
        case = dict(zip(atoms, truth, strict=True))
        value = bias.replace(
            lambda e: isinstance(e, sympy.Piecewise),
            lambda e, case=case: next(v for v, c in e.args if c is sympy.true or case.get(c, False)),
        )
        if value == 0:
            allowed.append(sympy.And(*[c if t else sympy.Not(c) for c, t in case.items()]))
        elif _masks(value):
            found.append(value)
        else:
            return None
    floors.extend(found)
    condition = sympy.Or(*allowed)
    return sympy.simplify_logic(condition) if len(allowed) > 1 else condition


def _add(mask: Mask, condition: sympy.Basic) -> Mask:
    """``mask`` and ``condition``, the latter as structure where it can be."""
    if condition is sympy.true:
        return mask
    free = condition.free_symbols & {b, h, q, k}
    if condition.has(score):
        return replace(mask, residual=True, unread=True)
    if free <= {b, k} and k in free:
        return replace(mask, key_valid=sympy.And(mask.key_valid, condition))
    if free <= {b, q} and q in free:
        return replace(mask, query_valid=sympy.And(mask.query_valid, condition))
    if not free & {h} and free >= {q, k}:
        if isinstance(condition, sympy.Eq):
            sides = _sides(condition)
            if sides is not None:
                return _with_twins(replace(mask, labels=(*mask.labels, sides[0])), [sides])
        elif isinstance(condition, sympy.core.relational.Relational):
            found = _bands(condition)
            if found is not None:
                bands = (*mask.bands, *(band for band, _ in found))
                return _with_twins(replace(mask, bands=bands), [(x.position, of_k) for x, of_k in found])
    return replace(mask, residual=True, unread=True)


def _with_twins(mask: Mask, sides: Sequence[tuple[sympy.Expr, sympy.Expr]]) -> Mask:
    alike = tuple((of_q, of_k) for of_q, of_k in sides if of_q.xreplace({q: k}) != of_k)
    return replace(mask, alike=(*mask.alike, *alike))


def _are_alike(of_q: sympy.Expr, of_k: sympy.Expr) -> bool:
    """Whether a formula of q and one of k are the same, or may turn out to be: each reads tensors."""
    if of_q.has(k) or of_k.has(q):
        return False
    return of_q.xreplace({q: k}) == of_k or all(formula.leaves_of(side) for side in (of_q, of_k))


def _sides(condition: sympy.Eq) -> tuple[sympy.Expr, sympy.Expr] | None:
    """f(q) and g(k) where the condition is that they are equal."""
    left, right = condition.args
    if left.has(k):
        left, right = right, left
    return (left, right) if _are_alike(left, right) else None


def _bands(condition: sympy.core.relational.Relational) -> list[tuple[Band, sympy.Expr]] | None:
    """The band of ``f(q) - g(k) + c >= 0`` or of a mirror image, and g(k); of ``|q - k| <= c`` both sides."""
    if isinstance(condition, sympy.Ge | sympy.Gt):
        difference = condition.lhs - condition.rhs
    elif isinstance(condition, sympy.Le | sympy.Lt):
        difference = condition.rhs - condition.lhs
    else:
        return None
    strict = isinstance(condition, sympy.Gt | sympy.Lt)
    absolute = [t for t in sympy.Add.make_args(difference) if isinstance(-t, sympy.Abs)]
    if absolute:
        inside = (-absolute[0]).args[0]
        rest = difference - absolute[0]
        differences = [rest + sign * inside for sign in (1, -1)]
    else:
        differences = [difference]
    bands = [band for x in differences if (band := _band(x, strict)) is not None]
    return bands if len(bands) == len(differences) else None


def _band(difference: sympy.Expr, strict: bool) -> tuple[Band, sympy.Expr] | None:
    """The band of ``difference >= 0`` (> 0 when strict), all integers, and its position as a formula of k."""
    terms = sympy.Add.make_args(sympy.expand(difference))
    of_q = sympy.Add(*[t for t in terms if t.has(q)])
    of_k = sympy.Add(*[t for t in terms if t.has(k)])
    constant = sympy.Add(*[t for t in terms if not t.has(q) and not t.has(k)])
    if not constant.is_Integer or not _are_alike(of_q, -of_k):
        return None
    margin = int(constant) - strict
    if of_q.could_extract_minus_sign():
        return Band(-of_q, None, margin), of_k
    return Band(of_q, -margin, None), -of_k
