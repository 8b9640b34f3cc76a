"""What a step takes in memory: over the layers, by the bytes of rows held, and the longest row that fits.

    python benchmarks/memory.py layers
    python benchmarks/memory.py stages --tokens 16384
    python benchmarks/memory.py length --limit 512
    python benchmarks/memory.py parameters --tokens 512 --layers 2 4 8

A step's memory is the peak of the process's resident memory during the step less what was resident before
it, on the rank with most; nothing is killed at the limit.  Freed memory goes back to the system at once
(glibc is told so), so that the peak is what lives at one time.  The second step of every kind counts.

layers: a small Llama on two ranks, one document of all tokens, whose key/value rows cross ("exchange"),
against as many tokens in documents that live whole on a rank ("none").  The resident peak is measured, and in
a third step the most that torch's allocator has given out at one time, which leaves out how the system
places it, and other libraries; the bars are of the latter.  "saved" counts the bytes that autograd keeps,
each storage once; "received" is what the plan says that the rank with most receives.

stages: the same model and packs on four ranks, each a group of its own, with ``received`` of fewer and fewer
bytes.  "buffer" is those bytes, or what a layer receives.

parameters: a wider Llama on two ranks, whose parameters are whole on each or in parts (``shard_parameters``).
"held" are a rank's parameters; "allocated" as above, gradients included; "kept" what autograd keeps.

length: a Llama of four layers, forward and backward, on packs in which one document has half of the tokens.
S grows by steps of ``--step`` until a step takes more than ``--limit`` MiB.  Contenders: Inductor with the
model's dense mask, and ours on 1, 2 and 4 ranks; each as it is, and with ``memory_budget``, which is torch's
activation_memory_budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from _measure import Bar, Ranks, Row, allocated_bytes, peak_bytes, report, reset_peak, resident_bytes
from torch.distributed.tensor import DTensor
from world_size_one import lengths, llama

import hsap_compile

MiB = 2**20
SMALL = dict(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
)
MODEL = dict(
    hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=4, vocab_size=1024
)
WIDE = dict(
    hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, vocab_size=64
)
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SPARE = 1.0  # buffers of received rows: what the layers may add beyond what autograd must save


def main() -> None:
    arguments = parse()
    questions = {
        "layers": over_layers,
        "stages": over_stages,
        "parameters": over_parameters,
        "length": longest,
    }
    questions[arguments.question](arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=["layers", "stages", "parameters", "length"])
    parser.add_argument("--tokens", type=int, default=8192, help="layers, stages: of the row")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="layers: how many; stages: the first",
    )
    parser.add_argument("--limit", type=int, default=512, help="length: MiB of a step on a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="length: of ours")
    parser.add_argument("--first", type=int, default=2048, help="length: the shortest row")
    parser.add_argument("--step", type=float, default=1.1, help="length: a row over the one before")
    parser.add_argument("--budget", type=float, default=0.3, help="length: the memory_budget that is tried")
    return parser.parse_args()


# --- over the layers -----------------------------------------------------------------------------------


def over_layers(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for layers in arguments.layers:
        for what in ("forward", "save", "again"):
            options = {"intra": 1, "outputs": "local", "received": "save" if what == "forward" else what}
            kinds = (options, SMALL | {"num_hidden_layers": layers}, what != "forward", None)
            with Ranks(step_of, "hsap", *kinds, count=2, distributed=True, environment=RETURNS) as ranks:
                found = {p: turns(ranks, pack) for p, pack in packs(arguments.tokens).items()}
            rows.append(row_of_layers(layers, what, found))
            print(rows[-1], flush=True)
    bars = []
    for what in ("forward", "save", "again"):
        first, *_, last = (r for r in rows if r["pass"] == what)
        grown = (last["extra allocated MiB"] - first["extra allocated MiB"]) / last["received MiB a layer"]
        least, most = arguments.layers[0], arguments.layers[-1]
        kept = most - least if what == "save" else 0
        bars.append(Bar(f"{what}: buffers that {most} layers add to {least}", grown, kept + SPARE))
    report("memory_layers", vars(arguments) | SMALL, rows, bars)


def packs(tokens: int) -> dict[str, list[int]]:
    """One document over both ranks, and documents that two ranks hold whole, equally many tokens each."""
    return {"exchange": [tokens], "none": [tokens // 8] * 8}


def turns(ranks: Ranks, documents: list[int]) -> Row:
    """The second step, on the rank with most memory, and what is allocated in the third."""
    ranks.turn(documents, "compile")
    found = max(ranks.turn(documents, "resident"), key=lambda found: found["bytes"])
    return found | {"allocated": max(f["allocated"] for f in ranks.turn(documents, "allocated"))}


def row_of_layers(layers: int, what: str, found: dict[str, Row]) -> Row:
    with_rows, without = found["exchange"], found["none"]
    return {
        "layers": layers,
        "pass": what,
        "exchange MiB": round(with_rows["bytes"] / MiB, 2),
        "none MiB": round(without["bytes"] / MiB, 2),
        "extra MiB": round((with_rows["bytes"] - without["bytes"]) / MiB, 2),
        "exchange, allocated MiB": round(with_rows["allocated"] / MiB, 2),
        "none, allocated MiB": round(without["allocated"] / MiB, 2),
        "extra allocated MiB": round((with_rows["allocated"] - without["allocated"]) / MiB, 2),
        "received MiB a layer": round(with_rows["received"] / layers / MiB, 3),
        "saved MiB, exchange": round(with_rows["saved"] / MiB, 3),
        "saved MiB, none": round(without["saved"] / MiB, 3),
    }


# --- bytes of rows held --------------------------------------------------------------------------------


def over_stages(arguments: argparse.Namespace) -> None:
    layers, rows, most = arguments.layers[0], list[Row](), 0
    for training in (False, True):
        for part in (None, 2, 4, 8):
            received: Any = "again" if part is None else most // part
            options = {"intra": 1, "outputs": "local", "received": received}
            kinds = (options, SMALL | {"num_hidden_layers": layers}, training, None)
            with Ranks(step_of, "hsap", *kinds, count=4, distributed=True, environment=RETURNS) as ranks:
                found = {p: turns(ranks, pack) for p, pack in packs(arguments.tokens).items()}
            row = row_of_layers(layers, "training" if training else "forward", found)
            most = round(found["exchange"]["received"] / layers)
            row["buffer MiB"] = round((most if part is None else received) / MiB, 3)
            rows.append(row | {"s, exchange": round(found["exchange"]["seconds"], 2)})
            print(rows[-1], flush=True)
    report("memory_stages", vars(arguments) | SMALL, rows, [])


# --- parameters in parts --------------------------------------------------------------------------------


def over_parameters(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for layers in arguments.layers:
        for parts in (False, True):
            kinds = ({"outputs": "local"}, WIDE | {"num_hidden_layers": layers}, True, None, parts)
            with Ranks(step_of, "hsap", *kinds, count=2, distributed=True, environment=RETURNS) as ranks:
                found = turns(ranks, [arguments.tokens])
            rows.append(
                {
                    "layers": layers,
                    "parameters": "in parts" if parts else "whole",
                    "held MiB": round(found["held"] / MiB, 1),
                    "allocated MiB": round(found["allocated"] / MiB, 1),
                    "kept MiB": round(found["saved"] / MiB, 1),
                    "s": round(found["seconds"], 2),
                }
            )
            print(rows[-1], flush=True)
    report("memory_parameters", vars(arguments) | WIDE, rows, [])


# --- the longest row -----------------------------------------------------------------------------------


def longest(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    tried: list[Row] = []
    for backend, count, budget, received in contenders(arguments.budget, arguments.ranks):
        options: dict[str, Any] = {"outputs": "local", "received": received, "memory_budget": budget}
        options |= {"intra": max(count // 2, 1)}
        kinds = (options if backend == "hsap" else None, MODEL | {"num_hidden_layers": 4}, True, budget)
        name = f"{backend}, {count} rank{'s' * (count > 1)}"
        with Ranks(
            step_of, backend, *kinds, count=count, distributed=count > 1, environment=RETURNS
        ) as ranks:
            fits: Row = {}
            for tokens in lengths_to_try(arguments):
                documents = [tokens // 2, *lengths(tokens - tokens // 2, 15).tolist()]
                found = turns(ranks, documents)
                tried.append(
                    {"contender": name, "budget": budget, "received": received, "S": tokens, **found}
                )
                print(tried[-1], flush=True)
                if found["bytes"] > arguments.limit * MiB:
                    break
                fits = found | {"S": tokens}
        rows.append(
            {
                "contender": name,
                "budget": budget or 1.0,
                "received": received if count > 1 else "",
                "longest S": fits["S"],
                "MiB": round(fits["bytes"] / MiB, 1),
                "s": round(fits["seconds"], 2),
                "S / the first row's": round(fits["S"] / (rows[0]["longest S"] if rows else fits["S"]), 2),
            }
        )
    alone = {row["contender"]: row["longest S"] for row in reversed(rows)}  # each as it is
    both = [alone[name] for name in ("inductor, 1 rank", "hsap, 1 rank") if name in alone]
    bars = [Bar("inductor / ours on one rank", both[0] / both[1], 1.0)] if len(both) == 2 else []
    report("memory_length", vars(arguments) | MODEL, rows, bars, tried)


def contenders(budget: float, ranks: list[int]) -> Iterator[tuple[str, int, float | None, str]]:
    """Backend, ranks, memory_budget, what becomes of received rows; Inductor is beside ours on one rank."""
    for share in (None, budget) if 1 in ranks else ():
        yield "inductor", 1, share, "save"
    for count in ranks:
        yield "hsap", count, None, "save"
        yield "hsap", count, budget, "save"
        if count > 1:
            yield "hsap", count, budget, "again"


def lengths_to_try(arguments: argparse.Namespace) -> Iterator[int]:
    tokens = float(arguments.first)
    while True:
        yield round(tokens / 64) * 64
        tokens *= arguments.step


# --- in a process of its own ---------------------------------------------------------------------------


def step_of(
    backend: str,
    options: dict[str, Any] | None,
    sizes: dict[str, int],
    training: bool,
    budget: float | None,
    parts: bool = False,
) -> Callable[[list[int], str], Row]:
    """Steps on a row of documents, with one compiled model, whose parameters may be in ``parts``; what is
    counted: "resident" bytes and those that autograd keeps, "allocated" bytes, or nothing, as it must be
    where it may compile."""
    from torch._functorch import config

    torch.set_num_threads(1)
    module = llama(2**20, **sizes)
    if parts:
        hsap_compile.shard_parameters(module)
    held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    reports: list[Any] = []
    if backend == "hsap":
        assert options is not None
        model: Any = torch.compile(module, backend="hsap", options={**options, "on_step": reports.append})
    else:
        model = torch.compile(module, backend=backend)
    share = config.patch(activation_memory_budget=budget) if budget and backend != "hsap" else nullcontext()
    owned = {p.untyped_storage().data_ptr() for p in held}

    def step(documents: list[int], counted: str) -> Row:
        module.zero_grad()
        tokens = sum(documents)
        ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(n) for n in documents])[None]
        for x in (ids, positions):
            torch._dynamo.maybe_mark_dynamic(x, 1)
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in owned:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def forward_and_backward() -> float:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with share, torch.set_grad_enabled(training):
                with hooks if training and counted == "resident" else nullcontext():
                    loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
                if training:
                    loss.backward()
            return round(loss.item(), 5)

        if counted == "allocated":
            return {"allocated": allocated_bytes(forward_and_backward)}
        before = resident_bytes()
        reset_peak()
        started = time.perf_counter()
        loss = forward_and_backward()
        return {
            "bytes": peak_bytes() - before,
            "resident": before,
            "seconds": time.perf_counter() - started,
            "saved": sum(storages.values()),
            "held": sum(p.nbytes for p in held),
            "received": reports[-1].received_bytes if reports else 0,
            "loss": loss,
        }

    return step


if __name__ == "__main__":
    main()
