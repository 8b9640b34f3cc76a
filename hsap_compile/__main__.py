"""``python -m hsap_compile``: plan a packed row, set it beside other strategies, draw it; measure a machine.

No GPU and, but for ``calibrate``, no processes are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hsap_compile.plan.check import BrokenPlan
from hsap_compile.plan.cost import MACHINES, CostModel
from hsap_compile.plan.lengths import SOURCES, draw
from hsap_compile.plan.report import Mask, make_plan
from hsap_compile.plan.strategies import STRATEGIES
from hsap_compile.plan.text import compared

PLAN = """\
where every token lives, who computes and who sends what, and what it costs

  python -m hsap_compile plan --lengths-from fineweb_like --tokens 262144 --inter 8 --intra 4 --compare
  python -m hsap_compile plan --lengths 4000,1200,300,2500 --ranks 8 --html plan.html"""

CALIBRATE = """\
measure this machine with two processes: matrix products, attention, and exchanges between them

  python -m hsap_compile calibrate --out machine.json
  python -m hsap_compile plan --machine machine.json ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 2 where something was asked for that cannot be done."""
    asked = _parser().parse_args(arguments)
    try:
        asked.run(asked)
    except (ValueError, BrokenPlan) as error:
        print(f"hsap-compile: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m hsap_compile", description=__doc__, **raw)
    commands = parser.add_subparsers(required=True, metavar="command")

    plan = commands.add_parser("plan", help=PLAN.splitlines()[0], description=PLAN, **raw)
    plan.set_defaults(run=_plan)
    row = plan.add_argument_group("the row: lengths of your own, or drawn ones")
    row.add_argument("--lengths", type=_lengths, metavar="N,N,...", help="tokens of each document")
    row.add_argument(
        "--lengths-from",
        metavar="SOURCE",
        help=f"draw them as {', '.join(SOURCES)} have them; needs --tokens",
    )
    row.add_argument("--tokens", type=int, help="tokens to draw; the last document is cut")
    row.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    mesh = plan.add_argument_group("the ranks; with --ranks alone the cost model chooses groups")
    mesh.add_argument("--inter", type=int, help="groups, between which keys and values are sent")
    mesh.add_argument("--intra", type=int, help="ranks of a group, which exchange heads")
    mesh.add_argument("--ranks", type=int, help="all of them")
    mesh.add_argument(
        "--placement",
        choices=("balanced", "contiguous"),
        default="balanced",
        help="contiguous keeps the row's order (default: balanced)",
    )
    model = plan.add_argument_group("the model's attention (default: Llama 3 8B)")
    model.add_argument(
        "--mask", type=_mask, default="causal", help="causal, full or window:TOKENS, inside documents"
    )
    model.add_argument("--query-heads", type=int, default=32, help="default: 32")
    model.add_argument("--kv-heads", type=int, default=8, help="default: 8")
    model.add_argument("--head-dim", type=int, default=128, help="default: 128")
    model.add_argument("--dtype-bytes", type=int, default=2, help="default: 2")
    model.add_argument(
        "--machine", default="H100", help=f"{', '.join(MACHINES)}, or a file that `calibrate` wrote"
    )
    out = plan.add_argument_group("what to show besides the plan")
    out.add_argument("--compare", action="store_true", help=f"beside {', '.join(STRATEGIES)}")
    out.add_argument("--verify", action="store_true", help="prove that the plan computes every pair once")
    out.add_argument("--html", type=Path, metavar="FILE", help="draw it for a browser")
    out.add_argument("--png", type=Path, metavar="FILE", help="draw it as a picture; needs matplotlib")

    calibrate = commands.add_parser("calibrate", help=CALIBRATE.splitlines()[0], description=CALIBRATE, **raw)
    calibrate.set_defaults(run=_calibrate)
    calibrate.add_argument("--out", type=Path, default=Path("machine.json"), help="default: machine.json")
    return parser


def _plan(asked: argparse.Namespace) -> None:
    cost = CostModel.load(asked.machine)
    report = make_plan(
        _row(asked),
        asked.inter,
        asked.intra,
        ranks=asked.ranks,
        placement=asked.placement,
        query_heads=asked.query_heads,
        kv_heads=asked.kv_heads,
        head_dim=asked.head_dim,
        dtype_bytes=asked.dtype_bytes,
        mask=asked.mask,
        cost=cost,
    )
    print(report)
    if asked.verify:
        report.verify()
        print("\nverified: every attended pair is computed once, and what is sent is what is received")
    if asked.compare:
        print(f"\n{compared(report)}")
    for path, save in ((asked.html, report.save_html), (asked.png, report.save_png)):
        if path is not None:
            _written(save, path)
            print(f"\nwritten to {path}")


def _row(asked: argparse.Namespace) -> list[int]:
    if (asked.lengths is None) == (asked.lengths_from is None):
        given = "neither" if asked.lengths is None else "both"
        raise ValueError(
            f"plan: got {given} of --lengths and --lengths-from; wanted one: give --lengths 4000,1200 for "
            "documents of your own, or --lengths-from fineweb_like --tokens 262144"
        )
    if asked.lengths is not None:
        return list(asked.lengths)
    if asked.tokens is None:
        raise ValueError(
            "plan: got --lengths-from without --tokens; wanted how many tokens to draw: add --tokens 262144"
        )
    return draw(asked.lengths_from, asked.tokens, asked.seed)


def _written(save: Callable[[Path], None], path: Path) -> None:
    try:
        save(path)
    except OSError as error:
        raise ValueError(
            f"got {path}; wanted a file that can be written ({error.strerror}): choose another"
        ) from None


def _calibrate(asked: argparse.Namespace) -> None:
    from hsap_compile.calibrate import calibrate

    measured = calibrate()
    _written(measured.save, asked.out)
    print(
        f"matrix products   {measured.linear_flops_per_s / 1e9:.4g} GFLOP/s\n"
        f"attention         {measured.attention_flops_per_s / 1e9:.4g} GFLOP/s on attended pairs\n"
        f"exchange          {measured.intra.latency_s * 1e6:.4g} us and "
        f"{measured.intra.bandwidth_bytes_per_s / 1e9:.4g} GB/s\n"
        f"hidden by work    {100 * measured.overlap:.0f} %\n"
        f"written to {asked.out}: use it with --machine {asked.out}"
    )


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; wanted whole numbers with commas between them: write 4000,1200,300"
        ) from None


def _mask(text: str) -> Mask:
    if text in ("causal", "full"):
        return text  # type: ignore[return-value]
    name, _, tokens = text.partition(":")
    if name == "window" and tokens.isdecimal():
        return "window", int(tokens)
    raise argparse.ArgumentTypeError(
        f"got {text!r}; wanted causal, full or window:TOKENS: write window:4096 for a sliding window"
    )


if __name__ == "__main__":
    sys.exit(main())
