"""Drawings: valid files, every token and pair in its place, nothing outside of the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile import make_plan
from hsap_compile.plan.drawing import INKS, Drawing, Shape, page, svg
from hsap_compile.plan.picture import INSIDE, MARGIN, ROW_HEIGHT, _shelves, _tile, colour, picture
from hsap_compile.plan.pieces import Pieces, rows_needed
from hsap_compile.plan.report import PlanReport
from test_report import reports

ROW = [420, 60, 150, 35, 90, 200, 45]


def area(points: list[tuple[float, float]]) -> float:
    x, y = np.array(points).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def inside(shape: Shape, drawing: Drawing) -> bool:
    x, y = np.array(shape.points).T
    return bool(
        x.min() >= -0.5 and x.max() <= drawing.width + 0.5 and y.min() >= 0 and y.max() <= drawing.height
    )


@settings(max_examples=30, deadline=None)
@given(reports())
def test_all_of_it_is_on_the_page(report: PlanReport) -> None:
    drawing = picture(report)
    assert all(inside(shape, drawing) for shape in drawing.shapes)
    assert all(
        0 <= x <= drawing.width and 0 <= y <= drawing.height for x, y in (t.at for t in drawing.labels)
    )
    page_ = ElementTree.fromstring(svg(drawing))
    assert len(page_) == len(drawing.shapes) + len(drawing.labels)


@settings(max_examples=30, deadline=None)
@given(reports())
def test_the_row_shows_every_token_in_its_ranks_colour(report: PlanReport) -> None:
    row = [x for x in picture(report).shapes if re.match(r"document \d+: tokens", x.note)]
    width = INSIDE / report.setting.tokens
    drawn = {colour(report, r): 0.0 for r in range(report.setting.ranks)}
    assert len(drawn) == report.setting.ranks
    for shape in row:
        drawn[shape.fill] += area(list(shape.points)) / ROW_HEIGHT / width
    got = np.array(list(drawn.values()))
    pieces = np.bincount(report.held.party, minlength=report.setting.ranks)
    assert np.all(np.abs(got - report.load.tokens) <= (pieces + 1) / width)
    assert min(x for x, _ in row[0].points) == MARGIN and max(x for x, _ in row[-1].points) == MARGIN + INSIDE


@settings(max_examples=30, deadline=None)
@given(reports())
def test_the_tiles_of_a_document_are_its_pairs(report: PlanReport) -> None:
    """The tiles of the longest fill what the mask allows; some are faint where keys are received."""
    s = report.setting
    tiles = [x for x in picture(report).shapes if re.match(r"document \d+: .* has queries", x.note)]
    longest = int(np.argmax(s.lengths))
    mine = [x for x in tiles if x.note.startswith(f"document {longest}:")]
    n, whole = s.lengths[longest], _tile(0, s.lengths[longest], 0, s.lengths[longest], s.band)
    across = [x for tile in mine for x, _ in tile.points]
    scale = (max(across) - min(across)) / n
    assert sum(area(list(t.points)) for t in mine) == pytest.approx(area(whole) * scale**2)
    if s.band[1] is None:  # a window's edge is drawn across tokens
        assert any(t.opacity < 1 for t in mine) == _is_cut(report, longest)


def _is_cut(report: PlanReport, document: int) -> bool:
    """Whether some group lacks keys of this document that its queries attend to."""
    p, s = report.held, report.setting
    here = p.document == document
    pieces = Pieces(p.document[here], p.start[here], p.stop[here], p.party[here] // s.intra)
    return bool(rows_needed(pieces, s.inter, s.band).any())


@pytest.mark.parametrize(
    ("rectangle", "band", "wanted"),
    [
        ((0, 4, 0, 4), (None, None), 16),
        ((0, 4, 0, 4), (0, None), 8),
        ((4, 6, 0, 4), (0, None), 8),
        ((0, 4, 4, 6), (0, None), 0),
        ((2, 4, 0, 4), (0, None), 6),
        ((0, 10, 0, 10), (0, 2), 50 - 24.5),
        ((8, 10, 0, 4), (0, 2), 0),
    ],
)
def test_a_tile_is_what_the_band_leaves(rectangle: tuple, band: tuple, wanted: float) -> None:
    corners = _tile(*rectangle, band)
    assert (area(corners) if corners else 0) == wanted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(5, 400), min_size=1, max_size=60))
def test_squares_do_not_overlap(sides: list[float]) -> None:
    sides.sort(reverse=True)
    squares = [(x, y, side) for (x, y), side in zip(_shelves(sides), sides, strict=True)]
    for i, (x, y, side) in enumerate(squares):
        assert 0 <= x and x + side <= INSIDE and y >= 0
        for x_, y_, side_ in squares[:i]:
            assert x >= x_ + side_ or x_ >= x + side or y >= y_ + side_ or y_ >= y + side


@pytest.mark.parametrize(("inter", "intra"), [(4, 1), (2, 4), (48, 2)])
def test_a_page_needs_nothing_else(inter: int, intra: int, tmp_path: Path) -> None:
    report = make_plan([10 * n for n in ROW], inter, intra)
    report.save_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text("utf-8")
    assert not re.search(r"(src|href|url\(|@import)", text)
    assert str(report).splitlines()[0] in text
    for name, (light, dark) in INKS.items():
        assert f"--{name}:{light}" in text and f"--{name}:{dark}" in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(INKS)


def test_what_is_written_on_a_page_is_text() -> None:
    drawing = Drawing(10, 10)
    drawing.text(1, 1, "<b> & c")
    drawing.box(1, 1, 2, 2, "ink", note="a < b")
    text = page("<t>", drawing, "<p>")
    assert (
        "&lt;b&gt; &amp; c" in text
        and "a &lt; b" in text
        and "<title>&lt;t&gt;" in text
        and "<pre>&lt;p&gt;" in text
    )


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    report = make_plan(ROW, 2, 2)
    report.save_png(tmp_path / "plan.png")
    pixels = imread(tmp_path / "plan.png")
    drawing = picture(report)
    assert pixels.shape[:2] == (round(2 * drawing.height), 2 * drawing.width)
    found = {
        tuple(c) for c in np.unique((255 * pixels[::4, ::4, :3]).round().astype(int).reshape(-1, 3), axis=0)
    }
    for rank in range(4):
        assert tuple(bytes.fromhex(colour(report, rank)[1:])) in found


def test_no_matplotlib_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.collections", None)
    with pytest.raises(ValueError) as refused:
        make_plan(ROW, 2).save_png(tmp_path / "plan.png")
    assert str(refused.value) == (
        "save_png: got no matplotlib; wanted it to draw with: pip install matplotlib, or save HTML"
    )
