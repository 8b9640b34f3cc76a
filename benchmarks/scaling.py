"""Predicted tokens/s and attention time of every strategy, by ranks and by tokens, on six document sources.

    python benchmarks/scaling.py --machine H100

Nothing runs but the planner and the counts of each strategy; seconds are the cost model's. Three sweeps: more
ranks on 4M tokens, more tokens on 64 ranks, and both, 16K tokens a rank. "hsap" is `make_plan(ranks=...)`,
whose groups the cost model chooses; "hsap, groups of n" are fixed. Others run on the groups that fit into a
host, and on the same ranks. Tokens/s are of a model of 32 such layers. Writes results/scaling.json and
docs/scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from _measure import Bar, Row, report

from hsap_compile import CostModel, make_plan
from hsap_compile.plan.lengths import SOURCES, draw
from hsap_compile.plan.load import Load, Setting
from hsap_compile.plan.strategies import STRATEGIES, padding, usp

LAYERS = 32
MOST_GROUPS = 256  # more take minutes and gigabytes to plan; there the best of fewer groups is taken
SWEEPS = {  # (ranks, tokens)
    "ranks at 4M tokens": [(r, 1 << 22) for r in (2, 8, 32, 128, 512, 1024)],
    "tokens on 64 ranks": [(64, 1 << t) for t in (15, 17, 19, 21, 23, 24)],
    "ranks at 16K tokens each": [(r, r << 14) for r in (2, 8, 32, 128, 512, 1024)],
}
PAPER = {"naive packing": 1.42, "padding": 2.80}  # arXiv 2606.30460: 3598 tokens/s, +42 % and +180 %
PAPER_SOURCES = ("fineweb_like", "slimpajama_like", "ultrachat_like")
PAPER_TOKENS, PAPER_SEEDS = 1 << 15, 8
COLOURS = {
    "hsap": "#1d2126", "chunk-lpt": "#3d6db5", "document zigzag": "#e3a02f", "ulysses": "#4aa564",
    "usp": "#9466bd", "zigzag ring": "#cf4457", "contiguous ring": "#c98b92", "padding": "#8c8c8c",
}  # fmt: skip


def main() -> None:
    arguments = parse()
    cost = CostModel.load(arguments.machine)
    rows: list[Row] = []
    for sweep, points in SWEEPS.items():
        for source in arguments.sources:
            for ranks, tokens in points:
                lengths = draw(source, tokens, arguments.seed)
                at = {"sweep": sweep, "source": source, "ranks": ranks, "tokens": tokens}
                rows += [at | row for row in point(lengths, ranks, cost)]
    paper = [row for ranks in arguments.paper_ranks for row in as_the_paper(ranks, cost)]
    report("scaling", {"machine": cost.name, "seed": arguments.seed}, summary(rows), bars(rows), paper)
    (Path(__file__).parent / "results" / "scaling_points.json").write_text(compact(rows))
    plot(rows, arguments.sources, arguments.png)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="H100", help="H100, A100 or a file that `calibrate` wrote")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper-ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--png", type=Path, default=Path(__file__).parent.parent / "docs" / "scaling.png")
    return parser.parse_args()


def point(lengths: list[int], ranks: int, cost: CostModel) -> list[Row]:
    """All strategies on one row of documents."""
    groups = [g for g in range(1, cost.ranks_per_host + 1) if ranks % g == 0 and cost.shape.splits(g)]
    fixed = [g for g in groups if ranks // g <= MOST_GROUPS]
    ours = {g: make_plan(lengths, ranks // g, g, cost=cost) for g in fixed}
    if ranks <= MOST_GROUPS:
        best = make_plan(lengths, ranks=ranks, cost=cost)
    else:
        best = min(ours.values(), key=lambda plan: plan.predicted_seconds.layer)
    setting = dataclasses.replace(best.setting, inter=ranks // max(groups), intra=max(groups))
    loads: dict[str, Load] = {"hsap": best.load}
    loads |= {f"hsap, groups of {g}": plan.load for g, plan in ours.items()}
    for name, strategy in STRATEGIES.items():
        try:
            loads[name] = strategy(setting)
        except ValueError:  # more ranks than heads
            continue
    even = float(best.area.mean())
    tokens = setting.tokens
    return [{"strategy": name} | numbers(load, tokens, even, cost) for name, load in loads.items()]


def numbers(load: Load, tokens: int, even: float, cost: CostModel) -> Row:
    seconds = load.predicted(cost)
    return {
        "tokens_per_s": tokens / seconds.layer / LAYERS,
        "attention_ms": 1e3 * seconds.attention,
        "area": float(load.area.max()) / even,
        "intra_bytes": load.most_bytes("intra"),
        "inter_bytes": load.most_bytes("inter"),
    }


def summary(rows: list[Row]) -> list[Row]:
    """At each point, over the sources: how many times as many tokens/s hsap has, least and most."""
    result: list[Row] = []
    for sweep, points in SWEEPS.items():
        for ranks, tokens in points:
            here = [r for r in rows if (r["sweep"], r["ranks"], r["tokens"]) == (sweep, ranks, tokens)]
            ours = {r["source"]: r["tokens_per_s"] for r in here if r["strategy"] == "hsap"}
            row: Row = {"sweep": sweep, "ranks": ranks, "tokens": tokens}
            for name in STRATEGIES:
                ratios = [ours[r["source"]] / r["tokens_per_s"] for r in here if r["strategy"] == name]
                row[name] = f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-"
            result.append(row)
    return result


def bars(rows: list[Row]) -> list[Bar]:
    """The choice of groups against each fixed one, and hsap against each strategy, at every point."""
    worst = {"fixed groups": 0.0, "other strategies": 0.0}
    ours = {key(r): r["tokens_per_s"] for r in rows if r["strategy"] == "hsap"}
    for r in rows:
        against = "fixed groups" if r["strategy"].startswith("hsap") else "other strategies"
        worst[against] = max(worst[against], r["tokens_per_s"] / ours[key(r)])
    return [
        Bar(f"tokens/s of the best of {name} over the choice's", got, 1.02) for name, got in worst.items()
    ]


def key(row: Row) -> tuple:
    return row["sweep"], row["source"], row["ranks"], row["tokens"]


def as_the_paper(ranks: int, cost: CostModel) -> list[Row]:
    """32K tokens: tokens/s of hsap over naive packing (one document, usp on its best groups) and padding."""
    result = []
    groups = [g for g in range(1, ranks + 1) if ranks % g == 0 and g <= cost.ranks_per_host]
    for source in PAPER_SOURCES:
        ratios: dict[str, list[float]] = {name: [] for name in PAPER}
        share = []
        for seed in range(PAPER_SEEDS):
            plan = make_plan(draw(source, PAPER_TOKENS, seed), ranks=ranks, cost=cost)
            s, ours = plan.setting, plan.predicted_seconds
            whole = [Setting((s.tokens,), ranks // g, g, s.band, s.shape) for g in groups]
            naive = min((usp(w).predicted(cost) for w in whole), key=lambda p: p.layer)
            ratios["naive packing"].append(naive.layer / ours.layer)
            ratios["padding"].append(padding(s).predicted(cost).layer / ours.layer)
            share.append(naive.attention / naive.layer)
        row: Row = {"source": source, "ranks": ranks, "naive_attention_share": sum(share) / len(share)}
        for name, found in ratios.items():
            row |= {f"over_{name.replace(' ', '_')}": geometric_mean(found), f"paper_{name}": PAPER[name]}
        result.append(row)
    return result


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def compact(rows: list[Row]) -> str:
    """JSON with one row a line, and four digits."""
    import json

    short = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    return "[\n" + ",\n".join(json.dumps(r) for r in short) + "\n]\n"


def plot(rows: list[Row], sources: list[str], path: Path) -> None:
    """Three sweeps by tokens/s a rank and attention time, one line of plots a source."""
    from matplotlib.figure import Figure

    figure = Figure((22, 3.1 * len(sources)), layout="constrained")
    axes = figure.subplots(len(sources), 2 * len(SWEEPS), squeeze=False)
    for line, source in zip(axes, sources, strict=True):
        for i, sweep in enumerate(SWEEPS):
            for name, colour in COLOURS.items():
                here = [r for r in rows if (r["sweep"], r["source"], r["strategy"]) == (sweep, source, name)]
                x = [r["tokens" if sweep.startswith("tokens") else "ranks"] for r in here]
                style = {"color": colour, "label": name, "lw": 2.4 if name == "hsap" else 1.3, "marker": "."}
                style["zorder"] = 3 if name == "hsap" else 2
                line[2 * i].plot(x, [r["tokens_per_s"] / r["ranks"] for r in here], **style)
                line[2 * i + 1].plot(x, [r["attention_ms"] for r in here], **style)
            for ax, what in zip(
                line[2 * i : 2 * i + 2], ("tokens/s a rank", "attention ms, a layer"), strict=True
            ):
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.grid(alpha=0.25)
                ax.set_title(f"{source}: {what}", fontsize=9)
                ax.set_xlabel(sweep, fontsize=8)
                ax.tick_params(labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(COLOURS), fontsize=11, frameon=False)
    figure.savefig(path, dpi=70)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
