"""The operators that copy rows for an exchange and after it: each stays on its rank and has a transpose.

===========  ============================  ==========
operator     forward                       backward
===========  ============================  ==========
split_heads  first and other tokens apart  join_heads
join_heads   both together again           split_heads
pool         own, received, constant row   unpool
pack         rows that others need         unpack
together     rows of several exchanges     apart
laid_out     the same in other memory      identity
===========  ============================  ==========

They are operators because they copy.  A view of an unknown number of rows, saved for the backward, has
strides that Inductor does not promise to keep.  Where Inductor (2.13) builds the operands of a ``cat``
inside of its result, it may write over one in place, save that for the backward, and give the memory of the
whole to another value.  And it fuses what reads one table, so that the rows of all layers would be packed,
and held, at once.
"""

from __future__ import annotations

from typing import Any

import torch

from hsap_compile.kernels.exchange import contiguous_copy, define


def _part_widths(xs: Any, repeats: list[int], groups: int) -> list[int]:
    """Elements of a token in what one rank of a group is sent of each of ``xs`` (B, H, n, D)."""
    return [x.shape[0] * (x.shape[1] * r // groups) * x.shape[3] for x, r in zip(xs, repeats, strict=True)]


def _part_of(
    packed: torch.Tensor, first: int, batch: int, heads: int, width: int, groups: int
) -> torch.Tensor:
    """What ``packed`` (groups * n, ...) holds of a tensor (B, H, n, D) from element ``first`` of a token on:
    a view (B, n, groups, H / groups, D)."""
    count = heads // groups
    part = packed.narrow(1, first, batch * count * width).unflatten(1, (batch, count, width))
    return part.unflatten(0, (groups, packed.shape[0] // groups)).permute(2, 1, 0, 3, 4)


def _split_heads(xs: list[torch.Tensor], first: int, groups: int, repeats: list[int]) -> list[torch.Tensor]:
    """Of each (B, H, n, D), its ``first`` tokens (B * first, H, D); and at the end what is sent of the other
    tokens' heads, each repeated so often, to each rank of a group in turn, all of ``xs`` side by side:
    (groups * (n - first), ...)."""
    batch, _, n, _ = xs[0].shape
    alone = [contiguous_copy(x[:, :, :first].transpose(1, 2)).flatten(0, 1) for x in xs]
    widths = _part_widths(xs, repeats, groups)
    packed = xs[0].new_empty((groups * (n - first), sum(widths)))
    done = 0
    for x, repeat, size in zip(xs, repeats, widths, strict=True):
        _, heads, _, width = x.shape
        part = _part_of(packed, done, batch, heads * repeat, width, groups)
        rows = x[:, :, first:].transpose(1, 2)
        if repeat > 1:
            rows = rows.repeat_interleave(repeat, 2)
        part.copy_(rows.unflatten(2, part.shape[2:4]))
        done += size
    return [*alone, packed]


def _split_heads_fake(xs: Any, first: Any, groups: int, repeats: list[int]) -> Any:
    batch, _, n, _ = xs[0].shape
    alone = [x.new_empty((batch * first, x.shape[1], x.shape[3])) for x in xs]
    return [*alone, xs[0].new_empty((groups * (n - first), sum(_part_widths(xs, repeats, groups))))]


def _split_heads_setup(ctx: Any, inputs: Any, output: Any) -> None:
    xs, _, ctx.groups, ctx.repeats = inputs
    ctx.batch, ctx.n = xs[0].shape[0], xs[0].shape[2]


def _split_heads_backward(ctx: Any, grads: list[torch.Tensor]) -> Any:
    return JOIN_HEADS(grads[:-1], grads[-1], ctx.batch, ctx.n, ctx.groups, ctx.repeats), None, None, None


SPLIT_HEADS = define(
    "split_heads(Tensor[] xs, SymInt first, int groups, int[] repeats) -> Tensor[]",
    _split_heads,
    _split_heads_fake,
    _split_heads_backward,
    _split_heads_setup,
)


def _join_heads(
    alone: list[torch.Tensor], packed: torch.Tensor, batch: int, n: int, groups: int, repeats: list[int]
) -> list[torch.Tensor]:
    """The transpose of split_heads: each (B, H, n, D), laid out as (B, n, H, D)."""
    found, done = [], 0
    for x, repeat in zip(alone, repeats, strict=True):
        first, heads, width = x.shape[0] // batch, x.shape[1], x.shape[2]
        made = x.new_empty((batch, n, heads, width))
        made[:, :first] = x.unflatten(0, (batch, first))
        part = _part_of(packed, done, batch, heads * repeat, width, groups)
        done += batch * (heads * repeat // groups) * width
        if repeat > 1:
            made[:, first:] = part.flatten(2, 3).unflatten(2, (heads, repeat)).sum(3)
        else:
            made[:, first:].unflatten(2, part.shape[2:4]).copy_(part)
        found.append(made.transpose(1, 2))
    return found


def _join_heads_fake(alone: Any, packed: Any, batch: int, n: Any, groups: int, repeats: list[int]) -> Any:
    return [x.new_empty((batch, n, *x.shape[1:])).transpose(1, 2) for x in alone]


def _join_heads_setup(ctx: Any, inputs: Any, output: Any) -> None:
    alone, _, batch, _, ctx.groups, ctx.repeats = inputs
    ctx.first = alone[0].shape[0] // batch


def _join_heads_backward(ctx: Any, grads: list[torch.Tensor]) -> Any:
    *alone, packed = SPLIT_HEADS(grads, ctx.first, ctx.groups, ctx.repeats)
    return alone, packed, None, None, None, None


JOIN_HEADS = define(
    "join_heads(Tensor[] alone, Tensor packed, int batch, SymInt n, int groups, int[] repeats) -> Tensor[]",
    _join_heads,
    _join_heads_fake,
    _join_heads_backward,
    _join_heads_setup,
)


def _pool(own: torch.Tensor, received: torch.Tensor, dim: int, fill: float) -> torch.Tensor:
    """The rows (dimension ``dim``) of ``own``, those of ``received`` (rows first), and one of ``fill``."""
    n, more = own.shape[dim], received.shape[0]
    made = own.new_empty((*own.shape[:dim], n + more + 1, *own.shape[dim + 1 :]))
    made.narrow(dim, 0, n).copy_(own)
    made.narrow(dim, n, more).copy_(received.movedim(0, dim))
    made.narrow(dim, n + more, 1).fill_(fill)
    return made


def _pool_fake(own: Any, received: Any, dim: int, fill: float) -> Any:
    return own.new_empty((*own.shape[:dim], own.shape[dim] + received.shape[0] + 1, *own.shape[dim + 1 :]))


def _pool_setup(ctx: Any, inputs: Any, output: Any) -> None:
    own, received, ctx.dim, _ = inputs
    ctx.own, ctx.received = own.shape[ctx.dim], received.shape[0]


def _pool_backward(ctx: Any, grad: torch.Tensor) -> Any:
    return *UNPOOL(grad, ctx.own, ctx.received, ctx.dim), None, None


def _unpool(x: torch.Tensor, own: int, received: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = x.narrow(dim, 0, own), x.narrow(dim, own, received).movedim(dim, 0)
    return contiguous_copy(parts[0]), contiguous_copy(parts[1])


def _unpool_fake(x: Any, own: Any, received: Any, dim: int) -> Any:
    before, behind = x.shape[:dim], x.shape[dim + 1 :]
    return x.new_empty((*before, own, *behind)), x.new_empty((received, *before, *behind))


UNPOOL = define(
    "unpool(Tensor x, SymInt own, SymInt received, int dim) -> (Tensor, Tensor)", _unpool, _unpool_fake
)
POOL = define(
    "pool(Tensor own, Tensor received, int dim, float fill) -> Tensor",
    _pool,
    _pool_fake,
    _pool_backward,
    _pool_setup,
)


def _pack(k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    """``rows`` (R) of ``k`` (n, H, D) and ``v`` (n, H, Dv) side by side: (R, H * D + H * Dv).  It is not done
    before ``after`` has been computed, whose elements it does not read."""
    flat = k.flatten(1), v.flatten(1)
    made = k.new_empty((rows.shape[0], flat[0].shape[1] + flat[1].shape[1]))
    for x, part in zip(flat, made.split([x.shape[1] for x in flat], 1), strict=True):
        torch.index_select(x, 0, rows, out=part)
    return made


def _pack_fake(k: Any, v: Any, rows: Any, after: Any) -> Any:
    return k.new_empty((rows.shape[0], k.shape[1] * k.shape[2] + v.shape[1] * v.shape[2]))


def _pack_setup(ctx: Any, inputs: Any, output: Any) -> None:
    k, v, rows, _ = inputs
    ctx.n, ctx.heads, ctx.widths = k.shape[0], k.shape[1], [k.shape[2], v.shape[2]]
    ctx.save_for_backward(rows)


def _pack_backward(ctx: Any, grad: torch.Tensor) -> Any:
    (rows,) = ctx.saved_tensors
    return *UNPACK(grad, rows, ctx.n, ctx.heads, ctx.widths, None, None), None, None


def _unpack(
    x: torch.Tensor,
    rows: torch.Tensor,
    n: int,
    heads: int,
    widths: list[int],
    k: torch.Tensor | None,
    v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The transpose of pack, added to ``k`` and ``v``: what several ranks send back for a row is added up."""
    found = []
    for part, width, base in zip(x.split([heads * w for w in widths], 1), widths, (k, v), strict=True):
        total = part.new_zeros((n, part.shape[1])) if base is None else contiguous_copy(base).flatten(1)
        found.append(total.index_add_(0, rows, part).unflatten(1, (heads, width)))
    return found[0], found[1]


def _unpack_fake(x: Any, rows: Any, n: Any, heads: int, widths: list[int], k: Any, v: Any) -> Any:
    return x.new_empty((n, heads, widths[0])), x.new_empty((n, heads, widths[1]))


UNPACK = define(
    "unpack(Tensor x, Tensor rows, SymInt n, int heads, int[] widths, Tensor? k, Tensor? v)"
    " -> (Tensor, Tensor)",
    _unpack,
    _unpack_fake,
)
PACK = define(
    "pack(Tensor k, Tensor v, Tensor rows, Tensor? after) -> Tensor",
    _pack,
    _pack_fake,
    _pack_backward,
    _pack_setup,
)


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all ``parts``, in turn."""
    return torch.cat(parts)


def _together_fake(parts: Any) -> Any:
    return parts[0].new_empty((sum(p.shape[0] for p in parts), *parts[0].shape[1:]))


def _together_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.sizes = [p.shape[0] for p in inputs[0]]


def _together_backward(ctx: Any, grad: torch.Tensor) -> Any:
    return APART(grad, ctx.sizes)


def _apart(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return [contiguous_copy(part) for part in x.split(sizes)]


APART = define(
    "apart(Tensor x, SymInt[] sizes) -> Tensor[]",
    _apart,
    lambda x, sizes: [x.new_empty((size, *x.shape[1:])) for size in sizes],
)
TOGETHER = define(
    "together(Tensor[] parts) -> Tensor", _together, _together_fake, _together_backward, _together_setup
)


# --- what is read by address --------------------------------------------------------------------------


def _laid_out(x: torch.Tensor, strides: list[int]) -> torch.Tensor:
    once = x
    for dim in [d for d, stride in enumerate(strides) if stride == 0]:  # whose elements are one
        once = once.narrow(dim, 0, 1)
    return x.new_empty_strided(once.shape, strides).copy_(once).as_strided(x.shape, strides)


LAID_OUT = define(
    "laid_out(Tensor x, SymInt[] strides) -> Tensor",
    _laid_out,
    lambda x, strides: x.new_empty_strided(x.shape, strides),
    lambda ctx, grad: (grad, None),
)
