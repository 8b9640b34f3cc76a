"""On a GPU (``pytest -m gpu``): what Inductor compiles for it against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import attention_cases as kernel_cases
import models
from flex_cases import Case, Run, attention, by_ranks, errors, reference
from hsap_compile._torch import compile_with_aot_eager, compile_with_inductor
from hsap_compile.kernels import exchange
from hsap_compile.kernels.reference import attend_reference
from strategies import pack
from test_flex_triton import LOGITS, case
from varlen_reference import reference_kernels

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


def check_sequences(device: str, case: kernel_cases.Case, dtype: torch.dtype) -> None:
    """``hsap::attend`` on ``device`` is about as near to float64 as dense attention in ``dtype`` is."""
    low = case.to(dtype)
    exact = low.to(torch.float64).run(attend_reference)
    eager = kernel_cases.errors(low.run(attend_reference), exact)
    moved = {n: getattr(low, n) for n in ("q", "k", "v", "k_remote", "v_remote", "grad", "rows", "heads")}
    moved = {n: None if x is None else x.to(device) for n, x in moved.items()}
    there = replace(low, leaves=tuple(x.to(device) for x in low.leaves), **moved)
    found = [x.cpu() for x in there.run(torch.ops.hsap.attend)]
    limits = [3 * max(e, torch.finfo(dtype).eps) for e in eager]
    pairs = zip(kernel_cases.errors(found, exact), limits, strict=True)
    assert [pair for pair in pairs if pair[0] > pair[1]] == []


SHARED = [[0, 300, 0, 300, 1, 0, 0], [300, 301, 300, 301, 1, 0, 0], [301, 390, 301, 390, 2, 0, 40]]
SHARED += [[100, 300, 400, 530, 0, 0, 0], [301, 341, 530, 570, 2, -300, 0], [200, 300, 530, 531, 0, 0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (20, 36), (256, 256)], ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_flash_attention_over_sequences(sizes: tuple[int, int], sink: bool, dtype: torch.dtype) -> None:
    check_sequences("cuda", kernel_cases.make_case(SHARED, 400, 170, (4, 2), sizes, sink=sink), dtype)
    ones = [[i, i + 1, 20 + i, 21 + i, 0, 0, 0] for i in range(9)]  # no sequence has two queries
    check_sequences("cuda", kernel_cases.make_case(ones, 30, 0, (4, 2), sizes, sink=sink), dtype)


def test_the_check_of_sequences_on_cpu() -> None:
    with reference_kernels():
        check_sequences("cpu", kernel_cases.make_case(SHARED, 400, 170, sizes=(20, 36)), torch.bfloat16)


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
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(torch.float32, "flex"), (torch.bfloat16, "flex"), (torch.bfloat16, "varlen")],
    ids=str,
)
def test_an_unmodified_llama(dtype: torch.dtype, kernel: str) -> None:
    model = models.build("llama", dtype).cuda()
    compiled = torch.compile(copy.deepcopy(model), backend="hsap", options={"attention": kernel})
    given: dict[str, Any] = {}
    for lengths in ([30, 20, 14], [1, 62, 1], [64]):
        batch = models.batch("llama", [lengths, lengths[::-1]])
        given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
        error = models.difference(compiled, compiled._orig_mod, model, given)
        assert error <= (1e-4 if dtype == torch.float32 else 5e-2)
