"""Train an unmodified Hugging Face Llama on packed documents over all ranks; check it against one process.

    pip install -e ".[examples]"
    torchrun --nproc-per-node=4 examples/train_packed.py

Four processes form a mesh of two groups of two.  The text is that of the Python installation itself, and
every step is one row of ``--tokens`` tokens holding other documents.  Afterwards rank 0 repeats the first
``--reference-steps`` alone and in eager mode, and both losses are plotted to ``--out``.  The last line is a
JSON object with the differences; the exit code is 1 when one of them is above ``TOLERANCE``.
Without torchrun the same runs in one process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from _corpus import VOCABULARY, packed_rows
from hsap_compile.runtime import StepReport

TOLERANCE = 1e-4  # of a loss: absolute; of a parameter's gradient: relative to its largest element
LEARNING_RATE = 1e-3
PATIENCE = datetime.timedelta(hours=1)  # how long the other ranks wait for rank 0's reference

Model = Callable[..., Any]  # the module itself or its compiled form


@dataclass
class Run:
    """What a training run leaves behind."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of every step; the first one compiles
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # of the first step


def main() -> int:
    arguments = parse()
    report: dict[str, float] = {}
    with ranks() as (rank, world):
        rows = shared_rows(arguments.tokens, arguments.steps, rank)
        module = llama(arguments.tokens)
        reports: list[StepReport] = []
        options: dict[str, Any] | None = None
        if arguments.backend == "hsap":  # only the loss is read: do not gather the logits
            options = {"intra": math.gcd(2, world), "outputs": "local", "on_step": reports.append}
        model = torch.compile(module, backend=arguments.backend, options=options)
        title = f"{arguments.backend} x {world}"
        run = train(module, model, rows, arguments.steps, title, reports, show=rank == 0)
        if rank == 0:
            recompiles = counters["stats"]["unique_graphs"] - 1
            module = llama(arguments.tokens)
            steps = min(arguments.steps, arguments.reference_steps)
            reference = train(module, module, rows, steps, "reference", [], show=True)
            report = compare(run, reference, arguments.tokens) | {"recompiles": recompiles}
            plot(run, reference, title, arguments.out)
        if world > 1:
            dist.barrier()
    if rank == 0:
        print(f"attention balance and bytes sent in the last step: {sent(reports[-1:])}")
        print(json.dumps(report), flush=True)
    return 0 if rank > 0 or within_tolerance(report) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--tokens", type=positive, default=2048, help="tokens of a packed row")
    parser.add_argument("--reference-steps", type=positive, default=20, help="steps of the eager reference")
    parser.add_argument("--out", type=Path, default=Path("train_packed.png"), help="where the plot goes")
    parser.add_argument("--backend", default="hsap", help="any torch.compile backend, to compare with")
    return parser.parse_args()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """This process's rank and how many there are: the ones torchrun started, or this one alone."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def shared_rows(tokens: int, count: int, rank: int) -> torch.Tensor:
    """The batches: made by rank 0, because other machines may have another Python installed."""
    rows = [packed_rows(tokens, count) if rank == 0 else torch.empty(0)]
    if dist.is_initialized():
        dist.broadcast_object_list(rows, src=0)
    return rows[0]


def llama(tokens: int) -> LlamaForCausalLM:
    """A small Llama with random weights, the same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def train(
    module: LlamaForCausalLM,
    model: Model,
    rows: torch.Tensor,
    steps: int,
    title: str,
    reports: Sequence[StepReport],
    *,
    show: bool,
) -> Run:
    """Trains ``module`` by calling ``model``; a step is one packed row.  ``reports`` grows by one a step."""
    run = Run()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    tokens = rows.shape[-1]
    with tqdm(total=steps * tokens, desc=title, unit="token", unit_scale=True, disable=not show) as bar:
        for step in range(steps):
            started = time.perf_counter()
            ids, positions, labels = rows[step % len(rows), :, None]
            loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
            loss.backward()
            if step == 0:
                run.gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - started)
            bar.set_postfix(step=step + 1, loss=f"{run.losses[-1]:.4f}", **sent(reports[-1:]))
            bar.update(tokens)
    return run


def sent(reports: Sequence[StepReport]) -> dict[str, str]:
    """What the last step's plan sends on each level, and how even it is."""
    return {
        key: text
        for report in reports
        for key, text in (
            ("inter", f"{report.inter_bytes / 2**20:.2f}MiB"),
            ("intra", f"{report.intra_bytes / 2**20:.2f}MiB"),
            ("balance", f"{report.balance:.3f}"),
        )
    }


def compare(run: Run, reference: Run, tokens: int) -> dict[str, float]:
    """The numbers of the last line; ``loss`` and ``reference_loss`` are those of the last common step."""
    last = len(reference.losses) - 1
    timed = run.seconds[1:] or run.seconds
    return {
        "loss": run.losses[last],
        "reference_loss": reference.losses[last],
        "max_loss_difference": largest(
            abs(a - b) for a, b in zip(run.losses, reference.losses, strict=False)
        ),
        "max_gradient_difference": largest(
            ((run.gradients[name] - wanted).abs().max() / wanted.abs().max()).item()
            for name, wanted in reference.gradients.items()
        ),
        "final_loss": run.losses[-1],
        "steps": len(run.losses),
        "tokens_per_second": round(tokens * len(timed) / sum(timed), 1),
    }


def largest(differences: Iterator[float]) -> float:
    """Like ``max``, but never hides what is not a number."""
    return max(math.inf if math.isnan(difference) else difference for difference in differences)


def within_tolerance(report: dict[str, float]) -> bool:
    return max(report["max_loss_difference"], report["max_gradient_difference"]) <= TOLERANCE


def plot(run: Run, reference: Run, title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(run.losses) + 1), run.losses, label=title)
    steps = range(1, len(reference.losses) + 1)
    axes.plot(steps, reference.losses, "k--", label="1 process, eager")
    axes.set(xlabel="step", ylabel="loss", title="Llama on packed documents")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())
