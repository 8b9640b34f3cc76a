"""Draw where one packed row lives: ``python examples/draw_plan.py --out docs/plan.png``.

Above: the row, coloured by the group of ranks that holds each token.  Below: which keys (columns) each
query (row) attends to, coloured by the group that computes it; hatched where the keys come from another
group.  Needs matplotlib (``pip install -e ".[examples]"``), no ranks and no GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hsap_compile.plan import Attended, MeshShape, Plan, make

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[420, 60, 150, 35, 90, 200, 45])
    parser.add_argument("--inter", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("plan.png"))
    arguments = parser.parse_args()
    labels = np.repeat(np.arange(len(arguments.lengths)), arguments.lengths)[None]
    mask = Attended(batch=1, tokens=labels.size, labels=labels, lo=0)
    groups = MeshShape(tuple((r,) for r in range(arguments.inter)))
    draw(make((mask,), groups), labels[0], arguments.out)


def draw(plan: Plan, labels: np.ndarray, path: Path) -> None:
    tokens = labels.size
    owner = np.empty(tokens, dtype=np.int64)
    for rank, columns in enumerate(plan.placement.columns):
        owner[columns] = plan.placement.mesh.group_of(rank)[0]
    column = np.arange(tokens)
    attended = (labels[:, None] == labels[None]) & (column[:, None] >= column[None])
    tiles = np.where(attended, owner[:, None], -1)
    received = attended & (owner[:, None] != owner[None])
    colours = ListedColormap(["white", *COLOURS[: plan.placement.mesh.inter]])
    figure = Figure(figsize=(6.4, 7), layout="constrained")
    row, square = figure.subplots(2, height_ratios=[1, 16], sharex=True)
    limits = {"vmin": -1, "vmax": plan.placement.mesh.inter - 1, "interpolation": "nearest"}
    row.imshow(owner[None], cmap=colours, aspect="auto", extent=(0, tokens, 0, 1), **limits)
    row.set(yticks=[], title="one packed row, coloured by the group that holds each token")
    square.imshow(tiles, cmap=colours, aspect="auto", extent=(0, tokens, tokens, 0), **limits)
    square.contourf(column + 0.5, column + 0.5, received, [0.5, 1.5], colors="none", hatches=["////"])
    sent = int(plan.masks[0].rows_sent.sum())
    square.set(
        xlabel="key", ylabel="query",
        title=f"attended pairs by group; hatched: keys received ({sent} rows in all, an all-gather sends "
        f"{tokens * (plan.placement.mesh.inter - 1)}); area max/mean {plan.balance:.3f}",
    )  # fmt: skip
    square.title.set_fontsize(9)
    for edge in np.flatnonzero(np.diff(labels)) + 1:
        row.axvline(edge, color="white", linewidth=1.5)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
