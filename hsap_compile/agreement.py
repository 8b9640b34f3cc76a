"""What ranks must agree on before a step: they were given the same batch, and hold the same model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hsap_compile._torch import parts_of_subclass, process_group
from hsap_compile.errors import Refused
from hsap_compile.kernels.exchange import all_gather

_BATCHES = (
    "the ranks were given different batches",
    "pass the same whole batch on every rank (same seed, no sampler per rank)",
)
#: What ranks compare, in the order of the numbers they exchange, and what to do when they differ.
_EXACT = (
    (
        "the ranks run different graphs",
        "call the compiled model with the same kinds of inputs and the same options on every rank",
    ),
    (
        "the ranks were given batches of different lengths",
        "pass the same whole batch on every rank; the backend shards it",
    ),
    _BATCHES,
    (
        "the ranks made different plans for one batch",
        "run the same version of this package and of numpy on every rank, on processors of one kind: each"
        " rank plans for itself, and the last digit of a number may decide where a document goes",
    ),
)
#: The same of floating values, which may differ in their last digits.
_NEARLY = (
    (
        "the ranks hold different parameters",
        "seed every rank alike, or broadcast the parameters before the first step",
    ),
    _BATCHES,
)


@dataclass(frozen=True)
class Claim:
    """One rank's call: its graph's ``signature``, S, the digests of its documents and of its plan, the
    graph's inputs, and which of them are parameters."""

    signature: int
    tokens: int
    documents: bytes
    plan: int
    args: Sequence[Any]
    parameters: frozenset[int]

    def exact(self) -> list[int]:
        """As ``_EXACT``: integers that are the same on every rank."""
        numbers = [x for x in self.args if isinstance(x, int)]
        content = zlib.crc32(repr(numbers).encode(), zlib.crc32(self.documents))
        for value in self._inputs(floating=False):
            content = zlib.crc32(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes(), content)
        return [self.signature, self.tokens, content, self.plan]

    def nearly(self) -> list[float]:
        """As ``_NEARLY``: sums in which every element counts, in its place."""
        given = [self.args[i] for i in sorted(self.parameters)]
        parameters = [x for x in given if not isinstance(x, DTensor)]  # of which ranks hold parts
        return [sum(map(_weighted, values)) for values in (parameters, self._inputs(floating=True))]

    def _inputs(self, floating: bool) -> list[torch.Tensor]:
        inputs = [x for i, x in enumerate(self.args) if i not in self.parameters]
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
        return [x for x in tensors if (x.is_floating_point() or x.is_complex()) == floating]


def _weighted(x: torch.Tensor) -> float:
    try:
        return _weighted_sum(x)
    except (NotImplementedError, TypeError):  # a subclass (quantised weights) that knows other operators
        return sum(map(_weighted, parts_of_subclass(x)))


def _weighted_sum(x: torch.Tensor) -> float:
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    flat = x.double().abs().flatten()
    return float(flat @ torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device))


def check(claim: Claim, ranks: int, group: str, *, thorough: bool) -> None:
    """Compare with all other ranks; ``thorough``: floating inputs and parameters as well, which costs one
    reading of them.  Raises ``Refused`` on every rank, naming those that differ from rank 0."""
    numbers = claim.nearly() if thorough else [0.0] * len(_NEARLY)
    bits = [int(np.float64(x).view(np.int64)) for x in numbers]
    mine = torch.tensor([*claim.exact(), thorough, *bits], dtype=torch.int64)
    everyone = process_group(group)
    if "cpu:" not in dist.get_backend_config(everyone):
        mine = mine.to(next(x.device for x in claim.args if isinstance(x, torch.Tensor) and x.is_cuda))
    rows = all_gather(mine, ranks, group).view(ranks, -1).tolist()
    members = dist.get_process_group_ranks(everyone)
    for column, (what, do) in enumerate(_EXACT):
        values = [row[column] for row in rows]
        _refuse_others(what, do, members, values, [v != values[0] for v in values])
    if not all(row[len(_EXACT)] for row in rows):  # a rank that compiled anew is at its first call
        return
    for column, (what, do) in enumerate(_NEARLY, len(_EXACT) + 1):
        sums = [float(np.int64(row[column]).view(np.float64)) for row in rows]
        same = np.isclose(sums, sums[0], rtol=1e-6, atol=0.0, equal_nan=True)
        _refuse_others(what, do, members, sums, [not s for s in same])


def _refuse_others(
    what: str, do: str, ranks: Sequence[int], values: Sequence[float], differs: Sequence[bool]
) -> None:
    others = [rank for rank, d in zip(ranks, differs, strict=True) if d]
    if others:
        raise Refused(
            what,
            got=f"ranks {others} differ from rank {ranks[0]}: {dict(zip(ranks, values, strict=True))}",
            wanted="the same on every rank",
            do=do,
        )
