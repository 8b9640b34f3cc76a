"""Every private or unstable torch name that the project uses, in one place.

Seen working on torch 2.11.0, 2.13.0 and 2.14.1 (CPU); written for torch >= 2.11.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.pgo import auto_dynamic, get_code_state
from torch._dynamo.source import TensorPropertySource
from torch._dynamo.variables.misc import produce_trampoline_autograd_apply
from torch._functorch import config as functorch_config
from torch._functorch import predispatch as _vmap
from torch._guards import CompileContext
from torch._higher_order_ops.auto_functionalize import auto_functionalized, can_auto_functionalize
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from torch._inductor import config as inductor_config
from torch._inductor import ir as inductor_ir
from torch._inductor.compile_fx import compile_fx as compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides, register_lowering
from torch._inductor.utils import contains_collective as contains_collective
from torch._inductor.utils import contains_wait as contains_wait
from torch._logging import trace_structured as trace_structured
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import grad_mode
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.experimental.symbolic_shapes import free_symbols as free_symbols
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.functions import FloorDiv as FloorDiv
from torch.utils.checkpoint import CheckpointPolicy

from hsap_compile.errors import Refused, where

#: What pre-dispatch graphs call to open and close a no_grad region.
SET_GRAD_ENABLED = torch._C._set_grad_enabled

#: What opens and closes an inference mode in dynamo's graph.
INFERENCE_BORDERS: Any = (grad_mode._enter_inference_mode, grad_mode._exit_inference_mode)

#: What opens and closes an autocast region in a pre-dispatch graph.
AUTOCAST_BORDERS = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)

#: dynamo's call of the body of a torch.utils.checkpoint.
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

#: A custom autograd.Function: forward, backward, operands.
CUSTOM_FUNCTION = torch.ops.higher_order.autograd_function_apply

FLEX_ATTENTION = torch.ops.higher_order.flex_attention

#: A Triton kernel that the model launches: as dynamo writes it, and in the form that returns, by their names,
#: the operands that it writes into.
LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_mutation
KERNEL = torch.ops.higher_order.triton_kernel_wrapper_functional

#: RETURNING(op, **arguments): what an operator of another library returns, and then what it writes.
RETURNING = auto_functionalized

#: What a user sets so that DDP's buckets of parameters do not cut the graph.
WHOLE_UNDER_DDP = "torch._dynamo.config.optimize_ddp = False"

#: What a user raises so that torch compiles more graphs of a function, or sets to get an error at the limit.
MORE_GRAPHS = "torch._dynamo.config.recompile_limit"
ERROR_AT_LIMIT = "torch._dynamo.config.fail_on_recompile_limit_hit = True"

#: ``x.data``, and what begins torch.func's own derivatives.
DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
DERIVATIVES = (torch._C._functorch._grad_increment_nesting, torch._C._functorch._jvp_increment_nesting)
#: What opens and closes a vmap in dynamo's graph, and what it calls once before.
VMAP_BORDERS = (_vmap._vmap_increment_nesting, _vmap._vmap_decrement_nesting)
VMAP_PREAMBLE = (_vmap.lazy_load_decompositions,)

_checkpoints = itertools.count(1)


def checkpoint_tags() -> dict[str, Any]:
    """What AOTAutograd's partitioner reads on the nodes of one checkpoint's body."""
    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_checkpoints)}


#: The tag of a node that is kept for the backward although it stands in a checkpoint.
SAVED = CheckpointPolicy.MUST_SAVE


def keeping(share: float | None) -> AbstractContextManager[Any]:
    """AOTAutograd's partitioner keeps this share of what it would for the backward; None: torch's setting."""
    return nullcontext() if share is None else functorch_config.patch(activation_memory_budget=float(share))


without_autocast = torch._C._DisableAutocast


def as_backend_sees(inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` of a graph, for what compiles behind dynamo and makes them anew in a fake mode of its own:
    which of them are Python floats that change (dynamo passes these as tensors) stays known."""
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode

    def seen(x: Any) -> Any:
        if mode is None or not isinstance(x, FakeTensor) or x.item_memo is None or x.fake_mode is mode:
            return x
        made = mode.from_tensor(x)
        made.item_memo = x.item_memo
        return made

    return [seen(x) for x in inputs]


class RetraceWithSymbols(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):
    """Ask dynamo to trace the frame again, now that dimensions were marked dynamic.

    Two of dynamo's own restarts, each for one half of what is needed: the second is what it lets a backend
    raise (since 2.7), the first makes it forget where it might break the graph, which another shape changes
    (``x.shape`` is a constant in the first trace and an operator in the next).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(restart_reason=reason)


def parts_of_subclass(x: Any) -> list[torch.Tensor]:
    """The tensors that a tensor of a subclass is made of."""
    if not is_traceable_wrapper_subclass(x):
        raise NotImplementedError(f"hsap: nothing is known of what a {type(x).__name__} is made of")
    return [getattr(x, name) for name in x.__tensor_flatten__()[0]]


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The mode of the first fake tensor of ``values``."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError(
        "hsap: the traced graph has no tensor input. got: a graph that computes on constants only. "
        "wanted: at least one tensor. do: pass the batch to the compiled function as an argument."
    )


def expr_of(size: Any) -> sympy.Expr:
    """The sympy expression of an int or SymInt, multiplied out: equal sizes are equal expressions."""
    assert not isinstance(size, float | torch.SymFloat), f"{size} is no size"
    return _expanded(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


_expanded = functools.lru_cache(maxsize=4096)(sympy.expand)


def hint_of(size: Any) -> int:
    """The value that a SymInt had while tracing (of ``mark_symbolic``'s unknown ones: the largest that it may
    have, which is the same), or the int itself."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.hint
    return int(size.node.shape_env.bound_sympy(expr_of(size)).upper if known is None else known)


def guard_at_most(size: Any, most: int) -> None:
    """What is compiled is for a ``size`` of up to ``most``: dynamo compiles again for a larger one."""
    if isinstance(size, torch.SymInt) and size.node.hint is not None:
        assert bool(size <= most), f"{size} is guarded at {most}"


@contextmanager
def _tracing(mode: FakeTensorMode) -> Iterator[None]:
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        with mode, enable_python_dispatcher(), fx_traceback.preserve_node_meta():
            yield
    finally:
        mode.allow_non_fake_inputs = before


class _Entering(torch.fx.Interpreter):
    """Enters the autocast regions of what it runs.  Their borders, called, would only be recorded.

    What reads an operand after an operator that returned it (``x.to(x.dtype)``) reads the operand: the
    operator may stand where nothing has a gradient.

    ``lost``: calls that autograd would differentiate by a Python function's own backward, or a hook, which no
    graph of operators shows, and those functions.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.lost: list[tuple[torch.fx.Node, str]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        mode: Any = get_proxy_mode()
        known = mode.tracer.tensor_tracker
        operands = [self.env[x] for x in n.all_input_nodes if isinstance(self.env[x], torch.Tensor)]
        before = [(x, known[x]) for x in operands if x in known]
        functions = {x.grad_fn for x in operands}
        if schema_of(n.target) is None:
            with _GradientHooks() as hooks:
                result = super().run_node(n)
            if name := hooks.found or _own_backward(result, functions):
                self.lost.append((n, name))
        else:
            result = super().run_node(n)
        for x, was in before:
            if known[x] is not was and _is_returned(known[x].proxy.node, was.proxy.node):
                known[x] = was
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        enter, leave = AUTOCAST_BORDERS
        if target is enter:
            region = torch.autocast(*args, **kwargs)
            region.__enter__()
            return region
        if target is leave:
            return args[0].__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


class _GradientHooks(TorchFunctionMode):
    """``found``: what set a hook on a gradient, if anything did."""

    found = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook:
            self.found = "tensor.register_hook"
        return func(*args, **(kwargs or {}))


def _own_backward(result: Any, known: set[Any]) -> str:
    """The custom function between ``result`` and what the functions ``known`` made, if there is one; but for
    those that torch makes around operators of other libraries, which are in the graph."""
    parts = result if isinstance(result, tuple | list) else (result,)
    stack = [x.grad_fn for x in parts if isinstance(x, torch.Tensor)]
    seen = {None, *known}
    while stack:
        function: Any = stack.pop()
        if function in seen:
            continue
        seen.add(function)
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            kind = function._forward_cls  # type: ignore[attr-defined]
            if kind.__module__ != "torch._library.autograd":
                return str(kind.__qualname__)
        stack.extend(following for following, _ in function.next_functions)
    return ""


def opaque_function(target: Any) -> str:
    """The name of the custom function that ``target``, of dynamo's graph, calls untraced; empty: of none."""
    if getattr(target, "_origin", None) is not produce_trampoline_autograd_apply:
        return ""
    return str(inspect.getclosurevars(target).nonlocals["fn_cls"].__qualname__)


def _is_returned(node: torch.fx.Node, operand: torch.fx.Node) -> bool:
    """Whether ``node`` is ``operand``, seen through operators that return what they are given, and write
    nothing."""
    found: Any = node
    while found is not operand:
        if not is_operator(found.target) or found.target._schema.is_mutable or not found.args:
            return False
        found = found.args[0]
        if not isinstance(found, torch.fx.Node):
            return False
    return True


def trace_pre_dispatch(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``module`` as a graph of ATen operators as they are before autograd: composite ones stay whole, but for
    a few that no pass needs to know."""

    interpreter = _Entering(module)
    with _tracing(fake_mode_of(inputs)):
        graph = make_fx(
            lambda *args: interpreter.run(*args),
            decomposition_table=_composed(),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*_distinct(inputs))
    for node, name in interpreter.lost:
        raise opaque(name, node)
    return graph


def opaque(name: str, node: torch.fx.Node) -> Refused:
    """Of a call whose backward is not in the graph."""
    return Refused(
        "a custom backward is hidden from torch.compile",
        got=f"{name}, which is allowed in graphs untraced (allow_in_graph, nonstrict_trace)",
        wanted="functions that torch.compile traces, forward and backward",
        do="drop what allows it, or leave the function out (float8 training of torchao has such functions)",
        at=where(node),
    )


#: Other names for, and products and joins made of, operators that passes know; none of which autocast knows.
_COMPOSED = (
    "narrow swapdims swapaxes moveaxis broadcast_to ravel hstack vstack dstack column_stack row_stack concat"
    " concatenate atleast_1d atleast_2d atleast_3d outer ger inner kron nanmean trapezoid trapz fliplr flipud"
    " subtract multiply divide true_divide greater greater_equal less less_equal not_equal clip absolute"
    " negative reshape_as"
)


@functools.cache
def _composed() -> dict[Any, Callable[..., Any]]:
    """``_COMPOSED`` as what they are made of, and dropout that does nothing as its operand."""
    packets = [getattr(torch.ops.aten, name) for name in _COMPOSED.split()]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    return {o: o.decompose for o in overloads} | {torch.ops.aten.dropout.default: _idle_dropout}


def _idle_dropout(x: torch.Tensor, p: float, train: bool) -> Any:
    return NotImplemented if p and train else x


def _distinct(values: Sequence[Any]) -> Iterator[Any]:
    """``values``, no tensor among them twice: which input is read is told by the object."""
    seen = set[int]()
    for value in values:
        again = isinstance(value, torch.Tensor) and id(value) in seen
        seen.add(id(value))
        yield value.detach().requires_grad_(value.requires_grad) if again else value


def trace_below_autograd(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``module`` as a graph of ATen operators after autograd and batching, which it must not leave open."""
    with _tracing(fake_mode_of(inputs)), warnings.catch_warnings():
        return make_fx(module, tracing_mode="real", _allow_non_fake_inputs=True)(*_distinct(inputs))


def run_fake(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What ``target`` would return, as fake tensors and symbolic sizes.

    A size that depends on data (``x[mask]``) gets a new symbol, which the next trace in this mode must not
    look for in its graph.
    """
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    env = mode.shape_env
    fresh = nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()
    try:
        with mode, enable_python_dispatcher(), torch._C._DisableAutocast(), fresh:
            return target(*args, **kwargs)
    finally:
        mode.allow_non_fake_inputs = before


@dataclass(frozen=True)
class Described:
    """``key`` is equal for values that every operator treats alike, as far as shapes go; ``symbols`` are
    those of their sizes."""

    key: Hashable
    symbols: frozenset[sympy.Basic]


def described(values: Any) -> Described:
    """Operands of an operator, or what it returned: tensors, sizes, constants, and lists of them."""
    symbols: set[sympy.Basic] = set()

    def key(value: Any) -> Hashable:
        if isinstance(value, FakeTensor):
            sizes = tuple(map(key, (*value.shape, *value.stride(), value.storage_offset())))
            kind = (value.dim(), value.dtype, value.device, value.layout, value.requires_grad)
            return sizes, kind, value.is_conj(), value.is_neg(), value.constant
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):  # to hash one is to fix it
            symbols.update(value.node.expr.free_symbols)
            return type(value), value.node.expr
        if isinstance(value, list | tuple):
            return tuple(map(key, value))
        if isinstance(value, dict):
            return tuple((name, key(part)) for name, part in value.items())
        return (type(value), value) if isinstance(value, Hashable) else object()  # which equals nothing else

    return Described(key(values), frozenset(symbols))


def fake_table(
    mode: FakeTensorMode, table: torch.Tensor, dynamic: Sequence[int], least: int = 0
) -> torch.Tensor:
    """A fake of ``table`` whose dimensions ``dynamic`` have symbols of their own, of ``least`` or more.

    The symbols are unbacked: nothing may be concluded from this table's sizes.  A backed symbol would let
    Inductor guard on it, and dynamo drops guards on symbols that are no input of its own: a kernel that
    was specialised for few tokens would then run on many.
    """
    sizes = [DimDynamic.UNBACKED if d in dynamic else DimDynamic.STATIC for d in range(table.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * table.dim())
    assert mode.shape_env is not None
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        fake = mode.from_tensor(table.clone(), symbolic_context=context)  # a mode knows a tensor it has seen
    for dim in dynamic:
        torch._check(fake.shape[dim] >= least)
        torch._check(fake.shape[dim] <= 2**40)
    return fake


def shape_env_of(mode: FakeTensorMode) -> ShapeEnv | None:
    """The shape environment of a fake mode; None when every size is static."""
    return mode.shape_env


def size_now(mode: FakeTensorMode, symbol: sympy.Basic) -> sympy.Expr:
    """What a size is after guards that were taken since: it may have been found equal to another one, or to a
    number."""
    return symbol if mode.shape_env is None else mode.shape_env.replace(symbol)


def control_flow_of(target: Any) -> str | None:
    """Which branch or loop inside of a graph ``target`` is; None: it is none."""
    known = ("cond", "while_loop", "scan", "map_impl", "associative_scan")
    name = target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""
    return name if name in known else None


def written_by(launch: torch.fx.Node, values: Mapping[str, Any]) -> list[str]:
    """The names of the operands that a ``LAUNCH`` writes into, found in the kernel's own code; all of them
    where that cannot be read.  ``values``: its operands."""
    number, constants, tma = (
        launch.kwargs[key] for key in ("kernel_idx", "constant_args_idx", "tma_descriptor_metadata")
    )
    return get_mutated_tensors(number, constants, dict(values), tma)  # type: ignore[arg-type]


def may_return_writes(target: Any) -> bool:
    """Whether ``RETURNING`` takes the operator, and what it returns is nothing that it was given."""
    if not is_operator(target) or not can_auto_functionalize(target):
        return False
    return all(x.alias_info is None for x in target._schema.returns)


def call_name(node: torch.fx.Node) -> str:
    """What a node calls, as its writer knows it."""
    if node.target is RETURNING:
        return operator_name(node.args[0])
    if node.target is not KERNEL:
        return operator_name(node.target)
    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    while hasattr(kernel, "fn"):  # under its tuning
        kernel = kernel.fn
    return f"kernel {kernel.__name__}"


def is_pointwise(target: Any) -> bool:
    """Whether torch tags the operator as pointwise."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def operator_name(target: Any) -> str:
    """``"aten::add"`` for ``torch.ops.aten.add.Tensor``, and without the overload; the plain name of a Python
    function."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return packet._qualified_op_name
    return getattr(target, "__name__", str(target))


def is_operator(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def schema_of(target: Any) -> Any:
    """The schema of an operator, also where it is written without its overload and has one (as in dynamo's
    graphs); None: ``target`` is none."""
    if isinstance(target, torch._ops.OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, *target.overloads())
    return target._schema if is_operator(target) else None


def compile_with_inductor(
    module: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor's compiled form of ``module``, differentiable (AOTAutograd) when its inputs are."""
    with inductor_config.patch(patches):
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches or None)
        return compiled


def compile_with_aot_eager(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """``module`` through AOTAutograd, its graphs run as they are."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(module, list(inputs))


def keywords_of(node: torch.fx.Node) -> Mapping[str, Any]:
    """The keyword arguments of a call.  Of a ``DTensor``'s method dynamo wrote, before 2.13, a function that
    holds them."""
    if inspect.isfunction(node.target):
        held: Mapping[str, Any] = inspect.getclosurevars(node.target).nonlocals.get("kwargs_as_value", {})
        return held
    return node.kwargs


def last_graph() -> int:
    """How many graphs torch compiles of one function, if this is the last one and what needs another will run
    in eager, without an error; else 0."""
    this, limit = CompileContext.current_compile_id(), dynamo_config.recompile_limit
    if this is None or this.frame_compile_id is None or dynamo_config.fail_on_recompile_limit_hit:
        return 0
    return limit if this.frame_compile_id + 1 >= limit else 0


def group_over(mesh: DeviceMesh) -> ProcessGroup:
    """The process group of all ranks of ``mesh``; a mesh of several dimensions keeps it, made at the first
    call, which is a collective of all ranks of the mesh that it is a part of."""
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def process_group(name: Any) -> ProcessGroup:
    """The process group that a graph calls ``name``, a text."""
    return _resolve_process_group(name)


def lower_as_collective(target: Any) -> None:
    """Inductor treats ``target(x, *rest)`` as the start of a collective that ``wait_tensor`` ends: it keeps x
    alive and moves the two apart, as far as other work allows."""
    add_layout_constraint(target, constrain_to_fx_strides)

    def start(x: Any, *rest: Any) -> Any:
        sent: Any = inductor_ir.ExternKernel.require_contiguous(x)
        made: Any = inductor_ir._CollectiveKernel.create_out_of_place(target, sent, *rest)
        return inductor_ir.TensorBox.create(made)

    register_lowering(target, type_promotion_kind=None)(start)


def mode_patches(mode: str) -> dict[str, Any]:
    """Inductor's configuration for a ``torch.compile`` mode."""
    return dict(torch._inductor.list_mode_options(mode))


def belongs_to_module(placeholder: torch.fx.Node) -> bool:
    """Whether an input of dynamo's graph is a parameter or buffer rather than something passed in."""
    value = placeholder.meta["example_value"]
    if isinstance(value, torch.nn.Parameter):
        return True
    graph_arg = placeholder.meta.get("grapharg")
    source = getattr(graph_arg, "source", None)
    if source is None:
        return False
    guard = source.guard_source
    return bool(guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module())


def source_name(placeholder: torch.fx.Node) -> str:
    """What the model calls an input of dynamo's graph: its last name, or which argument it is."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return placeholder.name
    return re.findall(r"[A-Za-z_]\w*(?:'\]\[\d+\])?", str(source.name))[-1].replace("']", "")


def break_of(module: torch.fx.GraphModule) -> str:
    """Why and where dynamo ended this graph before its function does; empty when it did not."""
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    said = next((line.strip() for line in reason.reason.splitlines() if line.strip()), "unknown")
    frame = reason.user_stack[-1] if reason.user_stack else None
    return said if frame is None else f"{said}, at {frame.filename}:{frame.lineno}, `{frame.line}`"


def fixed(value: Any) -> float | None:
    """The number that a SymFloat has, a constant of the graph from now on (others compile again), or that
    ``value`` is; None: it depends on data."""
    if isinstance(value, torch.SymFloat) and not value.node.has_hint():
        return None
    return float(value)


def fixed_number(value: Any) -> float | None:
    """The same of a number that is made of what the caller gave as such: attributes, or what a function
    closes over.  None: sizes of tensors or data are part of it."""
    env, symbols = value.node.shape_env, free_symbols(value)
    sources = [env.var_to_sources.get(symbol) or [None] for symbol in symbols]
    given = all(s is not None and not isinstance(s, TensorPropertySource) for of in sources for s in of)
    return (float(value) if isinstance(value, torch.SymFloat) else int(value)) if given else None


def equal_now(size: Any, other: Any) -> bool:
    """Whether two sizes were equal while tracing, as far as both were known then; asking adds no guard."""
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in (size, other)]
    return hints[0] is not None and hints[0] == hints[1]


def fixed_at(values: Sequence[Any]) -> str:
    """The stack, formatted, of the code that made a symbolic size of the fake ``values`` a number; "" if none
    did."""
    env = shape_env_of(fake_mode_of(values))
    stacks = [] if env is None else list(env.specialization_stacks.values())
    return "".join(stacks[0].format()) if stacks else ""


def mark_symbolic(tensor: torch.Tensor, dim: int, unknown: bool) -> bool:
    """Ask dynamo for a symbol in place of the size of ``dim``; ``unknown``: where that was asked before, for
    one of which nothing is known but that it is no larger.  False: there is nothing left to ask for."""
    marks = ("_dynamo_weak_dynamic_indices", "_dynamo_dynamic_indices")
    if not any(dim in getattr(tensor, mark, ()) for mark in marks):
        maybe_mark_dynamic(tensor, dim)
        return True
    if not unknown or dim in getattr(tensor, "_dynamo_unbacked_indices", ()):
        return False
    try:
        mark_unbacked(tensor, dim, shape_id="hsap_tokens", min=2, max=tensor.shape[dim])
    except TypeError:  # an older torch cannot say that two inputs have the same unknown size
        return False
    return True


def mark_numbers_symbolic(values: Container[int]) -> bool:
    """Ask dynamo for a symbol in place of every number of the caller that this trace took for a constant and
    that is one of ``values``, as it does by itself once one has changed: sizes that Python objects remember,
    such as those of a ``BlockMask``.  False: there is none."""
    context = torch._guards.TracingContext.try_get()
    guards = () if context is None else context.guards_context.dynamo_guards
    names = {guard.name for guard in guards}
    entries = [
        entry
        for state in get_code_state().values()
        for name, entry in state.automatic_dynamic.items()
        if name in names and entry.scalar in values
    ]
    for entry in entries:
        entry.scalar = auto_dynamic
    return bool(entries)


OLDEST, NEWEST_TESTED = (2, 11), (2, 14)


@functools.cache
def check_version(version: str = torch.__version__) -> None:
    """Refuse a torch that lacks what the passes build on; warn once of one nobody has tried."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST:
        raise Refused(
            "this torch is too old",
            got=f"torch {version}",
            wanted=f"torch >= {OLDEST[0]}.{OLDEST[1]}",
            do='pip install "torch>=2.11"',
        )
    if (major, minor) > NEWEST_TESTED:
        warnings.warn(
            f"hsap: torch {version} is newer than what was tested ({NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}); "
            "compare one step with eager before a long run",
            stacklevel=2,
        )


# --- flex attention ------------------------------------------------------------------------------------


def trace_aten(mode: FakeTensorMode, function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.Graph:
    """The ATen operators that ``function`` runs on ``inputs`` (fake tensors of ``mode``, sizes)."""
    with _tracing(mode), torch._C._DisableAutocast():
        return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*_distinct(inputs)).graph


def flex_block_mask(lengths: tuple[Any, Any], tables: Sequence[Any], block: int, mask_mod: Any) -> Any:
    """``BlockMask.as_tuple()``, which differs between versions of torch, of things that need not be tensors.

    ``tables``: kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, and the same four of q.
    """
    stand_ins = [torch.empty((1, 1, 1, 1)) for _ in tables]
    found = {id(s): t for s, t in zip(stand_ins, tables, strict=True)}
    make: Any = BlockMask
    made = make(lengths, *stand_ins, BLOCK_SIZE=(block, block), mask_mod=mask_mod).as_tuple()
    return tuple(found.get(id(x), x) for x in made)


#: Kernel options that change what is computed, and what they are here: rows may have no key, blocks lie
#: anywhere, and the lse has base 2 and a gradient (it is not so with BACKEND="FLASH").
_FLEX_FIXED = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "BACKEND": "TRITON",
    "FORCE_USE_FLEX_ATTENTION": True,
}


def flex_kernel_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a flex attention node, with those that a user chose (block sizes, warps, stages ...).

    Raises ``Refused`` for a name that torch does not know or that is not the user's choice.
    """
    known = [key for key in FlexKernelOptions.__annotations__ if key not in _FLEX_FIXED]
    for key in given:
        if key.removeprefix("fwd_").removeprefix("bwd_") not in known:
            raise Refused(
                f'there is no kernel option "{key}"',
                got=f'kernel_options={{"{key}": ...}}',
                wanted=f"one of {', '.join(known)}, with or without the prefix fwd_ or bwd_",
                do="see torch.nn.attention.flex_attention.FlexKernelOptions",
            )
    fixed = {key: _FLEX_FIXED[key] for key in FlexKernelOptions.__annotations__ if key in _FLEX_FIXED}
    if "BACKEND" in fixed:
        del fixed["FORCE_USE_FLEX_ATTENTION"]
    return {**fixed, **given, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
