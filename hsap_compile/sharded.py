"""Parameters in parts, one on each rank, of a model that is compiled as one graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hsap_compile.errors import Refused
from hsap_compile.runtime import memory_of

Model = TypeVar("Model", bound=torch.nn.Module)


def shard_parameters(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Model:
    """Leave every rank one part of each parameter, and so of its gradient and of what an optimiser keeps.

    The compiled model gathers a parameter where it is read, once more in the backward, and sums its gradient
    into the parts; unlike hooks around layers, this does not break the graph.  Parameters are ``DTensor`` of
    their old names, which optimisers, ``clip_grad_norm_`` and ``torch.distributed.checkpoint`` know.  Until
    ``model`` is called for the first time, ``layer.weight`` is that ``DTensor``, so that a model may be made
    on the meta device, sharded, and initialised in parts (``to_empty``, then ``torch.nn.init``).  From then
    on, reading one gathers it, and what is written into that is lost: write into ``model.parameters()``.
    Make the optimiser afterwards.

    ``model`` is changed and returned; rank 0's values are sent to all.  What modules outside of it share with
    it becomes a parameter of its own: shard a model whole.  ``mesh``: of all ranks of the world, which is the
    default; parts are made over its last dimension, and copies over others.  Gradients are the mean over the
    mesh: over replicas, as ranks that share a batch have equal ones.  ``dtype``: in which parameters travel
    and are read; ``reduce_dtype``: in which gradients are summed; None: as they are.

    Raises ``Refused`` without a process group, on a rank that the mesh does not have, for parameters that are
    distributed already, and for a module that writes into one, or keeps one in an attribute beside its name.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise Refused(
            "there are no ranks to shard parameters over",
            got="no process group",
            wanted="a process group of all ranks",
            do="call torch.distributed.init_process_group() first, in a program that torchrun starts",
        )
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            raise Refused(
                "parameters are distributed already",
                got=f"{name}, a DTensor",
                wanted="plain parameters",
                do="drop the other call (fully_shard, parallelize_module, or this one)",
            )
    parameters = dict.fromkeys(model.parameters())
    if not parameters:
        return model
    if mesh is None:
        mesh = init_device_mesh(_device_of(parameters), (dist.get_world_size(),))
    ranks = mesh.mesh.flatten().tolist()
    if mesh.get_coordinate() is None or ranks != sorted(ranks):
        raise Refused(
            "parameters cannot be sharded over this mesh",
            got=f"ranks {ranks}, on rank {dist.get_rank()}",
            wanted="a mesh that every rank is in, of ranks in ascending order",
            do="drop mesh, or pass init_device_mesh(device, (ranks,)) or (replicas, ranks of one)",
        )
    modules = list(model.modules())
    _refuse_kept(modules, parameters)
    parts = {p: torch.nn.Parameter(_divided(p, mesh), p.requires_grad) for p in parameters}
    kinds: dict[Any, type] = {}
    uses = _Uses()
    model.register_forward_pre_hook(uses.begin)
    for module in modules:
        own = {name: parts[p] for name, p in module._parameters.items() if p is not None}
        if own:
            module._parameters.update(own)
            kind = (type(module), tuple(own))
            if kind not in kinds:
                kinds[kind] = _reading_whole(*kind, dtype, reduce_dtype, uses)
            module.__class__ = kinds[kind]
    return model


def _device_of(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Where the ranks compute: of parameters on the meta device, where they will be."""
    found = next((p.device.type for p in parameters if not p.is_meta), None)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return found or (accelerator.type if accelerator else "cpu")


def _divided(p: torch.nn.Parameter, mesh: DeviceMesh) -> DTensor:
    last = Shard(0) if p.dim() else Replicate()
    return distribute_tensor(p.detach(), mesh, [*[Replicate()] * (mesh.ndim - 1), last])


class _Uses:
    """Whether a model was called: until then its parameters are read to be initialised."""

    begun = False

    def __deepcopy__(self, memo: Any) -> _Uses:
        """A copy of the model has the same classes, which know this one."""
        return self

    def begin(self, module: torch.nn.Module, args: Any) -> None:
        self.begun = True


def _reading_whole(
    kind: type,
    names: tuple[str, ...],
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    uses: _Uses,
) -> type:
    """``kind`` of modules, whose parameters are whole where they are read to compute."""

    def reader(name: str) -> property:
        def whole(module: torch.nn.Module) -> torch.Tensor | None:
            p: Any = module._parameters[name]
            if not isinstance(p, DTensor):  # set anew since
                return p
            if not (uses.begun or torch.compiler.is_compiling()):
                return p
            everywhere = [Replicate()] * p.device_mesh.ndim
            types = (dtype, reduce_dtype) if p.is_floating_point() else (None, None)
            made = p.redistribute(placements=everywhere, forward_dtype=types[0], backward_dtype=types[1])
            result: torch.Tensor = made.to_local(grad_placements=[Partial("avg")] * p.device_mesh.ndim)
            return result

        return property(whole)

    reading = {name: reader(name) for name in names}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **reading})


def _refuse_kept(modules: Sequence[torch.nn.Module], parameters: Iterable[torch.nn.Parameter]) -> None:
    """What would go on with the old parameter: what is kept of it elsewhere, and what is written into it."""
    old = list(parameters)
    same, places = set(map(id, old)), [memory_of(p) for p in old if _has_memory(p)]
    for module in modules:
        if getattr(module, "max_norm", None) is not None:
            raise Refused(
                "a module writes into its parameter, which is gathered for it to read",
                got=f"{type(module).__name__} with max_norm",
                wanted="modules that read their parameters",
                do="drop max_norm",
            )
        for attribute, value in vars(module).items():
            inside = [] if attribute in ("_parameters", "_modules") else _tensors_in(value)
            if any(id(x) in same or _has_memory(x) and _is_among(memory_of(x), places) for x in inside):
                raise Refused(
                    "a module keeps a parameter where it is not read by name",
                    got=f"{type(module).__name__}.{attribute}, which holds one",
                    wanted="modules that read their parameters as self.weight",
                    do="write the module so, or leave it out: shard modules that share no parameter with it",
                )


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | set | frozenset | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def _has_memory(x: torch.Tensor) -> bool:
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided
    return plain and not x.is_meta and x.numel() > 0


def _is_among(place: tuple[int, int], places: Iterable[tuple[int, int]]) -> bool:
    """Whether a byte of ``place`` is one of ``places``."""
    first, last = place
    return any(begin < last and first < end for begin, end in places)
