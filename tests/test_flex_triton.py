"""The Triton kernels that Inductor generates for our graph: compiled for real GPUs, and run, without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch

import offline_gpu
from flex_cases import Case, Sizes, attention, by_ranks, errors, reference
from hsap_compile import formula as f
from simulate import since

CAUSAL = f.k <= f.q
DOCUMENT = sympy.Eq(f.leaf(0, f.b, f.q), f.leaf(0, f.b, f.k))
LOWEST = float(torch.finfo(torch.float32).min)
LOGITS = {
    "documents": sympy.Piecewise((f.score, sympy.And(CAUSAL, DOCUMENT)), (-sympy.oo, True)),
    "alibi": sympy.Piecewise((f.score - f.leaf(1, f.h) * (f.q - f.k), CAUSAL & DOCUMENT), (-sympy.oo, True)),
    "soft": sympy.Piecewise((f.score, sympy.And(CAUSAL, DOCUMENT)), (LOWEST, True)),
}


def case(name: str, tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Two documents in one row; ``sizes``: query heads, key/value heads, head size."""
    labels = (torch.arange(tokens)[None] > 0.7 * tokens).long()
    slopes = torch.linspace(0.01, 0.1, sizes[0], dtype=torch.float64)
    heads, kv_heads, width = sizes
    return Case(LOGITS[name], Sizes(1, tokens, heads, kv_heads, width, width), (labels, slopes)).to(dtype)


# --- compiled ------------------------------------------------------------------------------------------


ARCHITECTURES = (80, 90)


def built(
    name: str, sizes: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[str], dict[int, list[offline_gpu.Built]]]:
    graphs = offline_gpu.generate(attention(case(name, 100, sizes, dtype), **options))
    texts = [graph.source for graph in graphs]
    return texts, {arch: offline_gpu.cubins(texts, arch) for arch in ARCHITECTURES}


def compiles(name: str, sizes: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> list[str]:
    """Check what was built for every architecture; returns the sources of forward and backward."""
    texts, found = offline_gpu.in_a_process(built, name, sizes, dtype, options)
    assert len(texts) == 2
    for text in texts:  # rows are whole blocks, and no size is a number that a batch chose
        assert "'IS_DIVISIBLE': True" in text and "'IS_DIVISIBLE': False" not in text
        assert "extern_kernels." not in text.partition("class Runner")[2]
    for arch, kernels in found.items():
        check_kernels(arch, kernels, name, dtype, options.get("remote", True))
    return texts


def check_kernels(
    arch: int, kernels: list[offline_gpu.Built], name: str, dtype: torch.dtype, remote: bool
) -> None:
    assert all(k.cubin_bytes > 0 for k in kernels)
    limit = offline_gpu.H100.shared_memory_per_block_optin if arch == 90 else 163 * 1024  # A100
    assert max(k.shared_bytes for k in kernels) <= limit
    runs = (2 if remote else 1) * (2 if name == "soft" else 1)
    templates = [k for k in kernels if k.name.startswith("triton_tem")]
    backward = [k for k in templates if "backward" in k.name]
    assert (len(templates) - len(backward), len(backward)) == (runs, 2 if remote else 1)
    assert dtype == torch.float32 or all(
        k.matrix_products > 0 for k in templates
    )  # float32 is exact: no tf32


def test_compiles_for_a_gpu() -> None:
    texts = compiles("documents", (4, 2, 64), torch.bfloat16, remote=False)
    assert all("u0 = " in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOGITS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_for_a_gpu_with_received_rows(name: str, dtype: torch.dtype) -> None:
    compiles(name, (32, 8, 128 if dtype == torch.bfloat16 else 64), dtype)


@pytest.mark.slow
def test_compiles_with_constant_sizes() -> None:
    texts = compiles("documents", (4, 2, 64), torch.bfloat16, remote=False, static=True)
    assert not any("u0 = " in text for text in texts)


@pytest.mark.slow
def test_kernel_options_reach_the_kernel() -> None:
    chosen = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "num_warps": 8}
    texts = compiles("documents", (4, 2, 64), torch.bfloat16, remote=False, **chosen)
    assert "'BLOCK_M': 32, 'BLOCK_N': 16" in texts[0] and "num_warps=8" in texts[0]
    assert "'BLOCK_M': 32" not in texts[1]


# --- run -----------------------------------------------------------------------------------------------


def interpreted(name: str, tokens: int, ranks: int) -> list[float]:
    """Errors of Inductor's own forward and backward, interpreted, on every rank."""
    torch.set_num_threads(1)
    drawn = case(name, tokens, (2, 1, 16), torch.float32)
    large = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 128)
    graphs = offline_gpu.generate(attention(drawn, **large))  # few programs: the interpreter is slow

    def run(inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, Sequence[Any]]:
        (out, _), grads = offline_gpu.train(graphs, inputs, grad, torch.zeros(grad.shape[:2]))
        return out, grads

    return errors(by_ranks(run, drawn, ranks), reference(drawn.to(torch.float64)))


@since((2, 12), "triton's interpreter does not know numpy 2.4")
def test_runs_in_the_interpreter() -> None:
    # 60 rows a rank: one partial block of own keys, one of received keys
    found = offline_gpu.in_a_process(interpreted, "documents", 120, 2, TRITON_INTERPRET="1")
    assert max(found) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOGITS))
def test_runs_in_the_interpreter_over_many_blocks(name: str) -> None:
    found = offline_gpu.in_a_process(interpreted, name, 700, 2, TRITON_INTERPRET="1")
    assert max(found) <= 1e-5
