"""The rule of the canonical attention, which stays one operator: ``partition_attention`` comes next.

Its queries and its keys are S tokens, or a constant fewer.  Columns of the batch that are none of them are
rows of the operator too, which its mask keeps apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from hsap_compile import formula
from hsap_compile._torch import hint_of
from hsap_compile.kernels import dense, exchange
from hsap_compile.masks import Mask, placed
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._operands import args_of
from hsap_compile.passes.infer_tokens import TokenAxis

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder


def attention(sharder: Sharder, node: Node) -> Any:
    q, k, v, leaves, logits, scale, lse = args_of(node)
    axes = [x.meta.get("tokens") for x in (q, k, v)]
    if _reads_context(node, axes):
        start = sharder.start_of(q)
        rows = [sharder.local(q, start), sharder.operand(k), sharder.operand(v)]
        made = sharder.emit(dense.OP, *rows, _whole(sharder, leaves), logits, scale, lse)
        made.meta.update(mask=node.meta["mask"], reads=node.meta["reads"])
        return Local(made, start)
    if sharder.frame.chunk is not None:
        raise NotLocal("an attention within a chunk of the tokens")
    if any(not isinstance(a, TokenAxis) or (a.dim, a.outer, a.inner) != (2, 1, 1) for a in axes):
        raise NotLocal("an attention whose queries and keys are not the tokens of a row")
    alike = axes[0].length == axes[1].length
    start = sharder.start_of(q, k, v) if alike else sharder.start_of(q)
    of_keys = start if alike else sharder.start_of(k, v)
    ranges = [(at, sharder.slack(a) - at) for at, a in zip((start, of_keys), axes, strict=False)]
    mask: Mask = placed(node.meta["mask"], *ranges)
    operands = [sharder.local(x, at) for x, at in zip((q, k, v), (start, of_keys, of_keys), strict=True)]
    text = logits if mask is node.meta["mask"] else formula.dumps(mask.logits)
    made = sharder.graph.call_function(dense.OP, (*operands, _whole(sharder, leaves), text, scale, lse))
    made.meta.update({key: value for key, value in node.meta.items() if key not in ("val", "tokens")})
    made.meta["mask"] = mask
    of_q, of_v = (operands[i].meta["val"] for i in (0, 2))
    shape = dense.result(of_q, of_v, lse).shape
    made.meta["val"] = of_q.new_empty((*map(hint_of, shape[:2]), *shape[2:]))
    return Local(made, start)


def _whole(sharder: Sharder, leaves: list[Node]) -> list[Any]:
    """What formulas read at numbers of columns, or at fixed places."""
    made = [sharder.whole(leaf) for leaf in leaves]
    return [
        sharder.emit(exchange.BROADCAST, value, sharder.group) if leaf in sharder.differentiable else value
        for leaf, value in zip(leaves, made, strict=True)
    ]


def _reads_context(node: Node, axes: list[Any]) -> bool:
    """Whether every query, on its own, attends to keys that are no tokens and that all queries see alike."""
    ours = isinstance(axes[0], TokenAxis) and axes[0].dim == 2 and not axes[0].folded
    read = formula.loads(args_of(node)[4]).free_symbols
    return ours and axes[1] is None and axes[2] is None and not read & {formula.q, formula.S}
