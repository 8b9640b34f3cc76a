"""How good placements are: token counts, area, rows and exchanged columns, on real packs and small examples.

The bars, on all sizes and seeds, are those of benchmarks/planner_quality.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsap_compile.plan import Attended, Plan, make
from hsap_compile.plan.cost import H100, Link
from hsap_compile.plan.fill import LIMIT
from hsap_compile.plan.lengths import SOURCES, draw
from test_plan import mesh_of, packed


def counts(plan: Plan) -> list[int]:
    return [len(c) for c in plan.placement.columns]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (32, 1), (2, 4), (1, 8), (8, 4)], ids=str)
def test_packs(source, shape):
    """Area within 1.02 on average and 1.10 at worst; never all rows; counts equal to +-1; and it computes."""
    ranks, found = shape[0] * shape[1], []
    tokens = {2: 32, 8: 64, 32: 256}[ranks] * 1024 + 5
    for seed in range(4):
        plan = make([packed(*draw(source, tokens, seed))], mesh_of(*shape))
        assert counts(plan) == [tokens // ranks + (r < tokens % ranks) for r in range(ranks)]
        received = plan.masks[0].rows_sent.sum(axis=0)
        assert received.max() <= tokens - tokens // shape[0]
        assert plan.masks[0].area.sum() == pytest.approx(plan.area.mean() * ranks)
        found.append(plan.balance)
        if seed == 0:
            plan.verify()
    assert max(found) <= 1.10 and np.mean(found) <= 1.02


def test_documents_that_fit_stay_whole():
    plan = make([packed(*[64] * 16)], mesh_of(4, 1))
    assert not plan.masks[0].rows_sent.any() and plan.balance == 1.0
    plan = make([packed(*[64] * 16)], mesh_of(1, 4))
    assert not plan.exchanged.any() and plan.balance == 1.0
    plan = make([packed(*[64] * 16)], mesh_of(2, 2))
    assert not plan.masks[0].rows_sent.any() and not plan.exchanged.any() and plan.balance == 1.0


def test_token_counts_are_evened_out_by_heads_of_documents():
    """6 tokens too many on one group: it gives them from the start of a document, and needs their rows."""
    plan = make([packed(1000, 1000, 600, 612)], mesh_of(2, 1))
    assert counts(plan) == [1606, 1606]
    assert plan.masks[0].rows_sent.sum() == 6 and plan.balance <= LIMIT


def test_a_long_document_is_shared_and_the_rest_alone():
    plan = make([packed(4096, *[256] * 16)], mesh_of(1, 4))
    assert plan.exchanged.sum() == 4096 and plan.balance == 1.0
    assert [t.alone for t in map(plan.tables, range(4))] == plan.placement.alone.tolist()


def test_the_cost_model_decides_what_to_trade():
    """Where links are slow, fewer rows and less even; where heads are slow to exchange, more alone."""
    slow = dataclasses.replace(H100, inter=Link(30e-6, 1e6), intra=Link(20e-6, 1e6))
    rows, alone = [], []
    for cost in (H100, slow):
        plans = [make([packed(*draw("wlb_like", 65536, s))], mesh_of(8, 1), cost=cost) for s in range(4)]
        rows.append(sum(int(p.masks[0].rows_sent.sum()) for p in plans))
        plans = [make([packed(*draw("wlb_like", 65536, s))], mesh_of(1, 8), cost=cost) for s in range(4)]
        alone.append(sum(int(p.placement.alone.sum()) for p in plans))
    assert rows[1] < rows[0] and alone[1] > alone[0]


@pytest.mark.parametrize("kind", ["balanced", "contiguous"])
def test_contiguous_groups_are_even_inside(kind):
    """Half of the row is one document: inside the group its heads are shared, in any placement."""
    plan = make([packed(32768, *[256] * 128)], mesh_of(1, 8), kind)
    assert plan.balance <= 1.02


def test_windows_move_their_halo_and_full_documents_stay_whole():
    plan = make([packed(*[1 << 14] * 4, hi=511)], mesh_of(8, 1))
    assert plan.masks[0].rows_sent.sum() == 4 * 511 and plan.balance <= 1.05
    plan = make([packed(*[700, 300] * 8, lo=None)], mesh_of(8, 1))
    assert not plan.masks[0].rows_sent.any()


def test_more_documents_than_are_placed_one_by_one():
    plan = make([packed(*[3] * 20000)], mesh_of(16, 1))
    assert plan.balance <= 1.001 and plan.masks[0].rows_sent.sum() <= 2 * 16
    plan.verify()


def test_several_masks_share_one_placement_with_transfers_of_their_own():
    lengths = draw("prolong_like", 65536, 0)
    masks = [packed(*lengths), packed(*lengths, hi=255)]
    plan = make(masks, mesh_of(8, 1))
    assert plan.masks[1].rows_sent.sum() < plan.masks[0].rows_sent.sum() / 3
    assert plan.balance <= 1.02
    plan.verify()


def test_rows_of_a_batch_are_balanced_together():
    labels = [np.repeat(np.arange(len(n)), n) for n in (draw("fineweb_like", 16384, s) for s in range(3))]
    plan = make([Attended(3, 16384, np.stack(labels), lo=0)], mesh_of(4, 1))
    assert plan.balance <= 1.02
    plan.verify()
