"""How many collectives a step has, and how many rows they carry: exact counts before values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from hsap_compile.kernels import exchange
from models import batch, build
from pool import Pool
from simulate import Simulated, rebatched, simulate, simulate_all, traced
from test_plan import allowed

NAMES = {
    exchange.ALL_TO_ALL: "all_to_all", exchange.GATHER: "gather", exchange.SHARD: "shard",
    exchange.SUM_RANKS: "sum_ranks", exchange.BROADCAST: "broadcast", exchange.SHARE: "share",
}  # fmt: skip
PACK = [[5, 1, 9, 4, 8]]
PARAMETERS = 28  # of "nano", each summed over the ranks in the backward


def in_graph(result: Simulated) -> Counter[str]:
    """Our operators in the program's graph, which runs as it is."""
    graph: Any = result.program.function
    return Counter(NAMES[node.target] for node in graph.graph.nodes if node.target in NAMES)


@contextmanager
def at_run_time(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The collectives that all ranks start inside of the block, forward and backward."""
    started: Counter[str] = Counter()
    packets = torch.ops._c10d_functional
    with patch.context() as inside:
        for name in ("all_to_all_single", "all_reduce", "all_gather_into_tensor"):
            original = getattr(packets, name)

            def counted(*args: Any, name: str = name, original: Any = original) -> Any:
                started[name] += 1
                return original(*args)

            inside.setattr(packets, name, counted)
        yield started


@pytest.mark.parametrize(
    ("mesh", "exchanges"), [((2, 1), 1), ((3, 1), 1), ((1, 2), 2), ((1, 4), 2), ((2, 2), 3)], ids=str
)
def test_exchanges_of_an_attention(mesh: tuple[int, int], exchanges: int) -> None:
    """Heads in, key/value rows, heads out; none where the level has one rank."""
    result = simulate(traced(build("nano"), batch("nano", PACK)), *mesh, outputs="local")
    layers = 2
    # one sum_ranks: the numerator and the denominator of the loss together
    assert in_graph(result) == {
        "all_to_all": exchanges * layers,
        "sum_ranks": 1,
        "broadcast": PARAMETERS,
    }


def test_whole_outputs_are_gathered_once() -> None:
    result = simulate(traced(build("nano"), batch("nano", PACK)), 2, 1)
    assert in_graph(result) == {"all_to_all": 2, "sum_ranks": 1, "gather": 1, "broadcast": PARAMETERS}


def test_one_rank_exchanges_nothing() -> None:
    assert in_graph(simulate(traced(build("nano"), batch("nano", PACK)), 1, 1)) == {}


@pytest.mark.parametrize("mesh", [pytest.param((2, 1), marks=pytest.mark.slow), (1, 2), (2, 2)], ids=str)
def test_backward_mirrors_forward(mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    of = traced(build("nano"), batch("nano", PACK))
    ranks, layers = mesh[0] * mesh[1], 2
    exchanges = layers * (2 * (mesh[1] > 1) + (mesh[0] > 1)) * ranks
    with at_run_time(monkeypatch) as forward:
        simulate(of, *mesh, outputs="local", backward=False)
    # the agreement of the ranks is one gather
    assert forward == {"all_to_all_single": exchanges, "all_reduce": ranks, "all_gather_into_tensor": ranks}
    with at_run_time(monkeypatch) as both:
        simulate(of, *mesh, outputs="local")
    assert both - forward == {"all_to_all_single": exchanges, "all_reduce": PARAMETERS * ranks}
    with at_run_time(monkeypatch) as shares:
        simulate(of, *mesh, outputs="local", grad_sync=False)
    assert both - shares == {"all_reduce": PARAMETERS * ranks}


@pytest.mark.parametrize("rows", [[[5, 1, 9, 4, 8]], [[27]], [[1] * 27], [[20, 7], [3, 24]]], ids=str)
@pytest.mark.parametrize("mesh", [pytest.param((2, 1), marks=pytest.mark.slow), (3, 1), (2, 2)], ids=str)
def test_only_needed_rows_travel(mesh: tuple[int, int], rows: list[list[int]]) -> None:
    result = simulate(traced(build("nano"), batch("nano", rows)), *mesh)
    plan, size = result.runner.last_plan, mesh[0] * mesh[1]
    assert plan is not None and len(plan.masks) == 1
    tables = [plan.tables(rank) for rank in range(size)]
    pairs = allowed(plan.masks[0].structure.mask)
    shape = result.program.mesh
    for source in range(size):
        for to in range(size):
            (from_group, position), (to_group, other) = shape.group_of(source), shape.group_of(to)
            needed = 0
            if from_group != to_group and position == other:
                needed = int(
                    pairs[:, tables[to].group_columns][:, :, tables[source].group_columns].any(1).sum()
                )
            assert tables[source].masks[0].splits[0, to] == tables[to].masks[0].splits[1, source] == needed


def rows_to_others(patch: pytest.MonkeyPatch, rows: list[list[int]], mesh: tuple[int, int]) -> list[int]:
    """The rows that a rank sends to others in each all-to-all of a forward, all ranks together."""
    sent: dict[int, list[int]] = {}
    original = torch.ops._c10d_functional.all_to_all_single

    def counted(x: Any, incoming: list[int], outgoing: list[int], group: str) -> Any:
        rank = torch.distributed.get_rank()
        sent.setdefault(rank, []).append(sum(outgoing) - outgoing[rank])
        return original(x, incoming, outgoing, group)

    of = traced(build("nano"), batch("nano", rows))
    with patch.context() as inside:
        inside.setattr(torch.ops._c10d_functional, "all_to_all_single", counted)
        simulate(of, *mesh, backward=False)
    return [sum(calls) for calls in zip(*sent.values(), strict=True)]


def test_only_documents_of_several_ranks_exchange_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks of eight tokens: documents of eight send nothing, a longer one its own tokens' heads."""
    assert rows_to_others(monkeypatch, [[8, 8, 8, 8]], (1, 4)) == [0, 0] * 2
    assert rows_to_others(monkeypatch, [[32]], (1, 4)) == [32 * 3, 32 * 3] * 2
    assert rows_to_others(monkeypatch, [[4, 24, 4]], (1, 2)) == [24, 24] * 2
    assert rows_to_others(monkeypatch, [[8, 8, 8, 8]], (2, 2)) == [0, 0, 0] * 2


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)], ids=str)
def test_documents_of_one_group_send_no_rows(mesh: tuple[int, int]) -> None:
    documents = [8] * mesh[0]
    result = simulate(traced(build("nano"), batch("nano", [documents])), *mesh)
    plan = result.runner.last_plan
    assert plan is not None
    assert not plan.masks[0].rows_sent.any()


def test_the_plan_is_the_last_batch() -> None:
    first = batch("nano", [[16]])
    of = traced(build("nano"), first)
    calls = [rebatched(of, first, batch("nano", [rows])) for rows in ([8, 8], [21], [8, 8])]
    results = simulate_all(of, 2, 1, *calls)
    plan = results[-1].runner.last_plan
    assert plan is not None and plan.placement.tokens == 16
    assert len(results[-1].runner.plans) == 2  # a pack seen before is not planned again
    assert np.array_equal(np.sort(np.concatenate(plan.placement.columns)), np.arange(16))


@pytest.mark.parametrize("world", [2, 4])
def test_operators_are_transposes(world: int) -> None:
    """<f(x), y> summed over ranks equals <x, backward of f(y)>: for each operator with its own pairing."""
    from threads import run_threads

    for errors in run_threads(world, _transposes, 11):
        assert max(errors.values()) < 1e-12, errors


def _transposes(tokens: int) -> dict[str, float]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD.group_name
    owner = torch.arange(tokens) % world
    columns = torch.nonzero(owner == rank).flatten()
    most = -(-tokens // world)
    order = torch.tensor([int(owner[c]) * most + c // world for c in range(tokens)])
    g = torch.Generator().manual_seed(0)  # the same whole values on every rank
    whole, cotangent = (torch.randn(2, tokens, 3, generator=g, dtype=torch.float64) for _ in range(2))

    def total(x: torch.Tensor) -> torch.Tensor:
        return exchange.all_reduce(x.detach().clone(), group)

    x = whole.clone().requires_grad_()
    mine = exchange.SHARD(x, columns, order, 1, group)
    (mine * cotangent[:, columns]).sum().backward()
    errors = {"shard": float((x.grad - cotangent).abs().max())}
    x = whole[:, columns].clone().requires_grad_()
    gathered = exchange.GATHER(x, columns, order, tokens, 1, group)
    (gathered * cotangent).sum().backward()
    errors["gather"] = float((gathered.detach() - whole).abs().max())
    errors["gather backward"] = float((x.grad - cotangent[:, columns]).abs().max())
    x = whole[:, columns].sum(1).clone().requires_grad_()
    summed = exchange.SUM_RANKS(x, group)
    summed.backward(cotangent[:, 0])
    errors["sum_ranks"] = float((summed.detach() - whole.sum(1)).abs().max())
    errors["sum_ranks backward"] = float((x.grad - cotangent[:, 0]).abs().max())
    for name, operator, combine in (
        ("broadcast", exchange.BROADCAST, lambda grad: grad / world),
        ("share", exchange.SHARE, total),
    ):
        x = whole.clone().requires_grad_()
        operator(x, group).backward(cotangent)
        errors[name] = float((combine(x.grad) - cotangent).abs().max())
    return errors


TYPES = (
    "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float16 bfloat16"
    " float32 float64 complex64 complex128"
)


def test_values_of_every_type_travel(pool: Pool) -> None:
    """Those that gloo does not send as well."""
    for wrong in pool.run(_travels, world=2):
        assert wrong == []


def _travels() -> list[str]:
    """What did not arrive as it was."""
    import torch.distributed as dist

    rank, group = dist.get_rank(), dist.group.WORLD.group_name
    splits = torch.tensor([[[1, 3], [1, 3]], [[3, 1], [3, 1]]][rank])
    wrong = []
    for name in TYPES.split():
        dtype = getattr(torch, name)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        whole = (torch.arange(24).view(2, 4, 3) % 7).to(dtype)
        exchanged = torch.cat([whole[0, :1], whole[1, :3]] if rank == 0 else [whole[0, 1:], whole[1, 3:]])
        for shape in ((4, 3), (4, 3, 1)):
            x = whole[rank].view(shape)
            got = {
                "gather": (exchange.all_gather(x, 2, group), whole.view(8, *shape[1:])),
                "all_to_all": (exchange.ALL_TO_ALL(x, splits, 4, False, group), exchanged.view(shape)),
                "vector": (exchange.all_gather(x.flatten(), 2, group), whole.flatten()),
            }
            if dtype != torch.bool:
                got["sum"] = exchange.all_reduce(x, group), whole.to(wide).sum(0).to(dtype).view(shape)
            wrong += [f"{what} {name} {shape}" for what, pair in got.items() if not _same(*pair)]
    return wrong


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
