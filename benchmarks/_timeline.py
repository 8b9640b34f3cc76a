"""What torch's profiler saw of one rank, drawn: work, exchanges under way, and waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

Event = tuple[str, float, float]  # operator, start and end in seconds

#: The rows of the picture, and the operators that stand in each.
ROWS = {
    "attention": ("hsap::attend", "hsap::attend_backward"),
    "exchange under way": ("gloo:all_to_all",),
    "waiting for it": ("_c10d_functional::wait_tensor",),
}
COLOURS = {"attention": "#4477aa", "exchange under way": "#ee7733", "waiting for it": "#bbbbbb"}


def draw(events: Sequence[Event], path: str, title: str) -> None:
    """Write a PNG of ``events`` to ``path``; the dashed line is where the backward begins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for height, (row, names) in enumerate(ROWS.items()):
        spans = [(1e3 * start, 1e3 * (end - start)) for name, start, end in events if name in names]
        axes.broken_barh(spans, (-height - 0.4, 0.8), color=COLOURS[row], edgecolor="white")
    backward = [start for name, start, _ in events if name == "hsap::attend_backward"]
    forward = [end for name, _, end in events if name == "hsap::attend"]
    axes.axvline(500 * (max(forward) + min(backward)), color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks([-i for i in range(len(ROWS))], list(ROWS))
    axes.set_xlabel("ms")
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def hidden(events: Sequence[Event]) -> float:
    """The part of the time that exchanges are under way in which this rank does not wait for them."""
    under_way = _seconds(events, "exchange under way")
    return 1 - min(_seconds(events, "waiting for it") / under_way, 1) if under_way else 0.0


def _seconds(events: Sequence[Event], row: str) -> float:
    return sum(end - start for name, start, end in events if name in ROWS[row])
