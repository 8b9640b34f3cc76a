"""The canonical attention: whole sequences, dense.  What ``lift_mask`` writes and the passes after it
partition; run as it is, it is the definition of what they must compute.

Shapes: q (B, H, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), result (B, H, S, Dv) in q's dtype.
"""

from __future__ import annotations

import torch

from hsap_compile import formula

_library = torch.library.Library("hsap", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] leaves, str logits, float scale) -> Tensor",
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    leaves: list[torch.Tensor],
    logits: str,
    scale: float,
) -> torch.Tensor:
    """softmax(logits(scale * q k^T, b, h, q, k)) v; a query that attends to nothing gets zeros.  A formula
    with a sink has one more logit, whose value is zero."""
    repeat = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
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
    return torch.matmul(weights, values.to(wide)).to(q.dtype)


_library.impl("attention", attention, "CompositeImplicitAutograd")

OP = torch.ops.hsap.attention.default


def result(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What looks like ``attention(q, .., v, ..)``, which takes long to find out from its formula."""
    return q.new_empty((*q.shape[:3], v.shape[3]))
