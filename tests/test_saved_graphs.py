"""What is tagged for the backward, what Inductor and its caches make of it, and what explain says."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generated_code import order_of_calls
from hsap_compile import explain
from hsap_compile._torch import FLEX_ATTENTION, SAVED
from hsap_compile.kernels import attention, exchange
from hsap_compile.options import parse
from hsap_compile.passes import choose_saved
from hsap_compile.pipeline import rewrite
from models import batch, build
from pool import Pool
from simulate import traced
from test_choose_saved import LAYERS, PACKS, counted, row_bytes

# --- in the graph -------------------------------------------------------------------------------------


@functools.cache
def one_trace(name: str) -> Any:
    return traced(build(name), batch(name, PACKS[0]))


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from([(2, 1), (3, 1), (1, 2), (2, 2), (4, 1)]),
    st.sampled_from(["slices", "flex"]),
    st.sampled_from(["nano", "llama", "gemma2"]),
    st.booleans(),
)
def test_what_is_repeated_lies_between_keys_and_attention(
    mesh: tuple[int, int], kernel: str, name: str, again: bool
) -> None:
    """Whatever holds received rows is repeated, and of what is sent only what nobody else keeps."""
    inter, intra = mesh
    options = {
        "intra": intra,
        "attention": kernel,
        "lower": "eager",
        "received": "again" if again else "save",
    }
    trace = one_trace(name)
    graph = rewrite(trace.module, parse(options, None), trace.length, inter * intra, "").graph.graph
    repeated = {n for n in graph.nodes if "ac_graph_id" in n.meta}
    attentions = {n for n in graph.nodes if n.target in (attention.OP, FLEX_ATTENTION)}
    exchanges = {n for n in graph.nodes if n.target is exchange.ALL_TO_ALL}
    rows = {n for n in exchanges if choose_saved.sends_rows(n)}
    assert len(rows) == LAYERS * (inter > 1) and len(attentions) >= LAYERS
    assert repeated & (exchanges | attentions) == (rows if again else set())
    assert all(n.meta["recompute"] is SAVED for n in (exchanges | attentions) - repeated)
    for node in repeated:
        assert repeated | attentions >= {user for user in node.users if _tensor(user)}
        for source in {n for n in node.all_input_nodes if _tensor(n)} - repeated:
            assert source.op == "placeholder" or any(user not in repeated for user in source.users)


def _tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


# --- in the code that Inductor writes -----------------------------------------------------------------


def compiled_anew(choices: list[str]) -> list[tuple[bool, int, list[list[str]]]]:
    """For each choice: whether AOTAutograd's cache had it, how many exchanges a step starts, and, where it
    had not, the order of calls in forward and backward."""
    found = []
    for received in choices:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with counted() as exchanges:
            order = order_of_calls({"intra": 1, "outputs": "local", "received": received})
        hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        found.append((hits > 0, len(exchanges), order))
    return found


def test_what_is_compiled_for_each_choice(pool: Pool) -> None:
    """Own keys are attended to while others travel; no choice is served from the cache of another."""
    for found in pool.run(compiled_anew, ["save", "again", "save"], world=2):
        assert [hit for hit, _, _ in found] == [False, False, True]
        assert [exchanges for _, exchanges, _ in found] == [4, 6, 4]
        for (forward, backward), again in zip((found[0][2], found[1][2]), (False, True), strict=True):
            layer = ["pack", "all_to_all_start", "attend", "wait_tensor", "attend"]
            assert forward == [*layer * 2, "mm", "all_reduce_", "wait_tensor"]  # the loss is summed last
            calls, sums = [name for name in backward if name != "mm"], ["all_reduce_", "wait_tensor"]
            if again:  # rows of the first layer travel with gradients of the second
                start, wait, attend = "all_to_all_start", "wait_tensor", "attend_backward"
                second = ["pack", start, wait, attend, start, attend, "pack", start, wait, "unpack"]
                assert calls == [*second, wait, attend, start, attend, wait, "unpack", *sums]
            else:
                layer = ["attend_backward", "all_to_all_start", "attend_backward", "wait_tensor", "unpack"]
                assert calls == [*layer * 2, *sums]  # of all gradients, which are small
            # gradients of a layer's parameters are not put off until all layers are done
            last = len(backward) - backward[::-1].index("all_to_all_start")
            assert backward[last:].count("mm") < backward.count("mm") / 2


# --- what a person reads ------------------------------------------------------------------------------


def test_explain_says_what_each_choice_costs() -> None:
    given_batch = batch("nano", [[40]])
    kept, twice = (
        explain(build("nano"), **given_batch, hsap_ranks=2, hsap_options={"intra": 1, "received": r}).graphs[
            0
        ]
        for r in ("save", "again")
    )
    assert kept.step is not None and twice.step is not None
    rows = kept.step.plan.masks[0].rows_sent
    most, all_of_them = (int(n) * LAYERS * row_bytes("nano", 1) for n in (rows.sum(axis=0).max(), rows.sum()))
    for step in (kept.step, twice.step):
        assert (step.received_bytes, step.rows_bytes) == (most, all_of_them)
    counts = [next(c for c in g.collectives if c.what == "keys and values") for g in (kept, twice)]
    assert [(c.forward, c.backward) for c in counts] == [(2, 2), (2, 4)]
    assert [(c.forward_bytes, c.backward_bytes) for c in counts] == [
        (all_of_them, all_of_them),
        (all_of_them, 2 * all_of_them),
    ]
    assert "received keys and values are kept for the backward: " in str(kept)
    assert 'options={"received": "again"} would keep none and send ' in str(kept)
    assert "received keys and values are sent once more in the backward, " in str(twice)
    assert 'options={"received": "save"} would keep them instead: ' in str(twice)
    nothing = explain(build("nano"), **batch("nano", [[20, 20]]), hsap_ranks=2, hsap_options={"intra": 1})
    assert "received keys" not in str(nothing)
