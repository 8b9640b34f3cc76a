"""``python -m hsap_compile``: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from hsap_compile import CostModel, make_plan
from hsap_compile.__main__ import main
from hsap_compile.plan.lengths import draw
from hsap_compile.plan.strategies import STRATEGIES

OWN = ["plan", "--lengths", "420,60,150,35,90,200,45"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--lengths-from", "fineweb_like", "--tokens", "32768", "--seed", "3"]
    status, out, err = run(capsys, "plan", *drawn, "--inter", "4", "--intra", "2", "--mask", "window:512")
    assert (status, err) == (0, "")
    assert out == f"{make_plan(draw('fineweb_like', 32768, 3), 4, 2, mask=('window', 512))}\n"


def test_a_machine_and_a_model_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cost = CostModel.load("A100")
    cost.save(tmp_path / "mine.json")
    heads = {"query_heads": 12, "kv_heads": 3, "head_dim": 64, "dtype_bytes": 4}
    flags = [x for name, value in heads.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    mesh = ["--ranks", "6", "--placement", "contiguous", "--mask", "full"]
    status, out, _ = run(capsys, *OWN, *mesh, *flags, "--machine", str(tmp_path / "mine.json"))
    lengths = [int(n) for n in OWN[2].split(",")]
    plan = make_plan(lengths, ranks=6, placement="contiguous", mask="full", cost=cost, **heads)  # type: ignore[arg-type]
    assert (status, out) == (0, f"{plan}\n")


def test_strategies_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *OWN, "--inter", "4", "--intra", "2", "--compare")
    table = out.split("\nstrategies; ")[1].splitlines()
    assert status == 0
    assert {line.split("  ")[0] for line in table[2:]} == {"hsap", *STRATEGIES}
    milliseconds = table[1].index("layer ms") + len("layer ms")
    times = [float(line[:milliseconds].split()[-1].replace(",", "")) for line in table[2:]]
    assert times == sorted(times)
    _, out, _ = run(capsys, *OWN, "--inter", "48", "--compare")
    assert "not possible here: ulysses: got 48 ranks to share 32 query heads" in out


def test_pictures_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    html, png = tmp_path / "plan.html", tmp_path / "plan.png"
    status, out, _ = run(capsys, *OWN, "--inter", "2", "--verify", "--html", str(html), "--png", str(png))
    assert status == 0
    assert "verified: every attended pair is computed once" in out
    assert f"written to {html}" in out and f"written to {png}" in out
    assert html.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["plan", "--ranks", "4"],
            "plan: got neither of --lengths and --lengths-from; wanted one: give --lengths",
        ),
        (
            [*OWN, "--lengths-from", "fineweb_like", "--ranks", "4"],
            "plan: got both of --lengths and --lengths-from",
        ),
        (
            ["plan", "--lengths-from", "fineweb_like", "--ranks", "4"],
            "got --lengths-from without --tokens; wanted",
        ),
        (
            ["plan", "--lengths-from", "web", "--tokens", "9", "--ranks", "4"],
            "got source 'web'; wanted one of wlb",
        ),
        (
            ["plan", "--lengths", "4;5", "--ranks", "4"],
            "got '4;5'; wanted whole numbers with commas between them",
        ),
        (
            [*OWN, "--ranks", "4", "--mask", "window"],
            "got 'window'; wanted causal, full or window:TOKENS: write",
        ),
        (OWN, "make_plan: got no mesh; wanted inter and intra, or ranks: give ranks alone"),
        ([*OWN, "--ranks", "4", "--machine", "B200"], "machine 'B200': got "),
        ([*OWN, "--inter", "900"], "place: got 1000 tokens a row on 900 ranks; wanted at least 1800"),
        (
            [*OWN, "--ranks", "4", "--html", "/nowhere/plan.html"],
            "got /nowhere/plan.html; wanted a file that can be",
        ),
    ],
)
def test_bad_input_is_answered_and_not_traced(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert text in err
    assert "Traceback" not in err


def test_help_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "plan" in out and "calibrate" in out
    status, out, _ = run(capsys, "plan", "--help")
    assert status == 0
    for word in (
        "--lengths-from fineweb_like --tokens 262144 --inter 8 --intra 4",
        "ultrachat_like",
        "window:TOKENS",
    ):
        assert word in out


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "hsap_compile.__main__")
    monkeypatch.setattr(sys, "argv", ["hsap_compile", *OWN, "--inter", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hsap_compile", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("1,000 tokens in 7 documents")


def test_calibrate_measures_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "machine.json"
    status, text, _ = run(capsys, "calibrate", "--out", str(out))
    assert status == 0
    assert f"written to {out}" in text
    cost = CostModel.load(out)
    assert cost.intra == cost.inter and "gloo" in cost.name
    assert 1e8 < cost.linear_flops_per_s < 1e14 and 1e7 < cost.attention_flops_per_s < 1e14
    assert 1e-6 < cost.intra.latency_s < 1 and 1e6 < cost.intra.bandwidth_bytes_per_s < 1e12
