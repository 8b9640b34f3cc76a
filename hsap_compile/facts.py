"""What ``explain`` finds out about a model, as values, and as the text that a person reads."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hsap_compile.plan.text import short, table
from hsap_compile.runtime import StepReport


@dataclass(frozen=True)
class AttentionFact:
    """One attention.  ``module`` is its module's name in the model, if any; ``mask`` a formula over batch b,
    head h, query q and key k; ``reads`` says what its tensors are; ``dense`` why it is not partitioned, empty
    when it is."""

    at: str
    module: str
    mask: str
    reads: tuple[str, ...]
    heads: int
    kv_heads: int
    how: str
    dense: str = ""


@dataclass(frozen=True)
class Gathered:
    """An operator that runs on gathered tokens: the line of the model, why, and the bytes gathered for it
    (0 where another operator's gather serves it too)."""

    operator: str
    reason: str
    at: str
    module: str
    bytes: int


@dataclass(frozen=True)
class Output:
    """A value that leaves a graph with tokens in it, made at ``at``; ``bytes`` of the whole value."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    gathered: bool
    at: str


@dataclass(frozen=True)
class Collective:
    """``forward`` and ``backward``: how many of them are in the graph, and their bytes.  Inductor's code has
    fewer sums: those of small gradients are one.

    Bytes of exchanged heads, keys, values and token rows are what all ranks together send (of attention as in
    ``StepReport``); of gathers and sums they are the size of the whole values, which every rank gets.
    """

    what: str
    level: str
    forward: int
    backward: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class GraphExplanation:
    """One of dynamo's graphs.  ``refused`` is why it cannot be run, empty when it can; ``break_reason`` why
    the graph ends before the model does, empty at the end; ``step`` the plan of the given batch; ``whole``:
    every rank computes all of the graph."""

    attentions: tuple[AttentionFact, ...] = ()
    gathered: tuple[Gathered, ...] = ()
    outputs: tuple[Output, ...] = ()
    collectives: tuple[Collective, ...] = ()
    parameters: int = 0
    parameter_bytes: int = 0
    grad_sync: bool = True
    grad: bool = True
    step: StepReport | None = None
    whole: bool = False
    refused: str = ""
    break_reason: str = ""

    def __str__(self) -> str:
        parts = [f"refused\n{_indented(self.refused)}"] if self.refused else []
        if self.step is not None:
            parts += [
                _gathered(self.gathered),
                _attentions(self.attentions),
                _outputs(self.outputs, bool(self.break_reason)),
                _gradients(self) if self.grad else "",
                _WHOLE if self.whole else _step(self.step),
                _received(self.step) if self.grad else "",
                _collectives(self.collectives),
            ]
        if self.break_reason:
            crossing = sum(o.bytes for o in self.outputs if o.gathered)
            parts.append(
                f"graph break: {self.break_reason}\n  costs: {short(crossing, 'B')} gathered here and cut "
                "into rows again in the next graph, a plan and an agreement of the ranks for each graph"
            )
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: one entry of ``graphs`` for each graph that dynamo makes of the model.
    ``failure``: what stopped it before the end of the model, or empty."""

    ranks: int
    graphs: tuple[GraphExplanation, ...]
    failure: str = ""

    def __str__(self) -> str:
        count = len(self.graphs)
        lines = [f"hsap on {_count(self.ranks, 'rank')}: {_count(count, 'graph')}"]
        for i, graph in enumerate(self.graphs):
            lines += ["", f"graph {i + 1} of {count}", _indented(str(graph))]
        if self.failure:
            lines += ["", f"stopped: {self.failure}"]
        return "\n".join(lines)

    def save_html(self, path: str | Path) -> None:
        """The text as a page of its own, in light or dark; needs no network."""
        Path(path).write_text(_PAGE.format(ranks=self.ranks, text=html.escape(str(self))), "utf-8")


# --- text ------------------------------------------------------------------------------------------------


_WHOLE = "no value is made of the tokens of a row: every rank computes all of the graph"


def _indented(text: str) -> str:
    return "\n".join("  " + line if line else line for line in text.splitlines())


def _count(number: int, one: str) -> str:
    return f"{number:,} {one}" + "s" * (number != 1)


def _listed(names: Sequence[str]) -> str:
    """Each once; the first and the last of many."""
    names = list(dict.fromkeys(names))
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _attentions(found: Sequence[AttentionFact]) -> str:
    """Layers that are alike are told of once."""
    lines = []
    alike: dict[AttentionFact, list[str]] = {}
    for fact in found:
        alike.setdefault(replace(fact, module=""), []).append(fact.module)
    for fact, modules in alike.items():
        lines.append(f"{len(modules)} x {fact.at}")
        if any(modules):
            lines.append(f"  in {_listed([m for m in modules if m])}")
        if fact.mask:
            lines += [f"  attends: {fact.mask}", *(f"    {read}" for read in fact.reads)]
            lines.append(f"  heads: {fact.heads}, of keys and values: {fact.kv_heads}")
        lines.append(f"  {'not partitioned: ' + fact.dense if fact.dense else 'partitioned'}: {fact.how}")
    return f"{_count(len(found), 'attention')}\n{_indented(chr(10).join(lines))}"


def _gathered(found: Sequence[Gathered]) -> str:
    if not found:
        return "nothing runs on gathered tokens"
    lines = []
    for fact in found:
        lines += [
            f"{fact.at}{', in ' * bool(fact.module)}{fact.module}",
            f"  {fact.operator}: {fact.reason}; {short(fact.bytes, 'B')} gathered",
        ]
    said = f"run on gathered tokens, on every rank: {_count(len(found), 'operator')}"
    return f"{said}\n{_indented(chr(10).join(lines))}"


def _outputs(found: Sequence[Output], crossing: bool) -> str:
    lines = []
    for fact in found:
        how = f"gathered, {short(fact.bytes, 'B')} on every rank" if fact.gathered else "this rank's rows"
        lines.append(f"output {fact.index}: {fact.dtype} {fact.shape}, {how}, made at {fact.at}")
    if any(fact.gathered for fact in found) and not crossing:
        lines.append('options={"outputs": "local"} returns each rank\'s rows and gathers nothing')
    return f"outputs with tokens\n{_indented(chr(10).join(lines))}" if lines else ""


def _gradients(graph: GraphExplanation) -> str:
    if not graph.grad_sync:
        return "gradients stay each rank's share (grad_sync=False)"
    return f"gradients of {graph.parameters} parameters are summed, {short(graph.parameter_bytes, 'B')}"


def _step(step: StepReport) -> str:
    mesh, area = step.plan.placement.mesh, step.plan.area
    return (
        f"plan of this batch: {_count(mesh.inter, 'group')} (inter) of {_count(mesh.intra, 'rank')} (intra), "
        f"{step.plan.placement.tokens:,} tokens a row\n"
        f"  balance {step.balance:.3f}: the busiest rank attends {short(float(area.max()))} pairs, "
        f"the mean is {short(float(area.mean()))}"
    )


def _received(step: StepReport) -> str:
    """What the rows of other groups cost, and what another choice would."""
    if not step.received_bytes:
        return ""
    kept, sent = f"{short(step.received_bytes, 'B')} on the rank with most", short(step.rows_bytes, "B")
    if step.again:
        stages = max(m.limit.filled(m.capacity) for m in step.plan.masks)
        arriving = f", and arrive in {stages} stages" if stages > 1 else ""
        return (
            f"received keys and values are sent once more in the backward, {sent}{arriving}\n"
            f'  options={{"received": "save"}} would keep them instead: {kept}'
        )
    return (
        f"received keys and values are kept for the backward: {kept}\n"
        f'  options={{"received": "again"}} would keep none and send {sent} more'
    )


def _collectives(found: Sequence[Collective]) -> str:
    if not found:
        return "no collectives"
    rows = [
        {
            "collectives of a step": c.what,
            "level": c.level,
            "forward": str(c.forward),
            "bytes forward": short(c.forward_bytes, "B"),
            "backward": str(c.backward),
            "bytes backward": short(c.backward_bytes, "B"),
        }
        for c in found
    ]
    return table(rows)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hsap on {ranks} ranks</title>
<style>
:root {{ color-scheme: light dark; }}
pre {{ margin: 24px; font-size: 13px; line-height: 1.5; white-space: pre-wrap; }}
</style>
</head>
<body>
<pre>{text}</pre>
</body>
</html>
"""
