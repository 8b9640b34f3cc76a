"""Drawn document lengths: they fill the row, repeat, and have the published figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile.plan.lengths import SOURCES, Lognormal, Quantiles, draw

MANY = 20_000_000  # tokens: 5 000 to 30 000 documents


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SOURCES)), st.integers(1, 300_000), st.integers(0, 2**32 - 1))
def test_documents_fill_the_row_exactly(source: str, tokens: int, seed: int) -> None:
    lengths = draw(source, tokens, seed)
    assert sum(lengths) == tokens
    assert min(lengths) >= 1
    assert all(type(n) is int for n in lengths)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(SOURCES)), st.integers(1, 100_000), st.integers(1, 100_000))
def test_more_tokens_are_more_of_the_same_documents(source: str, tokens: int, more: int) -> None:
    short, long = draw(source, tokens, 7), draw(source, tokens + more, 7)
    assert long[: len(short) - 1] == short[:-1]
    assert long[len(short) - 1] >= short[-1]
    assert draw(source, tokens, 7) == short


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_seeds_differ(source: str) -> None:
    assert draw(source, 100_000, 0) != draw(source, 100_000, 1)


@pytest.mark.parametrize("source", [s for s, f in SOURCES.items() if isinstance(f, Quantiles)])
def test_as_many_documents_are_as_short_as_published(source: str) -> None:
    figures = SOURCES[source]
    assert isinstance(figures, Quantiles)
    lengths = np.array(draw(source, MANY, 0)[:-1])
    for percent, length in zip(figures.percent, figures.length, strict=True):
        assert 100 * np.mean(lengths <= length) == pytest.approx(percent, abs=1.5)
    assert min(figures.length) <= lengths.min() and lengths.max() <= max(figures.length)


@pytest.mark.parametrize("source", [s for s, f in SOURCES.items() if isinstance(f, Lognormal)])
def test_the_logarithm_is_normal(source: str) -> None:
    figures = SOURCES[source]
    assert isinstance(figures, Lognormal)
    logs = np.log(draw(source, MANY, 0)[:-1])
    assert logs.mean() == pytest.approx(figures.mu, abs=0.03)
    assert logs.std() == pytest.approx(figures.sigma, abs=0.03)


@pytest.mark.parametrize(
    ("source", "mean", "within"),
    [
        ("wlb_like", 3962, 0.1),
        ("prolong_like", 3052, 0.1),
        ("longtail_pretrain", 1700, 0.1),
        ("fineweb_like", 700, 0.1),
        ("slimpajama_like", 1090, 0.1),
    ],
)
def test_the_mean_is_near_the_published_one(source: str, mean: float, within: float) -> None:
    assert np.mean(draw(source, MANY, 0)) == pytest.approx(mean, rel=within)


@pytest.mark.parametrize(
    ("source", "tokens", "text"),
    [
        (
            "fineweb",
            10,
            "draw: got source 'fineweb'; wanted one of wlb_like, prolong_like, longtail_pretrain, "
            "fineweb_like, slimpajama_like, ultrachat_like: choose one",
        ),
        ("fineweb_like", 0, "draw: got tokens=0; wanted at least 1: ask for a longer row"),
    ],
)
def test_what_cannot_be_drawn_is_refused(source: str, tokens: int, text: str) -> None:
    with pytest.raises(ValueError) as refused:
        draw(source, tokens, 0)
    assert str(refused.value) == text
