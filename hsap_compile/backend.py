"""The entry point: ``torch.compile(model, backend="hsap")``."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from hsap_compile._torch import (
    CHECKPOINT,
    CUSTOM_FUNCTION,
    ERROR_AT_LIMIT,
    FLEX_ATTENTION,
    MORE_GRAPHS,
    WHOLE_UNDER_DDP,
    FakeTensor,
    RetraceWithSymbols,
    belongs_to_module,
    check_version,
    equal_now,
    expr_of,
    guard_at_most,
    hint_of,
    last_graph,
    mark_numbers_symbolic,
    mark_symbolic,
)
from hsap_compile.errors import Refused, too_few
from hsap_compile.graph import placeholders, positional
from hsap_compile.mesh import group_name, place_in
from hsap_compile.options import Options, parse
from hsap_compile.passes._attention_calls import call_of, longest_sequences
from hsap_compile.pipeline import compile_graph, constant_length
from hsap_compile.plan.placement import LEAST
from hsap_compile.runtime import Runner

log = logging.getLogger("hsap_compile")

_FEW = 8  # tokens by which a batch's inputs may differ in length


def hsap(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of dynamo's graphs for all ranks of the mesh.

    ``options``: see ``hsap_compile.options.Options``.  Raises ``Refused`` with what, got, wanted, do.
    """
    check_version()
    chosen = parse(options, mode)
    if of_constants(module):
        return module.forward
    _, ranks = place_in(group_name(chosen.mesh))
    if ranks > 1 and any(isinstance(x, FakeTensor) for x in example_inputs):
        raise Refused(
            "DistributedDataParallel cuts the graph into pieces",
            got="a piece of a graph, made for one of DDP's buckets of parameters",
            wanted="the whole graph",
            do=f"set {WHOLE_UNDER_DDP}, or compile the model without DDP: its gradients are summed over the "
            "ranks already",
        )
    with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        length = prepare(module, example_inputs, ranks)
        if ranks > 1 and (graphs := last_graph()):
            _check_last(graphs, chosen)
        return Runner(compile_graph(module, chosen, length))


def _check_last(graphs: int, options: Options) -> None:
    """Torch compiles so many graphs of a function, and runs what needs another one in eager: whole on every
    rank, with whole gradients and outputs."""
    if options.grad_sync and options.outputs == "gather":
        log.warning(
            "this function was compiled %d times, and no more: the next kind of call runs in eager, whole on "
            "every rank; raise %s (TORCH_LOGS=recompiles says what differs)", graphs, MORE_GRAPHS,
        )  # fmt: skip
        return
    raise Refused(
        "the next kind of call would silently run in eager, with whole gradients and outputs on every rank",
        got=f'"grad_sync": {options.grad_sync}, "outputs": "{options.outputs}", and graph {graphs} of one '
        "function, the last one that torch compiles",
        wanted="compiled calls only, or an error",
        do=f"raise {MORE_GRAPHS} (TORCH_LOGS=recompiles says what differs between calls), or set "
        f"{ERROR_AT_LIMIT}",
    )


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    """In the place of a caller's hooks (a checkpoint's): what is traced is no business of theirs."""
    return x


def of_constants(module: GraphModule) -> bool:
    """Whether no tensor goes into dynamo's graph: a piece between two graph breaks, which runs as it is."""
    return not any(isinstance(n.meta["example_value"], torch.Tensor) for n in placeholders(module))


def prepare(module: GraphModule, example_inputs: Sequence[Any], ranks: int) -> sympy.Expr | None:
    """Check the inputs and return the symbol of their length, None when it is static.

    On several ranks None means that no input has tokens (a piece between two graph breaks).

    Raises ``RetraceWithSymbols``, which dynamo answers with a graph that has one.
    """
    _check_inputs(module)
    size = _sequence_size(module)
    few = size is not None and hint_of(size) < LEAST * ranks
    if few and ranks > 1 and next(_attended(module), None) is None:
        if isinstance(size, torch.SymInt):
            guard_at_most(size, LEAST * ranks - 1)
        return None  # a vector of a piece between two graph breaks: every rank computes all of it
    if few and ranks > 1 and _is_given(module, size):
        raise too_few(hint_of(size), ranks, LEAST)
    if ranks > 1 and isinstance(size, torch.SymInt):
        _share_length(module, size)
    try:
        symbol = None if size is None else _symbol(module, example_inputs, size)
        _fix_rows(module, symbol)
        return symbol
    except Refused as reason:
        if ranks > 1 and next(_attended(module), None) is not None:
            raise
        alone = "" if ranks == 1 else "every rank computes all of it, and "
        log.warning("%sanother length will compile again: %s", alone, reason)
        return None  # a piece between two graph breaks, if there are several ranks


def _is_given(module: GraphModule, size: Any) -> bool:
    """Whether rows of words are given, of ``size`` each."""
    inputs = [n.meta["example_value"] for n in placeholders(module) if not belongs_to_module(n)]
    words = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype in (torch.int64, torch.int32)]
    return any(x.dim() > 0 and equal_now(size, x.shape[-1]) for x in words)


def _nodes(module: GraphModule) -> Iterator[Node]:
    """Those of ``module`` and of the bodies in it (checkpoints)."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            yield from part.graph.nodes


def _check_inputs(module: GraphModule) -> None:
    for node in placeholders(module):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor) and value.is_nested:
            raise Refused(
                "nested tensors are not supported",
                got=f"{node.name}, rows of unlike lengths in one tensor",
                wanted="tokens of all documents in one row, and documents in the mask",
                do="pass x.values()[None] and position_ids that restart, or cumulative lengths: x.offsets()",
            )
        if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "cuda"):
            raise Refused(
                f"{value.device.type} tensors are not supported",
                got=f"{node.name} on {value.device}",
                wanted="tensors on cpu or cuda: partial attention has no other kernels",
                do="move the model and the batch there, or use another backend",
            )


def _sequence_size(module: GraphModule) -> Any:
    """The length of a row: what the attentions of the graph attend over, else what integer inputs share."""
    found = [size for size, _ in _attended(module)]
    lengths, known = [], set[sympy.Expr]()
    for node in placeholders(module):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor) and not belongs_to_module(node):
            if not value.is_floating_point() and value.dim() > 0:
                lengths.append(value.shape[-1])
                known.update(expr_of(size) for size in value.shape)  # (B, S), or (S, B)
    # of several sequences (an encoder's and a decoder's), one that is given as numbers of words
    given = next((size for size in found if expr_of(size) in known), None)
    if given is not None or not lengths:
        return next(iter(found), None) if given is None else given
    nearest = hint_of([*found, *lengths][0])  # rows may be cut, or have more in front, inside of the model
    return min(lengths, key=lambda size: abs(hint_of(size) - nearest))


def _attended(module: GraphModule) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Of every attention that dynamo's graph shows: how many queries a row has, and how many rows there are,
    in one number or more."""
    for node in _nodes(module):
        value = node.meta.get("example_value")
        name = getattr(node.target, "__name__", str(node.target))
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is FLEX_ATTENTION:
            yield _operand(node).shape[-2], _operand(node).shape[:-2]
        elif node.target is torch.nn.functional.multi_head_attention_forward:
            yield _operand(node).shape[0], _operand(node).shape[1:-1]
        elif (call := call_of(node)) is not None:
            shape = _operand(node).shape
            yield shape[call.tokens], shape[: call.tokens]
        elif not isinstance(value, torch.Tensor):
            continue
        elif name == "scaled_dot_product_attention":
            yield value.shape[-2], value.shape[:-2]
        elif name in ("softmax", "_softmax") and value.dim() >= 3:
            others = value.shape[-2:-1] if value.dim() == 3 else value.shape[1:-1]
            width = expr_of(value.shape[-1])
            size = next((size for size in others if expr_of(size) == width), None)
            if size is not None:
                yield size, [other for other in value.shape[:-1] if expr_of(other) != width]


def _fix_rows(module: GraphModule, symbol: sympy.Basic | None) -> None:
    """Other numbers of rows compile again: they are numbers in the graph, unless they depend on data, or are
    as many as tokens (a softmax over n of n numbers for every token looks like an attention)."""
    known = [
        size
        for _, rows in _attended(module)
        for size in rows
        if equal_now(size, size) and symbol not in expr_of(size).free_symbols  # it was known
    ]
    for node in placeholders(module):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor) and not belongs_to_module(node):
            others = [size for size in value.shape if symbol not in expr_of(size).free_symbols]
            if len(others) < value.dim():  # labels have as many rows, whether or not they meet words
                known += [x for x in others if any(equal_now(x, size) for size in known)]
    for size in known:
        int(size)


def _operand(node: Node) -> torch.Tensor:
    """The query of an attention."""
    return positional(node)[0].meta["example_value"]


def _share_length(module: GraphModule, size: torch.SymInt) -> None:
    """Inputs as long as the rows are of the rows' length: adding them up would say so, a gather does not
    (``logits.gather(-1, labels[..., None])``).  So are those as long as one that rows are made of.  A batch
    in which they are not compiles again."""
    inputs = [
        other
        for node in placeholders(module)
        if isinstance(value := node.meta["example_value"], torch.Tensor) and not belongs_to_module(node)
        for other in (value.shape[1:] if value.dim() > 1 else value.shape)
        if expr_of(other).is_Symbol
    ]
    source = next((x for x in inputs if expr_of(x) in expr_of(size).free_symbols), size)
    for length in (size, source):
        for other in inputs:
            if equal_now(length, other):
                bool(length == other)  # asked, it becomes a guard, and both one symbol


def _symbol(module: GraphModule, example_inputs: Sequence[Any], size: Any) -> sympy.Basic | None:
    """Of what S is made.  A graph in which it is a number is traced again with the batch's token dimensions
    symbolic."""
    expr = expr_of(size)
    symbol = next(iter(expr.free_symbols), None)
    if symbol is not None and (expr - symbol).is_Integer:
        return symbol
    if not expr.is_Integer:
        raise Refused(
            "the sequence length is not the size of an input",
            got=f"rows of {expr} tokens",
            wanted="rows as long as an input's dimension, or a constant number of tokens more or fewer",
            do="pad or cut the batch before the compiled function, not inside of it",
        )
    length = int(expr)
    cut = _cuts_buffers(module, {length, *(hint_of(size) for size, _ in _attended(module))})
    given = [
        (node, example, node.meta["example_value"])
        for node, example in zip(placeholders(module), example_inputs, strict=True)
        if isinstance(node.meta["example_value"], torch.Tensor) and not belongs_to_module(node)
    ]
    counted = _counted(module)
    inputs = [
        (example, ([*range(counted[node], value.dim())], [], []))
        if node in counted
        else (example, _token_dims(value, length))
        for node, example, value in given
    ]
    longest = {size for node in _nodes(module) for size in longest_sequences(node)}
    for which in range(3):  # likely ones; where S stays a number, others that are as long, or nearly
        marked = [mark_symbolic(x, dim, unknown=cut) for x, dims in inputs for dim in dims[which]]
        if which == 0:
            marked.append(mark_numbers_symbolic(longest))
        if any(marked) and length > 1:
            raise RetraceWithSymbols("hsap: the token dimension must be symbolic")
    if length > 1 and mark_numbers_symbolic({length}):
        raise RetraceWithSymbols("hsap: a number that is the length must be symbolic")
    as_long = any(equal_now(size, length) for _, _, value in given for size in value.shape[-2:])
    if as_long and length > 1:
        raise constant_length(length, [n.meta["example_value"] for n in placeholders(module)])
    return None


def _cuts_buffers(module: GraphModule, lengths: Collection[int]) -> bool:
    """Whether a buffer of the model is cut to a length that it has, as in ``mask[:, :, :S, :S]``: one is by
    chance as large as the other, and by asking which is smaller torch fixes S."""
    buffers = {n for n in placeholders(module) if belongs_to_module(n)}
    for node in module.graph.nodes:
        if node.target is operator.getitem and node.args[0] in buffers:
            index = positional(node)[1]
            for part in index if isinstance(index, tuple) else (index,):
                stop = part.stop if isinstance(part, slice) else None
                stop = stop.meta["example_value"] if isinstance(stop, Node) else stop
                if isinstance(stop, int | torch.SymInt) and expr_of(stop) in lengths:
                    return True
    return False


def _counted(module: GraphModule) -> dict[Node, int]:
    """Inputs whose sizes, from a dimension on, count blocks or documents: cumulative lengths, and what a
    ``BlockMask`` from outside is made of, (B, H, blocks, ..)."""
    found = dict[Node, int]()
    for node in module.graph.nodes:
        if node.target is FLEX_ATTENTION:
            map_arg(positional(node)[4], lambda table: found.setdefault(table, 2))
        elif call := call_of(node):
            map_arg([call.given[name] for name in call.lengths or ()], lambda ends: found.setdefault(ends, 0))
        elif node.target in (CHECKPOINT, CUSTOM_FUNCTION):
            inner: Any = module.get_submodule(positional(node)[0].target)
            counted, given_to = _counted(inner), placeholders(inner)
            operands = positional(node)[len(positional(node)) - len(given_to) :]
            for operand, given in zip(operands, given_to, strict=True):
                if given in counted:
                    found.setdefault(operand, counted[given])
    return found


def _token_dims(value: torch.Tensor, length: int) -> tuple[list[int], list[int], list[int]]:
    """The dimensions of an input that are ``length`` long: those that hold the tokens of a row, and others,
    which may be so long by chance (a width), or hold them as well (a mask).  Last, those that may hold a few
    tokens fewer or more (of labels that were shifted, of words that are cut inside of the model)."""
    matching = [d for d, size in enumerate(value.shape) if expr_of(size) == length]
    chosen, last = matching[-1:], value.dim() - 1
    if value.dim() >= 4 or value.dtype == torch.bool:  # a dense mask
        chosen = matching[-2:]
    elif value.is_floating_point() and value.dim() > 2:
        chosen, last = [d for d in matching if d == 1] or matching[:1], 1
    others = [d for d in matching if d not in chosen and (d > 0 or value.dim() < 3)]
    near = last >= 0 and isinstance(value.shape[last], int) and 0 < abs(value.shape[last] - length) <= _FEW
    return chosen, others, [last] if near else []
