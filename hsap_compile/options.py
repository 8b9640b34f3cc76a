"""``torch.compile(model, backend="hsap", options={...})``: the options, typed and checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from hsap_compile._torch import mode_patches, operator_name
from hsap_compile.errors import Refused

_CHOICES = {
    "placement": ("balanced", "contiguous"),
    "outputs": ("gather", "local"),
    "lower": ("inductor", "aot_eager", "eager"),
    "attention": ("auto", "flex", "varlen", "slices"),
    "check": ("batch", "always", "first"),
}


#: Options that are never None, which means their default.
_SET = frozenset((*_CHOICES, "grad_sync", "strict", "kernel_options", "received", "inductor", "token_wise"))


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    mesh: a DeviceMesh with dimensions named ``inter`` and ``intra`` (or one of them) of the ranks that share
        a batch: all, or a part of a larger mesh, whose other parts are replicas with batches of their own
        (their gradients are the caller's to average).  The default is made from ``intra``, of all ranks.
    intra: ranks of a group, among which heads are exchanged.  Default: the largest divisor of the
        key/value heads and of the ranks that fits into one host (LOCAL_WORLD_SIZE).
    placement: "balanced" moves tokens between ranks to balance attention; "contiguous" gives
        every group of ranks a run of the row.
    outputs: "gather" returns whole outputs in the caller's order; "local" this rank's rows: the attribute
        ``hsap_columns`` of every such tensor says which of the whole output's they are.
    grad_sync: sum parameter gradients over the mesh; False leaves each rank's share, of which eager's is the
        sum, if the whole model is one graph.  DDP and FSDP take the mean: have them add up (see the README).
    strict: refuse an operator that would run on gathered tokens.
    token_wise: operators of other libraries ("library::operator", or torch.ops.library.operator): row i of
        their results depends on row i of operands with tokens, and on operands without.  They run on each
        rank's rows; nothing checks that they are what they are said to be.
    lower: "inductor", or "aot_eager" / "eager" to run the rewritten graph as it is.
    attention: the kernel of partial attention.  On CPU "slices", ATen's flash kernel.  On CUDA "flex", flex
        attention, for which Inductor generates Triton, or "varlen", ATen's flash attention over sequences of
        unlike lengths: float16 or bfloat16, and masks of documents, causal order and windows only; it refuses
        the others.  "auto" is "slices" on CPU and "flex" on CUDA: nobody has measured the two on a GPU yet.
    kernel_options: of flex attention, see torch.nn.attention.flex_attention.FlexKernelOptions.
    check: what ranks compare before they go on, so that they stop with an error where they would hang or be
        wrong: "batch" the graph, the length, the documents and all integer inputs at every call, and at the
        first one floating inputs and parameters too; "always" all of it at every call; "first" nothing
        after the first call (a rank that compiles anew alone then waits for the others).
    received: key/value rows of other groups are kept for the backward ("save"), or received once more in it
        ("again"): less memory, half as much again is sent between groups.  ``explain`` says both costs.  A
        number is "again" and the bytes of one attention's received rows that a rank holds at a time: what
        does not fit arrives in stages, of which one travels while the one before is attended to; their
        gradients take as much again.
    memory_budget: above 0 and up to 1, the share of the other activations that is kept for the backward; what
        is cheapest is computed again, attentions and exchanges never.  Default: torch's own setting of its
        activation memory budget, which is 1.
    inductor: configuration patches for Inductor.
    on_step: called before every step with its ``hsap_compile.runtime.StepReport`` (plan, balance, bytes).
    """

    mesh: DeviceMesh | None = None
    intra: int | None = None
    placement: str = "balanced"
    outputs: str = "gather"
    grad_sync: bool = True
    strict: bool = False
    token_wise: Collection[Any] = frozenset()
    lower: str = "inductor"
    attention: str = "auto"
    check: str = "batch"
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    received: str | int = "save"
    memory_budget: float | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    on_step: Callable[[Any], None] | None = None


def parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """The checked options of one ``torch.compile`` call.  Raises ``Refused``."""
    given = {key: value for key, value in (options or {}).items() if value is not None or key not in _SET}
    known = [f.name for f in fields(Options)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise Refused(
                f'there is no option "{key}"',
                got=f'options={{"{key}": ...}}',
                wanted=f"one of {', '.join(known)}",
                do=f'did you mean "{near}"?',
            )
    for key, choices in _CHOICES.items():
        if key in given and given[key] not in choices:
            raise Refused(
                f'option "{key}" has a value that does not exist',
                got=repr(given[key]),
                wanted=f"one of {', '.join(map(repr, choices))}",
                do="choose one of these",
            )
    for key in ("grad_sync", "strict"):
        _check_type(given, key, bool)
    _check_type(given, "intra", int)
    _check_type(given, "mesh", DeviceMesh)
    _check_type(given, "inductor", Mapping)
    _check_type(given, "kernel_options", Mapping)
    _check_type(given, "on_step", Callable)
    _check_received(given.get("received", "save"))
    _check_budget(given.get("memory_budget"))
    if given.get("intra") is not None and given.get("mesh") is not None:
        raise Refused(
            "both a mesh and a group size are given",
            got='options with "mesh" and "intra"',
            wanted="one of the two: the mesh's `intra` dimension is the group size",
            do='drop "intra"',
        )
    _check_type(given, "token_wise", (list, tuple, set, frozenset))
    given["token_wise"] = frozenset(_operator(x) for x in given.get("token_wise", ()))
    given["inductor"] = {**_mode(mode), **given.get("inductor", {})}
    return Options(**given)


def _check_type(given: Mapping[str, Any], key: str, kind: Any) -> None:
    value = given.get(key)
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise Refused(
            f'option "{key}" has the wrong type',
            got=f"{value!r}, a {type(value).__name__}",
            wanted=f"a {kind[0].__name__ if isinstance(kind, tuple) else kind.__name__}",
            do="pass one",
        )


def _operator(named: Any) -> str:
    """ "library::operator" """
    name = named if isinstance(named, str) else operator_name(named)
    if name.count("::") != 1 or name.startswith("aten::"):
        raise Refused(
            'option "token_wise" names no operator of another library',
            got=repr(named),
            wanted='"library::operator", or torch.ops.library.operator; torch\'s own operators have rules',
            do="name operators as the log does when it says that they run on gathered tokens",
        )
    return name


def _check_received(value: Any) -> None:
    if value in ("save", "again") or (type(value) is int and value > 0):
        return
    raise Refused(
        'option "received" has a value that does not exist',
        got=repr(value),
        wanted="'save', 'again', or a number of bytes",
        do="choose one of these",
    )


def _check_budget(share: Any) -> None:
    if share is None or (type(share) in (int, float) and 0 < share <= 1):
        return
    raise Refused(
        'option "memory_budget" is not a share of the activations',
        got=repr(share),
        wanted="a number above 0 and up to 1; nothing kept would mean every exchange and attention twice",
        do="pass 0.5, say, and halve it until the batch fits",
    )


def _mode(mode: str | None) -> dict[str, Any]:
    if mode in (None, "default"):
        return {}
    if mode in ("max-autotune", "max-autotune-no-cudagraphs"):
        return mode_patches("max-autotune-no-cudagraphs")
    raise Refused(
        f'mode="{mode}" is not supported',
        got=f'torch.compile(..., mode="{mode}")',
        wanted='"default" or "max-autotune-no-cudagraphs" (CUDA graphs cannot hold tables that change)',
        do="drop mode=, or use one of these",
    )
