"""From a batch's tensors to what the planner works on: which pairs each mask allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch

from hsap_compile import formula
from hsap_compile.errors import Refused
from hsap_compile.masks import Band, Mask
from hsap_compile.plan import Attended
from hsap_compile.plan.attended import starts


def attended(mask: Mask, leaves: Sequence[torch.Tensor | None], batch: int, tokens: int) -> Attended:
    """``mask`` on one batch.  ``leaves``: the tensors its structure reads, on the host; None for the others.

    A band over positions that are read from a tensor (``position_ids[q] >= position_ids[k]``) is a band
    over columns where positions advance with the columns inside every label; where they do not, the
    formula is evaluated element by element.  Columns that are no tokens of the attention are a document.

    Raises ``Refused`` where a leaf holds NaN.
    """
    for leaf in leaves:
        if leaf is not None and leaf.is_floating_point() and leaf.isnan().any():
            raise Refused(
                "an attention mask compares numbers that are not",
                got=f"NaN, in a tensor of shape {tuple(leaf.shape)} that the mask {mask} reads",
                wanted="documents, positions and valid tokens in numbers",
                do="replace NaN in what the model makes its mask of (x.nan_to_num())",
            )
    first, behind = mask.others
    read = _Reader(leaves, batch, tokens - first - behind)
    if not all(_say_the_same(read.array(of_q), read.array(of_k)) for of_q, of_k in mask.alike):
        mask = mask.told_apart()
    labels = read.labels(mask.labels)
    begins = None if labels is None else starts(labels)
    residual, unread, lo, hi = mask.residual, mask.unread, None, None
    for band in mask.bands:
        if not _follows_columns(band, read, labels, begins):
            residual = unread = True
            continue
        lo = _tighter(max, lo, band.lo)
        hi = _tighter(min, hi, band.hi)
    if unread and mask.soft:  # a query may attend to nothing, hence to everything, and nobody knows which
        return unknown(mask, batch, tokens)
    key_valid, query_valid = read.valid(mask.key_valid), read.valid(mask.query_valid)
    if lo is not None and hi is not None and lo > hi:  # nothing is that far from itself
        query_valid, lo, hi = np.zeros((1, read.tokens), np.bool_), None, None
    if first or behind:
        labels = np.zeros((1, read.tokens), np.int64) if labels is None else labels
        labels, begins = _with_others(labels, first, behind, int(labels.max()) + 1), None
        key_valid, query_valid = (
            None if valid is None else _with_others(valid, first, behind, True)
            for valid in (key_valid, query_valid)
        )
    return Attended(
        batch=batch,
        tokens=tokens,
        labels=labels,
        key_valid=key_valid,
        query_valid=query_valid,
        lo=lo,
        hi=hi,
        residual=residual,
        soft=mask.soft,
        starts=begins,
    )


def _say_the_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Integers beside floats would be compared in fewer digits than they have."""
    return (one.dtype.kind == "f") == (other.dtype.kind == "f") and bool((one == other).all())


def _with_others(of_tokens: np.ndarray, first: int, behind: int, other: Any) -> np.ndarray:
    return np.pad(of_tokens, ((0, 0), (first, behind)), constant_values=other)


def unknown(mask: Mask, batch: int, tokens: int) -> Attended:
    """A mask that the host cannot read before the step: every pair may be attended."""
    return Attended(
        batch=batch, tokens=tokens, labels=None, key_valid=None, query_valid=None, lo=None, hi=None,
        residual=True, soft=mask.soft,
    )  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    leaves: Sequence[torch.Tensor | None]
    batch: int
    tokens: int

    def array(self, expr: sympy.Basic) -> np.ndarray:
        """(B or 1, S): ``expr`` at every (b, q), or at every (b, k)."""
        value = self._as_it_is(expr)
        if value is None:
            columns = torch.arange(self.tokens)[None, :]
            index = {
                "b": torch.arange(self.batch)[:, None], "q": columns, "k": columns, "S": self.tokens
            }  # fmt: skip
            value = torch.as_tensor(formula.evaluate(expr, index, self.leaves))
        rows = value.shape[0] if value.dim() == 2 else 1
        value = value.float() if value.dtype == torch.bfloat16 else value  # numpy has none; every value fits
        return value.expand(rows, self.tokens).numpy()

    def _as_it_is(self, expr: sympy.Basic) -> torch.Tensor | None:
        """A leaf whose element (b, q) is read at (b, q): what most masks read, at a tenth of the time.
        It is a copy, as plans outlive the batch."""
        number = formula.leaf_index(expr)
        leaf = None if number is None else self.leaves[number]
        if leaf is None or expr.args not in ((formula.b, formula.q), (formula.b, formula.k)):
            return None
        if leaf.dim() != 2 or leaf.shape[0] != self.batch or leaf.shape[1] < self.tokens:
            return None
        return leaf[:, : self.tokens].clone()

    def labels(self, exprs: Sequence[sympy.Expr]) -> np.ndarray | None:
        if not exprs:
            return None
        arrays = np.broadcast_arrays(*[self.array(e) for e in exprs])
        combined = np.ascontiguousarray(arrays[0])
        for other in arrays[1:]:
            _, a = np.unique(combined, return_inverse=True)
            _, b = np.unique(other, return_inverse=True)
            combined = (a.astype(np.int64) * (int(b.max()) + 1) + b).reshape(other.shape)
        if combined.dtype != np.int64:
            combined = np.unique(combined, return_inverse=True)[1].astype(np.int64).reshape(combined.shape)
        return combined

    def valid(self, condition: sympy.Basic) -> np.ndarray | None:
        return None if condition is sympy.true else np.ascontiguousarray(self.array(condition).astype(bool))


def _tighter(choose: Callable[[int, int], int], one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return one if other is None else other
    return choose(one, other)


def _follows_columns(band: Band, read: _Reader, labels: np.ndarray | None, begins: np.ndarray | None) -> bool:
    """Whether position(b, c) - c is the same wherever two tokens may attend to one another.

    ``begins``: where labels differ from the column before."""
    if band.position == formula.q:
        return True
    offset = read.array(band.position) - np.arange(read.tokens)
    if labels is None or begins is None:
        return bool((offset == offset[:, :1]).all())
    for row, label, begin in zip(*np.broadcast_arrays(offset, labels, begins), strict=True):
        if (label[1:] < label[:-1]).any():
            order = np.argsort(label, kind="stable")
            row, begin = row[order], starts(label[order])
        if (starts(row) > begin).any():
            return False
    return True
