"""The operators that cross ranks, each the transpose of another where one exists.

==============  ===========================  ==============================
operator        forward                      backward
==============  ===========================  ==============================
shard           rows of a whole tensor       gather
gather          whole tensor from all rows   shard
sum_ranks       all-reduce                   identity
broadcast       identity (a copy)            all-reduce
share           identity (a copy)            the gradient on rank 0, else 0
extreme         largest over dims and ranks  the gradient, shared by all that are as large
all_to_all      rows to ranks by a table     all_to_all, the table reversed
==============  ===========================  ==============================

A *whole* tensor is the same on every rank, and so is its gradient; the gradients of ``share`` are parts
of a sum that is taken outside of the graph.  Host tables (int64, CPU) say who gets what, so that nothing is
compiled anew when documents change.  What is copied for an exchange, and after it, stands in ``copies``.
"""

from __future__ import annotations

from typing import Any

import torch

from hsap_compile._torch import lower_as_collective, process_group
from hsap_compile.errors import Refused

_library = torch.library.Library("hsap", "FRAGMENT")


_c10d = torch.ops._c10d_functional


#: The types that every backend of ``torch.distributed`` sends and adds up.
SENT = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}
SENT |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _as_sent(x: torch.Tensor) -> torch.Tensor:
    """``x``, contiguous; with its bytes as one more dimension if its type is not sent."""
    x = x.resolve_conj().contiguous()
    return x if x.dtype in SENT else x.unsqueeze(-1).view(torch.uint8)


def _as_was(sent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return sent if dtype in SENT else sent.view(dtype).squeeze(-1)


def all_gather(x: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """``x`` (N, ...) of every rank, (ranks * N, ...) in order of rank.  Not differentiable."""
    return _as_was(_c10d.wait_tensor(_c10d.all_gather_into_tensor(_as_sent(x), ranks, group)), x.dtype)


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of ``x`` over the ranks.  Not differentiable."""
    wide = x if x.dtype in SENT or x.is_complex() else x.float() if x.is_floating_point() else x.long()
    return _c10d.wait_tensor(_c10d.all_reduce(wide.contiguous(), "sum", group)).to(x.dtype)


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The backward of operators that are gradients."""
    raise Refused(
        "a gradient is differentiated",
        got="a backward through a backward (autograd.grad with create_graph=True, a gradient penalty)",
        wanted="first derivatives",
        do="compute what needs second derivatives without the backend, on the model that is not compiled",
    )


def define(schema: str, implementation: Any, fake: Any, backward: Any = None, setup: Any = None) -> Any:
    """The operator ``hsap::schema``, with its fake and its gradient."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hsap::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"hsap::{name}", backward, setup_context=setup, lib=_library)
    return getattr(torch.ops.hsap, name).default


# --- shard and gather ---------------------------------------------------------------------------------


def _shard(x: torch.Tensor, columns: torch.Tensor, order: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    return x.index_select(dim, columns)


def _shard_fake(x: Any, columns: Any, order: Any, dim: int, group: str) -> Any:
    shape = list(x.shape)
    shape[dim] = columns.shape[0]
    return x.new_empty(shape)


def _shard_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, columns, order, ctx.dim, ctx.group = inputs
    ctx.size = x.shape[ctx.dim]
    ctx.save_for_backward(columns, order)


def _shard_backward(ctx: Any, grad: torch.Tensor) -> Any:
    columns, order = ctx.saved_tensors
    return GATHER(grad, columns, order, ctx.size, ctx.dim, ctx.group), None, None, None, None


SHARD = define(
    "shard(Tensor x, Tensor columns, Tensor order, int dim, str group) -> Tensor",
    _shard,
    _shard_fake,
    _shard_backward,
    _shard_setup,
)


def _gather(
    x: torch.Tensor, columns: torch.Tensor, order: torch.Tensor, size: int, dim: int, group: str
) -> torch.Tensor:
    """Every rank's rows of dimension ``dim``, put into the caller's order: ``size`` rows."""
    ranks = process_group(group).size()
    most = -(-size // ranks)  # counts are equal up to one: pad to the larger
    rows = x.movedim(dim, 0)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    everything = all_gather(padded, ranks, group)
    whole = x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    torch.index_select(everything, 0, order, out=whole.movedim(dim, 0))
    return whole


def _gather_fake(x: Any, columns: Any, order: Any, size: Any, dim: int, group: str) -> Any:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _gather_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, columns, order, _, ctx.dim, ctx.group = inputs
    ctx.save_for_backward(columns, order)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> Any:
    columns, order = ctx.saved_tensors
    return SHARD(grad, columns, order, ctx.dim, ctx.group), None, None, None, None, None


GATHER = define(
    "gather(Tensor x, Tensor columns, Tensor order, SymInt size, int dim, str group) -> Tensor",
    _gather,
    _gather_fake,
    _gather_backward,
    _gather_setup,
)


# --- sums over ranks ----------------------------------------------------------------------------------


def _like(x: Any, group: str) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous_copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group = inputs[1]


SUM_RANKS = define(
    "sum_ranks(Tensor x, str group) -> Tensor",
    all_reduce,
    _like,
    lambda ctx, grad: (grad, None),
    _keep_group,
)

BROADCAST = define(
    "broadcast(Tensor x, str group) -> Tensor",
    lambda x, group: contiguous_copy(x),
    _like,
    lambda ctx, grad: (SUM_RANKS(grad, ctx.group), None),
    _keep_group,
)


def _times(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.times = inputs[1]


#: ``broadcast`` to so many ranks, for a gradient that is summed over them later on all the same.
SUMMED_LATER = define(
    "summed_later(Tensor x, int ranks) -> Tensor",
    lambda x, ranks: contiguous_copy(x),
    lambda x, ranks: _like(x, ""),
    lambda ctx, grad: (grad * ctx.times, None),
    _times,
)


ON_FIRST = define(
    "on_first(Tensor x, str group) -> Tensor",
    lambda x, group: (
        contiguous_copy(x) if process_group(group).rank() == 0 else torch.zeros_like(_like(x, group))
    ),
    _like,
    no_second_derivative,
)

SHARE = define(
    "share(Tensor x, str group) -> Tensor",
    lambda x, group: contiguous_copy(x),
    _like,
    lambda ctx, grad: (ON_FIRST(grad, ctx.group), None),
    _keep_group,
)


def _extreme(x: torch.Tensor, dims: list[int], least: bool, group: str) -> torch.Tensor:
    """The largest (smallest) number of ``x`` over ``dims``, which stay as 1, and over ranks.  A gather, as no
    all-reduce promises to keep NaN."""
    take = torch.amin if least else torch.amax
    part = take(x, dims, keepdim=True)
    return take(all_gather(part[None], process_group(group).size(), group), 0)


def _extreme_fake(x: Any, dims: list[int], least: bool, group: str) -> Any:
    return x.new_empty([1 if d in dims else size for d, size in enumerate(x.shape)])


def _extreme_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.dims, _, ctx.group = inputs
    ctx.save_for_backward(x, output)


def _extreme_backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, found = ctx.saved_tensors
    hits = x == found
    count = SUM_RANKS(hits.sum(ctx.dims, keepdim=True), ctx.group)
    return grad / count * hits, None, None, None


EXTREME = define(
    "extreme(Tensor x, int[] dims, bool least, str group) -> Tensor",
    _extreme,
    _extreme_fake,
    _extreme_backward,
    _extreme_setup,
)


# --- rows to ranks ------------------------------------------------------------------------------------


def _start(x: torch.Tensor, splits: torch.Tensor, rows: int, reverse: bool, group: str) -> torch.Tensor:
    outgoing, incoming = splits.tolist()
    if reverse:
        outgoing, incoming = incoming, outgoing
    if sum(incoming) != rows or sum(outgoing) != x.shape[0]:
        raise ValueError(
            f"hsap::all_to_all: splits send {sum(outgoing)} rows and receive {sum(incoming)}, "
            f"but x has {x.shape[0]} rows and the result {rows}; pass the tables of one plan"
        )
    return _as_was(_c10d.all_to_all_single(_as_sent(x), incoming, outgoing, group), x.dtype)


def _all_to_all(x: torch.Tensor, splits: torch.Tensor, rows: int, reverse: bool, group: str) -> torch.Tensor:
    """Send ``splits[0, r]`` rows of ``x`` (N, ...) to rank r, in order, and return the ``splits[1, r]``
    rows that come from each, ``rows`` in all.  ``reverse`` sends the other way."""
    return _c10d.wait_tensor(_start(x, splits, rows, reverse, group))


def _all_to_all_fake(x: Any, splits: Any, rows: Any, reverse: bool, group: str) -> Any:
    return x.new_empty((rows, *x.shape[1:]))


def _all_to_all_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, splits, _, ctx.reverse, ctx.group = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(splits)


def _all_to_all_backward(ctx: Any, grad: torch.Tensor) -> Any:
    (splits,) = ctx.saved_tensors
    return ALL_TO_ALL(grad, splits, ctx.rows, not ctx.reverse, ctx.group), None, None, None, None


ALL_TO_ALL = define(
    "all_to_all(Tensor x, Tensor splits, SymInt rows, bool reverse, str group) -> Tensor",
    _all_to_all,
    _all_to_all_fake,
    _all_to_all_backward,
    _all_to_all_setup,
)

# --- apart in time ------------------------------------------------------------------------------------

# all_to_all = wait(start), and so is sum_ranks: apart, other work goes on in between.  They have no gradient:
# graphs that have been differentiated are rewritten to them (passes/overlap.py).
ALL_TO_ALL_START = define(
    "all_to_all_start(Tensor x, Tensor splits, SymInt rows, bool reverse, str group) -> Tensor",
    _start,
    _all_to_all_fake,
)
ALL_REDUCE_START = _c10d.all_reduce.default
WAIT = _c10d.wait_tensor.default
lower_as_collective(ALL_TO_ALL_START)
