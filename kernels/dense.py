"""The canonical attention: whole sequences, dense.  What ``lift_mask`` writes and the passes after it
partition; run as it is, it is the definition of what they must compute.

Shapes: q (B, H, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), result (B, H, S, Dv) in q's dtype; with ``lse``,
the log-sum-exp of the logits stands behind it in as many more columns as hold all its digits (``packed``).
"""

from __future__ import annotations

import torch

from hsap_compile import formula
from hsap_compile.kernels.attend import compute_dtype

_library = torch.library.Library("hsap", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] leaves, str logits, float scale, bool lse) -> Tensor",
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    leaves: list[torch.Tensor],
    logits: str,
    scale: float,
    lse: bool,
) -> torch.Tensor:
    """softmax(logits(scale * q k^T, b, h, q, k)) v; a query that attends to nothing gets zeros, and -inf as
    its log-sum-exp.  A formula with a sink has one more logit, whose value is zero."""
    repeat = q.shape[1] // k.shape[1]
    wide = compute_dtype(q.dtype)
    keys, values = (x.repeat_interleave(repeat, 1) if repeat != 1 else x for x in (k, v))
    score = torch.matmul(q.to(wide), keys.to(wide).transpose(-1, -2)) * scale
    batch, heads, queries, columns = score.shape
    index = {
        "score": score,
        "b": torch.arange(batch, device=q.device)[:, None, None, None],
        "h": torch.arange(heads, device=q.device)[:, None, None],
        "q": torch.arange(queries, device=q.device)[:, None],
        "k": torch.arange(columns, device=q.device),
        "S": columns,
    }
    expr, sink = formula.without_sink(formula.loads(logits))
    value = torch.as_tensor(formula.evaluate(expr, index, leaves), device=q.device)
    value = value.to(wide).expand(score.shape)
    empty = (value == -torch.inf).all(-1, keepdim=True)
    value = value.masked_fill(empty, 0.0)
    if sink is not None:
        extra = torch.as_tensor(formula.evaluate(sink, index, leaves), device=q.device).to(wide)
        value = torch.cat([value, extra.expand(*score.shape[:-1], 1)], -1)
    weights = torch.softmax(value, -1)[..., :columns].masked_fill(empty, 0.0)
    out = torch.matmul(weights, values.to(wide)).to(q.dtype)
    return packed(out, value.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)) if lse else out


_library.impl("attention", attention, "CompositeImplicitAutograd")

OP = torch.ops.hsap.attention.default


def result(q: torch.Tensor, v: torch.Tensor, lse: bool) -> torch.Tensor:
    """What looks like ``attention(q, .., v, .., lse)``, which takes long to find out from its formula."""
    return q.new_empty((*q.shape[:3], int(v.shape[3]) + (columns_of_lse(q.dtype) if lse else 0)))


def columns_of_lse(dtype: torch.dtype) -> int:
    """How many columns of ``dtype`` hold a number of ``compute_dtype(dtype)``."""
    return 1 if dtype == compute_dtype(dtype) else 3  # 24 binary digits, of 8 or 11


def packed(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """out (.., Dv) and lse (..), side by side: each further column is what rounding took from that before."""
    columns = []
    for _ in range(columns_of_lse(out.dtype)):
        columns.append(lse.to(out.dtype))
        lse = torch.where(lse.isinf(), 0.0, lse - columns[-1].to(lse.dtype))
    return torch.cat([out, torch.stack(columns, -1)], -1)


def unpacked(columns: torch.Tensor) -> torch.Tensor:
    """The lse (..) of such columns (.., n)."""
    return columns.to(compute_dtype(columns.dtype)).sum(-1)
