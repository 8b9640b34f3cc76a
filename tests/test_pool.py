"""The two ways of running ranks in tests: persistent gloo processes and simulated ranks as threads."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from pool import Pool, RankError
from threads import run_threads

Run = Callable[..., list[Any]]

# torch 2.13 deprecates the first name, torch 2.11 lacks the second.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def in_threads(function: Callable[..., Any], *args: Any, world: int) -> list[Any]:
    return run_threads(world, function, *args)


@pytest.fixture(params=["processes", "threads"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue("pool").run if request.param == "processes" else in_threads


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """For tests that leave a pool broken."""
    with Pool() as pool:
        yield pool


def splits_of(world: int, seed: int) -> list[list[int]]:
    """``splits[i][j]``: rows from rank i to rank j; about half of them none."""
    draw = random.Random(seed)
    return [[draw.choice([0, 0, 1, 2, 5]) for _ in range(world)] for _ in range(world)]


class Exchange(torch.autograd.Function):
    """``all_to_all_single`` whose backward is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.splits = sent, received
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows, received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        sent, received = ctx.splits
        back = grads[0].new_empty(sum(sent), grads[0].shape[1])
        dist.all_to_all_single(back, grads[0].contiguous(), sent, received)
        return back, None, None


def exchange_rows(splits: list[list[int]], dtype: torch.dtype) -> None:
    """Rows hold (sender, receiver): what arrives is known; so is the gradient that comes back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent, received = splits[rank], [row[rank] for row in splits]
    rows = torch.tensor([[rank, j] for j in range(world) for _ in range(sent[j])], dtype=dtype).reshape(-1, 2)
    wanted = torch.tensor([[i, rank] for i in range(world) for _ in range(received[i])], dtype=dtype)
    rows.requires_grad_(dtype.is_floating_point)
    out = Exchange.apply(rows, sent, received)
    assert torch.equal(out, wanted.reshape(-1, 2))
    by_functional = functional.all_to_all_single(rows.detach(), received, sent, dist.group.WORLD)
    assert torch.equal(functional.wait_tensor(by_functional), out)
    if dtype.is_floating_point:
        (out * (rank + 1)).sum().backward()
        receivers = torch.tensor([j + 1 for j in range(world) for _ in range(sent[j])], dtype=dtype)
        assert rows.grad is not None and torch.equal(rows.grad, receivers[:, None].expand(-1, 2))


def gather_and_reduce(dtype: torch.dtype) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = torch.tensor([rank, 2], dtype=dtype)
    whole = torch.empty(2 * world, dtype=dtype)
    all_gather_single(whole, mine)
    assert whole.tolist() == [value for i in range(world) for value in (i, 2)]
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    assert torch.equal(torch.cat(parts), whole)
    dist.all_reduce(mine)
    assert mine.tolist() == [world * (world - 1) // 2, 2 * world]


def sum_in_halves() -> int:
    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("inter", "intra"))
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total, group=mesh.get_group("intra"))
    return int(total)


def where_am_i() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def fail_on(ranks: list[int]) -> None:
    """The other ranks wait in a collective for the one that fails."""
    if dist.get_rank() in ranks:
        raise KeyError("no such document")
    dist.all_reduce(torch.ones(1))


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def warn() -> None:
    warnings.warn("sent elsewhere", UserWarning, stacklevel=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_collectives(run: Run, world: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        run(exchange_rows, splits_of(world, seed), dtype, world=world)
    run(exchange_rows, [[0] * world] * world, dtype, world=world)
    run(gather_and_reduce, dtype, world=world)


def test_sub_groups(run: Run) -> None:
    assert run(sum_in_halves, world=4) == [1, 1, 5, 5]


@given(st.integers(1, 9), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_threads_are_cheap_enough_to_draw(world: int, seed: int) -> None:
    run_threads(world, exchange_rows, splits_of(world, seed), torch.float64)


def test_processes_persist(pool: Pool) -> None:
    first = pool.run(where_am_i, world=2)
    assert [answer[:2] for answer in first] == [(0, 2), (1, 2)]
    assert pool.run(where_am_i, world=2) == first
    assert len({*first, *pool.run(where_am_i, world=4)}) == 6


def test_the_traceback_comes_back_and_waiting_ranks_are_replaced(
    own_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pool.GRACE_s", 0.5)
    before = own_pool.run(where_am_i, world=2)
    with pytest.raises(RankError, match="(?s)rank 1:.*in fail_on.*no such document") as caught:
        own_pool.run(fail_on, [1], world=2)
    assert isinstance(caught.value.__cause__, KeyError)
    after = own_pool.run(where_am_i, world=2)
    assert not {pid for *_, pid in before} & {pid for *_, pid in after}
    with pytest.raises(RankError, match="no such document"):
        own_pool.run(fail_on, [0, 1], world=2)
    assert own_pool.run(where_am_i, world=2) == after, "all raised, none waits: they are kept"


def test_a_dead_rank_and_a_late_one(own_pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 1 died with exit code 7"):
        own_pool.run(die, world=2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 have not answered after 0.2 s"):
        own_pool.run(sleep, 60.0, world=2, timeout=0.2)


def test_a_warning_on_a_rank_is_an_error_here(pool: Pool) -> None:
    with pytest.raises(UserWarning, match="sent elsewhere"):
        pool.run(warn, world=2)


def test_a_failing_thread_frees_the_others() -> None:
    for ranks in ([0], [2], [0, 3]):
        with pytest.raises(KeyError, match="no such document"):
            run_threads(4, fail_on, ranks)
    run_threads(4, gather_and_reduce, torch.float32)


def wait_for_nobody() -> None:
    if dist.get_rank() != 1:
        dist.barrier()


def test_a_rank_that_leaves_early_is_reported() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] of 3 were still waiting after 0.3 s"):
        run_threads(3, wait_for_nobody, timeout=0.3)
    run_threads(3, gather_and_reduce, torch.int64)
