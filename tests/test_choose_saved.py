"""What a backward keeps of the forward: exact bytes and exchanges, and the values of eager all the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from generated_code import order_of_calls
from hsap_compile.passes import choose_saved
from hsap_compile.runtime import StepReport
from models import TOLERANCE, batch, build, difference
from pool import Pool

LAYERS = 2
#: One document over all ranks, odd ones, none that is cut (of 2 or 4 ranks), another length.
PACKS = [[[40]], [[5, 20, 2]], [[8] * 4], [[1] * 9 + [31, 2, 18]]]


class Seen(NamedTuple):
    """One step on one rank: the largest error to eager, bytes kept for the backward, the exchanges of each
    direction and the bytes that they send to others, what the plan says that this rank receives."""

    error: float
    kept: int
    calls: tuple[int, int]
    sent: tuple[int, int]
    received: int
    report: tuple[int, int, int]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that every exchange inside of the block sends to other ranks."""
    sent: list[int] = []
    original = torch.ops._c10d_functional.all_to_all_single

    def count(x: Any, incoming: list[int], outgoing: list[int], group: str) -> Any:
        others = sum(outgoing) - outgoing[torch.distributed.get_rank()]
        sent.append(others * x.shape[1:].numel() * x.itemsize)
        return original(x, incoming, outgoing, group)

    with mock.patch.object(torch.ops._c10d_functional, "all_to_all_single", count):
        yield sent


def steps(name: str, packs: list[Any], options: dict[str, Any], checkpointed: bool = False) -> list[Seen]:
    """Every pack, with one compiled model."""
    model = build(name)
    if checkpointed:
        old = model.gradient_checkpointing_enable  # the name before transformers 5.24
        getattr(model, "activation_checkpointing_enable", old)()
    reference, reports = copy.deepcopy(model), list[StepReport]()
    compiled = torch.compile(model, backend="hsap", options={"on_step": reports.append, **options})
    return [
        seen(compiled, model, reference, batch(name, rows, seed=i), reports) for i, rows in enumerate(packs)
    ]


def seen(compiled: Any, model: Any, reference: Any, given: dict[str, Any], reports: list[StepReport]) -> Seen:
    """One step."""
    error = difference(compiled, model, reference, given)
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with counted() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = compiled(**given)[0]
    with counted() as backward:
        loss.backward()
    step = reports[-1]
    rank = torch.distributed.get_rank()
    rows = int(step.plan.masks[0].rows_sent[:, rank].sum())
    return Seen(
        error,
        sum(storages.values()),
        (len(forward), len(backward)),
        (sum(forward), sum(backward)),
        rows,
        (step.inter_bytes, step.intra_bytes, step.rows_bytes),
    )


def row_bytes(name: str, intra: int) -> int:
    """Of a key and a value of one row, of the heads of one rank, in float64."""
    heads = {"nano": 4, "llama": 2}[name]
    return 2 * heads // intra * 8 * 8


def both(pool: Pool, name: str, packs: list[Any], options: dict[str, Any], world: int, *more: Any) -> Any:
    """What every rank sees with rows that are kept, and with rows that are received again."""
    return [
        pool.run(steps, name, packs, {**options, "received": r}, *more, world=world)
        for r in ("save", "again")
    ]


CASES = [
    ("nano", 2, {"intra": 1, "lower": "aot_eager"}),
    pytest.param("nano", 2, {"intra": 1}, marks=pytest.mark.slow),
    pytest.param("llama", 4, {"intra": 2, "lower": "aot_eager"}, marks=pytest.mark.slow),
    pytest.param("llama", 4, {"intra": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "world", "options"), CASES, ids=str)
def test_received_rows_are_kept_or_sent_once_more(
    pool: Pool, name: str, world: int, options: dict[str, Any]
) -> None:
    intra = options["intra"]
    kept, less = both(pool, name, PACKS, options, world)
    for found, twice in ((kept, False), (less, True)):
        for ranks in zip(*found, strict=True):
            there = LAYERS * (1 + 2 * (intra > 1))
            assert {s.calls for s in ranks} == {(there, there + LAYERS * twice)}
            inter, within, rows = ranks[0].report
            assert rows == sum(s.received for s in ranks) * LAYERS * row_bytes(name, intra)
            assert inter == (3 if twice else 2) * rows
            assert sum(s.sent[0] for s in ranks) == rows + within // 2
            assert sum(s.sent[1] for s in ranks) == inter - rows + within // 2
            assert max(s.error for s in ranks) < TOLERANCE[name]
    for a, b in zip(sum(kept, []), sum(less, []), strict=True):
        assert a.kept - b.kept == a.received * LAYERS * row_bytes(name, intra)
    assert [any(ranks[i].received for ranks in kept) for i in range(len(PACKS))] == [True, True, False, True]


@pytest.mark.slow
def test_batches_of_several_rows(pool: Pool) -> None:
    kept, less = both(pool, "llama", [[[20, 7], [3, 24]]], {"intra": 1, "lower": "aot_eager"}, 2)
    for (a,), (b,) in zip(kept, less, strict=True):
        assert max(a.error, b.error) < TOLERANCE["llama"] and a.received > 0
        assert a.kept - b.kept == a.received * LAYERS * row_bytes("llama", 1)


def test_checkpoints_keep_what_they_received_unless_told(pool: Pool) -> None:
    kept, less = both(pool, "llama", PACKS[:1], {"intra": 1, "lower": "aot_eager"}, 2, True)
    for (a,), (b,) in zip(kept, less, strict=True):
        assert max(a.error, b.error) < TOLERANCE["llama"] and a.received > 0
        assert (a.calls, b.calls) == ((2, 2), (2, 4))
        assert a.kept - b.kept == a.received * LAYERS * row_bytes("llama", 1)


def only_the_exchange(*args: Any) -> list[Seen]:
    with mock.patch.object(choose_saved, "_is_made", lambda node: False):
        return steps(*args)


@pytest.mark.slow
def test_an_exchange_whose_copies_are_kept_is_noticed(pool: Pool) -> None:
    options = {"intra": 1, "lower": "aot_eager"}
    kept = pool.run(steps, "nano", PACKS[:1], options, world=2)
    less = pool.run(only_the_exchange, "nano", PACKS[:1], {**options, "received": "again"}, world=2)
    for (a,), (b,) in zip(kept, less, strict=True):
        assert a.kept - b.kept < a.received * LAYERS * row_bytes("nano", 1)


@pytest.mark.slow
def test_a_budget_repeats_neither_attentions_nor_exchanges(pool: Pool) -> None:
    options = {"intra": 1, "outputs": "local"}
    (usual, *_), (less, *_) = (
        pool.run(order_of_calls, {**options, "memory_budget": b}, world=2) for b in (1.0, 0.2)
    )
    once = [Counter(call for call in calls if call != "mm") for calls in (*less, *usual)]
    assert once[: len(less)] == once[len(less) :]  # a product may be repeated
    kept = [
        pool.run(steps, "nano", [[[250]]], {"intra": 1, "lower": "aot_eager", "memory_budget": b}, world=2)[
            0
        ][0]
        for b in (None, 0.5, 0.2)
    ]
    assert max(s.error for s in kept) < TOLERANCE["nano"] and len({s.calls for s in kept}) == 1
    assert kept[0].kept > kept[1].kept > kept[2].kept
