"""What the planner is told of a batch, against the pairs that the mask's formula allows."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import documents, formula
from hsap_compile.documents import attended, unknown
from hsap_compile.errors import Refused
from hsap_compile.formula import b, floordiv, k, leaf, q, score
from hsap_compile.masks import normalise
from hsap_compile.plan import Attended
from strategies import conditions, logits_of, packs, styles
from test_plan import allowed, wanted


def meant(
    logits: sympy.Expr, leaves: list[torch.Tensor], batch: int, tokens: int, keys: int | None = None
) -> np.ndarray:
    """(B, S, keys) bool: the pairs whose weight may differ from 0, by the formula alone."""
    keys = tokens if keys is None else keys
    index = {
        "b": torch.arange(batch)[:, None, None],
        "q": torch.arange(tokens)[:, None],
        "k": torch.arange(keys),
        "h": 0,
        "S": keys,
        "score": torch.zeros(batch, tokens, keys, dtype=torch.float64),
    }
    value = torch.as_tensor(formula.evaluate(logits, index, leaves)).expand(batch, tokens, keys)
    return (torch.softmax(value.double(), -1).nan_to_num() > 0).numpy()


def check(logits: sympy.Expr, leaves: list[torch.Tensor], batch: int, tokens: int) -> Attended:
    mask, _ = normalise(logits)
    got = attended(mask, leaves, batch, tokens)
    pairs = meant(logits, leaves, batch, tokens)
    if got.residual:
        assert not (pairs & ~wanted(got)).any(), "the planner does not know of a pair that is attended"
    else:
        assert np.array_equal(wanted(got), pairs)
    if got.labels is not None:
        before = np.concatenate((got.labels[:, :1] - 1, got.labels[:, :-1]), axis=1)
        assert got.starts is not None and np.array_equal(got.starts, got.labels != before)
    return got


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[torch.Tensor], int, int]:
    """(labels, validity) (B, S): documents, positions that restart, or anything; B and S."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    labels, positions = draw(packs(batch, tokens))
    size = batch * tokens
    numbers = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    drawn = torch.tensor(numbers).view(batch, tokens)
    first = draw(st.sampled_from([labels, positions, drawn, torch.arange(tokens).repeat(batch, 1)]))
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    valid = draw(st.sampled_from([torch.ones(size, dtype=torch.int64), torch.tensor(bits).long()]))
    return (
        [first.to(draw(st.sampled_from([torch.int64, torch.int32]))), valid.view(batch, tokens)],
        batch,
        tokens,
    )


@settings(max_examples=100, deadline=None)
@given(tensors(), st.sampled_from(["both", "labels", "positions", "neither"]), st.booleans())
def test_two_tensors_that_say_the_same(
    drawn: tuple[list[torch.Tensor], int, int], same: str, soft: bool
) -> None:
    """Labels and positions of queries, and those of keys: of other numbers where they are not the same."""
    (first, other), batch, tokens = drawn
    positions = torch.arange(tokens).repeat(batch, 1)
    keys = first if same in ("both", "labels") else first + other
    places = positions if same in ("both", "positions") else positions + other
    condition = sympy.And(sympy.Eq(leaf(0, b, q), leaf(1, b, k)), leaf(2, b, q) >= leaf(3, b, k))
    logits = logits_of(condition, "min" if soft else "where", score)
    got = check(logits, [first, keys.clone(), positions, places.clone()], batch, tokens)
    apart = not (torch.equal(first, keys) and torch.equal(positions, places))
    assert got.residual == apart and (got.labels is None) == apart


def test_integers_are_not_compared_in_fewer_digits() -> None:
    """2^53 and one more are one label to a mask that compares them with floats."""
    labels = torch.tensor([[2**53, 2**53 + 1]])
    logits = logits_of(sympy.Eq(leaf(0, b, q), leaf(1, b, k)), "where", score)
    assert check(logits, [labels, labels.double()], 1, 2).residual


@pytest.mark.parametrize("at", [0, 5])
def test_masks_of_what_is_no_number_are_refused(at: int) -> None:
    labels = torch.arange(6).div(2).floor()[None].double()
    logits = logits_of(sympy.Eq(leaf(0, b, q), leaf(0, b, k)), "where", score)
    assert not check(logits, [labels], 1, 6).residual
    labels[0, at] = torch.nan
    text = r"NaN, in a tensor of shape \(1, 6\) that the mask .* == .* reads\n.*\n  do:     replace NaN"
    with pytest.raises(Refused, match=text):
        check(logits, [labels], 1, 6)


@settings(max_examples=200, deadline=None)
@given(tensors(), conditions(), styles())
def test_the_planner_knows_every_attended_pair(
    batch: tuple[list[torch.Tensor], int, int], condition: sympy.Basic, style: str
) -> None:
    check(logits_of(condition, style, score), *batch)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(2, 12), st.sampled_from([None, 0, 1, 3]), st.booleans())
def test_documents_and_windows_over_positions(
    data: st.DataObject, batch: int, tokens: int, window: int | None, soft: bool
) -> None:
    """The usual mask of a pack is read completely, also where its band is over restarting positions."""
    labels, positions = data.draw(packs(batch, tokens))
    distance = leaf(1, b, q) - leaf(1, b, k)
    parts = [sympy.Eq(leaf(0, b, q), leaf(0, b, k)), distance >= 0]
    parts += [] if window is None else [distance <= window]
    logits = logits_of(sympy.And(*parts), "min" if soft else "where", score)
    got = check(logits, [labels, positions], batch, tokens)
    assert not got.residual and got.lo == 0 and got.hi == window and got.soft == soft


def causal(position: sympy.Expr) -> sympy.Basic:
    return position >= position.xreplace({q: k})


def test_positions_that_do_not_follow_the_columns_are_evaluated_element_by_element() -> None:
    positions = torch.tensor([[0, 2, 1, 3, 4]])
    got = check(logits_of(causal(leaf(0, b, q)), "where", score), [positions], 1, 5)
    assert got.residual and got.lo is None
    soft = check(logits_of(causal(leaf(0, b, q)), "min", score), [positions], 1, 5)
    assert soft.residual and soft.labels is None and wanted(soft).all()


def test_interleaved_documents() -> None:
    labels, positions = torch.tensor([[0, 1, 0, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    same = sympy.Eq(leaf(0, b, q), leaf(0, b, k))
    columns = check(logits_of(sympy.And(same, q >= k), "where", score), [labels], 1, 6)
    assert not columns.residual
    by_position = sympy.And(same, causal(leaf(1, b, q)))
    assert check(logits_of(by_position, "where", score), [labels, positions], 1, 6).residual


def test_a_band_that_holds_nothing() -> None:
    got = check(logits_of(sympy.And(q - k >= 3, q - k <= 1), "where", score), [], 1, 4)
    assert not allowed(got).any()
    assert wanted(check(logits_of(sympy.And(q - k >= 3, q - k <= 1), "min", score), [], 1, 4)).all()


def test_labels_are_combined() -> None:
    labels = torch.tensor([[1, 1, 1, 1, 7, 7, 7, 7]])
    both = sympy.And(sympy.Eq(leaf(0, 0, q), leaf(0, 0, k)), sympy.Eq(floordiv(q, 3), floordiv(k, 3)))
    got = check(logits_of(both, "where", score), [labels], 2, 8)
    assert got.labels is not None and got.labels.shape == (1, 8) and len(np.unique(got.labels)) == 4


def test_what_is_read_outlives_the_batch() -> None:
    """Loaders write the next batch into the tensors of this one, and plans are kept."""
    labels, positions = torch.tensor([[0, 0, 1, 1], [2, 0, 2, 0]]), torch.tensor([[0, 1, 0, 1], [0, 0, 2, 2]])
    same = sympy.Eq(leaf(0, b, q), leaf(0, b, k)) & (leaf(1, b, k) <= leaf(1, b, q))
    got = check(logits_of(same, "where", score), [labels, positions], 2, 4)
    pairs = wanted(got).copy()
    labels.zero_(), positions.zero_()
    assert not got.residual and np.array_equal(wanted(got), pairs)


def test_what_is_unknown_allows_everything() -> None:
    mask, _ = normalise(logits_of(sympy.Eq(leaf(0, b, q), leaf(0, b, k)), "min", score))
    got = unknown(mask, 2, 3)
    assert got.residual and got.soft and allowed(got).all()


def test_a_soft_mask_beside_a_tensor_that_may_mask() -> None:
    """Row 0 may attend to nothing but what the finite mask left: the structure alone does not tell."""
    bias = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64)
    logits = logits_of(q >= k, "min", score + leaf(0, b, k))
    assert wanted(check(logits, [bias], 1, 3)).all()


def test_the_check_sees_a_wrong_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_follows_columns", lambda *_: True)
    with pytest.raises(AssertionError):
        test_positions_that_do_not_follow_the_columns_are_evaluated_element_by_element()
    monkeypatch.undo()
    original = documents._Reader.labels
    monkeypatch.setattr(documents._Reader, "labels", lambda self, exprs: original(self, exprs[:1]))
    with pytest.raises(AssertionError):
        test_labels_are_combined()


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    mask, _ = normalise(logits_of(sympy.Eq(leaf(0, b, q), leaf(0, b, k)), "where", score))
    both = attended(mask, [labels], 2, 4)
    for row in range(2):
        alone = attended(mask, [labels[row : row + 1]], 1, 4)
        assert np.array_equal(allowed(alone)[0], allowed(both)[row])
