"""How even and how cheap plans are, on packs of six sources: area, rows received, columns exchanged.

    python benchmarks/planner_quality.py

Each row is one source on one mesh over several seeds.  ``area`` is the largest area over the mean, by rank;
no plan is below 1, and splitting documents anywhere reaches 1 to a column's area.  Rows are received by a
group from other groups, in tokens of a group: ``rows`` of all groups on average and ``most`` of the one that
receives most; ``least`` is a bound: a document with more tokens than a group's share, or more area than the
most loaded group has, has to be split.  Beside them stand chunk-LPT (as MagiAttention does: equal chunks, 16
for each group but at least 512 tokens, equally many on each group, the largest area first on the least
loaded; ``its area`` in the worst seed: chunks of a long document may have more than a group's share; ``its
least`` is the bound with its area, which allows fewer rows where it is uneven) and all-gather.  ``of its
excess``: rows over the bound, over the same of chunk-LPT, where it is not 0.  ``exchanged`` is the part of
all columns whose heads are exchanged in groups, ``shared at least`` the part in documents longer than a
rank's share.  ``slowest`` is the predicted attention of the slowest rank (cost model H100: area, then links,
nothing hidden) over the time of the mean area alone.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence

import numpy as np
from _measure import Bar, Row, report

from hsap_compile.plan import Attended, MeshShape, Plan, make
from hsap_compile.plan.attended import Ints, Structure, area, structure
from hsap_compile.plan.cost import H100
from hsap_compile.plan.lengths import SOURCES, draw
from hsap_compile.plan.pieces import least_rows
from hsap_compile.plan.placement import Placement, owned
from hsap_compile.plan.transfers import transfers

CASES = ((2, 32), (4, 128), (8, 64), (8, 512), (32, 256), (64, 1024), (256, 8192))  # ranks, K tokens
CHUNKS, LEAST_CHUNK = 16, 512


def main() -> None:
    arguments = parse()
    rows = []
    for source in arguments.sources:
        for ranks, thousands in CASES:
            if ranks > arguments.most_ranks:
                continue
            packs = [pack(source, thousands * 1024, seed) for seed in range(arguments.seeds)]
            for intra in arguments.intra:
                if ranks % intra == 0:
                    rows.append({"source": source} | cell(packs, ranks, intra))
                    print(rows[-1], flush=True)
    report("planner_quality", vars(arguments), rows, bars(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--intra", type=int, nargs="+", default=[1, 4, 8], help="ranks of a group")
    parser.add_argument("--most-ranks", type=int, default=256)
    return parser.parse_args()


def bars(rows: Sequence[Row]) -> list[Bar]:
    def most(name: str) -> float:
        return max((row[name] for row in rows), default=0.0)

    of_all, by_most = "rows of all groups over chunk-LPT's", "rows of the group that receives most"
    return [
        Bar("area max/mean, average over seeds, of the worst row", most("area"), 1.02),
        Bar("area max/mean, worst seed", most("area worst"), 1.10),
        Bar(f"{of_all}, worst seed", most("of chunk-LPT"), 1.0),
        Bar(f"{of_all}, worst seed where its area is at most 1.10 too", most("of even chunk-LPT"), 1.0),
        Bar("rows over the least that its area allows, over chunk-LPT's", most("of its excess"), 1.0),
        Bar(f"{by_most} over chunk-LPT's, average over seeds", most("most of"), 1.0),
        Bar(f"{by_most} over chunk-LPT's, worst seed", most("most of, worst"), 1.0),
        Bar(f"{by_most} over all-gather's, worst seed", most("of all-gather"), 1.0),
    ]


def pack(source: str, tokens: int, seed: int) -> tuple[Ints, Structure]:
    """Document lengths, and a causal mask of them in one row."""
    lengths = np.array(draw(source, tokens, seed))
    mask = Attended(1, tokens, np.repeat(np.arange(len(lengths)), lengths)[None], lo=0)
    return lengths, structure(mask)


def cell(packs: Sequence[tuple[Ints, Structure]], ranks: int, intra: int) -> Row:
    """All seeds of one source on one mesh."""
    groups, tokens = ranks // intra, packs[0][1].mask.tokens
    mesh = MeshShape(tuple(tuple(range(i, i + intra)) for i in range(0, ranks, intra)))
    share, found = tokens / groups, []
    for lengths, s in packs:
        plan = make([s.mask], mesh)
        rows = plan.masks[0].rows_sent.sum(axis=0).reshape(groups, intra)[:, 0]
        theirs, their_area = chunk_lpt(s, groups)
        of_theirs = ratio(rows.sum(), theirs.sum())
        mean = float(np.sum(lengths * (lengths + 1) // 2)) / groups
        least, its_least = (
            least_rows(lengths, -(-tokens // ranks) * intra, (0, None), load * mean) / groups / share
            for load in (group_area(plan), their_area)
        )
        found.append(
            {
                "area": plan.balance,
                "rows": rows.mean() / share,
                "most": rows.max() / share,
                "least": least,
                "chunk-LPT": theirs.mean() / share,
                "its most": theirs.max() / share,
                "its area": their_area,
                "its least": its_least,
                "of its excess": ratio(rows.sum() * its_least, theirs.sum() * least) if least else 0.0,
                "of chunk-LPT": of_theirs,
                "of even chunk-LPT": of_theirs if their_area <= 1.10 else 0.0,
                "most of": ratio(rows.max(), theirs.max()),
                "of all-gather": rows.max() / max(1.0, tokens - share),
                "exchanged": plan.exchanged.sum() / tokens if intra > 1 else 0.0,
                "shared at least": lengths[lengths > tokens // ranks].sum() / tokens if intra > 1 else 0.0,
                "slowest": slowest(plan),
            }
        )
    table = {name: np.array([f[name] for f in found]) for name in found[0]}
    result: Row = {"ranks": f"{groups} x {intra}", "K tokens": tokens // 1024}
    for name, values in table.items():
        worst = name in ("its area", "of chunk-LPT", "of even chunk-LPT", "of its excess", "of all-gather")
        result[name] = round(float(values.max() if worst else values.mean()), 4)
    result["area worst"] = round(float(table["area"].max()), 4)
    result["most of, worst"] = round(float(table["most of"].max()), 4)
    return result


def group_area(plan: Plan) -> float:
    """The largest area of a group over the mean."""
    mesh = plan.placement.mesh
    found = np.bincount(mesh.group, plan.area, mesh.inter)
    return float(found.max() / found.mean())


def ratio(ours: float, theirs: float) -> float:
    return float(ours / theirs) if theirs else float(ours > 0)


def chunk_lpt(s: Structure, groups: int) -> tuple[Ints, float]:
    """(G,) rows that each group receives; its largest area over the mean."""
    tokens = s.mask.tokens
    count = max(1, min(CHUNKS, tokens // groups // LEAST_CHUNK))
    edges = np.arange(count * groups + 1) * tokens // (count * groups)
    pairs, owner = np.diff(area([s]).before(edges)), np.empty(count * groups, np.int64)
    heap = [(0, g, 0) for g in range(groups)]
    for chunk in np.argsort(-pairs, kind="stable").tolist():
        load, g, held = heapq.heappop(heap)
        owner[chunk] = g
        if held + 1 < count:
            heapq.heappush(heap, (load + int(pairs[chunk]), g, held + 1))
    order = np.argsort(owner, kind="stable")
    flat = MeshShape(tuple((g,) for g in range(groups)))
    shared = np.ones(len(owner), np.bool_)
    placement = Placement(flat, tokens, owner[order], shared, edges[:-1][order], edges[1:][order])
    load = np.bincount(owner, pairs, groups)
    return transfers(s, owned(placement, 1)).rows(groups).sum(axis=0), float(load.max() / load.mean())


def slowest(plan: Plan) -> float:
    """Predicted time of the slowest rank, over that of the mean area."""
    intra, shape = plan.placement.mesh.intra, H100.shape
    rows = plan.masks[0].rows_sent
    rows = np.maximum(rows.sum(axis=0), rows.sum(axis=1))
    away = (intra - 1) / intra
    seconds = (
        H100.attention_seconds(1.0) * plan.area
        + 2 * rows * shape.kv_row_bytes / intra / H100.inter.bandwidth_bytes_per_s
        + 2 * away * plan.exchanged * (2 * shape.query_row_bytes + shape.kv_row_bytes)
        / H100.intra.bandwidth_bytes_per_s
    )  # fmt: skip
    return float(seconds.max() / (H100.attention_seconds(1.0) * plan.area.mean()))


if __name__ == "__main__":
    main()
