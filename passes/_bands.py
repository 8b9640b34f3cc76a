"""What flash attention over sequences (kernels/varlen.py) cannot compute exactly is refused.

It knows bands inside of documents, and logits that are the scaled product where nothing masks them.  What a
mask's formula says is known when a graph is compiled, what a batch makes of it when the batch is planned:
every rank plans the whole batch, so that all refuse it.
"""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from hsap_compile.errors import Refused, where
from hsap_compile.kernels import varlen
from hsap_compile.masks import Mask
from hsap_compile.plan import Plan, slices
from hsap_compile.plan.attended import Ints, Runs, Structure, overlaps, unanswered
from hsap_compile.plan.tables import MaskPlan

_FLEX = 'pass options={"attention": "flex"}, which evaluates any formula'


def check_site(site: Node, q: Node, v: Node, lse: bool, mask: Mask, plannable: bool) -> None:
    """Raises ``Refused`` for an attention.

    ``site`` calls it, of ``q`` (B, H, n, D) and ``v`` (B, Hkv, n, Dv); ``lse``: whether its log-sum-exp is
    read, whose gradient is one more column; ``plannable``: whether what the mask reads is known before the
    step.
    """
    query, value = q.meta["val"], v.meta["val"]
    if mask.residual:
        raise Refused(
            "flash attention over sequences cannot compute these logits",
            got=mask.readable(),
            wanted="the scaled product, maybe with a sink, masked by documents, order, windows, valid tokens",
            do=_FLEX,
            at=where(site),
        )
    if not plannable:
        raise Refused(
            "flash attention over sequences cannot wait for a mask",
            got=f"a mask that the model computes from more than its inputs: {mask.readable()}",
            wanted="a mask of documents and positions that the host can read before the step",
            do=_FLEX,
            at=where(site),
        )
    if query.dtype not in varlen.DTYPES:
        raise Refused(
            "flash attention over sequences has no kernel of this type",
            got=str(query.dtype),
            wanted="torch.float16 or torch.bfloat16",
            do='convert the model, call it under torch.autocast, or pass options={"attention": "flex"}',
            at=where(site),
        )
    size = max(int(query.shape[3]), int(value.shape[3]) + lse)
    if size > varlen.WIDEST:
        raise Refused(
            "flash attention over sequences has no kernel of this head size",
            got=f"{size}, the larger of {query.shape[3]} (queries, keys) and {value.shape[3]} (values"
            + (", and one more for the log-sum-exp)" if lse else ")"),
            wanted=f"at most {varlen.WIDEST}",
            do='pass options={"attention": "flex"}',
            at=where(site),
        )


def check_batch(plan: Plan) -> None:
    """Raises ``Refused`` for a batch that makes of a mask what is not bands."""
    for number, planned in enumerate(plan.masks):
        structure = planned.structure
        if structure.mask.residual:
            raise Refused(
                "flash attention over sequences cannot compute this batch",
                got="positions that do not advance with the columns inside of a document, or keys in other "
                f"documents than their queries (mask {number})",
                wanted="position_ids that go up by one from token to token of a document; equal ends of both",
                do=_FLEX,
            )
        if structure.mask.soft and len(rows := unanswered(structure)[0]):
            row, column = divmod(int(rows[0]), structure.stride)
            raise Refused(
                "flash attention over sequences cannot compute this batch",
                got=f"a query without a key (row {row}, token {column}) where masked logits are finite (mask "
                f"{number}), so that it attends to everything alike",
                wanted="a key for every query, or masked logits of -inf",
                do='use a boolean mask or -inf instead of finfo.min, or pass options={"attention": "flex"}',
            )
        ranks = plan.placement.mesh.size if _MARGIN * _parts(plan, structure) > slices.MAX_EXACT else 0
        if any(_by_formula(planned, rank) for rank in range(ranks)):
            raise Refused(
                "flash attention over sequences cannot compute this batch",
                got=f"documents that interleave into more than {slices.MAX_EXACT} parts on one rank (mask "
                f"{number})",
                wanted="documents whose tokens stand together in a row, or in a few parts",
                do=_FLEX,
            )


_MARGIN = 4  # received rows may be in more parts, where a window leaves gaps


def _parts(plan: Plan, structure: Structure) -> int:
    """How many pairs there are, at most, of a group's parts of a document and of all ranks' parts of it: what
    the planner leaves to the formula where it is many."""
    place = plan.placement
    order = place.start.argsort()
    rows = np.arange(structure.mask.batch)[:, None] * structure.stride
    start, stop = ((rows + x[order]).ravel() for x in (place.start, place.stop))
    group = np.tile(place.group[order], structure.mask.batch)

    def parted(runs: Runs) -> tuple[Ints, Ints]:
        line = runs.row * structure.stride
        run, part = overlaps(line + runs.start, line + runs.stop, start, stop)
        return runs.label[run], group[part]

    (keys, _), (queries, of) = parted(structure.keys), parted(structure.queries)
    counts = np.bincount(keys, minlength=int(queries.max(initial=0)) + 1)
    return int(np.bincount(of, weights=counts[queries]).max(initial=0))


def _by_formula(planned: MaskPlan, rank: int) -> bool:
    """Whether a rank has a slice that only the mask's formula decides."""
    tables = planned.tables(rank)
    return any((rows[:, 4] == slices.MOD).any() for rows in (tables.slices, tables.alone_slices))
