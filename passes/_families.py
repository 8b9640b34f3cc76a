"""How each family of operators is computed on local rows.  A rule gets the sharder and the old node and
returns the local form (``Local``), or a whole value (a new node) when the tokens were summed away; it
raises ``NotLocal`` where the family's condition does not hold.  Families are told apart by torch's tags
and by the names of the arguments in the operator's schema; what neither shows stands in a list here.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from hsap_compile._torch import (
    CUSTOM_FUNCTION,
    is_operator,
    is_pointwise,
    operator_name,
)
from hsap_compile.errors import Refused, where
from hsap_compile.graph import arguments
from hsap_compile.kernels import dense
from hsap_compile.kernels.copies import LAID_OUT
from hsap_compile.passes._attentions import attention
from hsap_compile.passes._custom_functions import custom_function
from hsap_compile.passes._forms import Local, NotLocal
from hsap_compile.passes._numbered import (
    added_along,
    indexed,
    looked_up,
    masked_scatter,
    put,
    read_along,
    written_along,
)
from hsap_compile.passes._operands import (
    args_of,
    as_is,
    einsum_letters,
    only_source,
    output_axis,
    source_of,
    tensor_inputs,
    value_of,
)
from hsap_compile.passes._random import drawn
from hsap_compile.passes._routing import ids_of_map, is_sorted, map_counts, row_counts, row_sort
from hsap_compile.passes._shifts import ALONG_TOKENS, concatenation, convolution, pad, table_rows, token_part
from hsap_compile.passes._totals import LOSSES, TOTALS, contraction, cross_entropy, loss
from hsap_compile.passes.infer_tokens import MANY, VIEWS, TokenAxis, parts_of_tokens, rows_in_front

if TYPE_CHECKING:
    from hsap_compile.passes.shard_tokens import Sharder

aten = torch.ops.aten


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


#: Element-wise, but composite or without torch's pointwise tag.
_ELEMENTWISE = _names(
    "to _to_copy clone contiguous alias detach lift_fresh_copy dropout native_dropout"
    " zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli uniform"
    " normal_functional exponential cauchy log_normal geometric random"
    " silu gelu celu selu mish prelu log_sigmoid"
    " __and__ __or__ __xor__ masked_fill where one_hot square float expand_as"
    " _assert_tensor_metadata relu6 hardswish rsub logical_not logical_and logical_or floor_divide fill"
    " broadcast_tensors zero"
)
#: Token by token, though dimensions behind the tokens come and go.
_PAIRS = _names("view_as_complex view_as_real real imag resolve_conj resolve_neg complex polar")
#: Operators whose arguments name every dimension they mix; all others are left as they are.
_BY_DIM = _names(
    "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp topk sort argsort chunk split"
    " split_with_sizes slice select cat stack gather index_select unbind flip roll narrow argmax argmin glu"
    " transpose squeeze unsqueeze movedim swapaxes diff logsumexp amax amin sum mean prod any all max min var"
    " std norm linalg_vector_norm scatter scatter_add scatter_reduce index_add cummax kthvalue tensor_split"
    " slice_scatter select_scatter unfold var_mean std_mean cosine_similarity index_copy index_fill aminmax"
)
_BROADCAST = _names("cosine_similarity")  # of these, whose operands may have other dimensions
_NORMS = _names("layer_norm rms_norm native_layer_norm _fused_rms_norm")


#: Operators of well-known libraries that treat every token alone (a matrix product with 4-bit weights).
_TOKEN_WISE = frozenset({"bitsandbytes::gemm_4bit"})


def rule_for(node: Node, token_wise: Collection[str]) -> Any:
    """The rule of the node's family, or None; ``token_wise``: operators that the user says are."""
    if node.target is operator.getitem:
        return _getitem
    if node.target is dense.OP:
        return attention
    if node.target is CUSTOM_FUNCTION:
        return custom_function
    if node.target is LAID_OUT:
        return _rows_laid_out
    if not is_operator(node.target):
        return None
    name = operator_name(node.target)
    if name in RULES:
        return RULES[name]
    if name in LOSSES:
        return loss
    if name in _ELEMENTWISE or is_pointwise(node.target):
        return _elementwise
    if name in _TOKEN_WISE or name in token_wise:
        return _said_to_be_token_wise
    return _by_dim if name in _BY_DIM else None


def no_rule(node: Node) -> str:
    """Why an operator is gathered that no family knows."""
    known = not is_operator(node.target) or operator_name(node.target).startswith("aten::")
    do = "" if known else '; if it treats every token alone, name it in options={"token_wise": [..]}'
    return f"no rule for this operator{do}"


def _said_to_be_token_wise(sharder: Sharder, node: Node) -> Any:
    """Row i of every result is row i's of the operands, as far as sizes can tell."""
    out = output_axis(node)
    results = [node] if isinstance(node.meta["val"], torch.Tensor) else list(node.users)
    operands = [x for x in node.all_input_nodes if x.meta.get("tokens") is not None]
    for x in (*results, *operands):
        axis = sharder.axis(x)
        if (axis.dim, axis.layout) != (out.dim, out.layout):
            raise NotLocal("token dimensions of the operands and results differ")
    if any(isinstance(x.meta["val"], torch.SymInt) for x in node.all_input_nodes):
        raise NotLocal("an operator that is told the length")
    return as_is(sharder, node)


def _compared_with_a_table(sharder: Sharder, node: Node) -> Any:
    """Every row of one operand with all of another, which has no tokens."""
    rows = arguments(node)[_ROWS[operator_name(node.target)]]
    if any(x is not rows and x.meta.get("tokens") is not None for x in tensor_inputs(node)):
        raise NotLocal("token dimensions of the operands differ")
    return _said_to_be_token_wise(sharder, node)


def _getitem(sharder: Sharder, node: Node) -> Any:
    source = args_of(node)[0]
    if parts_of_tokens(source):
        return token_part(sharder, node)
    if source not in sharder.home:
        raise NotLocal("a part of several values that are not local")
    home = sharder.home[source]
    return Local(sharder.emit(operator.getitem, home.node, args_of(node)[1]), home.start)


def _rows_laid_out(sharder: Sharder, node: Node) -> Any:
    """Rows are read by their own strides."""
    source, _ = only_source(node)
    start = sharder.start_of(source)
    return Local(sharder.local(source, start), start)


def _elementwise(sharder: Sharder, node: Node) -> Any:
    _check_aligned(node)
    return as_is(sharder, node)


def _check_aligned(node: Node) -> None:
    """All operands have the tokens where the result has them."""
    out = output_axis(node)
    value = value_of(node)
    for source in tensor_inputs(node):
        axis = source.meta.get("tokens")
        if axis is MANY:
            raise NotLocal("a value with several token dimensions")
        if isinstance(axis, TokenAxis):
            from_right = axis.dim - source.meta["val"].dim()
            aligned = operator_name(node.target) == "aten::one_hot" or from_right == out.dim - value.dim()
            if not aligned or axis.layout != out.layout:
                raise NotLocal("token dimensions of the operands differ")


def _view(sharder: Sharder, node: Node) -> Any:
    source, axis = only_source(node)
    out = output_axis(node)
    if out.length != axis.length or rows_in_front(source, axis) != rows_in_front(node, out):
        raise NotLocal("a view that changes the tokens of a row")
    start = sharder.start_of(source)
    local = sharder.local(source, start)
    return Local(sharder.emit(aten.reshape.default, local, sharder.local_shape(node)), start)


def _expand(sharder: Sharder, node: Node) -> Any:
    source = args_of(node)[0]
    start = sharder.start_of(source)
    shape = sharder.local_shape(node)
    return Local(sharder.emit(aten.expand.default, sharder.operand(source, start), shape), start)


def _copy(sharder: Sharder, node: Node) -> Any:
    """copy(x, y): y in the shape and type of x."""
    _check_aligned(node)
    start = sharder.start_of(*tensor_inputs(node))
    value = sharder.operand(args_of(node)[1], start)
    value = sharder.emit(aten.expand.default, value, sharder.local_shape(node))
    return Local(sharder.emit(aten.to.dtype, value, node.meta["val"].dtype), start)


def _repeat(sharder: Sharder, node: Node) -> Any:
    """repeat(x, times): all tokens again and again are more rows in front of them."""
    source, axis = only_source(node)
    times = args_of(node)[1][axis.dim - source.meta["val"].dim()]
    if times != 1 and output_axis(node).outer != axis.outer * times:
        raise NotLocal("it repeats the tokens")
    return as_is(sharder, node)


def _each_repeated(sharder: Sharder, node: Node) -> Any:
    """repeat_interleave(x, times, dim): every token again and again are more rows behind it."""
    given = arguments(node)
    source, axis = only_source(node)
    if given["dim"] is None or not isinstance(given["repeats"], int):
        raise NotLocal("it repeats the tokens")
    if output_axis(node).inner != axis.inner * (
        given["repeats"] if _along(source, axis, given["dim"]) else 1
    ):
        raise NotLocal("it repeats the tokens")
    start = sharder.start_of(source)
    return Local(
        sharder.emit(node.target, sharder.local(source, start), given["repeats"], given["dim"]), start
    )


def _along(source: Node, axis: TokenAxis, dim: int) -> bool:
    return dim % source.meta["val"].dim() == axis.dim


def _concatenation(sharder: Sharder, node: Node) -> Any:
    """cat(xs, dim) along the tokens: rows of tokens one after the other are more rows in front."""
    parts, out = args_of(node)[0], output_axis(node)
    axes = [part.meta.get("tokens") for part in parts]
    if all(isinstance(axis, TokenAxis) and axis.layout[1:] == out.layout[1:] for axis in axes):
        return as_is(sharder, node)
    return concatenation(sharder, node)


def _pairs(sharder: Sharder, node: Node) -> Any:
    """Complex numbers: as element-wise, but for a last dimension of two."""
    source, axis = source_of(node)
    out = output_axis(node)
    axes = [other.meta.get("tokens") for other in tensor_inputs(node)]
    if (axis.dim, axis.layout) != (out.dim, out.layout) or any(a not in (None, axis) for a in axes):
        raise NotLocal("complex numbers made of tokens")
    return as_is(sharder, node)


def _pad(sharder: Sharder, node: Node) -> Any:
    """pad(x, [last dimension's left, right, ...])"""
    source, axis = only_source(node)
    behind = source.meta["val"].dim() - 1 - axis.dim
    if tuple(args_of(node)[1][2 * behind : 2 * behind + 2]) not in ((), (0, 0)):
        return pad(sharder, node)
    return as_is(sharder, node)


def _einsum(sharder: Sharder, node: Node) -> Any:
    """einsum("bsd,df->bsf", ..): the tokens' letter is kept, and no other dimension holds tokens; or it is
    summed over in all operands that have it."""
    letters_of = einsum_letters(node)
    if letters_of is None:
        raise NotLocal("an einsum without explicit dimensions")
    result, names = letters_of[1], list(zip(letters_of[0], args_of(node)[1], strict=True))
    of_tokens = {x[o.meta["tokens"].dim] for x, o in names if isinstance(o.meta.get("tokens"), TokenAxis)}
    if len(of_tokens) == 1 and not of_tokens & set(result):
        (letter,) = of_tokens
        return contraction(sharder, node, {o: x.index(letter) for x, o in names if letter in x})
    out = output_axis(node)
    for letters, operand in names:
        axis = operand.meta.get("tokens")
        if axis is MANY or (isinstance(axis, TokenAxis) and letters[axis.dim] != result[out.dim]):
            raise NotLocal("an einsum that sums over tokens")
        if isinstance(axis, TokenAxis) and axis.layout != out.layout:
            raise NotLocal("token dimensions of the operands differ")
    return as_is(sharder, node)


def _feature_dropout(sharder: Sharder, node: Node) -> Any:
    """dropout1d (B, C, S): one draw is for all that stands behind the first two dimensions."""
    if output_axis(node).dim > 1:
        raise NotLocal("a draw that is one for all tokens")
    return _elementwise(sharder, node)


def _permutation(sharder: Sharder, node: Node) -> Any:
    output_axis(node)
    return as_is(sharder, node)


def _new(sharder: Sharder, node: Node) -> Any:
    """new_zeros(x, size) and its like: the size is this rank's when it counts tokens."""
    given = arguments(node)
    rest = {k: v for k, v in node.kwargs.items() if k not in ("size", "fill_value")}
    source = sharder.operand(args_of(node)[0], sharder.start_of(args_of(node)[0]))
    extra = [map_arg(given["fill_value"], sharder.whole)] if "fill_value" in given else []
    if not isinstance(node.meta["tokens"], TokenAxis):
        return sharder.emit(node.target, source, map_arg(given["size"], sharder.whole), *extra, **rest)
    return Local(sharder.emit(node.target, source, sharder.local_shape(node), *extra, **rest))


def _linear(sharder: Sharder, node: Node) -> Any:
    source, axis = source_of(node)
    if source is not args_of(node)[0] or axis.dim == source.meta["val"].dim() - 1:
        raise NotLocal("a linear layer over the token dimension")
    _check_aligned(node)
    return as_is(sharder, node)


def _matmul(sharder: Sharder, node: Node) -> Any:
    """Products whose token dimension is a row of the left operand or a batch dimension of both, or is what
    they sum over."""
    left, right = args_of(node)[-2:]
    if node.meta["tokens"] is None and len(args_of(node)) == 2:
        sizes = [side.meta["val"].dim() for side in (left, right)]
        return contraction(sharder, node, {left: sizes[0] - 1, right: max(sizes[1] - 2, 0)})
    out = output_axis(node)
    rank = node.meta["val"].dim()
    for side, contracted in ((left, -1), (right, -2)):
        axis = side.meta.get("tokens")
        if axis is MANY:
            raise NotLocal("a value with several token dimensions")
        if not isinstance(axis, TokenAxis):
            continue
        size = side.meta["val"].dim()
        if size > 1 and axis.dim == size + contracted:
            raise NotLocal("a product that sums over tokens")
        other = right if side is left else left
        # a vector on the other side takes its dimension of the result away
        missing = other.meta["val"].dim() == 1 and (side is left or axis.dim < size - 2)
        if size == 1 or axis.dim - size + missing != out.dim - rank or axis.layout != out.layout:
            raise NotLocal("token dimensions of the operands differ")
    return as_is(sharder, node)


def _norm(sharder: Sharder, node: Node) -> Any:
    source, axis = source_of(node)
    given = arguments(node)
    if source is not args_of(node)[0] or axis.dim >= source.meta["val"].dim() - len(
        given["normalized_shape"]
    ):
        raise NotLocal("a normalisation over tokens")
    return as_is(sharder, node)


def _batch_norm(sharder: Sharder, node: Node) -> Any:
    """In evaluation, (B, C, S): numbers of each channel that are no tokens'."""
    source, axis = source_of(node)
    if arguments(node)["training"] or source is not args_of(node)[0] or axis.dim == 1:
        raise NotLocal("a normalisation over tokens")
    return as_is(sharder, node)


def _group_norm(sharder: Sharder, node: Node) -> Any:
    source, axis = source_of(node)
    if source is not args_of(node)[0] or axis.dim != 0:
        raise NotLocal("a normalisation over tokens")
    return as_is(sharder, node)


def _embedding(sharder: Sharder, node: Node) -> Any:
    if args_of(node)[0].meta.get("tokens") is not None:
        raise NotLocal("a table whose rows are tokens")
    given = arguments(node)
    if given.get("scale_grad_by_freq"):
        raise NotLocal("a gradient that is divided by how often the whole batch has a word")
    if given.get("sparse"):
        raise Refused(
            "an embedding whose gradient is sparse",
            got="sparse=True",
            wanted="a dense gradient: ranks add theirs up",
            do="drop sparse=True",
            at=where(node),
        )
    return as_is(sharder, node)


def _by_dim(sharder: Sharder, node: Node) -> Any:
    """Operators that mix the dimensions they name and leave the others alone."""
    name = operator_name(node.target)
    given = arguments(node)
    if name == "aten::slice" and given["self"].meta["tokens"] is None:
        return table_rows(sharder, node)
    source, axis = source_of(node)
    if name in _NUMBERED and given["self"].meta["tokens"] is None:
        return added_along(sharder, node) if name in _ADDED else looked_up(sharder, node)
    rank = source.meta["val"].dim() + (name == "aten::stack")
    named: list[int] = []
    for key in ("dim", "dims", "dimension", "dim0", "dim1", "source", "destination", "axis0", "axis1"):
        value = given.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            named.append(value)
        elif isinstance(value, list | tuple):
            named.extend(value)
    reduces = name in REDUCTIONS
    if reduces and not named:
        named = list(range(rank))
    if name in _MOVES:
        return _permutation(sharder, node)
    if not named and name not in _MOVES:
        raise NotLocal("it works on every dimension")
    if name == "aten::unsqueeze":
        return as_is(sharder, node)
    dims = {d % rank for d in named}
    here = axis.dim + (name == "aten::stack" and min(dims) <= axis.dim)
    if here not in dims:
        for other in tensor_inputs(node):
            other_axis = other.meta.get("tokens")
            plain = name in _OF_DIMENSIONS and other in (given["index"], given.get("value"))
            more = other.meta["val"].dim() - rank
            if other_axis is None and (plain or name in _BROADCAST and more <= 0):
                continue
            if other_axis != axis or (name in _BROADCAST and more):
                raise NotLocal("token dimensions of the operands differ")
        return as_is(sharder, node)
    if name in TOTALS:
        if (ids := ids_of_map(node)) is not None:
            return map_counts(sharder, node, ids)
        some_are_none = axis.length != sharder.length or sharder.frame.chunk is not None
        if is_sorted(sharder, source) and some_are_none:
            raise NotLocal("sorted rows of which some are no tokens")
        return TOTALS[name](sharder, node, source, axis, dims)
    if name in ("aten::index_select", "aten::gather"):
        return read_along(sharder, node)
    if name in _WRITTEN:
        return written_along(sharder, node)
    if name in ALONG_TOKENS:
        return ALONG_TOKENS[name](sharder, node)
    if name == "aten::cat":
        return _concatenation(sharder, node)
    if name in ("aten::sort", "aten::argsort"):
        return row_sort(sharder, node)
    raise NotLocal("it works along the tokens")


#: Operators whose ``index`` holds numbers; of the last, one for each place of a dimension, and one ``value``.
_ADDED = _names("scatter_add scatter_reduce index_add")
_NUMBERED = _ADDED | _names("gather index_select")
_WRITTEN = _ADDED | _names("scatter index_copy index_fill")
_OF_DIMENSIONS = _names("index_select index_add index_copy index_fill")
_MOVES = _names("transpose squeeze movedim swapaxes permute t")
REDUCTIONS = _names(
    "sum mean amax amin aminmax max min any all prod var std var_mean std_mean norm linalg_vector_norm argmax"
    " argmin"
)


#: Which argument of operators that compare rows with a table has the rows.
_ROWS = {"aten::mv": "self", "aten::bucketize": "self", "aten::searchsorted": "self"}

RULES: dict[str, Any] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(_names("expand"), _expand),
    **dict.fromkeys(_names("permute t mT numpy_T"), _permutation),
    **dict.fromkeys(_names("new_zeros new_ones new_full new_empty"), _new),
    **dict.fromkeys(_names("rand randn randint"), drawn),
    **dict.fromkeys(_names("feature_dropout"), _feature_dropout),
    **dict.fromkeys(_names("linear"), _linear),
    **dict.fromkeys(_names("matmul mm bmm addmm baddbmm"), _matmul),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_names("batch_norm"), _batch_norm),
    **dict.fromkeys(_names("group_norm"), _group_norm),
    **dict.fromkeys(_names("embedding"), _embedding),
    **dict.fromkeys(_names("index"), indexed),
    **dict.fromkeys(_names("index_put"), put),
    **dict.fromkeys(_names("masked_scatter"), masked_scatter),
    **dict.fromkeys(_names("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d"), cross_entropy),
    **dict.fromkeys(_names("copy"), _copy),
    **dict.fromkeys(_names("repeat"), _repeat),
    **dict.fromkeys(_names("repeat_interleave"), _each_repeated),
    **dict.fromkeys(_PAIRS, _pairs),
    **dict.fromkeys(_names("histc"), row_counts),
    **dict.fromkeys(_names("pad constant_pad_nd"), _pad),
    **dict.fromkeys(_names("einsum"), _einsum),
    **dict.fromkeys(_names("conv1d convolution"), convolution),
    **dict.fromkeys(_ROWS, _compared_with_a_table),
}

#: The rules whose operators act on every row alone, whatever the order of the rows.
ROW_BY_ROW = (
    _elementwise, _linear, _matmul, _norm, _group_norm, _embedding, indexed, put, _by_dim, _getitem,
    _view, _expand, _copy, _pad, _einsum, _pairs,
)  # fmt: skip
