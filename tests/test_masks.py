"""What ``normalise`` reads from a formula, against the pairs that the formula allows."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import formula, masks
from hsap_compile.formula import b, floordiv, h, k, leaf, q, score
from hsap_compile.masks import Band, Mask, normalise
from strategies import BATCH, LEAVES, TOKENS, conditions, logits_of, styles

INDEX = {
    "b": torch.arange(BATCH)[:, None, None],
    "q": torch.arange(TOKENS)[:, None],
    "k": torch.arange(TOKENS),
    "h": 0,
    "S": TOKENS,
}
SHAPE = (BATCH, TOKENS, TOKENS)


def evaluated(expr: Any, leaves: Any = LEAVES, **values: Any) -> torch.Tensor:
    return torch.as_tensor(formula.evaluate(expr, {**INDEX, **values}, leaves)).expand(SHAPE)


def structure(mask: Mask) -> torch.Tensor:
    """(B, S, S) bool: the pairs that pass the mask's labels, bands and valid tokens."""
    result = torch.ones(SHAPE, dtype=torch.bool)

    def other(expr: Any) -> torch.Tensor:
        return evaluated(expr.xreplace({q: k}))

    for label in mask.labels:
        result &= evaluated(label) == other(label)
    for band in mask.bands:
        distance = evaluated(band.position) - other(band.position)
        result &= (distance >= (-(10**9) if band.lo is None else band.lo)) & (
            distance <= (10**9 if band.hi is None else band.hi)
        )
    return result & evaluated(mask.key_valid).bool() & evaluated(mask.query_valid).bool()


def allowed(logits: sympy.Expr) -> torch.Tensor:
    """(B, S, S) bool: the pairs that the formula does not mask."""
    return evaluated(logits, score=torch.zeros(SHAPE, dtype=torch.float64)) > -1000.0


def check(logits: sympy.Expr) -> Mask:
    mask, scale = normalise(logits)
    wanted, got = allowed(logits), structure(mask)
    assert not (wanted & ~got).any(), "the structure forbids a pair that the formula allows"
    if not mask.residual:
        assert torch.equal(got, wanted)
    if not mask.unread:
        assert torch.equal(got, wanted), "what is not residual in its conditions is read completely"
    scores = torch.randn(SHAPE, dtype=torch.float64)
    before, after = evaluated(logits, score=scores), evaluated(mask.logits, score=scores * scale)
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-11)
    if not mask.residual:  # the logits are the score where it is allowed
        torch.testing.assert_close(after[wanted], (scores * scale)[wanted], rtol=0, atol=1e-11)
    finite = torch.isfinite(evaluated(logits, score=torch.zeros(SHAPE))) & ~got
    assert mask.soft >= bool(finite.any())
    return mask


@settings(max_examples=150, deadline=None)
@given(conditions(), styles(), st.sampled_from([1, 2, 0.125]))
def test_structure_is_what_the_formula_allows(condition: sympy.Basic, style: str, scale: float) -> None:
    check(logits_of(condition, style, sympy.sympify(scale) * score))


@settings(max_examples=60, deadline=None)
@given(conditions(), conditions(), styles(), styles())
def test_masks_on_masks(one: sympy.Basic, other: sympy.Basic, inner: str, outer: str) -> None:
    check(logits_of(other, outer, logits_of(one, inner, score)))


DOCUMENT = sympy.Eq(leaf(0, b, q), leaf(0, b, k))
KEY = sympy.Ne(leaf(1, b, k), 0)


@pytest.mark.parametrize("style", ["where", "fill", "add", "min", "multiply"])
@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        (DOCUMENT, {"labels": (leaf(0, b, q),)}),
        (q >= k, {"bands": (Band(q, 0, None),)}),
        (sympy.And(q >= k, q - k < 3), {"bands": {Band(q, 0, None), Band(q, None, 2)}}),
        (sympy.Abs(q - k) <= 2, {"bands": {Band(q, None, 2), Band(q, -2, None)}}),
        (sympy.Eq(floordiv(q, 4), floordiv(k, 4)), {"labels": (floordiv(q, 4),)}),
        (KEY, {"key_valid": KEY}),
        (sympy.Not(sympy.Or(sympy.Not(DOCUMENT), q < k, sympy.Not(KEY))),
         {"labels": (leaf(0, b, q),), "bands": (Band(q, 0, None),), "key_valid": KEY}),
        (leaf(0, b, q) >= leaf(0, b, k), {"bands": (Band(leaf(0, b, q), 0, None),)}),
    ],
)  # fmt: skip
def test_what_is_recognised(condition: sympy.Basic, wanted: dict[str, Any], style: str) -> None:
    mask = check(logits_of(condition, style, score))
    assert not mask.residual and not mask.unread
    assert mask.soft == (style in ("min", "multiply"))
    for name in ("labels", "bands", "key_valid", "query_valid"):
        default = sympy.true if name.endswith("valid") else ()
        got, want = getattr(mask, name), wanted.get(name, default)
        assert (set(got) == want) if isinstance(want, set) else (got == want), (name, got)


def test_score_functions_are_residual_and_keep_their_structure() -> None:
    capped = 5 * sympy.tanh(score / 5) + leaf(2, h) * (q - k)
    mask, scale = normalise(sympy.Piecewise((capped, sympy.And(DOCUMENT, q >= k)), (-sympy.oo, True)))
    assert (mask.residual, mask.unread, mask.soft, scale) == (True, False, False, 1.0)
    assert mask.labels == (leaf(0, b, q),) and mask.bands == (Band(q, 0, None),)


@settings(max_examples=60, deadline=None)
@given(conditions(), conditions(), st.sampled_from([-sympy.oo, sympy.Float(-3.4e38)]))
def test_masks_that_are_added_beside_a_bias(one: sympy.Basic, other: sympy.Basic, masked: sympy.Expr) -> None:
    masks = [sympy.Piecewise((sympy.Integer(0), c), (masked, True)) for c in (one, other)]
    check(score + masks[0] + (q - k) * sympy.Float(0.25))
    check(sympy.Add(score, *masks, leaf(0, b, k)))


@pytest.mark.parametrize(
    ("masked", "kept"), [(-sympy.oo, True), (sympy.Float(-3.4e38), True), (-(10**4), False)]
)
def test_a_mask_beside_a_bias_keeps_its_structure(masked: sympy.Expr, kept: bool) -> None:
    """Where no bias is so large that it could take the mask away."""
    condition = sympy.And(DOCUMENT, q >= k)
    mask, _ = normalise(score + leaf(2, h, q - k) + sympy.Piecewise((0, condition), (masked, True)))
    assert mask.residual and mask.soft == (kept and masked != -sympy.oo)
    assert (mask.labels, mask.bands) == (((leaf(0, b, q),), (Band(q, 0, None),)) if kept else ((), ()))


@pytest.mark.parametrize(
    "condition",
    [score > 0, sympy.Or(score > 0, KEY), sympy.Or(q > k, KEY), sympy.false, sympy.Eq(leaf(3), 0)],
)
def test_what_is_not_recognised_stays_in_the_formula(condition: sympy.Basic) -> None:
    mask, _ = normalise(logits_of(condition, "where", score))
    assert mask.residual and (mask.unread or condition is sympy.false)
    assert (mask.labels, mask.bands, mask.key_valid, mask.query_valid) == ((), (), sympy.true, sympy.true)


def test_a_small_penalty_is_no_mask() -> None:
    mask, _ = normalise(score + sympy.Piecewise((0, q >= k), (-5, True)))
    assert mask.residual and not mask.bands and not mask.soft


def test_a_mask_says_what_it_is() -> None:
    mask, _ = normalise(logits_of(sympy.And(DOCUMENT, q >= k), "where", score))
    assert str(mask) == "leaf0[b, q] == leaf0[b, k] and q >= k"
    assert str(normalise(score)[0]) == "every pair"
    assert normalise(score)[0].by_columns and not mask.by_columns


def test_what_two_tensors_say_is_taken_for_one_until_a_batch_tells_them_apart() -> None:
    labels, positions = ((leaf(n, b, q), leaf(n + 1, b, k)) for n in (0, 2))
    condition = sympy.And(sympy.Eq(*labels), positions[0] >= positions[1], DOCUMENT, q - k <= 5)
    mask, _ = normalise(logits_of(condition, "where", score))
    assert set(mask.alike) == {labels, positions} and not mask.residual and not mask.unread
    assert labels[1] in mask.structure and positions[1] in mask.structure
    assert "leaf0[b, q] == leaf1[b, k]" in str(mask) and "leaf2[b, q] >= leaf3[b, k]" in str(mask)
    apart = mask.told_apart()
    assert (apart.labels, apart.bands) == ((), (Band(q, None, 5),)) and apart.residual and apart.unread


@pytest.mark.parametrize("side", [k, leaf(1, q, k), sympy.Integer(3)], ids=str)
def test_one_tensor_and_something_else_are_never_alike(side: sympy.Expr) -> None:
    mask, _ = normalise(logits_of(sympy.Eq(leaf(0, b, q), side), "where", score))
    assert mask.alike == () and mask.labels == ()


def test_the_check_sees_a_wrong_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    original = masks._band

    def broken(*args: Any) -> Any:
        band, of_k = original(*args)  # type: ignore[misc]
        return Band(band.position, band.hi, band.lo), of_k

    monkeypatch.setattr(masks, "_band", broken)
    with pytest.raises(AssertionError):
        check(logits_of(q >= k, "where", score))


def test_structure_has_one_order_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks number documents by it.  sympy's parts of a condition are a set, which hashes put in order."""
    labels = [leaf(0, b, x) for x in (q, k)], [floordiv(leaf(1, b, x), 4) for x in (q, k)]
    condition = sympy.And(*[sympy.Eq(*sides) for sides in labels], k <= q, q - k <= 5)
    logits = sympy.Piecewise((score, condition), (-sympy.oo, True))
    wanted, _ = normalise(logits)
    assert len(wanted.labels) == len(wanted.bands) == 2
    right = sympy.And.make_args
    for turn in range(4):

        def turned(e: sympy.Basic, turn: int = turn) -> list[sympy.Basic]:
            parts = sorted(right(e), key=str)
            return [*parts[turn:], *parts[:turn]]

        monkeypatch.setattr(sympy.And, "make_args", turned)
        assert normalise(logits)[0] == wanted
