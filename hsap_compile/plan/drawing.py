"""Shapes and text in pixels, as SVG in a page of its own or, with matplotlib, as PNG.

Colours are "#rrggbb", or a name of `INKS`, which a page shows by the reader's light or dark theme.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

INKS = {  # light theme, dark theme
    "paper": ("#ffffff", "#15181d"),
    "ink": ("#1d2126", "#e8eaed"),
    "faint": ("#6b7280", "#9aa2ad"),
    "line": ("#d5d9df", "#3a414b"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
DPI = 100  # of the pixels that shapes are given in
PNG_SCALE = 2


@dataclass(frozen=True)
class Shape:
    """A filled polygon; `note` is what a page shows when the pointer rests on it."""

    points: Sequence[Point]
    fill: str
    opacity: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Label:
    """One line of text; `at` is on its baseline, at its start, middle or end."""

    at: Point
    text: str
    size: float = 12
    anchor: Anchor = "start"
    ink: str = "ink"
    bold: bool = False


@dataclass
class Drawing:
    """What is drawn, in order: shapes first, then labels."""

    width: float
    height: float = 0.0
    shapes: list[Shape] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0, note: str = ""
    ) -> None:
        corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
        self.shapes.append(Shape(corners, fill, opacity, note))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        anchor: Anchor = "start",
        ink: str = "ink",
        bold: bool = False,
    ) -> None:
        self.labels.append(Label((x, y), text, size, anchor, ink, bold))


def svg(drawing: Drawing) -> str:
    """An <svg> element; the inks are variables that `page` defines."""
    size = f"{drawing.width:g} {drawing.height:g}"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">']
    for shape in drawing.shapes:
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in shape.points)
        opacity = f' fill-opacity="{shape.opacity:.2f}"' if shape.opacity < 1 else ""
        note = f"<title>{html.escape(shape.note)}</title>" if shape.note else ""
        lines.append(f'<polygon points="{points}" style="fill:{_css(shape.fill)}"{opacity}>{note}</polygon>')
    for label in drawing.labels:
        x, y = label.at
        bold = ' font-weight="600"' if label.bold else ""
        lines.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{label.size:g}" text-anchor="{label.anchor}"'
            f' style="fill:{_css(label.ink)}"{bold}>{html.escape(label.text)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def page(title: str, drawing: Drawing, text: str) -> str:
    """A whole HTML page that needs nothing else: the drawing, and under it preformatted text."""
    light, dark = (";".join(f"--{name}:{of[i]}" for name, of in INKS.items()) for i in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 24px auto; max-width: {drawing.width:g}px; padding: 0 16px; background: var(--paper);
  color: var(--ink); font-family: {FONT}; }}
svg {{ width: 100%; height: auto; font-family: {FONT}; }}
pre {{ overflow-x: auto; font-size: 12px; line-height: 1.5; }}
</style>
</head>
<body>
{svg(drawing)}
<pre>{html.escape(text)}</pre>
</body>
</html>
"""


def save_png(drawing: Drawing, path: str | Path) -> None:
    """On light paper.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "save_png: got no matplotlib; wanted it to draw with: pip install matplotlib, or save HTML"
        ) from None
    figure = Figure((drawing.width / DPI, drawing.height / DPI), DPI * PNG_SCALE, facecolor=_light("paper"))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.set_axis_off()
    colours = [to_rgba(_light(s.fill), s.opacity) for s in drawing.shapes]
    axes.add_collection(PolyCollection([s.points for s in drawing.shapes], facecolors=colours, linewidths=0))
    alignment = {"start": "left", "middle": "center", "end": "right"}
    for label in drawing.labels:
        axes.text(
            *label.at,
            label.text,
            fontsize=label.size * 72 / DPI,
            ha=alignment[label.anchor],
            va="baseline",
            color=_light(label.ink),
            weight="bold" if label.bold else "normal",
            parse_math=False,
        )
    figure.savefig(path, format="png")


def _css(colour: str) -> str:
    return f"var(--{colour})" if colour in INKS else colour


def _light(colour: str) -> str:
    return INKS[colour][0] if colour in INKS else colour
