"""On a GPU (``pytest -m gpu``): what Inductor compiles for it against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models
from flex_cases import Case, Run, attention, by_ranks, errors, reference
from hsap_compile._torch import compile_with_aot_eager, compile_with_inductor
from hsap_compile.kernels import exchange
from strategies import pack
from test_flex_triton import LOGITS, case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PACKS = [[700], [1] * 40 + [660], [128, 128, 444], [5, 300, 1, 394]]


def run_on(device: str, drawn: Case) -> Run:
    """One compiled graph; inputs and results are on the CPU."""
    graph = attention(drawn, device=device)
    inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    if device == "cpu":  # Inductor has no backward of flex attention there
        compiled = compile_with_aot_eager(graph, inputs)
    else:
        compiled = compile_with_inductor(graph, inputs, {})

    def run(given: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        fresh = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in given]
        out, _ = compiled(*fresh)
        out.backward(grad.to(device))
        return out.detach().cpu(), [None if x.grad is None else x.grad.cpu() for x in fresh]

    return run


def check_packs(device: str, name: str, dtype: torch.dtype, packs: list[list[int]], width: int) -> None:
    """Errors of out and gradients stay near those of dense attention in the same type, on 1 and 3 ranks."""
    drawn = case(name, 700, (4, 2, width), dtype)
    run = run_on(device, drawn)  # compiled once for all packs
    for lengths in packs:
        low = Case(drawn.logits, drawn.sizes, (pack([lengths])[0], drawn.leaves[1]), dtype)
        wanted = reference(low.to(torch.float64))
        eager = errors([x.double() for x in reference(low)], wanted)
        limits = [4 * max(e, 8 * torch.finfo(dtype).eps) for e in eager]
        for ranks in (1, 3):
            found = errors([x.double() for x in by_ranks(run, low, ranks)], wanted)
            assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (lengths, ranks, found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(LOGITS))
def test_kernels(name: str, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    check_packs("cuda", name, dtype, PACKS, 64)


def test_the_check_itself_on_cpu() -> None:
    check_packs("cpu", "documents", torch.float32, [[300, 400]], 16)


@pytest.fixture
def one_nccl_rank(tmp_path: Any) -> Iterator[str]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


@pytest.mark.gpu
def test_rows_are_packed_and_exchanged(one_nccl_rank: str) -> None:
    rows = torch.tensor([5, 0, 3, 3], device="cuda")

    def exchanged(k: Tensor, v: Tensor, splits: Tensor) -> Tensor:
        packed = torch.cat([k, v], 1).index_select(0, rows)
        return exchange.ALL_TO_ALL(packed, splits, 4, False, one_nccl_rank)

    k, v = (torch.randn(9, 16, device="cuda", requires_grad=True) for _ in range(2))
    compiled = torch.compile(exchanged, fullgraph=True)
    found = compiled(k, v, torch.tensor([[4], [4]]))
    assert torch.equal(found, torch.cat([k, v], 1)[rows])
    found.sum().backward()
    assert k.grad is not None and k.grad[:, 0].tolist() == [1, 0, 0, 2, 0, 1, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unmodified_llama(dtype: torch.dtype) -> None:
    model = models.build("llama", dtype).cuda()
    compiled = torch.compile(copy.deepcopy(model), backend="hsap")
    given: dict[str, Any] = {}
    for lengths in ([30, 20, 14], [1, 62, 1], [64]):
        batch = models.batch("llama", [lengths, lengths[::-1]])
        given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
        error = models.difference(compiled, compiled._orig_mod, model, given)
        assert error <= (1e-4 if dtype == torch.float32 else 5e-2)
