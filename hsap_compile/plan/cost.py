"""What a plan costs, in seconds: matrix work, attention and bytes on two kinds of links.

One rule for every choice the planner makes: the step is as slow as its slowest rank, and a rank's time in one
attention is its attended pairs at the machine's rate plus what it sends and receives at its links' rates.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_AND_BACKWARD = 3.5  # of the forward's FLOPs in attention: 2 products forward, 5 backward
PRODUCTS = 4  # FLOPs of one pair, one head, one element of the head: q.k and weight.v, a multiply-add each


@dataclass(frozen=True)
class Link:
    """What one rank can send over one level of the mesh while it receives as much.

    Attributes:
        latency_s: of one collective, in seconds.
        bandwidth_bytes_per_s: of one rank, one direction.
    """

    latency_s: float
    bandwidth_bytes_per_s: float

    def seconds(self, size_bytes: float, collectives: int = 1) -> float:
        """The time of ``collectives`` exchanges that move ``size_bytes`` in all through one rank."""
        return collectives * self.latency_s + size_bytes / self.bandwidth_bytes_per_s if size_bytes else 0.0


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a model: heads, sizes in elements, bytes an element."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype_bytes: int = 2

    @property
    def kv_row_bytes(self) -> int:
        """One token's keys and values, all heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def query_row_bytes(self) -> int:
        """One token's queries (or outputs), all heads."""
        return self.query_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True)
class CostModel:
    """The machine and the model's attention.

    Attributes:
        intra: the links inside a group of ranks.
        inter: the links between groups.
        attention_flops_per_s: of one rank, achieved on attended pairs.
        linear_flops_per_s: of one rank, achieved by matrix products.
        linear_flops_per_token: of everything but attention in one layer, forward and backward.
    """

    intra: Link
    inter: Link
    attention_flops_per_s: float
    linear_flops_per_s: float
    linear_flops_per_token: float
    shape: AttentionShape = AttentionShape()

    def attention_seconds(self, pairs: float) -> float:
        """Forward and backward of ``pairs`` attended (query, key) pairs, all query heads."""
        flops = PRODUCTS * self.shape.head_dim * self.shape.query_heads * FORWARD_AND_BACKWARD * pairs
        return flops / self.attention_flops_per_s

    def linear_seconds(self, tokens: float) -> float:
        """Everything but attention in one layer, forward and backward, for ``tokens`` of one rank."""
        return self.linear_flops_per_token * tokens / self.linear_flops_per_s


#: H100 SXM, bf16: NVLink 4 900 GB/s both ways and InfiniBand NDR 400 Gb/s a GPU (NVIDIA data sheets), at
#: 70 %; dense bf16 989 TFLOP/s, of which matrix products reach 60 % and flash attention 40 %.
H100 = CostModel(
    intra=Link(latency_s=20e-6, bandwidth_bytes_per_s=0.7 * 450e9),
    inter=Link(latency_s=30e-6, bandwidth_bytes_per_s=0.7 * 50e9),
    attention_flops_per_s=0.4 * 989e12,
    linear_flops_per_s=0.6 * 989e12,
    linear_flops_per_token=6 * 202e6,  # an 8B Llama's layer: 2 FLOPs a parameter forward, 4 backward
)
