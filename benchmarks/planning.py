"""Milliseconds to plan one batch: ``make`` and the tables of one rank, as every rank does once a batch.

    python benchmarks/planning.py

Documents are drawn from three length distributions and packed into one row as they come; the mask is
document and causal as transformers writes it, by position_ids.  ``read_ms`` is what every call costs before a
plan is made or found: the mask's leaves to labels, and their digest.  It does not depend on the ranks.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import sympy
import torch
from _measure import Row, report

from hsap_compile import formula, masks
from hsap_compile.documents import attended
from hsap_compile.plan import Attended, MeshShape, Plan, make
from hsap_compile.runtime import _digest

# Lengths in tokens.  Two (mu, sigma) of ln(length): FineWeb, whose published sample has a mean of about 700,
# and SlimPajama, about 1090 (the spreads are estimates); and quantiles (percent: length) of a
# long-context mix like ProLong's, from published simulator data.
LOGNORMAL = {"fineweb": (5.95, 1.07), "slimpajama": (6.2, 1.26)}
PROLONG = {0: 575, 10: 919, 30: 1347, 50: 1914, 70: 3018, 90: 6051, 98: 12308, 99.5: 21339, 100: 340149}

DISTRIBUTIONS = (*LOGNORMAL, "prolong")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # several wait for one another when other programs run
    rows: list[Row] = []
    for distribution in DISTRIBUTIONS:
        for documents in arguments.documents:
            lengths = draw(distribution, documents)
            mask, leaves = transformers_mask(), batch_of(lengths)
            packed = attended(mask, leaves, 1, int(lengths.sum()))
            (read_ms,) = least_ms([functools.partial(read, mask, leaves)], arguments.repeats)
            for shape in meshes(arguments):
                case = {"distribution": distribution, "documents": documents, "tokens": packed.tokens}
                rows.append(case | {"read_ms": read_ms} | measure(packed, shape, arguments.repeats))
    report("planning", vars(arguments), rows, [])
    if arguments.profile:
        profile(draw("slimpajama", arguments.documents[-1]), meshes(arguments)[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[16, 200, 1500])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 64])
    parser.add_argument("--intra", type=int, nargs="+", default=[1, 8], help="ranks of a group")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where the largest case's time goes")
    return parser.parse_args()


def draw(distribution: str, documents: int) -> np.ndarray:
    """(documents,) lengths."""
    random = np.random.default_rng(0)
    if distribution in LOGNORMAL:
        return np.maximum(1, random.lognormal(*LOGNORMAL[distribution], documents)).astype(np.int64)
    logs = [math.log(n) for n in PROLONG.values()]
    return np.exp(np.interp(random.uniform(0, 100, documents), list(PROLONG), logs)).astype(np.int64)


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


def meshes(arguments: argparse.Namespace) -> list[MeshShape]:
    """Of all ranks and group sizes, those with at least two groups."""
    sizes = [(ranks, intra) for ranks in arguments.ranks for intra in arguments.intra if 2 * intra <= ranks]
    return [MeshShape(tuple(tuple(range(i, i + g)) for i in range(0, n, g))) for n, g in sizes]


def measure(mask: Attended, shape: MeshShape, repeats: int) -> Row:
    rank = shape.size - 1

    def both() -> Plan:
        plan = make([mask], shape)
        plan.tables(rank)
        return plan

    plan = both()
    make_ms, both_ms = least_ms([lambda: make([mask], shape), both], repeats)
    return {
        "mesh": f"{shape.inter} x {shape.intra}",
        "make_ms": make_ms,
        "make + tables_ms": both_ms,
        "balance": round(plan.balance, 4),
        "slices": len(plan.tables(rank).masks[0].slices),
        "most_rows_received": int(plan.masks[0].rows_sent.sum(0).max()),
    }


def least_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Of each of the ``calls``, which take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return [round(1e3 * min(found), 3) for found in seconds]


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
