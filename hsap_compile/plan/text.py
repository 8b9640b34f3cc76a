"""A plan, and strategies side by side, as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hsap_compile.plan.load import Load

if TYPE_CHECKING:
    from hsap_compile.plan.report import PlanReport

RANKS_SHOWN = 32  # above, the slowest few
SLOWEST_SHOWN = 8


def described(report: PlanReport) -> str:
    """The mesh, how documents lie, balance and bytes against their bounds, seconds, and the ranks."""
    s, p, load = report.setting, report.held, report.load
    documents, ranks_of = len(s.lengths), places(report)
    one, group = int((ranks_of[0] == 1).sum()), int(((ranks_of[0] > 1) & (ranks_of[1] == 1)).sum())
    seconds, bound = report.predicted_seconds, report.lower_bound
    head = [
        f"{s.tokens:,} tokens in {documents:,} documents of {min(s.lengths):,} to {max(s.lengths):,}, "
        f"{mask_name(report)}",
        f"{s.ranks} ranks: {s.inter} groups (inter) of {s.intra} (intra), {report.placement} placement, "
        f"{len(p.party):,} pieces",
        f"documents: {one:,} on one rank, {group:,} in one group, {documents - one - group:,} across groups",
    ]
    balance = [
        {
            "": name,
            "got": short(of.got, unit),
            "least possible": short(of.least, unit),
            "over it": "all of it" if math.isinf(of.gap) else f"{100 * of.gap:.1f} %",
        }
        for name, of, unit in (
            ("pairs of the busiest rank", bound.area, ""),
            ("KV sent between groups", bound.inter_bytes, "B"),
            ("heads sent inside groups", bound.intra_bytes, "B"),
        )
    ]
    slowest = int((seconds.forward.total + seconds.backward.total).argmax())
    times = [
        {
            "ms on the slowest rank": name,
            "own keys": _ms(spent.own[slowest]),
            "received keys": _ms(spent.remote[slowest]),
            "head exchange": _ms(spent.intra[slowest]),
            "KV exchange": _ms(spent.inter[slowest]),
            "total": _ms(spent.total[slowest]),
        }
        for name, spent in (("forward", seconds.forward), ("backward", seconds.backward))
    ]
    tail = (
        f"one layer: attention {_ms(seconds.attention)} ms, all else {_ms(seconds.linear.max())} ms: "
        f"{short(s.tokens / seconds.layer)} tokens/s through it"
    )
    ranks = _ranks(report, load)
    return "\n".join(
        [*head, "", table(balance), "", f"one attention as predicted for {report.cost.name}", table(times)]
        + [tail, "", ranks]
    )


def compared(report: PlanReport) -> str:
    """The plan beside what others would do with the same row, the fastest first."""
    even = float(report.area.mean())
    rows, notes = [], []
    for name, load in report.compare().items():
        if isinstance(load, str):
            notes.append(f"not possible here: {load}")
            continue
        seconds = load.predicted(report.cost)
        row = {
            "strategy": name,
            "tokens/s": short(report.setting.tokens / seconds.layer),
            "layer ms": _ms(seconds.layer),
            "attention ms": _ms(seconds.attention),
            "most tokens": f"{load.tokens.max():,}",
            "most pairs": short(float(load.area.max())),
            "of an even share": f"{load.area.max() / even:.3f}",
            "most bytes intra": short(load.most_bytes("intra"), "B"),
            "most bytes inter": short(load.most_bytes("inter"), "B"),
        }
        rows.append((seconds.layer, row))
    rows.sort(key=lambda x: x[0])
    title = "strategies; most: of the rank that has most, bytes of one attention forward and backward"
    return "\n".join([title, table([row for _, row in rows]), *notes])


def places(report: PlanReport) -> np.ndarray:
    """(2, D): ranks and groups that hold parts of each document."""
    p = report.held
    result = []
    for party in (p.party, p.party // report.setting.intra):
        pair = np.unique(np.stack((p.document, party)), axis=1)
        result.append(np.bincount(pair[0], minlength=len(report.setting.lengths)))
    return np.stack(result)


def mask_name(report: PlanReport) -> str:
    """In words."""
    lo, hi = report.setting.band
    if hi is not None:
        return f"causal window of {hi + 1:,} tokens"
    return "full inside documents" if lo is None else "causal"


def short(value: float, unit: str = "") -> str:
    """With three digits and a prefix of thousands."""
    prefixes = iter("kMGTPE")
    prefix = ""
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}".rstrip()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns by the first row's keys: the first to the left, the others to the right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def _ranks(report: PlanReport, load: Load) -> str:
    seconds, mean = report.predicted_seconds, float(load.area.mean()) or 1.0
    total = seconds.forward.total + seconds.backward.total
    shown, title = range(report.setting.ranks), ""
    if report.setting.ranks > RANKS_SHOWN:
        shown = np.argsort(-total, kind="stable")[:SLOWEST_SHOWN].tolist()
        title = f"the slowest {SLOWEST_SHOWN} of {report.setting.ranks} ranks\n"
    counts = np.bincount(report.held.party, minlength=report.setting.ranks)
    sent = {level: load.bytes[level, "forward"].sent for level in ("intra", "inter")}
    rows = [
        {
            "rank": str(r),
            "group": str(report.setting.group[r]),
            "tokens": f"{load.tokens[r]:,}",
            "pieces": f"{counts[r]:,}",
            "pairs": short(float(load.area[r])),
            "of the mean": f"{load.area[r] / mean:.3f}",
            "KV rows received": f"{report.rows_received[r]:,}",
            "heads sent": short(float(sent["intra"][r]), "B"),
            "KV sent": short(float(sent["inter"][r]), "B"),
            "attention ms": _ms(total[r]),
        }
        for r in shown
    ]
    return title + table(rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
