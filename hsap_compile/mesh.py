"""The ranks as groups: ``inter`` groups of ``intra`` ranks."""

from __future__ import annotations

import os

import torch.distributed as dist

from hsap_compile.errors import Refused
from hsap_compile.options import Options
from hsap_compile.plan import MeshShape


def world() -> tuple[int, int]:
    """(this rank, ranks); (0, 1) when torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def group_name() -> str:
    """The process group of all ranks; empty when there is only this one."""
    if dist.is_available() and dist.is_initialized():
        everyone = dist.group.WORLD
        assert everyone is not None
        return everyone.group_name
    return ""


def mesh_shape(options: Options, kv_heads: int, heads: int, size: int) -> MeshShape:
    """The groups of ``size`` ranks for a model whose attentions have (a multiple of) these heads.

    Raises ``Refused``.
    """
    if options.mesh is not None:
        return _from_device_mesh(options, size)
    intra = options.intra
    if intra is None:
        host = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        fits = [g for g in range(1, size + 1) if size % g == host % g == kv_heads % g == 0]
        intra = max(fits)
    possible = [g for g in range(1, size + 1) if size % g == 0 and heads % g == 0]
    if intra not in possible:
        raise Refused(
            f"groups of {intra} ranks are not possible",
            got=f"intra={intra} with {size} ranks and {heads} query heads",
            wanted=f"a divisor of both: one of {possible}",
            do='pass options={"intra": ...} with one of these',
        )
    return MeshShape(tuple(tuple(range(i, i + intra)) for i in range(0, size, intra)))


def _from_device_mesh(options: Options, size: int) -> MeshShape:
    mesh = options.mesh
    assert mesh is not None
    names = mesh.mesh_dim_names or ()
    ranks = mesh.mesh
    if sorted(ranks.flatten().tolist()) != list(range(size)):
        raise Refused(
            "the mesh is not over all ranks",
            got=f"a mesh of ranks {sorted(ranks.flatten().tolist())} in a world of {size}",
            wanted="every rank exactly once",
            do='init_device_mesh(device, (inter, intra), mesh_dim_names=("inter", "intra")) over all of them',
        )
    if not names or not set(names) <= {"inter", "intra"}:
        raise Refused(
            "the mesh has other dimensions than inter and intra",
            got=f"dimensions named {tuple(names)}",
            wanted='"inter" and "intra", or one of them',
            do='pass mesh_dim_names=("inter", "intra") to init_device_mesh',
        )
    if names == ("intra",):
        groups = [ranks.tolist()]
    elif names == ("inter",):
        groups = [[r] for r in ranks.tolist()]
    else:
        groups = (ranks if names == ("inter", "intra") else ranks.T).tolist()
    return MeshShape(tuple(tuple(sorted(g)) for g in groups))
