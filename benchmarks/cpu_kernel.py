"""The CPU kernel of partial attention against one flash call, and against the machine's matrix products.

    python benchmarks/cpu_kernel.py
    python benchmarks/cpu_kernel.py --heads 32 --kv-heads 8 --width 128 --tokens 4096

Packs of causal documents on one thread, forward and backward, float32 and bfloat16.  ``one call`` is ATen's
flash kernel on a single causal document with as many attended pairs as the pack has, in the same dtype;
``floor`` is the FLOPs of the attended pairs at the rate of a large matrix product in that dtype.  A pack of
short documents has many more tokens than the one document, whose rows are read and written too.

All contenders of a pack live in one process and take turns.  Times are of the process (CPU time), which other
programs lengthen least; the least wall time stands beside it.  Every output and gradient is compared with a
loop over documents.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from _measure import Bar, Ranks, Row, report

from hsap_compile.kernels import attention
from hsap_compile.plan.cost import FORWARD_AND_BACKWARD, PRODUCTS
from hsap_compile.plan.lengths import draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, ONE_CALL, PRODUCT = "hsap", "one call", "matrix product"
SIDE = 2048  # of the square matrices whose product is timed

LONG, SHORT = 512, 64  # mean tokens of a document
THAN_ONE_CALL = {LONG: 1.5, SHORT: 3.0}  # of its time, forward and backward, float32
HALF_THAN_FLOAT = 1.05  # backward: equal, up to what a measurement varies

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Seconds = tuple[float, float]  # wall, CPU


def main() -> None:
    arguments = parse()
    rows: list[Row] = []
    for name, lengths in packs(arguments.tokens).items():
        rows += compare(name, lengths, arguments)
    report(f"cpu_kernel_{arguments.heads}x{arguments.width}", vars(arguments), rows, promises(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def packs(tokens: int) -> dict[str, list[int]]:
    """Lengths of documents that fill ``tokens``."""

    def equal(length: int) -> list[int]:
        return [min(length, tokens - start) for start in range(0, tokens, length)]

    random = np.random.default_rng(0)
    varied = np.cumsum(random.integers(SHORT // 2, 3 * SHORT // 2, 2 * tokens // SHORT, endpoint=True))
    ends = [0, *(int(e) for e in varied if e < tokens), tokens]
    return {
        "64": equal(64),
        "64 +- 50 %": [b - a for a, b in itertools.pairwise(ends)],
        "512": equal(512),
        "2048": equal(2048),
        "one": [tokens],
        "fineweb_like": draw("fineweb_like", tokens, 0),
    }


def promises(rows: Sequence[Row]) -> list[Bar]:
    bars = []
    for row in rows:
        name = row["documents"]
        if row["dtype"] == "float32":
            limit = THAN_ONE_CALL[SHORT if name.startswith(str(SHORT)) else LONG]
            bars.append(Bar(f"{name}: float32 / one call", row["/ one call"], limit))
        else:
            got = row["bwd / float32"]
            bars.append(Bar(f"{name}: bfloat16 / float32, backward", got, HALF_THAN_FLOAT))
    return bars


def compare(name: str, lengths: list[int], arguments: argparse.Namespace) -> list[Row]:
    """One row a dtype."""
    contenders = list(itertools.product(DTYPES, (OURS, ONE_CALL, PRODUCT)))
    taken: dict[tuple[str, str], list[list[Seconds]]] = {c: [] for c in contenders}
    with Ranks(steps, lengths, arguments, environment={"OMP_NUM_THREADS": "1"}) as process:
        errors = {dtype: process.turn(dtype, OURS, True)[0] for dtype in DTYPES}
        for contender in contenders * (arguments.repeats + 1):  # the first warms up
            taken[contender].append(process.turn(*contender, False)[0])
    least = {
        c: np.min(parts[1:], axis=0) for c, parts in taken.items()
    }  # (forward and backward, wall and CPU)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    rows = []
    for dtype in DTYPES:
        (wall, _), (wall_back, _) = least[dtype, OURS]
        (_, forward), (_, backward) = least[dtype, OURS]
        (_, one), (_, one_back) = least[dtype, ONE_CALL]
        rate = 2 * SIDE**3 / least[dtype, PRODUCT][0, 1]
        floor = PRODUCTS * arguments.width * arguments.heads * pairs / rate
        rows.append(
            {
                "documents": name,
                "count": len(lengths),
                "dtype": dtype,
                "fwd_ms": 1e3 * forward,
                "bwd_ms": 1e3 * backward,
                "wall_ms": 1e3 * (wall + wall_back),
                "fwd / one call": forward / one,
                "/ one call": (forward + backward) / (one + one_back),
                "fwd / floor": forward / floor,
                "/ floor": (forward + backward) / (FORWARD_AND_BACKWARD * floor),
                "bwd / float32": backward / least["float32", OURS][1, 1],
                "gflop/s of a product": rate / 1e9,
                "largest error": errors[dtype],
            }
        )
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


# --- in the process ------------------------------------------------------------------------------------


def steps(lengths: list[int], arguments: argparse.Namespace) -> Callable[..., Any]:
    """``step(dtype, contender, check)``: seconds of [forward, backward], or the largest error of ours."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    shapes = [(h, arguments.width) for h in heads]
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    pack = [torch.randn(tokens, *shape) for shape in shapes]
    single = [torch.randn(round(math.sqrt(2 * pairs + 0.25) - 0.5), *shape) for shape in shapes]
    squares = [torch.randn(SIDE, SIDE) for _ in range(2)]
    ends = list(itertools.accumulate(lengths, initial=0))
    slices = torch.tensor([[a, b, a, b, attention.CAUSAL, 0, 0] for a, b in itertools.pairwise(ends)])
    inputs = {
        name: [[x.to(dtype) for x in tensors] for tensors in (pack, single, squares)]
        for name, dtype in DTYPES.items()
    }

    def step(dtype: str, contender: str, check: bool) -> Any:
        pack, single, squares = inputs[dtype]
        if check:
            return largest_error(ours(slices, *pack)[0], document_loop(ends, *(x.float() for x in pack)))
        if contender == PRODUCT:
            seconds = timed(lambda: squares[0] @ squares[1])[1]
            return [seconds, seconds]
        return ours(slices, *pack)[1] if contender == OURS else one_call(*single)[1]

    return step


def timed(function: Callable[[], Any]) -> tuple[Any, Seconds]:
    started, began = time.perf_counter(), time.process_time()
    result = function()
    return result, (time.perf_counter() - started, time.process_time() - began)


def ours(
    slices: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor
) -> tuple[list[torch.Tensor], list[Seconds]]:
    """(out, dq, dk, dv) and the seconds of forward and backward."""
    inputs: tuple[Any, ...] = (q, k, v, None, None, slices, None, None, None, [], "", 0, q.shape[2] ** -0.5)
    (out, lse), forward = timed(lambda: attention.OP(*inputs))
    grads, backward = timed(lambda: attention.BACKWARD(grad, *inputs, out, lse, None, []))
    return [out, *grads[:3]], [forward, backward]


def one_call(*rows: torch.Tensor) -> tuple[list[torch.Tensor], list[Seconds]]:
    """The same of one causal document."""
    q, k, v, grad = (x.transpose(0, 1)[None] for x in rows)
    (out, lse), forward = timed(lambda: flash(q, k, v, 0.0, True))
    grads, backward = timed(lambda: flash_backward(grad, q, k, v, out, lse, 0.0, True))
    return [x[0].transpose(0, 1) for x in (out, *grads)], [forward, backward]


def document_loop(ends: Sequence[int], *rows: torch.Tensor) -> list[torch.Tensor]:
    parts = [one_call(*(x[a:b] for x in rows))[0] for a, b in itertools.pairwise(ends)]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def largest_error(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Of the output and the gradients, relative to the largest element of each."""
    errors = [(g.float() - w).abs().max() / w.abs().max() for g, w in zip(got, wanted, strict=True)]
    return float(f"{max(errors).item():.1e}")


if __name__ == "__main__":
    main()
