"""Data parallel replicas beside the mesh: ranks that share a batch are a part of the world."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from models import batch, build, difference, error_of_mean
from pool import Pool

#: Of each replica, other documents and other lengths.
PACKS = ([[5, 1, 9, 4, 8]], [[30, 2, 9]])
Mesh = dict[str, int]


def made(sizes: Mesh) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shared(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that share a batch."""
    return mesh["inter", "intra"]


def compared(sizes: Mesh, lower: str) -> float:
    """The relative error of loss, logits and all gradients of this rank's replica."""
    mesh = made(sizes)
    model = build("nano", torch.float32 if lower == "inductor" else torch.float64)
    options = {"lower": lower, "mesh": shared(mesh)}
    compiled = torch.compile(model, backend="hsap", options=options)
    reference, replica = copy.deepcopy(model), mesh.get_local_rank("data")
    packs = [PACKS[replica], PACKS[1 - replica]]  # then the documents of the other one
    return max(difference(compiled, model, reference, batch("nano", p, seed=replica)) for p in packs)


@pytest.mark.parametrize(
    ("sizes", "lower", "most"),
    [
        ({"data": 2, "inter": 2, "intra": 1}, "eager", 1e-12),
        ({"inter": 2, "data": 2, "intra": 1}, "aot_eager", 1e-12),
        pytest.param({"data": 2, "intra": 2, "inter": 1}, "inductor", 2e-5, marks=pytest.mark.slow),
        ({"data": 2, "inter": 1, "intra": 1}, "eager", 1e-12),
    ],
    ids=str,
)
def test_each_replica_has_its_own_batch(pool: Pool, sizes: Mesh, lower: str, most: float) -> None:
    world = 2 if sizes["inter"] * sizes["intra"] == 1 else 4
    assert max(pool.run(compared, sizes, lower, world=world)) < most


def averaged(how: str) -> float:
    """The largest difference of gradients from the mean of what eager gives each replica's batch."""
    mesh = made({"data": 2, "inter": 1, "intra": 2})
    model = build("nano")
    references = [copy.deepcopy(model) for _ in PACKS]
    options = {"lower": "eager", "mesh": shared(mesh), "grad_sync": how != "FSDP2 over all, shares"}
    step: Any = model
    if how == "DDP":
        step = torch.compile(
            DistributedDataParallel(model, process_group=mesh.get_group("data")),
            backend="hsap",
            options=options,
        )
    elif how == "FSDP2":
        fully_shard(model, mesh=mesh["data"]).compile(backend="hsap", options=options)
    else:
        sharded = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        if how == "FSDP2 over all, shares":
            sharded.set_gradient_divide_factor(len(PACKS))
        model.compile(backend="hsap", options=options)
    given = [batch("nano", rows, seed=i) for i, rows in enumerate(PACKS)]
    step(**given[mesh.get_local_rank("data")])[0].backward()
    for reference, of_replica in zip(references, given, strict=True):
        reference(**of_replica)[0].backward()
    return error_of_mean(model, references)


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.parametrize("how", ["DDP", "FSDP2", "FSDP2 over all", "FSDP2 over all, shares"])
def test_gradients_are_averaged_over_replicas(pool: Pool, how: str) -> None:
    assert max(pool.run(averaged, how)) < 1e-12


def disagreeing() -> str:
    """What this rank says where the last of all ranks was given other tokens."""
    mesh = made({"data": 2, "inter": 2, "intra": 1})
    options = {"lower": "eager", "mesh": shared(mesh)}
    compiled = torch.compile(build("nano"), backend="hsap", options=options)
    given = batch("nano", PACKS[mesh.get_local_rank("data")])
    if dist.get_rank() == dist.get_world_size() - 1:
        given["ids"] = given["ids"].flip(1)
    try:
        compiled(**given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_ranks_of_a_replica_that_disagree_are_refused_by_their_numbers(pool: Pool) -> None:
    said = pool.run(disagreeing)
    assert said[:2] == ["accepted"] * 2
    for text in said[2:]:
        assert text.startswith("Refused: hsap: the ranks were given different batches")
        assert "ranks [3] differ from rank 2: {2: " in text


def outside() -> str:
    """What a rank says that is not in the mesh it was given."""
    part = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("inter", "intra"))
    if dist.get_rank() < 2:
        return "a member"
    try:
        torch.compile(build("nano"), backend="hsap", options={"mesh": part})(**batch("nano", PACKS[0]))
    except Exception as error:
        return str(error)
    return "accepted"


def test_a_rank_outside_of_the_mesh_is_told_which_mesh_to_pass(pool: Pool) -> None:
    said = pool.run(outside)
    assert said[:2] == ["a member"] * 2
    for rank, text in enumerate(said[2:], 2):
        assert "this rank is not in the mesh" in text
        assert f"rank {rank} of 4, and a mesh of ranks [0, 1]" in text
        assert 'pass mesh["inter", "intra"] of a mesh over all ranks' in text
