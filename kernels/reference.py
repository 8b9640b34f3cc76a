"""What partial attention means, in plain differentiable PyTorch: dense logits, no flash kernel.

Shapes: R own rows, C remote rows, Hq query heads, Hkv key/value heads, D / Dv head sizes, M slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsap_compile import formula


def attend_reference(
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
    """``hsap::attend`` by its definition: (out (R, Hq, Dv), lse (R, Hq)), in the dtype of the inputs.

    The arguments are those of the operator.  Memory is Hq * R * (R + C): for tests.
    """
    group = q.shape[1] // k.shape[1]
    keys_RHD = (k if k_remote is None else torch.cat([k, k_remote])).repeat_interleave(group, 1)
    values_RHD = (v if v_remote is None else torch.cat([v, v_remote])).repeat_interleave(group, 1)
    positions = _positions(rows, remote_rows)
    score_HQK = torch.einsum("qhd,khd->hqk", q, keys_RHD) * scale
    logits_HQK = torch.full_like(score_HQK, -torch.inf)
    for q0, q1, k0, k1, kind, lo, hi in slices.tolist():
        if q0 == q1 or k0 == k1:
            continue
        score = score_HQK[:, q0:q1, k0:k1]
        value, allowed = score, torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        distance = torch.arange(q1 - q0)[:, None] - torch.arange(k1 - k0)
        if kind == 1:
            allowed = distance >= 0
        elif kind == 2:
            allowed = (lo <= distance) & (distance <= hi)
        elif kind == 3:
            assert positions is not None and heads is not None
            value = _formula_logits(score, positions[q0:q1], positions[k0:k1], heads, leaves, mod, tokens)
        before = logits_HQK[:, q0:q1, k0:k1]
        logits_HQK = logits_HQK.clone()
        logits_HQK[:, q0:q1, k0:k1] = torch.where(allowed, value, before)
    sink = formula.without_sink(formula.loads(mod))[1] if mod else None
    if sink is None:
        return _softmax_attend(logits_HQK, values_RHD)
    assert rows is not None and heads is not None
    values = {"b": rows[:, 0, None], "q": rows[:, 1, None], "h": heads, "S": tokens}
    extra_QH = torch.as_tensor(formula.evaluate(sink, values, leaves)).to(q.dtype).expand(q.shape[:2])
    logits_HQK = torch.cat([logits_HQK, extra_QH.T[..., None]], -1)
    return _softmax_attend(logits_HQK, torch.cat([values_RHD, torch.zeros_like(values_RHD[:1])]))


def _positions(rows: Tensor | None, remote_rows: Tensor | None) -> Tensor | None:
    return rows if rows is None or remote_rows is None else torch.cat([rows, remote_rows])


def _formula_logits(
    score: Tensor, at_q: Tensor, at_k: Tensor, heads: Tensor, leaves: Sequence[Tensor], mod: str, tokens: int
) -> Tensor:
    """The formula on a (Hq, q, k) block; query and key columns, batch row of the query."""
    values = {
        "score": score,
        "b": at_q[:, 0, None],
        "q": at_q[:, 1, None],
        "k": at_k[:, 1],
        "h": heads[:, None, None],
        "S": tokens,
    }
    value = formula.evaluate(formula.without_sink(formula.loads(mod))[0], values, leaves)
    return torch.as_tensor(value).to(score.dtype).expand(score.shape)


def _softmax_attend(logits_HQK: Tensor, values_KHD: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over keys times values; a row with no finite logit gives out 0 and lse -inf, no NaN."""
    if not logits_HQK.shape[-1]:
        heads, queries, _ = logits_HQK.shape
        return values_KHD.new_zeros(queries, heads, values_KHD.shape[2]), logits_HQK.new_full(
            (queries, heads), -torch.inf
        )
    peak = logits_HQK.detach().amax(-1, keepdim=True)
    weight = (logits_HQK - peak.masked_fill(peak == -torch.inf, 0)).exp()
    mass = weight.sum(-1, keepdim=True)
    empty = mass == 0
    weight = weight / mass.masked_fill(empty, 1)
    lse = peak + mass.masked_fill(empty, 1).log()
    return torch.einsum("hqk,khd->qhd", weight, values_KHD), lse[..., 0].T.contiguous()
