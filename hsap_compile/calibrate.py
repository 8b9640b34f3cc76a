"""Measure this machine's processors and the exchange between its processes (gloo), as a cost model."""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hsap_compile.plan.cost import FORWARD_AND_BACKWARD, LINEAR_FLOPS_PER_TOKEN, PRODUCTS, CostModel, Link

PROCESSES = 2
REPEATS = 5  # the fastest counts: whatever else runs on the machine only slows
MATRIX = 512  # rows and columns
ATTENTION = (8, 512, 64)  # heads, tokens, head size
SMALL, LARGE = 16, 1 << 20  # float32 elements to the other process


def calibrate() -> CostModel:
    """Run two processes for some seconds and return what they reach, in float32.

    Both kinds of links are the one that was measured: gloo between processes of one machine.
    """
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_measure, (directory,), nprocs=PROCESSES)
        return CostModel.load(Path(directory) / "0.json")


def _measure(rank: int, directory: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=PROCESSES)
    matrix = torch.randn(MATRIX, MATRIX)
    linear_s = _fastest(lambda: torch.mm(matrix, matrix))
    heads, tokens, size = ATTENTION
    attention_s = _fastest(_attention(*(torch.randn(1, *ATTENTION, requires_grad=True) for _ in range(3))))

    small, large = (torch.zeros(PROCESSES * n) for n in (SMALL, LARGE))
    latency_s = _fastest(lambda: dist.all_to_all_single(torch.empty_like(small), small))
    received = torch.empty_like(large)
    exchange_s = _fastest(lambda: dist.all_to_all_single(received, large))

    times = max(1, round(exchange_s / linear_s))  # as much work as the exchange takes

    def both() -> None:
        pending = dist.all_to_all_single(received, large, async_op=True)
        for _ in range(times):
            torch.mm(matrix, matrix)
        assert pending is not None
        pending.wait()

    work_s, both_s = times * linear_s, _fastest(both)
    hidden = (work_s + exchange_s - both_s) / min(work_s, exchange_s)
    link = Link(latency_s, 4 * LARGE / max(exchange_s - latency_s, 1e-9))
    pairs = tokens * (tokens + 1) // 2
    model = CostModel(
        intra=link,
        inter=link,
        attention_flops_per_s=PRODUCTS * FORWARD_AND_BACKWARD * heads * size * pairs / attention_s,
        linear_flops_per_s=2 * MATRIX**3 / linear_s,
        linear_flops_per_token=LINEAR_FLOPS_PER_TOKEN,
        overlap=min(1.0, max(0.0, hidden)),
        name=f"{platform.node()}, measured {datetime.date.today()} with torch {torch.__version__} and gloo",
    )
    model.save(Path(directory) / f"{rank}.json")
    dist.barrier()
    dist.destroy_process_group()


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out.sum(), (q, k, v))

    return step


def _fastest(step: Callable[[], object]) -> float:
    """Seconds, of steps that all processes begin together."""
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
