"""hsap::attend as an operator: empty inputs, memory, compilation, autocast, which gradients, messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attention_cases import MIXED, check, errors, make_case
from hsap_compile.kernels.attention import BAND, CAUSAL, FULL, MOD
from hsap_compile.kernels.reference import attend_reference

EMPTY = [[0, 0, 0, 4, FULL, 0, 0], [2, 2, 2, 2, CAUSAL, 0, 0], [0, 4, 3, 3, MOD, 0, 0]]
UNSEEN = [[0, 4, 0, 4, BAND, 9, 12], [0, 4, 0, 4, BAND, 3, 2]]  # bands beside the keys, or without width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("own", "remote", "table"),
    [(own, remote, table) for own in (0, 5) for remote in (None, 0, 3) for table in ([], EMPTY)]
    + [(5, None, UNSEEN), (5, 3, EMPTY + UNSEEN)],
)
def test_nothing_to_attend_to(
    own: int, remote: int | None, table: list[list[int]], dtype: torch.dtype
) -> None:
    case = make_case(table, own, remote or 0).to(dtype)
    if remote == 0:
        case = replace(case, k_remote=case.k[:0], v_remote=case.v[:0], remote_rows=case.rows[:0])
    out, lse, *grads = case.run(torch.ops.hsap.attend)
    assert out.shape == case.q.shape and (out == 0).all() and out.dtype == dtype
    assert lse.shape == case.q.shape[:2] and (lse == -torch.inf).all()
    floats = [x for x in (*case.floats, *case.leaves[:2]) if x is not None]
    assert [g.shape for g in grads] == [x.shape for x in floats]
    assert all((g == 0).all() for g in grads)


def test_queries_with_received_keys_alone() -> None:
    check(make_case([[0, 4, 5, 8, FULL, 0, 0]], 5, 3), torch.float64)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11
@pytest.mark.parametrize(
    ("kind", "rows", "elements"),
    # a mask, int64 while it is built, or the blocks of 256 x 512 logits that the kernel works on
    [(CAUSAL, 1024, 2 * 2**16), (CAUSAL, 3000, 2**18), (FULL, 3000, 2**18), (BAND, 3000, 2 * 2**22)],
)
def test_nothing_is_as_large_as_the_square_of_the_rows(kind: int, rows: int, elements: int) -> None:
    case = make_case([[0, rows, 0, rows, kind, 0, 2500]], rows, heads=(1, 1), sizes=(8, 8)).to(torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        case.run(torch.ops.hsap.attend)
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    assert 4 * rows * 8 <= largest <= 4 * elements < 4 * rows**2


# torch 2.14's own check reads .grad of tensors that are not leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    case = MIXED.to(torch.float32)
    floats = [None if x is None else x.detach().requires_grad_() for x in case.floats]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in case.leaves]
    rest = (case.slices, case.rows, case.remote_rows, case.heads, leaves, case.mod, 100, 0.3)
    torch.library.opcheck(torch.ops.hsap.attend.default, (*floats, *rest))
    plain = [None if x is None else x.detach() for x in floats]
    rest = (*rest[:4], [x.detach() for x in leaves], *rest[5:])
    out, lse = torch.ops.hsap.attend(*plain, *rest)
    for of_lse in (None, torch.ones_like(lse)):
        args = (case.grad, *plain, *rest, out, lse, of_lse, [0, 1])
        torch.library.opcheck(
            torch.ops.hsap.attend_backward.default, args, test_utils=("test_schema", "test_faketensor")
        )


def _around(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.hsap.attend(q * 2, *rest)
    return out.sin(), lse


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_for_all_sizes(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_around, backend=backend, dynamic=True, fullgraph=True)
    small = make_case([[0, 9, 0, 9, CAUSAL, 0, 0], [9, 30, 31, 38, MOD, 0, 0]], 30, 17, sizes=(8, 12))
    assert max(errors(MIXED.run(compiled), MIXED.run(_around))) <= 1e-11
    with torch.compiler.set_stance("fail_on_recompile"):
        assert max(errors(small.run(compiled), small.run(_around))) <= 1e-11


def test_autocast_does_not_reach_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MIXED.to(torch.float32).run(torch.ops.hsap.attend)
    assert max(errors(found, MIXED.run(attend_reference))) <= 1e-5


def test_only_asked_leaves_get_a_gradient() -> None:
    leaves = [x.detach() for x in MIXED.leaves]
    leaves[1].requires_grad_()
    rest = (MIXED.slices, MIXED.rows, MIXED.remote_rows, MIXED.heads, leaves, MIXED.mod, 100, 0.3)
    out, _ = torch.ops.hsap.attend(*MIXED.floats, *rest)
    out.sum().backward()  # a gradient of stride 0
    assert (
        leaves[0].grad is None and leaves[1].grad is not None and not leaves[1].grad.any()
    )  # alibi does not read the table


def test_lse_alone_has_a_gradient() -> None:
    found = []
    for attend in (torch.ops.hsap.attend, attend_reference):
        q, k, v, *far = (x if x is None else x.detach().requires_grad_() for x in MIXED.floats)
        rest = (MIXED.slices, MIXED.rows, MIXED.remote_rows, MIXED.heads, list(MIXED.leaves), MIXED.mod)
        lse = attend(q, k, v, *far, *rest, 100, 0.3)[1]
        lse.square().sum().backward()
        assert v.grad is None or not v.grad.any()
        found.append([q.grad, k.grad, far[0].grad])
    assert max(errors(*found)) <= 1e-12


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"slices": torch.zeros(2, 6, dtype=torch.int64)},
            r"slices are \(2, 6\) torch.int64 on cpu, expected",
        ),
        ({"mod": ""}, "mod is empty; pass formula.dumps"),
        ({"rows": None}, "rows is None; pass"),
        ({"heads": None}, "heads is None; pass"),
    ],
)
def test_messages(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(MIXED, **change).run(torch.ops.hsap.attend)  # type: ignore[arg-type]
