"""Every model of the tests' zoo on simulated ranks, written to docs/models.md.

    python benchmarks/zoo.py [--only NAME ...]

One step in float64 (a model's own float32 is taken to float64 too) on 3 x 1 and 2 x 2 ranks against one
process running the untouched graph.  The error is the largest relative one of all outputs and all parameters'
gradients, over all ranks.  An operator that gathers is named below the table, with its line.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from zoo import CASES, MESHES, ZOO, Result, compare  # noqa: E402

HEAD = """# Models

Written by `python benchmarks/zoo.py` (torch {torch}, transformers {transformers}). Each model is tiny, has
random weights and gets packed documents; one step, forward and backward, runs on {meshes} simulated ranks in
float64 and is compared with one process: the error is the largest relative one of all outputs and all
parameters' gradients, over all ranks. A gather is an operator that runs on gathered tokens.

| model | kind | attention | works | gathers | error on {columns} |
|---|---|---|---|---|---|{rules}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(ZOO), help="names of models; docs are not written")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.getLogger("hsap_compile").setLevel(logging.ERROR)
    lines, notes = [], {}
    for name, attention in [case for case in CASES if case[0] in only]:
        try:
            results = compare(ZOO[name], attention, *MESHES)
        except Exception as error:  # the table is for exactly this
            lines.append(_failed(name, attention, error))
        else:
            lines.append(_line(name, attention, results))
            if results[0].gathers:
                notes[name] = results[0].gathers
        print(lines[-1], flush=True)
    if only == list(ZOO):
        (ROOT / "docs" / "models.md").write_text(_document(lines, notes))


def _line(name: str, attention: str, results: list[Result]) -> str:
    works = "yes" if all(r.error <= 1e-10 for r in results) else "**no**"
    errors = " | ".join(f"{r.error:.0e}" for r in results)
    return f"| {name} | {ZOO[name].kind} | {attention} | {works} | {len(results[0].gathers)} | {errors} |"


def _failed(name: str, attention: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"| {name} | {ZOO[name].kind} | {attention} | **no**: {text} | |{' |' * len(MESHES)}"


def _document(lines: list[str], notes: dict[str, tuple[str, ...]]) -> str:
    meshes = [f"{inter} x {intra}" for inter, intra in MESHES]
    text = HEAD.format(
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        meshes=" and ".join(meshes),
        columns=" | on ".join(meshes),
        rules="---|" * (len(meshes) - 1),
    )
    text += "\n".join(lines) + "\n\n## What gathers, and where\n"
    for name, gathers in notes.items():
        text += f"\n{name}\n"
        for gather in dict.fromkeys(gathers):
            text += f"- {gathers.count(gather)} x {_short(gather)}\n"
    return text


def _short(gather: str) -> str:
    """Without the directories of this machine."""
    what, _, at = gather.rpartition(", at ")
    for part in ("site-packages/", f"{ROOT}/"):
        at = at.rpartition(part)[2]
    return f"{what}, at {at}"


if __name__ == "__main__":
    main()
