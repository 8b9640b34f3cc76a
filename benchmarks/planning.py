"""Milliseconds to plan one batch: ``make`` and the tables of one rank, as every rank does once a batch.

    python benchmarks/planning.py

Documents are drawn from three length distributions and packed into one row as they come; the mask is
document and causal.  Reading the documents from the batch (the digest, the labels) is the same for every
number of ranks and listed by itself.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from _measure import Row, report, summary
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
    rows: list[Row] = []
    for distribution in DISTRIBUTIONS:
        for documents in arguments.documents:
            mask = packed(draw(distribution, documents))
            for ranks in arguments.ranks:
                rows.append(measure(distribution, documents, mask, ranks, arguments))
    report("planning", vars(arguments), rows, [])
    if arguments.profile:
        profile(packed(draw("fineweb", arguments.documents[-1])), mesh(arguments.ranks[-1], arguments.intra))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[16, 200, 1500])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 64])
    parser.add_argument("--intra", type=int, default=8, help="ranks of a group, at most half of them")
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


def packed(lengths: np.ndarray) -> Attended:
    """One row of these documents, causal."""
    labels = np.repeat(np.arange(len(lengths)), lengths)[None]
    return Attended(batch=1, tokens=labels.shape[1], labels=labels, lo=0)


def mesh(ranks: int, intra: int) -> MeshShape:
    """Groups of ``intra`` ranks, smaller where there would be fewer than two groups."""
    intra = min(intra, ranks // 2)
    return MeshShape(tuple(tuple(range(i, i + intra)) for i in range(0, ranks, intra)))


def measure(
    distribution: str, documents: int, mask: Attended, ranks: int, arguments: argparse.Namespace
) -> Row:
    shape = mesh(ranks, arguments.intra)

    def both() -> Plan:
        plan = make([mask], shape)
        plan.tables(ranks - 1)
        return plan

    plan = both()
    make_ms, both_ms, read_ms = (
        least_ms(f, arguments.repeats)
        for f in (lambda: make([mask], shape), both, lambda: _digest([mask], mask.tokens))
    )
    return {
        "distribution": distribution,
        "documents": documents,
        "tokens": mask.tokens,
        "mesh": f"{shape.inter} x {shape.intra}",
        "make_ms": make_ms,
        "tables_ms": round(both_ms - make_ms, 3),
        "make + tables_ms": both_ms,
        "digest_ms": read_ms,
        "balance": round(plan.balance, 4),
        "slices": len(plan.tables(ranks - 1).masks[0].slices),
        "rows_received": int(plan.masks[0].rows_sent.sum(0).max()),
    }


def least_ms(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(1e3 * summary(seconds)["min_s"], 3)


def profile(mask: Attended, shape: MeshShape) -> None:
    with profiled():
        make([mask], shape).tables(shape.size - 1)


@contextmanager
def profiled() -> Iterator[None]:
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        yield
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("hsap_compile|numpy", 20)


if __name__ == "__main__":
    main()
