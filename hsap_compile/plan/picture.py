"""One plan as a picture: where tokens live, who computes what, who sends what to whom, and when.

Every group of ranks has a hue, and its ranks shades of it. Lengths are pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hsap_compile.plan.attended import Ints
from hsap_compile.plan.drawing import Drawing, Point, Shape
from hsap_compile.plan.load import LEVELS
from hsap_compile.plan.pieces import Band
from hsap_compile.plan.text import mask_name, places, short

if TYPE_CHECKING:
    from hsap_compile.plan.report import PlanReport

WIDTH, MARGIN = 1120, 28
INSIDE = WIDTH - 2 * MARGIN
GAP = 14  # between triangles
ROW_HEIGHT = 40
TRIANGLES_HEIGHT = 620
LARGEST = (420, 360, 300, 250, 200, 160)  # sides to try for the longest document
SMALLEST = 5  # a shorter side is not drawn
LABELLED = 95  # a triangle this wide has room for two lines of text
PANEL = 400  # height of the matrix and the timeline
TIMELINE_RANKS = 64  # more are shown by one of several
MATRIX_RANKS = 64  # more are shown by group
SWATCHES = 64  # ranks in the legend
FAINT = 0.35  # opacity of what is computed on received keys

OWN, REMOTE, HEADS, ROWS = "#3d6db5", "#8db3e2", "#e3a02f", "#cf4457"
PHASES = {
    "own": ("attention on own keys", OWN),
    "remote": ("on received keys", REMOTE),
    "intra": ("head exchange", HEADS),
    "inter": ("KV exchange", ROWS),
}


def picture(report: PlanReport) -> Drawing:
    """All panels, one below the other."""
    d, s = Drawing(WIDTH), report.setting
    y = 38.0
    d.text(
        MARGIN,
        y,
        f"{s.tokens:,} tokens in {len(s.lengths):,} documents on {s.ranks} ranks "
        f"({s.inter} groups of {s.intra})",
        19,
        bold=True,
    )
    bound, seconds = report.lower_bound.area, report.predicted_seconds
    for line in (
        f"{mask_name(report)}, {report.placement} placement; the busiest rank computes "
        f"{100 * bound.gap:.1f} % more than an even share",
        f"attention takes {_time(float(seconds.forward.total.max()))} forward and "
        f"{_time(float(seconds.backward.total.max()))} backward, predicted for {report.cost.name}",
    ):
        y += 20
        d.text(MARGIN, y, line, 12.5, ink="faint")
    y = _row(d, report, y + 34)
    y = _triangles(d, report, y + 40)
    y += 44
    _matrix(d, report, MARGIN, y)
    _timeline(d, report, MARGIN + PANEL + 60, y, INSIDE - PANEL - 60)
    d.height = y + PANEL + 60
    return d


def colour(report: PlanReport, rank: int) -> str:
    """A shade of the group's hue."""
    group, member = divmod(rank, report.setting.intra)
    return _shade(report, group, member / max(1, report.setting.intra - 1))


def _shade(report: PlanReport, group: int, light: float) -> str:
    hue = (0.58 + group / report.setting.inter) % 1
    return _hex(*colorsys.hls_to_rgb(hue, 0.38 + 0.3 * light, 0.58))


def _hex(*rgb: float) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


# --- where tokens live ---


def _row(d: Drawing, report: PlanReport, y: float) -> float:
    s, p = report.setting, report.held
    d.text(MARGIN, y, "Where tokens live: the packed row, coloured by rank", 14, bold=True)
    y += 14
    # what is under the middle of each pixel: exact to a pixel however many pieces there are
    begin = np.cumsum(s.lengths) - s.lengths
    first = begin[p.document] + p.start
    piece = np.searchsorted(first, (np.arange(INSIDE) + 0.5) * s.tokens / INSIDE, side="right") - 1
    for a, b in _runs(piece):
        i = piece[a]
        note = f"document {p.document[i]}: tokens {p.start[i]:,} to {p.stop[i]:,} on rank {p.party[i]}"
        d.box(MARGIN + a, y, b - a, ROW_HEIGHT, colour(report, int(p.party[i])), note=note)
    document = p.document[piece]
    for at, _ in list(_runs(document))[1:]:
        d.box(MARGIN + at - 0.4, y, 0.8, ROW_HEIGHT, "paper")
    y += ROW_HEIGHT + 16
    d.text(MARGIN, y, "token 0", 11, ink="faint")
    d.text(MARGIN + INSIDE, y, f"{s.tokens:,}", 11, "end", "faint")
    if s.ranks > SWATCHES:
        d.text(WIDTH / 2, y, f"hues are groups 0 to {s.inter - 1}, shades their ranks", 11, "middle", "faint")
        return y
    size = min(20.0, (INSIDE - 240 - 6 * s.inter) / s.ranks)
    x = MARGIN + (INSIDE - size * s.ranks - 6 * (s.inter - 1)) / 2
    d.text(x - 8, y + 1, "rank", 11, "end", "faint")
    for rank in range(s.ranks):
        d.box(x, y - 12, size - 1, 16, colour(report, rank))
        d.text(x + (size - 1) / 2, y, str(rank), min(10.0, size * 0.62), "middle", "#ffffff")
        x += size + (6 if (rank + 1) % s.intra == 0 else 0)
    return y


def _runs(values: Ints) -> Iterator[tuple[int, int]]:
    """[start, stop) of equal neighbours."""
    at = np.flatnonzero(np.diff(values)) + 1
    return zip([0, *at.tolist()], [*at.tolist(), len(values)], strict=True)


# --- who computes what ---


def _triangles(d: Drawing, report: PlanReport, y: float) -> float:
    s = report.setting
    d.text(MARGIN, y, "Who computes what: queries down, keys to the right, the longest first", 14, bold=True)
    heads = "in the middle hue of a group: its ranks share the heads; " if s.intra > 1 else ""
    d.text(MARGIN, y + 18, f"{heads}faint: on keys received from another group", 11.5, ink="faint")
    y += 30
    order = np.argsort(-np.array(s.lengths), kind="stable").tolist()
    shown: list[tuple[int, float, float, float]] = []
    for largest in LARGEST:
        sides = [s.lengths[i] * largest / s.lengths[order[0]] for i in order]
        corners = _shelves([side for side in sides if side >= SMALLEST])
        shown = [(i, *corner, side) for i, corner, side in zip(order, corners, sides, strict=False)]
        if all(top + side <= TRIANGLES_HEIGHT for _, _, top, side in shown):
            break
    shown = [x for x in shown if x[2] + x[3] <= TRIANGLES_HEIGHT]
    for document, left, top, side in shown:
        _triangle(d, report, document, MARGIN + left, y + top, side)
    y += max(top + side for _, _, top, side in shown)
    rest = sorted({*order} - {document for document, *_ in shown})
    if rest:
        y += 18
        one = int((places(report)[0][rest] == 1).sum())
        d.text(
            MARGIN, y, f"and {len(rest):,} shorter ones, {one:,} of them on one rank each", 11.5, ink="faint"
        )
    return y


def _shelves(sides: Sequence[float]) -> list[Point]:
    """(left, top) of squares, the largest first: in columns as high as the first of each shelf."""
    corners: list[Point] = []
    shelf, height, left, column, below = 0.0, 0.0, 0.0, 0.0, 0.0  # column: its width; below: what it holds
    for side in sides:
        if below + side > height:
            left, below, column = left + (column + GAP if column else 0.0), 0.0, side
            if left + side > INSIDE or height == 0.0:
                left, shelf, height = 0.0, shelf + (height + GAP if height else 0.0), side
        corners.append((left, shelf + below))
        below += side + GAP
    return corners


def _triangle(d: Drawing, report: PlanReport, document: int, x: float, y: float, side: float) -> None:
    s, p = report.setting, report.held
    here = slice(*np.searchsorted(p.document, [document, document + 1]))
    start, stop, rank, shared = p.start[here], p.stop[here], p.party[here], report.shared[here]
    group, scale = rank // s.intra, side / s.lengths[document]
    together = shared & (s.intra > 1)
    for a, b in _runs(np.where(together, -1 - group, rank)):  # who computes: a group, or one rank
        mine = int(group[a])
        fill = _shade(report, mine, 0.5) if together[a] else colour(report, int(rank[a]))
        who = f"group {mine}, which shares the heads" if together[a] else f"rank {rank[a]}"
        for c, e in _runs((group == mine).astype(np.int64)):
            own = bool(group[c] == mine)
            tile = _tile(start[a], stop[b - 1], start[c], stop[e - 1], s.band)
            if tile:
                keys = f"{'its own' if own else 'received'} keys {start[c]:,} to {stop[e - 1]:,}"
                note = f"document {document}: {who} has queries {start[a]:,} to {stop[b - 1]:,} on {keys}"
                points = [(x + scale * k, y + scale * q) for k, q in tile]
                d.shapes.append(Shape(points, fill, 1.0 if own else FAINT, note))
    if side >= LABELLED and s.band[0] is not None:  # above the diagonal is room
        d.text(x + side, y + 10, f"document {document}", 11, "end")
        d.text(x + side, y + 23, f"{s.lengths[document]:,}", 11, "end", "faint")


def _tile(a: int, b: int, c: int, d: int, band: Band) -> list[Point]:
    """The corners (k, q) of what a band leaves of the queries [a, b) and keys [c, d)."""
    corners: list[Point] = [(c, a), (d, a), (d, b), (c, b)]
    lo, hi = band
    if lo is not None:
        corners = _clipped(corners, -1, -lo)
    if hi is not None:
        corners = _clipped(corners, 1, hi + 1)
    return corners


def _clipped(corners: list[Point], sign: int, most: float) -> list[Point]:
    """The part of a convex polygon of (k, q) where sign * (q - k) <= most; empty if it has no area."""
    beyond = [sign * (q - k) - most for k, q in corners]
    if min(beyond, default=0) >= 0:
        return []
    result: list[Point] = []
    for i, ((k, q), over) in enumerate(zip(corners, beyond, strict=True)):
        (k_, q_), over_ = corners[i - 1], beyond[i - 1]
        if (over > 0) != (over_ > 0):
            t = over_ / (over_ - over)
            result.append((k_ + t * (k - k_), q_ + t * (q - q_)))
        if over <= 0:
            result.append((k, q))
    return result


# --- who sends to whom ---


def _matrix(d: Drawing, report: PlanReport, x: float, y: float) -> None:
    s = report.setting
    by_group = s.ranks > MATRIX_RANKS
    ways = s.intra if by_group else 1
    n = s.ranks // ways
    what = "group" if by_group else "rank"
    d.text(x, y, f"Who sends how much to whom, forward, by {what}", 14, bold=True)
    moved = [m.reshape(n, ways, n, ways).sum(axis=(1, 3)) for m in report.matrices]
    x, y, size = x + 34, y + 40, PANEL - 40
    d.box(x, y, size, size, "line", 0.35)
    cell = size / n
    most = max(1, *(int(m.max()) for m in moved))
    for matrix, fill, name in zip(moved, (HEADS, ROWS), ("heads", "keys and values"), strict=True):
        for i, j in np.argwhere(matrix > 0).tolist():
            share = math.sqrt(matrix[i, j] / most)  # small amounts are seen too
            note = f"{what} {i} to {what} {j}: {short(float(matrix[i, j]), 'B')} of {name}"
            d.box(x + j * cell, y + i * cell, cell, cell, fill, 0.12 + 0.88 * share, note)
    for g in range(1, s.inter if not by_group else 1):
        at = g * s.intra * cell
        d.box(x, y + at - 0.4, size, 0.8, "paper")
        d.box(x + at - 0.4, y, 0.8, size, "paper")
    d.text(x + size / 2, y - 7, f"to {what}", 11, "middle", "faint")
    d.text(x - 8, y + size / 2, "from", 11, "end", "faint")
    for at in (0, n - 1):
        d.text(x - 8, y + (at + 0.5) * cell + 4, str(at), 11, "end", "faint")
        d.text(x + (at + 0.5) * cell, y - 7, str(at), 11, "middle", "faint")
    total = [short(float(m.sum()), "B") for m in moved]
    _legend(d, x, y + size + 20, ((f"heads, {total[0]} in all", HEADS), (f"KV, {total[1]}", ROWS)))


def _legend(d: Drawing, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
    for text, fill in entries:
        d.box(x, y - 9, 11, 11, fill)
        d.text(x + 16, y, text, 11.5)
        x += 34 + 6.2 * len(text)


# --- when ---


def _timeline(d: Drawing, report: PlanReport, x: float, y: float, width: float) -> None:
    """Two lanes a rank: attention above, exchanges below. What stands above one another runs side by side."""
    s = report.setting
    spans = report.load.timeline(report.cost)
    last = np.max([span.stop for span in spans], axis=0)
    of = -(-s.ranks // TIMELINE_RANKS)  # of so many neighbours the slowest is shown
    shown = [r + int(last[r : r + of].argmax()) for r in range(0, s.ranks, of)]
    some = f", the slowest of every {of} ranks" if of > 1 else ""
    d.text(x, y, f"When: one attention, forward, predicted{some}", 14, bold=True)
    d.text(
        x,
        y + 18,
        "each rank: attention above, what is exchanged beside it below; gaps: what that does not hide",
        11.5,
        ink="faint",
    )
    end = float(last.max())
    x, y, width, size = x + 40, y + 40, width - 40, PANEL - 40
    row = size / len(shown)
    lane = min(row * 0.44, 9.0)
    scale = width / end
    for part in (0, 0.25, 0.5, 0.75, 1):
        d.text(x + part * width, y - 6, _time(part * end), 11, "middle" if part < 1 else "end", "faint")
        d.box(x + part * width - 0.3, y, 0.6, size, "line")
    for span in spans:
        name, fill = PHASES[span.kind]
        for line, rank in enumerate(shown):
            a, b = float(span.start[rank]), float(span.stop[rank])
            if b > a:
                top = y + (line + 0.5) * row - lane + (lane if span.kind in LEVELS else 0)
                note = f"rank {rank}: {name}, {_time(b - a)}"
                d.box(x + a * scale, top, max(0.3, (b - a) * scale), lane, fill, note=note)
    for line in range(0, len(shown), -(-len(shown) // 32)):
        d.text(x - 8, y + (line + 0.5) * row + 4, str(shown[line]), min(11, max(8, row)), "end", "faint")
    _legend(d, x, y + size + 20, list(PHASES.values()))


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
