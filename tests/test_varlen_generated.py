"""What Inductor generates for a GPU around ``hsap::attend``: slices stay on the host, and nothing waits."""

from __future__ import annotations

import operator
import re

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import offline_gpu
from hsap_compile._torch import FakeTensorMode, fake_table
from hsap_compile.graph import Builder
from hsap_compile.kernels import attention
from hsap_compile.passes.overlap import overlap

aten = torch.ops.aten


def sources() -> list[str]:
    """Of forward and backward of sin(attend(2 q, k, v, k', v')), any number of rows and received rows."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    build = Builder(module.graph, mode)

    def given(name: str, value: torch.Tensor) -> torch.fx.Node:
        node = module.graph.placeholder(name)
        node.meta["val"] = value
        return node

    own, received = (fake_table(mode, torch.zeros(9), (0,)).shape[0] for _ in range(2))
    shapes = {
        "q": (own, 4),
        "k": (own, 2),
        "v": (own, 2),
        "k_remote": (received, 2),
        "v_remote": (received, 2),
    }
    operands = []
    for name, shape in shapes.items():
        with mode:
            value = torch.empty(*shape, 64, dtype=torch.bfloat16, requires_grad=True)
        operands.append(given(name, value))
    slices = given("slices", fake_table(mode, torch.zeros(11, 7, dtype=torch.int64), (0,)))
    twice = build(aten.mul.Tensor, operands[0], 2)
    found = build(
        attention.OP, twice, *operands[1:], slices, None, None, None, [], "", 0, 0.125
    )  # fmt: skip
    module.graph.output((build(aten.sin.default, build(operator.getitem, found, 0)),))
    module.recompile()
    return [made.source for made in offline_gpu.generate(module, rewrite=overlap)]


def test_slices_stay_on_the_host() -> None:
    forward, backward = offline_gpu.in_a_process(sources)
    for text, name in ((forward, "attend"), (backward, "attend_backward")):
        code = text.partition("class Runner")[2]
        assert len(re.findall(rf"ops\.hsap\.{name}\.default\(", code)) == 2  # own keys, received keys
        assert len(re.findall(r"ops\.hsap\.slices_of\.default\(", code)) == 2
        assert not re.search(r"\.item\(|synchronize|\.cpu\(|copy_\(|empty_strided_cpu\(", code)
    assert "device='cpu', dtype=torch.int64" in forward
