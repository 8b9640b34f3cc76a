"""The ranks that share a batch, and these as groups: ``inter`` groups of ``intra`` ranks."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hsap_compile._torch import group_over, process_group
from hsap_compile.errors import Refused
from hsap_compile.options import Options
from hsap_compile.plan import MeshShape


def group_name(mesh: DeviceMesh | None) -> str:
    """The process group of the ranks of ``mesh``, or of all; empty when there is only this one.

    Raises ``Refused`` on a rank that the mesh does not have.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    everyone = dist.group.WORLD
    assert everyone is not None
    if mesh is None or mesh.size() == everyone.size():
        return everyone.group_name
    if mesh.get_coordinate() is None:
        raise Refused(
            "this rank is not in the mesh",
            got=f"rank {everyone.rank()} of {everyone.size()}, and a mesh of ranks {_members(mesh)}",
            wanted="on every rank the mesh of the ranks that share its batch",
            do='pass mesh["inter", "intra"] of a mesh over all ranks: init_device_mesh(device, '
            '(replicas, inter, intra), mesh_dim_names=("data", "inter", "intra"))',
        )
    return group_over(mesh).group_name


def place_in(group: str) -> tuple[int, int]:
    """(this rank, ranks) of a process group; of the world for "", (0, 1) when there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if not group:
        return dist.get_rank(), dist.get_world_size()
    found = process_group(group)
    return found.rank(), found.size()


def members_of(group: str) -> frozenset[int]:
    """Which ranks of the world a process group has; none for "", as when nothing is run."""
    return frozenset() if not group else frozenset(dist.get_process_group_ranks(process_group(group)))


def mesh_shape(options: Options, kv_heads: int, heads: int, size: int) -> MeshShape:
    """The groups of ``size`` ranks for a model whose attentions have (a multiple of) these heads.

    Raises ``Refused``.
    """
    if options.mesh is not None:
        return _from_device_mesh(options.mesh, size)
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


def _members(mesh: DeviceMesh) -> list[int]:
    """The ranks of ``mesh``, in the order that their process group has them."""
    return sorted(mesh.mesh.flatten().tolist())


def _from_device_mesh(mesh: DeviceMesh, size: int) -> MeshShape:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {"inter", "intra"}:
        raise Refused(
            "the mesh has other dimensions than inter and intra",
            got=f"dimensions named {tuple(names)}",
            wanted='"inter" and "intra", or one of them',
            do='pass mesh_dim_names=("inter", "intra") to init_device_mesh; of a mesh that has other '
            'dimensions too, the part that shares a batch: mesh["inter", "intra"]',
        )
    members = _members(mesh)
    if len(members) != size:
        raise Refused(
            "the mesh has another number of ranks",
            got=f"a mesh of ranks {members}, and {size} ranks",
            wanted="as many",
            do=f"ask about hsap_ranks={len(members)}, or pass another mesh",
        )
    of_group = {rank: position for position, rank in enumerate(members)}
    ranks = [[of_group[rank] for rank in row] for row in mesh.mesh.reshape(-1, mesh.shape[-1]).tolist()]
    if names == ("inter",) or names == ("intra", "inter"):
        ranks = [list(column) for column in zip(*ranks, strict=True)]
    return MeshShape(tuple(tuple(sorted(g)) for g in ranks))
