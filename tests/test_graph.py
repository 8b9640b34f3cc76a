"""What builders infer once, and what they must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from hsap_compile._torch import FakeTensorMode, ShapeEnv
from hsap_compile.graph import Builder, ancestors
from hsap_compile.kernels.flex import inline

aten = torch.ops.aten


def placeholder(build: Builder, value: torch.Tensor) -> Node:
    node = build.graph.placeholder(f"x{len(build.graph.nodes)}")
    node.meta["val"] = build.mode.from_tensor(value, static_shapes=True)
    return node


def builder(inferred: Any = None) -> Builder:
    return Builder(
        Graph(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), inferred=inferred
    )


def test_an_operator_is_inferred_once_for_operands_alike() -> None:
    build = builder({})
    x, y = (placeholder(build, torch.zeros(3, 4)) for _ in range(2))
    assert build(aten.add.Tensor, x, 1.0).meta["val"] is build(aten.add.Tensor, y, 1.0).meta["val"]
    again = Builder(build.graph, build.mode, inferred=build.inferred)
    assert again(aten.add.Tensor, x, 1.0).meta["val"] is build(aten.add.Tensor, y, 1.0).meta["val"]


def test_without_being_asked_every_node_has_a_value_of_its_own() -> None:
    build = builder()
    x = placeholder(build, torch.zeros(3, 4))
    assert build(aten.add.Tensor, x, 1.0).meta["val"] is not build(aten.add.Tensor, x, 1.0).meta["val"]


def test_nodes_that_share_a_value_are_not_taken_for_one_another() -> None:
    build = builder({})
    a, b = (build(aten.neg.default, placeholder(build, torch.zeros(3))) for _ in range(2))
    assert a.meta["val"] is b.meta["val"]
    difference = inline(build, lambda a, b: a - b * b, a, b)
    assert set(ancestors([difference])) >= {a, b}


#: Pairs of operands that differ in one thing, on which what the operator returns depends.
UNLIKE = {
    "size": (aten.neg.default, [torch.zeros(3, 4)], [torch.zeros(4, 3)]),
    "stride": (aten.clone.default, [torch.zeros(4, 4)], [torch.zeros(4, 4).t()]),
    "offset": (aten.as_strided.default, [torch.zeros(8)[1:5], [2], [1]], [torch.zeros(8)[2:6], [2], [1]]),
    "type": (aten.neg.default, [torch.zeros(3)], [torch.zeros(3, dtype=torch.float64)]),
    "constant": (
        aten.add.Tensor,
        [torch.zeros(3, dtype=torch.int64), 1.0],
        [torch.zeros(3, dtype=torch.int64), 1],
    ),
    "truth": (aten.sum.dim_IntList, [torch.zeros(3, 4), [0], True], [torch.zeros(3, 4), [0], False]),
    "list": (aten.permute.default, [torch.zeros(2, 3, 4), [0, 2, 1]], [torch.zeros(2, 3, 4), [1, 0, 2]]),
    "conjugate": (
        aten.imag.default,
        [torch.zeros(3, dtype=torch.complex64)],
        [torch.zeros(3, dtype=torch.complex64).conj()],
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_operands_unlike_are_inferred_anew(name: str) -> None:
    target, *calls = UNLIKE[name]
    build = builder({})
    made = []
    for given in calls:
        operands = [placeholder(build, x) if isinstance(x, torch.Tensor) else x for x in given]
        made.append(looks(build(target, *operands).meta["val"]))
    wanted = [looks(target(*given)) for given in calls]
    assert made == wanted and wanted[0] != wanted[1] and build.inferred


def looks(value: torch.Tensor) -> Any:
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.is_conj(), value.is_neg()


def test_sizes_that_depend_on_data_are_new_with_every_call() -> None:
    build = builder({})
    given = [placeholder(build, torch.zeros(3, 4)) for _ in range(2)]
    sizes = [build(aten.nonzero.default, x).meta["val"].shape[0].node.expr for x in given]
    assert sizes[0] != sizes[1]


def test_what_sizes_may_depend_on_is_of_each_node_alone() -> None:
    """torch remembers on a fake tensor how many of its numbers are true: two masks are two."""
    build = builder({})
    masks = [build(aten.gt.Scalar, placeholder(build, torch.zeros(3, 4)), 0.0) for _ in range(2)]
    sizes = [build(aten.nonzero.default, mask).meta["val"].shape[0].node.expr for mask in masks]
    assert sizes[0] != sizes[1]
    assert sizes[0] == build(aten.nonzero.default, masks[0]).meta["val"].shape[0].node.expr
