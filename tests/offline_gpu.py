"""What Inductor would run on a GPU, made on a machine that has none: its source, its cubins, its numbers.

A graph is traced on CPU (autograd refuses fake tensors of a device that torch was built without), its fake
values are moved to "cuda", and Inductor's own code generation does the rest under the properties of an
H100.  ``triton`` compiles the kernels for a real target, or interprets them on CPU tensors.  The torch names
that pretend to be a GPU are patched for the whole process: call these functions in one of its own
(``in_a_process``), with TRITON_INTERPRET set where it shall interpret.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, gcnArchName="", uuid="", is_integrated=0,
)  # fmt: skip


class Generated(NamedTuple):
    """Inductor's Python source of one graph, and the names of what it takes and returns."""

    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Built(NamedTuple):
    """What ptxas made of a kernel."""

    name: str
    cubin_bytes: int
    shared_bytes: int
    matrix_products: int


def in_a_process(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """``function(*args)`` in a new process with these environment variables."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict("os.environ", environment), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


# --- from a graph to Inductor's source -----------------------------------------------------------------


def generate(
    module: torch.fx.GraphModule,
    config: Mapping[str, Any] | None = None,
    rewrite: Callable[[torch.fx.Graph], None] | None = None,
) -> list[Generated]:
    """The forward and, when an input requires a gradient, the backward of ``module``.

    ``rewrite``: what is done to each of the two first.  Tables of slices stay on the host.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor.decomposition import select_decomp_table

    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.insert(0, graph)
        return make_boxed_func(graph.forward)

    def partition(
        *args: Any, **kwargs: Any
    ) -> Any:  # without symbols, no backward is compiled before its use
        forward, backward = min_cut_rematerialization_partition(*args, **kwargs)
        found.append(backward)
        return forward, backward

    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    mode = next(x.fake_mode for x in inputs if isinstance(x, torch.Tensor))  # type: ignore[attr-defined]
    with tracing(TracingContext(mode)):
        aot_module_simplified(
            module, inputs, fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            decompositions=select_decomp_table(), partition_fn=partition,
        )  # fmt: skip
    for graph in found if rewrite is not None else ():
        rewrite(graph.graph)
        graph.recompile()
    with pretended_gpu():
        return [_generated(graph, mode, config or {}) for graph in found]


def _generated(graph: torch.fx.GraphModule, mode: Any, config: Mapping[str, Any]) -> Generated:
    from torch._inductor import config as inductor_config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    taken = [n for n in graph.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    patches = {"force_disable_caches": True, "compile_threads": 1, **config}
    with inductor_config.patch(patches):
        _move(graph)
        view_to_reshape(graph)
        lowering = GraphLowering(graph, shape_env=mode.shape_env, is_inference=False)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), DebugContext():
            lowering.run(*[n.meta["val"] for n in taken])
            source = lowering.codegen()[0].value
    return Generated(source, tuple(n.name for n in taken), tuple(str(x) for x in output.args[0]))


def _move(graph: torch.fx.GraphModule) -> None:
    """Fake values and device arguments, in subgraphs too, to cuda."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = torch.utils._pytree.tree_map(_moved, node.meta["val"])
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
            module.recompile()


def _moved(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or (value.dtype == torch.int64 and value.shape[1:] == (7,)):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Inductor and triton find one GPU."""
    import torch._inductor.runtime.triton_helpers as helpers
    import torch.utils._triton as availability
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    class Driver:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_current_stream = staticmethod(lambda device=None: 0)
        get_device_interface = staticmethod(lambda: torch.cuda)
        is_active = staticmethod(lambda: True)

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "get_device_properties": H100, "get_device_capability": capability, "_lazy_init": None,
        "get_device_name": H100.name,
    }  # fmt: skip
    interface = {k: answers[k] for k in ("is_available", "device_count", "current_device")}
    interface |= {"get_device_properties": H100, "get_compute_capability": target.arch}

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, constant(value)))
        for name, value in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(constant(value))))
        worker = mock.patch.object(
            CudaInterface.Worker, "get_device_properties", staticmethod(constant(H100))
        )
        stack.enter_context(worker)
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        # what a torch built for CUDA does on the device for its first fake tensor
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", constant(None)))
        for name in ("set_driver_to_gpu", "set_driver_to_cpu"):
            stack.enter_context(mock.patch.object(helpers, name, constant(None)))
        for function in vars(availability).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
        triton.runtime.driver.set_active(Driver())
        yield


# --- from the source to cubins -------------------------------------------------------------------------


def kernels(source: str) -> dict[str, str]:
    """The Triton kernels of Inductor's source, by name."""
    pattern = r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)"
    return dict(re.findall(pattern, source, re.DOTALL))


def cubins(sources: Sequence[str], arch: int) -> list[Built]:
    """Compile every kernel (its first configuration) with triton for sm_``arch``."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_compat import ASTSource
    from triton.backends.compiler import GPUTarget

    found = []
    with pretended_gpu((arch // 10, arch % 10)):
        for source in sources:
            for name, text in kernels(source).items():
                tuner = getattr(PyCodeCache.load(text), name)
                config, meta = tuner.configs[0], tuner.triton_meta
                signature = dict(meta["signature"]) | dict.fromkeys(config.kwargs, "constexpr")
                constants = {**meta.get("constants", {}), **config.kwargs}
                program = ASTSource(tuner.fn, signature, constants, meta["configs"][0])
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "debug": True}
                built = triton.compile(program, target=GPUTarget("cuda", arch, 32), options=options)
                products = built.asm["ptx"].count("wgmma.mma") + built.asm["ptx"].count("mma.sync")
                found.append(Built(name, len(built.asm["cubin"]), built.metadata.shared, products))
    return found


# --- from the source to numbers ------------------------------------------------------------------------


def interpreted(source: str, args: Sequence[Any]) -> list[Any]:
    """Run Inductor's ``call`` on CPU tensors, its kernels in triton's interpreter (TRITON_INTERPRET=1)."""
    text = re.sub(r"= async_compile\.triton\(", "= _Interpreted(", source)
    unwanted = r"^(async_compile\.wait|from torch._C import _cuda_getCurrentRawStream).*$"
    text = re.sub(unwanted, "", text, flags=re.MULTILINE)
    space: dict[str, Any] = {"__name__": "interpreted", "_Interpreted": _Interpreted}
    guard = mock.patch.object(torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext())
    with pretended_gpu(), guard, mock.patch.object(torch.cuda, "set_device", lambda device: None):
        exec(compile(text, "<inductor>", "exec"), space)
        space["empty_strided_cuda"] = _not_a_number
        space["get_raw_stream"] = lambda device: 0
        return list(space["call"](list(args)))


def train(
    graphs: Sequence[Generated], args: Sequence[Any], *grads: torch.Tensor
) -> tuple[list[Any], list[Any]]:
    """What the forward returns to its caller, and the backward for the gradients ``grads`` of that."""
    forward, backward = graphs
    found = interpreted(forward.source, args)
    saved = dict(zip(forward.outputs[len(grads) :], found[len(grads) :], strict=True))
    incoming = iter(grads)
    taken = [saved[name] if name in saved else next(incoming) for name in backward.inputs]
    return found[: len(grads)], interpreted(backward.source, taken)


def _not_a_number(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """A new buffer that shows when it is read before it is written."""
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(float("nan")) if dtype.is_floating_point else made


#: What the interpreter lacks of CUDA's own library and of tl.math.
_NOT_FINITE = """
@triton.jit
def _isnan(x):
    return x != x


@triton.jit
def _isinf(x):
    return (x == float("inf")) | (x == float("-inf"))


"""


class _Interpreted:
    """Stands for a kernel that ``async_compile.triton`` would have compiled."""

    def __init__(self, name: str, source: str, device_str: str) -> None:
        from torch._inductor.codecache import PyCodeCache

        decorator = source.index("@triton_heuristics")
        jit = source.index("@triton.jit", decorator)
        # the interpreter reads a function's source file, hence a module and not exec
        text = source[:decorator] + _NOT_FINITE + source[jit:]
        text = re.sub(r"libdevice\.(isnan|isinf)", r"_\1", text).replace("libdevice.", "tl.math.")
        self.function = getattr(PyCodeCache.load(text), name)
        found = re.search(r"'grid_type': '(\w+)'", source)
        self.grid = found.group(1) if found else ""

    def run(self, *args: Any, stream: int) -> None:
        if self.grid == "FixedGrid":
            *rest, x, y, z = args
            self.function[(x, y, z)](*rest)
            return
        assert self.grid in ("Grid1D", "Grid2D", "Grid2DWithYZOverflow"), f"no such grid here: {self.grid}"
        names = list(self.function.arg_names)
        blocks = {"XBLOCK": 1024, "YBLOCK": 16, "R0_BLOCK": 16}
        chosen = {name: size for name, size in blocks.items() if name in names}
        grid = [-(-args[names.index("xnumel")] // blocks["XBLOCK"])]
        if "ynumel" in names:
            grid.append(-(-args[names.index("ynumel")] // blocks["YBLOCK"]))
        self.function[tuple(grid)](*args, **chosen)
