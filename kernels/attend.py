"""``hsap::attend``, partial attention of some queries over own and received keys, as an operator.

Shapes: R own rows, C remote rows, Hq query heads, Hkv key/value heads, D / Dv head sizes, M slices.

Args:
    q (R, Hq, D), k (R, Hkv, D), v (R, Hkv, Dv), k_remote (C, Hkv, D), v_remote (C, Hkv, Dv).
    slices: (M, 7) int64, always on the host; see plan/tables.py.
    rows (R, 2), remote_rows (C, 2), heads (Hq,), leaves, mod, tokens: what a formula reads, see
        formula_blocks.py.

Returns out (R, Hq, Dv) and lse (R, Hq), natural, in float32 (float64 of float64); a row without a key has out
0 and lse -inf.  Attentions are cut into parts after differentiation only, and the backward of each part is
given the out and lse of the whole (passes/_parts.py), which makes it exact.

On CPU attention.py computes it, on CUDA varlen.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsap_compile.kernels.exchange import no_second_derivative


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What lse and sums are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_ATTEND = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_remote, Tensor? v_remote, Tensor slices, Tensor? rows, "
    "Tensor? remote_rows, Tensor? heads, Tensor[] leaves, str mod, SymInt tokens, float scale) "
    "-> (Tensor out, Tensor lse)"
)
# `wanted` numbers the leaves whose gradient is asked for: inside a compiled graph they do not say
_ATTEND_BACKWARD = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? k_remote, Tensor? v_remote, Tensor slices, "
    "Tensor? rows, Tensor? remote_rows, Tensor? heads, Tensor[] leaves, str mod, SymInt tokens, "
    "float scale, Tensor out, Tensor lse, Tensor? grad_lse, int[] wanted) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_remote, Tensor dv_remote, Tensor[] dleaves)"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
torch.library.define("hsap::attend", _ATTEND, tags=_TAGS)
torch.library.define("hsap::attend_backward", _ATTEND_BACKWARD, tags=_TAGS)


@torch.library.register_fake("hsap::attend")
def _attend_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    slices: Tensor,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    mod: str,
    tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    n, n_heads, _ = q.shape
    return q.new_empty(n, n_heads, v.shape[2]), q.new_empty(n, n_heads, dtype=compute_dtype(q.dtype))


@torch.library.register_fake("hsap::attend_backward")
def _attend_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    slices: Tensor,
    rows: Tensor | None,
    remote_rows: Tensor | None,
    heads: Tensor | None,
    leaves: Sequence[Tensor],
    mod: str,
    tokens: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    n_remote = 0 if k_remote is None else k_remote.shape[0]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        k.new_empty(n_remote, *k.shape[1:]),
        v.new_empty(n_remote, *v.shape[1:]),
        [leaf.new_empty(leaf.shape if i in wanted else 0) for i, leaf in enumerate(leaves)],
    )


_TENSORS = ("q", "k", "v", "k_remote", "v_remote", "slices", "rows", "remote_rows", "heads")


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, leaves, ctx.mod, ctx.tokens, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *leaves, *output)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # what follows is not recorded
        no_second_derivative(ctx)
    n = len(_TENSORS)
    *inputs, out, lse = ctx.saved_tensors
    tensors, leaves = inputs[:n], inputs[n:]
    needs = ctx.needs_input_grad[n]
    wanted = [i for i, need in enumerate(needs) if need and leaves[i].is_floating_point()]
    dq, dk, dv, dk_remote, dv_remote, dleaves = torch.ops.hsap.attend_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        *tensors, leaves, ctx.mod, ctx.tokens, ctx.scale, out, lse, grad_lse, wanted,
    )  # fmt: skip
    remote = (None, None) if tensors[3] is None else (dk_remote, dv_remote)
    found = [grad if i in wanted else None for i, grad in enumerate(dleaves)]
    return dq, dk, dv, *remote, None, None, None, None, found, None, None, None


torch.library.register_autograd("hsap::attend", _backward, setup_context=_setup_context)


def with_gradient_of_lse(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out and out of a softmax P whose lse has a gradient, one column wider: of out, a kernel needs
    grad_out . out alone, and

        d logit = P (grad_out . v - grad_out . out + grad_lse)
                = P ((grad_out, grad_lse) . (v, 0) - (grad_out, grad_lse) . (out, -1))
    """
    if grad_lse is None:
        return grad_out, out
    column = grad_lse.to(grad_out.dtype)[..., None]
    return torch.cat([grad_out, column], -1), torch.nn.functional.pad(out, (0, 1), value=-1.0)


OP = torch.ops.hsap.attend.default
BACKWARD = torch.ops.hsap.attend_backward.default
