"""One process: a Llama-like model on packed documents, backend "hsap" against Inductor's dense mask.

    python benchmarks/world_size_one.py
    python benchmarks/world_size_one.py --threads 0     # all cores, on an idle machine

Forward and backward of an unmodified transformers LlamaForCausalLM with random weights in float32, on one
row of ``--tokens``: once as many documents of random lengths (position_ids restart, no attention_mask, no
cache), once as one document.  Every contender has a process of its own and they take turns; peak memory
is the resident memory of the process during a step, after the first one.  For one document there is also
the call that a user without documents would make (no position_ids, use_cache left on), for which
transformers needs no mask.  One thread by default: several wait for one another as soon as
another program wants a core, and then time the machine instead of the contenders.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import Bar, Ranks, Row, peak_bytes, report, reset_peak, summary

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4, 512, 1376, 8, 2, 8192

FASTER = 1 / 2.5  # of Inductor's time, many documents
NO_SLOWER = 1.05  # of Inductor's time, one document


def main() -> None:
    arguments = parse()
    rows: list[Row] = []
    bars: list[Bar] = []
    for documents in (arguments.documents, 1):
        found = compare(documents, arguments)
        rows += found.values()
        ours, theirs = found["hsap"], found["inductor"]
        case = ours["case"]
        limit = FASTER if documents > 1 else NO_SLOWER
        bars.append(Bar(f"{case}: time / inductor", ours["min_s"] / theirs["min_s"], limit))
        if documents > 1:
            bars.append(Bar(f"{case}: peak memory / inductor", ours["peak_MiB"] / theirs["peak_MiB"], 1.0))
    model = dict(layers=LAYERS, hidden=HIDDEN, intermediate=INTERMEDIATE, heads=f"{HEADS}:{KV_HEADS}")
    report("world_size_one", vars(arguments) | model | {"vocabulary": VOCABULARY}, rows, bars)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0: as many as torch takes")
    return parser.parse_args()


def compare(documents: int, arguments: argparse.Namespace) -> dict[str, Row]:
    """A row per contender, ``repeats`` turns of each."""
    contenders = ["hsap", "inductor"] + (
        ["inductor, is_causal", "eager, is_causal"] if documents == 1 else []
    )
    ranks = {c: Ranks(step_of, c, arguments.tokens, documents, arguments.threads) for c in contenders}
    # one after another, so that nobody's compilation slows another's
    first = {c: ranks[c].turn()[0] for c in contenders}
    steps: dict[str, list[Row]] = {c: [] for c in contenders}
    for _ in range(arguments.repeats):
        for contender in contenders:
            steps[contender] += ranks[contender].turn()
    for process in ranks.values():
        process.close()
    rows = {c: row(documents, c, first[c], steps[c]) for c in contenders}
    for found in rows.values():
        found["time / inductor"] = round(found["min_s"] / rows["inductor"]["min_s"], 4)
    return rows


def row(documents: int, contender: str, first: Row, steps: list[Row]) -> Row:
    return {
        "case": f"{documents} document{'s' if documents > 1 else ''}",
        "contender": contender,
        **summary([s["seconds"] for s in steps]),
        "min_cpu_s": round(min(s["cpu"] for s in steps), 3),
        "peak_MiB": max(s["peak_bytes"] for s in steps) // 2**20,
        "first_s": round(first["seconds"], 2),
        "first_peak_MiB": first["peak_bytes"] // 2**20,
        "loss": steps[-1]["loss"],
    }


def lengths(tokens: int, documents: int) -> torch.Tensor:
    """Random lengths that add up to ``tokens``, the same every time."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts.sort().values, torch.tensor([tokens])])
    return ends.diff()


def step_of(contender: str, tokens: int, documents: int, threads: int) -> Callable[[], Row]:
    """One forward and backward."""
    if threads:
        torch.set_num_threads(threads)
    backend, _, variant = contender.partition(", ")
    module = llama(tokens)
    model: Any = module if backend == "eager" else torch.compile(module, backend=backend)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if variant != "is_causal":
        positions = torch.cat([torch.arange(int(n)) for n in lengths(tokens, documents)])[None]
        batch |= {"position_ids": positions, "use_cache": False}

    def step() -> Row:
        module.zero_grad()
        reset_peak()
        started, began = time.perf_counter(), time.process_time()
        loss = model(**batch).loss
        loss.backward()
        seconds, cpu = time.perf_counter() - started, time.process_time() - began
        return {"seconds": seconds, "cpu": cpu, "peak_bytes": peak_bytes(), "loss": round(loss.item(), 5)}

    return step


def llama(tokens: int, **changes: int) -> torch.nn.Module:
    """``changes`` go to the configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, attn_implementation="sdpa"))


if __name__ == "__main__":
    main()
