"""``make_plan``: what its report says is what the tables do and what brute force counts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import make_plan
from hsap_compile.plan.check import BrokenPlan
from hsap_compile.plan.cost import A100, H100
from hsap_compile.plan.lengths import SOURCES, draw
from hsap_compile.plan.report import Bound, PlanReport
from test_pieces import allowed

MASKS = st.sampled_from(["causal", "full", ("window", 1), ("window", 5)])


@st.composite
def reports(draw: st.DrawFn) -> PlanReport:
    inter, intra = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    lengths[0] += max(0, 2 * inter * intra - sum(lengths))
    heads = draw(st.sampled_from([(4, 4), (4, 1), (8, 2)]))
    return make_plan(
        lengths, inter, intra, placement=draw(st.sampled_from(["balanced", "contiguous"])),
        query_heads=heads[0], kv_heads=heads[1], head_dim=3, dtype_bytes=2, mask=draw(MASKS),
    )  # fmt: skip


def owners(report: PlanReport) -> np.ndarray:
    """(S,) rank of every token, by the pieces; each token is in one of them."""
    lengths = report.setting.lengths
    first, owner = np.cumsum([0, *lengths]), np.full(sum(lengths), -1)
    for document, start, stop, rank in report.pieces:
        assert 0 <= start < stop <= lengths[document]
        part = owner[first[document] + start : first[document] + stop]
        assert np.all(part == -1)
        part[:] = rank
    assert owner.min() >= 0
    return owner


@settings(max_examples=40, deadline=None)
@given(reports())
def test_pieces_are_the_tables_columns(report: PlanReport) -> None:
    owner = owners(report)
    for rank in range(report.setting.ranks):
        columns = report.plan.tables(rank).columns
        assert np.array_equal(np.flatnonzero(owner == rank), np.sort(columns))
    assert np.ptp(np.bincount(owner, minlength=report.setting.ranks)) <= 1


@settings(max_examples=40, deadline=None)
@given(reports())
def test_area_rows_and_bytes_against_brute_force(report: PlanReport) -> None:
    s, owner = report.setting, owners(report)
    mask = allowed(list(s.lengths), s.band)
    group = owner // s.intra
    tables = [report.plan.tables(rank) for rank in range(s.ranks)]
    alone = np.zeros(s.tokens, bool)
    for t in tables:
        alone[t.columns[: t.alone]] = True
    area, rows = np.zeros(s.ranks), np.zeros(s.ranks, int)
    for rank in range(s.ranks):
        g = rank // s.intra
        area[rank] = mask[alone & (owner == rank)].sum() + mask[~alone & (group == g)].sum() / s.intra
        rows[rank] = mask[group == g][:, group != g].any(axis=0).sum()
    assert report.area == pytest.approx(area)
    assert report.rows_received.tolist() == rows.tolist()
    inter = report.bytes["inter", "forward"]
    kv_row = s.shape.kv_share_bytes(s.intra)
    assert inter.received.tolist() == (rows * kv_row).tolist()
    intra = report.bytes["intra", "forward"]
    q_row = s.shape.query_row_bytes // s.intra
    exchanged = np.array([len(t.columns) - t.alone for t in tables])
    of_group = exchanged.reshape(s.inter, s.intra).sum(axis=1).repeat(s.intra)
    sent = exchanged * (s.intra - 1) * (q_row + kv_row) + (of_group - exchanged) * q_row
    assert intra.sent.tolist() == sent.tolist()


@settings(max_examples=40, deadline=None)
@given(reports())
def test_sums_and_bounds(report: PlanReport) -> None:
    s = report.setting
    assert math.isclose(report.area.sum(), allowed(list(s.lengths), s.band).sum())
    for level in ("intra", "inter"):
        forward, backward = report.bytes[level, "forward"], report.bytes[level, "backward"]
        assert forward.sent.sum() == forward.received.sum()
        assert backward.sent.tolist() == forward.received.tolist()
        assert backward.received.tolist() == forward.sent.tolist()
    for bound in dataclasses.asdict(report.lower_bound).values():
        assert bound["least"] <= bound["got"] * (1 + 1e-12)
    seconds = report.predicted_seconds
    for spent in (seconds.forward, seconds.backward):
        parts = spent.own + spent.remote + spent.intra + spent.inter
        assert np.all(spent.total <= parts * (1 + 1e-12)) and np.all(spent.total >= parts / 2)
    assert seconds.layer >= seconds.attention > 0


@settings(max_examples=20, deadline=None)
@given(reports())
def test_verify_reads_the_tables(report: PlanReport) -> None:
    report.verify()
    masks = report.plan.masks
    broken = dataclasses.replace(masks[0].transfers, start=masks[0].transfers.start + 1)
    if len(broken.start):
        wrong = dataclasses.replace(report.plan, masks=(dataclasses.replace(masks[0], transfers=broken),))
        with pytest.raises(BrokenPlan):
            dataclasses.replace(report, plan=wrong).verify()


def test_gaps() -> None:
    assert Bound(4, 5).gap == 0.25
    assert Bound(0, 0).gap == 0
    assert Bound(0, 1).gap == math.inf


@pytest.mark.parametrize("source", sorted(SOURCES))
@pytest.mark.parametrize(("ranks", "tokens"), [(4, 32768), (16, 131072)])
def test_the_cost_model_chooses_the_best_mesh(source: str, ranks: int, tokens: int) -> None:
    for seed, cost in ((0, H100), (1, A100)):
        lengths = draw(source, tokens, seed)
        chosen = make_plan(lengths, ranks=ranks, cost=cost)
        fixed = [
            make_plan(lengths, ranks // intra, intra, cost=cost, placement=placement)
            for intra in (1, 2, 4, 8)
            if intra <= ranks
            for placement in ("balanced", "contiguous")
        ]
        best = min(f.predicted_seconds.layer for f in fixed)
        assert chosen.predicted_seconds.layer <= 1.02 * best


def test_the_mesh_that_is_asked_for() -> None:
    row = [300, 100, 80]
    for asked, got in (
        ({"inter": 2, "intra": 4}, (2, 4)),
        ({"inter": 3}, (3, 1)),
        ({"intra": 4}, (1, 4)),
        ({"ranks": 8, "intra": 2}, (4, 2)),
        ({"ranks": 8, "inter": 2}, (2, 4)),
        ({"ranks": 1}, (1, 1)),
    ):
        setting = make_plan(row, **asked).setting  # type: ignore[arg-type]
        assert (setting.inter, setting.intra) == got


def test_a_person_can_read_it() -> None:
    text = str(make_plan([420, 60, 150, 35, 90, 200, 45], 4, 2))
    assert text.startswith(
        "1,000 tokens in 7 documents of 35 to 420, causal\n8 ranks: 4 groups (inter) of 2 (intra)"
    )
    assert "pairs of the busiest rank" in text and "tokens/s" in text
    table = text.split("\n\n")[-1].splitlines()
    assert len(table) == 9
    assert table[1].split()[:3] == ["0", "0", "125"]
    many = str(make_plan([1000] * 4, 64, 1, mask=("window", 100)))
    assert "causal window of 100 tokens" in many and "the slowest 8 of 64 ranks" in many


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lengths": []}, "got no documents; wanted one or more documents of at least 1 token"),
        ({"lengths": [3, 0, 9]}, "got documents of [0] tokens; wanted one or more documents of at least 1"),
        ({"inter": 0}, "got inter=0; wanted at least 1: give a number of ranks"),
        ({"inter": None, "intra": None}, "got no mesh; wanted inter and intra, or ranks"),
        ({"ranks": 6, "inter": 4}, "got inter=4, intra=2, ranks=6; wanted inter x intra = ranks"),
        ({"intra": 3}, "got groups of 3 ranks for 32 query heads; wanted a divisor of 32: intra may be 1, 2"),
        ({"kv_heads": 5}, "got 32 query heads and 5 key/value heads; wanted the first to be a multiple"),
        ({"mask": "window"}, "got mask='window'; wanted \"causal\", \"full\" or (\"window\", tokens)"),
        ({"mask": ("window", 0)}, "got mask=('window', 0)"),
        ({"lengths": [3]}, "place: got 3 tokens a row on 4 ranks; wanted at least 8, two a rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_says_so(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError) as refused:
        make_plan(**{"lengths": [100, 50], "inter": 2, "intra": 2, **arguments})
    assert text in str(refused.value)
