"""What a plan costs, in seconds: matrix work, attention and bytes on two kinds of links.

One rule for every choice the planner makes: the step is as slow as its slowest rank, and a rank's time in one
attention is its attended pairs at the machine's rate plus what it sends and receives at its links' rates; the
shorter of the two is partly hidden where they run side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Seconds = TypeVar("Seconds", float, npt.NDArray[np.float64])

FORWARD_AND_BACKWARD = 3.5  # of the forward's FLOPs in attention: 2 products forward, 5 backward
BACKWARD = FORWARD_AND_BACKWARD - 1
PRODUCTS = 4  # FLOPs of one pair, one head, one element of the head: q.k and weight.v, a multiply-add each


def _check(value: object, kind: type, least: float, most: float, *names: str) -> None:
    """Raise ValueError where one of the fields is no number (of `kind`) from `least` to `most`."""
    for name in names:
        got: Any = getattr(value, name)
        if type(got) not in (int, kind) or not least <= got <= most:
            number = "a whole number" if kind is int else "a number"
            limits = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
            raise ValueError(
                f"{type(value).__name__}: got {name}={got!r}; wanted {number} {limits}: correct it"
            )


@dataclass(frozen=True)
class Link:
    """What one rank can send over one level of the mesh while it receives as much.

    Attributes:
        latency_s: of one collective, in seconds.
        bandwidth_bytes_per_s: of one rank, one direction.
    """

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        _check(self, float, 0, math.inf, "latency_s")
        _check(self, float, 1, math.inf, "bandwidth_bytes_per_s")

    def seconds(self, size_bytes: Seconds, collectives: int = 1) -> Seconds:
        """The time of ``collectives`` exchanges that move ``size_bytes`` in all through one rank."""
        return (collectives * self.latency_s + size_bytes / self.bandwidth_bytes_per_s) * (size_bytes > 0)


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a model: heads, sizes in elements, bytes an element."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        _check(self, int, 1, math.inf, "query_heads", "kv_heads", "head_dim", "dtype_bytes")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"AttentionShape: got {self.query_heads} query heads and {self.kv_heads} key/value heads; "
                "wanted the first to be a multiple of the second: give the model's own"
            )

    @property
    def kv_row_bytes(self) -> int:
        """One token's keys and values, all heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def query_row_bytes(self) -> int:
        """One token's queries (or outputs), all heads."""
        return self.query_heads * self.head_dim * self.dtype_bytes

    def splits(self, ways: int) -> bool:
        """Whether ``ways`` ranks can have equally many whole query heads."""
        return self.query_heads % ways == 0

    def kv_share_bytes(self, ways: int) -> int:
        """One token's keys and values on one of ``ways`` ranks that share the query heads; key/value heads
        that do not divide are repeated just enough."""
        per_head = self.query_heads // self.kv_heads
        repeats = next(
            r for r in range(1, per_head + 1) if per_head % r == 0 and self.kv_heads * r % ways == 0
        )
        return self.kv_row_bytes * repeats // ways


@dataclass(frozen=True)
class CostModel:
    """The machine and the model's attention.

    Attributes:
        intra: the links inside a group of ranks.
        inter: the links between groups.
        attention_flops_per_s: of one rank, achieved on attended pairs.
        linear_flops_per_s: of one rank, achieved by matrix products.
        linear_flops_per_token: of everything but attention in one layer, forward and backward.
        overlap: of the shorter of attention and exchange that run side by side, the part that is hidden.
        ranks_per_host: ranks that the intra links reach; the largest group to choose.
        name: which machine, and where its figures come from.
    """

    intra: Link
    inter: Link
    attention_flops_per_s: float
    linear_flops_per_s: float
    linear_flops_per_token: float
    shape: AttentionShape = AttentionShape()
    overlap: float = 0.8
    ranks_per_host: int = 8
    name: str = "unnamed machine"

    def __post_init__(self) -> None:
        rates = "attention_flops_per_s", "linear_flops_per_s", "linear_flops_per_token"
        _check(self, float, 1, math.inf, *rates)
        _check(self, float, 0, 1, "overlap")
        _check(self, int, 1, math.inf, "ranks_per_host")

    def attention_seconds(self, pairs: Seconds, passes: float = FORWARD_AND_BACKWARD) -> Seconds:
        """``pairs`` attended (query, key) pairs, all query heads: forward and backward, or ``passes``
        forwards (1, BACKWARD)."""
        flops = PRODUCTS * self.shape.head_dim * self.shape.query_heads * passes * pairs
        return flops / self.attention_flops_per_s

    def linear_seconds(self, tokens: Seconds) -> Seconds:
        """Everything but attention in one layer, forward and backward, for ``tokens`` of one rank."""
        return self.linear_flops_per_token * tokens / self.linear_flops_per_s

    def side_by_side(self, work: Seconds, exchange: Seconds) -> Seconds:
        """The time of attention and of an exchange that needs nothing of it."""
        return work + exchange - self.overlap * np.minimum(work, exchange)

    def save(self, path: str | Path) -> None:
        """Write it as JSON that ``load`` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, machine: str | Path) -> CostModel:
        """One of ``MACHINES`` by name, or what ``save`` wrote.

        Raises:
            ValueError: neither, or a field is missing or has no sensible value.
        """
        if str(machine) in MACHINES:
            return MACHINES[str(machine)]
        try:
            values = json.loads(Path(machine).read_text())
            parts = {"intra": Link, "inter": Link, "shape": AttentionShape}
            return cls(**{name: parts[name](**v) if name in parts else v for name, v in values.items()})
        except (OSError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"machine {str(machine)!r}: got {error}; wanted one of {', '.join(MACHINES)}, or a file that "
                "`python -m hsap_compile calibrate` wrote: write one"
            ) from None


# Links: NVIDIA's data sheets, one direction, taken at 70 %. Matrix products are taken at 60 % of the dense
# bf16 peak; attention, forward and backward together, at 40 % on H100 (FlashAttention-3, arXiv 2407.08608:
# forward up to 75 %, backward less) and 50 % on A100 (FlashAttention-2, arXiv 2307.08691: 50 to 73 %).
# Latencies and overlap are assumptions. None was measured by us: `calibrate` measures.
LINEAR_FLOPS_PER_TOKEN = 6 * 218e6  # a layer of an 8B Llama, 218M parameters: 2 FLOPs forward, 4 backward

#: H100 SXM nodes: NVLink 4, 900 GB/s both ways; InfiniBand NDR, 400 Gb/s a GPU; 989 TFLOP/s.
H100 = CostModel(
    intra=Link(latency_s=20e-6, bandwidth_bytes_per_s=0.7 * 450e9),
    inter=Link(latency_s=30e-6, bandwidth_bytes_per_s=0.7 * 50e9),
    attention_flops_per_s=0.4 * 989e12,
    linear_flops_per_s=0.6 * 989e12,
    linear_flops_per_token=LINEAR_FLOPS_PER_TOKEN,
    name="H100 SXM nodes, from data sheets",
)

#: A100 SXM nodes: NVLink 3, 600 GB/s both ways; InfiniBand HDR, 200 Gb/s a GPU; 312 TFLOP/s.
A100 = CostModel(
    intra=Link(latency_s=20e-6, bandwidth_bytes_per_s=0.7 * 300e9),
    inter=Link(latency_s=30e-6, bandwidth_bytes_per_s=0.7 * 25e9),
    attention_flops_per_s=0.5 * 312e12,
    linear_flops_per_s=0.6 * 312e12,
    linear_flops_per_token=LINEAR_FLOPS_PER_TOKEN,
    name="A100 SXM nodes, from data sheets",
)

MACHINES: Mapping[str, CostModel] = MappingProxyType({"H100": H100, "A100": A100})
