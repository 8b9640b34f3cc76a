"""Placements are compared by the time that the report predicts, and the faster one is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import make_plan
from hsap_compile.plan import balance
from hsap_compile.plan.attended import UNBOUNDED
from hsap_compile.plan.cost import H100, Link
from hsap_compile.plan.report import Mask, PlanReport
from hsap_compile.plan.slowest import Price, slowest
from hsap_compile.plan.swap import Reach, Spread

# no latency, which the comparison leaves out; links so slow that rows matter to short documents
COST = dataclasses.replace(H100, inter=Link(0.0, 35e9), intra=Link(0.0, 315e9))
SEVEN = [64 * n for n in (420, 60, 150, 35, 90, 200, 45)]  # docs/plan.png
MASKS = st.sampled_from(["causal", "full", ("window", 3)])
LENGTHS = st.lists(st.one_of(st.integers(1, 30), st.integers(30, 3000)), min_size=1, max_size=9)


@contextmanager
def one_way() -> Iterator[None]:
    """Only the first way to split documents."""
    few = balance.FEW
    try:
        balance.FEW = 0
        yield
    finally:
        balance.FEW = few


def price_of(report: PlanReport) -> float:
    held, (lo, hi) = report.held, report.setting.band
    units = np.append(0, np.cumsum(report.setting.lengths))
    reach = Reach(units, -UNBOUNDED if lo is None else lo, UNBOUNDED if hi is None else hi)
    first = units[held.document]
    spread = Spread(held.party, first + held.start, first + held.stop)
    return slowest(spread, report.area, reach, Price.of(report.cost)) * report.cost.attention_seconds(1.0)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 6), MASKS, st.sampled_from(["balanced", "contiguous"]))
def test_the_slowest_group_takes_what_the_report_predicts(lengths, ranks, mask: Mask, placement):
    ranks = min(ranks, max(1, sum(lengths) // 2))
    report = make_plan(lengths, inter=ranks, intra=1, mask=mask, placement=placement, cost=COST)
    assert price_of(report) == pytest.approx(report.predicted_seconds.attention, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 6), MASKS)
def test_a_second_way_is_never_slower_and_never_less_even(lengths, ranks, mask: Mask):
    ranks = min(ranks, max(1, sum(lengths) // 2))
    report = make_plan(lengths, inter=ranks, intra=1, mask=mask, cost=COST)
    report.verify()
    with one_way():
        first = make_plan(lengths, inter=ranks, intra=1, mask=mask, cost=COST)
    assert report.predicted_seconds.attention <= first.predicted_seconds.attention * (1 + 1e-9)
    assert report.plan.balance <= max(balance.LIMIT, first.plan.balance) * (1 + 1e-9)


def test_seven_documents_send_less():
    report = make_plan(SEVEN, inter=4, intra=2)
    with one_way():
        first = make_plan(SEVEN, inter=4, intra=2)
    # on both ranks of a group half of the heads
    assert [int(r.rows_received.sum()) // 2 for r in (report, first)] == [70243, 99239]
    assert max(r.plan.balance for r in (report, first)) <= 1.0151
    assert report.predicted_seconds.attention < 0.96 * first.predicted_seconds.attention


def test_a_document_of_two_shares_gives_its_end_and_keeps_its_head():
    """The head needs no rows, and is placed like a document of its own."""
    report = make_plan([8192 * 4, 4096, 20000], inter=4, intra=2)
    with one_way():
        first = make_plan([8192 * 4, 4096, 20000], inter=4, intra=2)
    assert report.rows_received.sum() < 0.8 * first.rows_received.sum()
    assert report.predicted_seconds.attention < 0.95 * first.predicted_seconds.attention
