"""What rules read of an operator's node, where its operands and its result have their tokens, and the rule of
an operator that is the same on local operands."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import KERNEL, RETURNING, operator_name
from hsap_compile.graph import arguments
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes.infer_tokens import TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder


def args_of(node: Node) -> Any:
    """The arguments, whose types the operator's schema knows and Python does not."""
    return node.args


def schema_of(node: Node) -> Any:
    target: Any = node.target
    return target._schema.arguments


def reads_no_numbers(node: Node) -> bool:
    """Whether the operator reads of its first operand what it is like, and nothing else."""
    name = operator_name(node.target).removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def cuts_gradient(node: Node) -> bool:
    """Whether what ``node`` returns has no gradient, whatever it reads."""
    return node.target in (torch.ops.aten.detach.default, KERNEL, RETURNING) or reads_no_numbers(node)


def tensor_inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def value_of(node: Node) -> Any:
    value = node.meta["val"]
    return value[0] if isinstance(value, tuple | list) else value


def output_axis(node: Node) -> TokenAxis:
    axis = node.meta.get("tokens")
    if axis is None and isinstance(node.meta["val"], tuple | list):
        axes = [n.meta.get("tokens") for n in node.users]
        axis = next((a for a in axes if isinstance(a, TokenAxis)), None)
    if not isinstance(axis, TokenAxis):
        raise NotLocal("the result has no single token dimension")
    return axis


def source_of(node: Node) -> tuple[Node, TokenAxis]:
    """The first operand with tokens."""
    for source in tensor_inputs(node):
        axis = source.meta.get("tokens")
        if isinstance(axis, TokenAxis):
            return source, axis
    raise NotLocal("no operand has a single token dimension")


def only_source(node: Node) -> tuple[Node, TokenAxis]:
    """The first argument, which must be the one with tokens."""
    source = args_of(node)[0]
    axis = source.meta.get("tokens")
    if not isinstance(axis, TokenAxis):
        raise NotLocal("a value without a single token dimension")
    return source, axis


def constant_of(value: Any) -> float | None:
    """The number that ``value``, or every element of it, is; None: not known."""
    if not isinstance(value, Node):
        return value if isinstance(value, int | float) else None
    name = operator_name(value.target).removeprefix("aten::").removeprefix("new_").removesuffix("_like")
    number = {"zeros": 0.0, "ones": 1.0}.get(name)
    if name == "full":
        filled = arguments(value)["fill_value"]
        number = float(filled) if isinstance(filled, int | float) else None
    return number


def einsum_letters(node: Node) -> tuple[list[str], str] | None:
    """The letters of each operand's dimensions, and of the result's, an ellipsis written out; None where it
    stands for a different number of dimensions, or the result is not said."""
    equation, operands = args_of(node)[0].replace(" ", ""), args_of(node)[1]
    inputs, arrow, result = equation.partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != len(operands):
        return None
    if "..." in equation:
        dims = [(names, x.meta["val"].dim()) for names, x in zip(letters, operands, strict=True)]
        counts = {rank - len(names) + 3 for names, rank in dims if "..." in names}
        free = [c for c in string.ascii_letters if c not in equation]
        if len(counts) != 1 or "..." not in result or len(free) < max(counts):
            return None
        lead = "".join(free[: max(counts)])
        letters, result = [names.replace("...", lead) for names in letters], result.replace("...", lead)
    return letters, result


def as_is(sharder: Sharder, node: Node) -> Any:
    """The operator itself, on local operands."""
    start = sharder.start_of(*node.all_input_nodes)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: sharder.operand(n, start))
    return Local(sharder.emit(node.target, *args, **kwargs), start)
