"""The rule of the canonical attention, which stays one operator: ``partition_attention`` comes next.

Its queries and keys are the same tokens, S or a constant fewer.  Columns of the batch that are none of them
are rows of the operator too, which its mask keeps apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from hsap_compile import formula
from hsap_compile._torch import expr_of, hint_of
from hsap_compile.kernels import dense, exchange
from hsap_compile.masks import Mask, placed
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._operands import args_of, as_is
from hsap_compile.passes.infer_tokens import TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def attention(sharder: Sharder, node: Node) -> Any:
    q, k, v, leaves, logits, scale = args_of(node)
    axes = [x.meta.get("tokens") for x in (q, k, v)]
    if _reads_context(sharder, node, axes):
        made = as_is(sharder, node)
        made.node.meta.update(mask=node.meta["mask"], reads=node.meta["reads"])
        return made
    if any(not isinstance(a, TokenAxis) or (a.dim, *a.layout) != (2, 1, axes[0].length, 1) for a in axes):
        raise NotLocal("an attention whose queries and keys are not the same tokens")
    slack = int(sharder.length - axes[0].length)
    start = sharder.start_of(q, k, v)
    mask: Mask = placed(node.meta["mask"], start, slack - start)
    operands = [sharder.local(x, start) for x in (q, k, v)]
    whole = []
    for leaf, more in zip(leaves, _read_beyond(sharder, mask, leaves), strict=True):
        value = _padded(sharder, leaf, more)
        differentiable = leaf in sharder.differentiable
        whole.append(sharder.emit(exchange.BROADCAST, value, sharder.group) if differentiable else value)
    text = formula.dumps(mask.logits) if slack else logits
    made = sharder.graph.call_function(dense.OP, (*operands, whole, text, scale))
    made.meta.update({key: value for key, value in node.meta.items() if key not in ("val", "tokens")})
    made.meta["mask"] = mask
    batch, heads = (hint_of(s) for s in operands[0].meta["val"].shape[:2])
    rows, width = operands[0].meta["val"].shape[2], hint_of(operands[2].meta["val"].shape[3])
    made.meta["val"] = operands[0].meta["val"].new_empty((batch, heads, rows, width))
    return Local(made, start)


def _padded(sharder: Sharder, leaf: Node, more: list[int]) -> Any:
    """``leaf``, whole and longer; once for all layers, which then have one mask."""
    if not any(more):
        return sharder.whole(leaf)
    key = leaf, tuple(more)
    if key not in sharder.padded:
        sharder.padded[key] = sharder.emit(aten.constant_pad_nd.default, sharder.whole(leaf), more)
    return sharder.padded[key]


def _reads_context(sharder: Sharder, node: Node, axes: list[Any]) -> bool:
    """Whether every query, on its own, attends to keys that are no tokens and that all queries see alike."""
    ours = isinstance(axes[0], TokenAxis) and (axes[0].dim, axes[0].layout) == (2, (1, sharder.length, 1))
    read = formula.loads(args_of(node)[4]).free_symbols
    return ours and axes[1] is None and axes[2] is None and not read & {formula.q, formula.S}


def _read_beyond(sharder: Sharder, mask: Mask, leaves: list[Node]) -> list[list[int]]:
    """Of every leaf, how much longer its dimensions must be (in the order of ``pad``) so that the formula of
    columns that are no tokens of the attention reads something.  Negative indices count from the end."""
    more = [[0] * (2 * leaf.meta["val"].dim()) for leaf in leaves]
    if mask.others == (0, 0):
        return more
    for expr in sympy.preorder_traversal(mask.logits):
        number = formula.leaf_index(expr)
        if number is None:
            continue
        for dim, index in enumerate(expr.args):
            size = expr_of(leaves[number].meta["val"].shape[dim])
            place = 2 * (len(expr.args) - 1 - dim) + 1
            beyond = _beyond(index, size, sharder.length)
            if beyond is None:
                raise NotLocal(
                    f"an attention over fewer tokens than others (by {sum(mask.others)}), whose mask looks "
                    "tensors up by a formula: cut the batch before the model"
                )
            more[number][place] = max(more[number][place], beyond)
    return more


def _beyond(index: sympy.Expr, size: sympy.Expr, length: sympy.Expr) -> int | None:
    """How far ``index`` reaches beyond ``size`` for queries and keys at any of ``length`` columns; None where
    that is not known."""
    if not index.free_symbols & {formula.q, formula.k} or formula.leaf_index(index) is not None:
        return 0
    rest, lowest, highest = index, sympy.Integer(0), sympy.Integer(0)
    for side in (formula.q, formula.k):
        factor, last = index.coeff(side), formula.S - 1
        if not factor.is_Integer:
            return None
        rest -= factor * side
        lowest += min(factor, 0) * last
        highest += max(factor, 0) * last
    rest, lowest, highest = (sympy.expand(x.xreplace({formula.S: length})) for x in (rest, lowest, highest))
    beyond = sympy.expand(rest + highest + 1 - size)
    below = sympy.expand(rest + lowest + size)
    (symbol,) = length.free_symbols
    if not beyond.is_Integer or not (below.is_Integer and below >= 0 or below.coeff(symbol) > 0):
        return None
    return max(int(beyond), 0)
