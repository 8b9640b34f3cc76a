"""Milliseconds to plan one batch: ``make`` and the tables of one rank, as every rank does once a batch.

    python benchmarks/planning.py

Documents are drawn from published length distributions and packed into one row as they come; the mask is
document and causal as transformers writes it, by position_ids.  ``plan_ms`` is the least time of this thread
on the processor over ``--repeats``, ``wall_ms`` the least on the clock: they differ where other programs run.
``read_ms`` is what every call costs before a plan is made or found: the mask's leaves to labels, and their
digest.  It does not depend on the ranks.  ``verify_ms`` is ``Plan.verify`` of all ranks' tables.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import sympy
import torch
from _measure import Bar, Row, report

from hsap_compile import formula, masks
from hsap_compile.documents import attended
from hsap_compile.plan import Attended, MeshShape, Plan, make
from hsap_compile.plan.lengths import SOURCES
from hsap_compile.runtime import _digest

CASES = ((200, 8, 2.0), (1500, 64, 10.0), (12000, 256, 100.0))  # documents, ranks, allowed milliseconds


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # several wait for one another when other programs run
    rows: list[Row] = []
    bars: list[Bar] = []
    for source in arguments.sources:
        for documents, ranks, allowed in CASES:
            lengths = draw(source, documents)
            mask, leaves = transformers_mask(), batch_of(lengths)
            packed = attended(mask, leaves, 1, int(lengths.sum()))
            read_ms, _ = least_ms([functools.partial(read, mask, leaves)], min(3, arguments.repeats))[0]
            for intra in arguments.intra:
                shape = MeshShape(tuple(tuple(range(i, i + intra)) for i in range(0, ranks, intra)))
                case = {"source": source, "documents": documents, "tokens": packed.tokens, "read_ms": read_ms}
                rows.append(case | measure(packed, shape, arguments.repeats))
                name = f"{source}, {documents} documents, {rows[-1]['mesh']}"
                bars.append(Bar(name, rows[-1]["plan_ms"], allowed))
                print(bars[-1], flush=True)
    report("planning", vars(arguments), rows, bars)
    if arguments.profile:
        profile(lengths, shape)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES))
    parser.set_defaults(sources=["fineweb_like", "slimpajama_like", "longtail_pretrain", "prolong_like"])
    parser.add_argument("--intra", type=int, nargs="+", default=[1, 4, 8], help="ranks of a group")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print where the last case's time goes")
    return parser.parse_args()


def draw(source: str, documents: int) -> np.ndarray:
    """(documents,) lengths."""
    return np.maximum(1, SOURCES[source].draw(np.random.default_rng(0), documents)).astype(np.int64)


def transformers_mask() -> masks.Mask:
    """Same document, and causal by position: leaf 0 numbers the documents, leaf 1 holds position_ids."""
    b, q, k = formula.b, formula.q, formula.k
    same = sympy.Eq(formula.leaf(0, b, q), formula.leaf(0, b, k))
    causal = formula.leaf(1, b, k) <= formula.leaf(1, b, q)
    return masks.normalise(sympy.Piecewise((formula.score, same & causal), (-sympy.oo, True)))[0]


def batch_of(lengths: np.ndarray) -> list[torch.Tensor]:
    """The mask's leaves on one row of these documents."""
    sizes = torch.from_numpy(lengths)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return [labels[None], (torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels])[None]]


def read(mask: masks.Mask, leaves: list[torch.Tensor]) -> bytes:
    tokens = leaves[0].shape[1]
    return _digest([attended(mask, leaves, 1, tokens)], tokens)


def measure(mask: Attended, shape: MeshShape, repeats: int) -> Row:
    def both() -> Plan:
        plan = make([mask], shape)
        plan.tables(shape.size - 1)
        return plan

    plan = both()
    (plan_ms, wall_ms), (make_ms, _) = least_ms([both, lambda: make([mask], shape)], repeats)
    ((verify_ms, _),) = least_ms([plan.verify], 1)
    return {
        "mesh": f"{shape.inter} x {shape.intra}",
        "make_ms": make_ms,
        "plan_ms": plan_ms,
        "wall_ms": wall_ms,
        "verify_ms": verify_ms,
        "balance": round(plan.balance, 4),
        "slices": len(plan.tables(shape.size - 1).masks[0].slices),
        "most_rows_received": plan.masks[0].capacity,
        "exchanged": round(plan.exchanged.sum() / mask.tokens, 3) if shape.intra > 1 else 0.0,
    }


def least_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[tuple[float, float]]:
    """(least on the processor, least on the clock) of each of the ``calls``, which take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, times, strict=True):
            wall, busy = time.perf_counter(), time.thread_time()
            call()
            found.append((time.thread_time() - busy, time.perf_counter() - wall))
    least = [np.min(found, axis=0) for found in times]
    return [(round(1e3 * float(busy), 3), round(1e3 * float(wall), 3)) for busy, wall in least]


def profile(lengths: np.ndarray, shape: MeshShape) -> None:
    mask, leaves = transformers_mask(), batch_of(lengths)
    tokens = leaves[0].shape[1]
    with profiled():
        read(mask, leaves)
    with profiled():
        make([attended(mask, leaves, 1, tokens)], shape).tables(shape.size - 1)


@contextmanager
def profiled() -> Iterator[None]:
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        yield
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("hsap_compile|numpy", 20)


if __name__ == "__main__":
    main()
