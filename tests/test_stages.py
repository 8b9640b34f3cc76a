"""Rows that arrive in stages: the values of eager, exact counts, and never more than two stages at a time."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generated_code import operators_in
from hsap_compile import explain
from hsap_compile.errors import Refused
from hsap_compile.options import parse
from hsap_compile.passes import _parts
from hsap_compile.passes.overlap import Overlap
from hsap_compile.pipeline import rewrite
from hsap_compile.plan import ReceiveLimit
from hsap_compile.runtime import StepReport
from models import TOLERANCE, batch, build
from pool import Pool
from simulate import Traced, eager, rebatched, simulate, traced, worst
from test_choose_saved import PACKS, Seen, row_bytes, seen
from test_recompiles import graphs


@functools.cache
def one_trace(name: str) -> tuple[Traced, dict[str, Any]]:
    given = batch(name, [[40]])
    return traced(build(name), given), given


# --- values --------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["nano", "llama"]),
    st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2)]),
    st.lists(st.integers(1, 30), min_size=1, max_size=4).filter(lambda x: sum(x) >= 8),
    st.sampled_from([2100, 3000, 5000, 12_000]),
)
def test_any_pack_in_stages(name: str, mesh: tuple[int, int], documents: list[int], most: int) -> None:
    trace, first = one_trace(name)
    args = rebatched(trace, first, batch(name, [documents]))
    wanted = eager(trace, args)
    found = simulate(trace, *mesh, args, received=most)
    assert max(max(worst(step, wanted)) for step in found.ranks) < TOLERANCE[name]


def limit_of(name: str, ranks: int, most: int) -> ReceiveLimit:
    trace, _ = one_trace(name)
    options = parse({"intra": 1, "lower": "eager", "received": most}, None)
    return rewrite(trace.module, options, trace.length, ranks, "").program.limit


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_stages_hold_the_worst_batch_and_no_half_of_them_does(ranks: int, stages: int) -> None:
    """Two stages of the bytes asked for hold a row each; a batch is 40 tokens."""
    row, others = row_bytes("nano", 1), 40 - 40 // ranks
    needed = -(-others // max(stages, 2)) + 1  # a row more: what a group sends is divided evenly
    found = limit_of("nano", ranks, 2 * row * needed)
    assert found.rows == needed and found.stages <= stages
    assert max(found.stages, 2) * needed >= others
    assert found.stages == 1 or max(found.stages // 2, 2) * needed < others + 2 * ranks


def test_a_longer_row_compiles_again_with_more_stages(pool: Pool) -> None:
    room = 2 * 12 * row_bytes("nano", 1)
    packs = [[24], [12, 3, 15], [90], [60, 33], [17, 18]]
    for found in pool.run(graphs_in, room, packs, world=2):
        assert [b - a for a, b in zip(found, found[1:], strict=False)][1:] == [1, 0, 0]


def graphs_in(most: int, packs: list[list[int]]) -> list[int]:
    return graphs("nano", packs, intra=1, received=most)


# --- as Inductor compiles it ---------------------------------------------------------------------------

STAGES, ROWS = 4, 8  # for the 40 tokens of the first pack and the 60 of the last


def in_stages(packs: list[Any]) -> tuple[list[Seen], list[list[str]]]:
    """Steps of one layer, and the operators of its forward and its backward in order."""
    from torch._inductor.utils import run_and_get_code

    model, reports = build("nano"), list[StepReport]()
    model.blocks = model.blocks[:1]
    reference = copy.deepcopy(model)
    options = {"intra": 1, "received": 2 * ROWS * row_bytes("nano", 1), "on_step": reports.append}
    compiled = torch.compile(model, backend="hsap", options=options)
    given = [batch("nano", rows, seed=i) for i, rows in enumerate(packs)]
    found, code = run_and_get_code(lambda: [seen(compiled, model, reference, x, reports) for x in given])
    return found, operators_in(code)


def test_on_ranks(pool: Pool) -> None:
    """As many bytes as without stages; no stage is asked for before the second one before it is done with."""
    found = pool.run(in_stages, PACKS, world=2)
    for ranks in zip(*(steps for steps, _ in found), strict=True):
        assert max(s.error for s in ranks) < TOLERANCE["nano"]
        assert {s.calls for s in ranks} == {(STAGES, 2 * STAGES)}
        inter, _, rows = ranks[0].report
        assert rows == sum(s.received for s in ranks) * row_bytes("nano", 1) and inter == 3 * rows
        assert (sum(s.sent[0] for s in ranks), sum(s.sent[1] for s in ranks)) == (rows, 2 * rows)
    for _, (forward, backward) in found:
        ask, attend = ["pack", "all_to_all_start"], ["wait_tensor", "attend"]
        layer = [*ask, *ask, "attend", *[*attend, *ask] * (STAGES - 2), *attend * 2]
        assert forward[: len(layer)] == layer
        assert backward.count("unpack") == STAGES and not too_early(backward)


def too_early(calls: list[str]) -> list[int]:
    """The stages of a backward whose rows are packed too early."""
    kinds = "pack", "attend_backward"
    packs, done = ([i for i, name in enumerate(calls) if name == kind] for kind in kinds)
    assert (len(packs), len(done)) == (STAGES, STAGES + 1)  # the last one is of own keys
    return [n for n, at in enumerate(packs) if n >= 2 and at < done[n - 2]]


def asked_for_at_once(packs: list[Any]) -> tuple[list[Seen], list[list[str]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Overlap, "uuid", lambda self: None)  # what is compiled with it is not cached
        patch.setattr(_parts, "_ask_later", lambda *args, **kwargs: None)
        return in_stages(packs)


@pytest.mark.slow
def test_stages_that_are_asked_for_at_once_are_noticed(pool: Pool) -> None:
    for _, (_, backward) in pool.run(asked_for_at_once, PACKS[:1], world=2):
        assert too_early(backward)


# --- what is said --------------------------------------------------------------------------------------


def refusal(most: int, **options: Any) -> str:
    trace, _ = one_trace("nano")
    with pytest.raises(Refused) as caught:
        rewrite(trace.module, parse({"intra": 1, "received": most, **options}, None), trace.length, 4, "")
    return str(caught.value)


def test_too_few_bytes_are_refused() -> None:
    text = refusal(1000)
    assert 'option "received" has no room for two rows' in text
    assert "got:    1000 bytes, and a key and a value of 512 bytes" in text
    assert "wanted: 1024 bytes or more" in text


def test_too_many_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsap_compile.passes.partition_attention._MOST_STAGES", 16)
    text = refusal(1024)
    assert "got:    32 stages, of 1 rows of 512 bytes each, for 40 tokens a row" in text
    assert "do:     pass 2048 bytes or more" in text
    assert limit_of("nano", 4, 2048).stages <= 16


def test_flex_attention_is_refused() -> None:
    text = refusal(2048, attention="flex", lower="eager")
    assert "flex attention takes all received rows at once" in text
    assert "got:    received=2048, a number of bytes that are held at a time" in text


def test_what_holds_all_rows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    trace = traced(build("llama", attn_implementation="eager"), batch("llama", [[40]]))
    with caplog.at_level(logging.WARNING, "hsap_compile"):
        rewrite(trace.module, parse({"intra": 1, "received": 4096}, None), trace.length, 2, "")
    (text,) = {r.getMessage() for r in caplog.records if "holds all" in r.getMessage()}
    assert (
        "holds all received rows at a time, more than options['received']: its masked logits are finite"
        in text
    )


def test_explain_counts_the_stages() -> None:
    options = {"intra": 1, "received": 2 * 5 * row_bytes("nano", 1)}
    found = explain(build("nano"), **batch("nano", [[40]]), hsap_options=options, hsap_ranks=2)
    assert "sent once more in the backward" in str(found) and "and arrive in 4 stages" in str(found)
