"""Partial attention whose logits are an index formula: one dense block of query rows x key rows at a time.

Shapes: Hq query heads, Hkv key/value heads, nq queries and nk keys of a block, D head size; q (Hq, nq, D),
k and v (Hkv, nk, D), all of the computed dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch
from torch import Tensor

from hsap_compile import formula
from hsap_compile.kernels.slices import Run, Span
from hsap_compile.masks import normalise


class Parts(NamedTuple):
    """A formula: its logits, the sink (one more logit of every row, whose weight is dropped) if it has one,
    and whether masked logits are finite, so that a row which sees nothing sees everything alike."""

    logits: sympy.Basic
    sink: sympy.Basic | None
    soft: bool


@functools.lru_cache(maxsize=1024)
def read(mod: str) -> Parts:
    """The parts of the formula ``mod``."""
    logits, sink = formula.without_sink(formula.loads(mod))
    return Parts(logits, sink, normalise(logits)[0].soft)


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula and what it reads; leaves are in the computed dtype or above, so are their gradients."""

    expr: sympy.Basic
    sink: sympy.Basic | None
    soft: bool
    rows: Tensor | None
    remote_rows: Tensor | None
    heads: Tensor | None
    leaves: tuple[Tensor, ...]
    tokens: int

    @classmethod
    def ready(
        cls,
        mod: str,
        rows: Tensor | None,
        remote_rows: Tensor | None,
        heads: Tensor | None,
        leaves: Sequence[Tensor],
        tokens: int,
        dtype: torch.dtype,
    ) -> Formula:
        raised = [x.detach() for x in leaves]
        raised = [x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x for x in raised]
        return cls(*read(mod), rows, remote_rows, heads, tuple(raised), tokens)

    def sinks(self, lse: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The sink of every query row and head (R, Hq), as ``lse``."""
        values: dict[str, Tensor | int] = {"S": self.tokens}
        if self.rows is not None:
            values |= {"b": self.rows[:, 0, None], "q": self.rows[:, 1, None]}
        if self.heads is not None:
            values["h"] = self.heads
        assert self.sink is not None
        return _as_dtype(formula.evaluate(self.sink, values, leaves), lse).expand(lse.shape)

    def logits(self, score: Tensor, run: Run, leaves: Sequence[Tensor]) -> Tensor:
        """Logits (Hq, nq, nk) of a block with scaled products ``score`` of the same shape."""
        names = {symbol.name for symbol in self.expr.free_symbols}
        values: dict[str, Tensor | int] = {"score": score, "S": self.tokens}
        if names & {"b", "q"}:
            at = _block_rows(self.rows, "rows", run.q)
            values |= {"b": at[:, 0, None], "q": at[:, 1, None]}
        if "k" in names:
            keys = (self.remote_rows, "remote_rows") if run.remote else (self.rows, "rows")
            values["k"] = _block_rows(*keys, run.k)[:, 1]
        if "h" in names:
            if self.heads is None:
                raise ValueError("hsap::attend: the formula reads h, but heads is None; pass (Hq,) int64")
            values["h"] = self.heads[:, None, None]
        value = formula.evaluate(self.expr, values, leaves)
        return _as_dtype(value, score).expand(score.shape)


def _block_rows(rows: Tensor | None, name: str, span: Span) -> Tensor:
    if rows is None:
        raise ValueError(
            f"hsap::attend: the formula reads positions, but {name} is None; pass (rows, 2) int64"
        )
    return rows[span.start : span.start + span.length]


def _as_dtype(value: Tensor | float, score: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return score.new_tensor(value)
    if value.dtype == torch.float64 and score.dtype != torch.float64:
        # a finite float64 below float32's range must not become -inf: that row would lose its keys
        lowest = torch.finfo(score.dtype).min
        return value.clamp(min=lowest).masked_fill(value == -torch.inf, -torch.inf).to(score.dtype)
    return value.to(score.dtype)


def _fold(x: Tensor, groups: int) -> Tensor:
    """(Hq, nq, ...) as (Hkv, G * nq, ...), so that one product serves the G query heads of a key head."""
    return x.reshape(groups, -1, x.shape[-1])


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products (Hq, nq, nk)."""
    return torch.bmm(_fold(q, k.shape[0]) * scale, k.transpose(1, 2)).view(*q.shape[:2], k.shape[1])


def forward(
    index: Formula, run: Run, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (Hq, nq, D), peak (Hq, nq), mass (Hq, nq)); lse = peak + log(mass).

    The two stay apart because they do not fit one float where the peak is as low as finfo.min.
    """
    logits = index.logits(scores(q, k, scale), run, index.leaves)
    peak = logits.amax(-1, keepdim=True)
    weight = logits.sub(peak.masked_fill(peak == -torch.inf, 0)).exp_()
    mass = weight.sum(-1, keepdim=True)
    out = torch.bmm(_fold(weight, k.shape[0]), v).view(q.shape)
    return out.div_(mass.masked_fill(mass == 0, 1)), peak[..., 0], mass[..., 0]


@dataclass(frozen=True, slots=True)
class Softmax:
    """What the backward of a block reads of the whole softmax of its query rows."""

    grad: Tensor  # (Hq, nq, D)
    out: Tensor  # (Hq, nq, D)
    lse: Tensor  # (Hq, nq), +inf where a row has no key: exp(logit - lse) is then 0, not NaN
    log_mass: Tensor | None  # (Hq, nq): what rounding took from lse

    def weights(self, logits: Tensor) -> Tensor:
        weight = logits.sub(self.lse[..., None])
        if self.log_mass is not None:
            weight.sub_(self.log_mass[..., None])
        return weight.exp_()


def backward(
    index: Formula,
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softmax: Softmax,
    wanted: Sequence[int],
    sums: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a block, exact for its part of the softmax; adds to ``sums`` of the wanted leaves."""
    groups = k.shape[0]
    leaves = list(index.leaves)
    score = scores(q, k, scale)
    with torch.enable_grad():
        score.requires_grad_()
        for i in wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        logits = index.logits(score, run, leaves)
    weight = softmax.weights(logits.detach())
    grad = _fold(softmax.grad, groups)
    d_logits = torch.bmm(grad, v.transpose(1, 2)).view_as(weight)
    d_logits.sub_((softmax.grad * softmax.out).sum(-1, keepdim=True)).mul_(weight)
    sources = [score, *(leaves[i] for i in wanted)]
    grads: Sequence[Tensor | None] = [None] * len(sources)
    if logits.requires_grad:
        grads = torch.autograd.grad(logits, sources, d_logits, allow_unused=True)
    for total, part in zip(sums, grads[1:], strict=True):
        if part is not None:
            total.add_(part)
    d_values = torch.bmm(_fold(weight, groups).transpose(1, 2), grad)
    if grads[0] is None:
        return torch.zeros_like(q), torch.zeros_like(k), d_values
    d_score = _fold(grads[0] * scale, groups)
    d_q = torch.bmm(d_score, k).view(q.shape)
    return d_q, torch.bmm(d_score.transpose(1, 2), _fold(q, groups)), d_values


def sink_forward(index: Formula, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out (R, Hq, D), in place, and lse (R, Hq) with the sink of every row, which has no value."""
    together = torch.logaddexp(lse, index.sinks(lse, index.leaves))
    return out.mul_((lse - together).exp_()[..., None]), together


def sink_backward(
    index: Formula, delta: Tensor, lse: Tensor, wanted: Sequence[int], sums: Sequence[Tensor]
) -> None:
    """A sink takes its weight times -delta, grad . out, of every row (R, Hq); adds to ``sums``."""
    leaves = list(index.leaves)
    with torch.enable_grad():
        for i in wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        sinks = index.sinks(lse, leaves)
    if not sinks.requires_grad:
        return
    d_sinks = (sinks.detach() - lse).exp_().mul_(delta).neg_()
    grads = torch.autograd.grad(sinks, [leaves[i] for i in wanted], d_sinks, allow_unused=True)
    for total, part in zip(sums, grads, strict=True):
        if part is not None:
            total.add_(part)


def leaf_grads(leaves: Sequence[Tensor], wanted: Sequence[int], sums: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all leaves; no ``sums`` where nothing read them; empty where none is wanted."""
    found = dict(zip(wanted, sums, strict=False))
    result = []
    for i, leaf in enumerate(leaves):
        total = found.get(i)
        if i not in wanted:
            result.append(leaf.new_empty(0))
        else:
            result.append(leaf.new_zeros(leaf.shape) if total is None else total.to(leaf.dtype).contiguous())
    return result
