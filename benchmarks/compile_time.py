"""The first call: backend "hsap" against Inductor alone, fresh caches, and where our share goes.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --ranks 2        # with sharding; the contenders on as many processes

The first forward and backward of a small Llama on packed documents, each in new processes with an empty
cache, the contenders in turns.  Inductor sees static lengths, as it does by default, and for comparison
("dynamic") symbolic ones, as our backend always does; its first call with another length compiles a second
time, ours does not.  The second table takes one of our first calls
apart: dynamo's traces (it traces twice, the second time with a symbolic length), each step of
``hsap_compile/pipeline.py``, Inductor ("lower", which with symbolic lengths compiles the backward as well),
and the rest.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from _measure import Bar, Ranks, Row, report, summary

MORE = 1.15  # of Inductor's time
STEPS = (
    "capture",
    "find_attention",
    "lift_mask",
    "infer_tokens",
    "shard_tokens",
    "partition_attention",
    "extract",
    "_done",
    "lower",
)


def main() -> None:
    arguments = parse()
    contenders = ["hsap", "inductor", "inductor, dynamic"]
    firsts: dict[str, list[Row]] = {c: [] for c in contenders}
    for _ in range(arguments.repeats):
        for contender in contenders:
            firsts[contender].append(first_call(contender, arguments))
    rows = [row(contender, found) for contender, found in firsts.items()]
    least = {r["contender"]: r["min_s"] for r in rows}
    for found in rows:
        found["time / inductor"] = round(found["min_s"] / least["inductor"], 3)
    parts = shares(firsts["hsap"])
    bars = [Bar("first call / inductor", least["hsap"] / least["inductor"], MORE)]
    ours = sum(p["median_s"] for p in parts if p["step"] in STEPS and p["step"] != "lower")
    bars.append(Bar("our passes / first call", ours / statistics.median(firsts_s(firsts["hsap"])), MORE - 1))
    report(f"compile_time_{arguments.ranks}", vars(arguments), rows, bars, parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def first_call(contender: str, arguments: argparse.Namespace) -> Row:
    """The slowest of the ranks."""
    distributed = arguments.ranks > 1
    with Ranks(step_of, contender, arguments, count=arguments.ranks, distributed=distributed) as ranks:
        return max(ranks.turn(), key=lambda found: found["seconds"])


def firsts_s(found: list[Row]) -> list[float]:
    return [f["seconds"] for f in found]


def row(contender: str, found: list[Row]) -> Row:
    return {
        "contender": contender,
        **summary(firsts_s(found)),
        "min_cpu_s": round(min(f["cpu"] for f in found), 2),
        "forward_s": round(min(f["forward"] for f in found), 2),
    }


def shares(found: list[Row]) -> list[Row]:
    """Medians of the parts of a first call, the largest first."""
    steps = dict.fromkeys(step for f in found for step in f["parts"])
    medians = {s: statistics.median(f["parts"].get(s, 0.0) for f in found) for s in steps}
    whole = statistics.median(firsts_s(found))
    return [
        {"step": step, "median_s": round(s, 3), "percent": round(100 * s / whole, 1)}
        for step, s in sorted(medians.items(), key=lambda item: -item[1])
    ]


# --- in a process of its own ---------------------------------------------------------------------------


def step_of(contender: str, arguments: argparse.Namespace) -> Callable[[], Row]:
    torch.set_num_threads(1)
    backend, _, dynamic = contender.partition(", ")
    parts = clocked() if backend == "hsap" else {}
    import_module("torch._inductor.compile_fx")  # both need it: importing it is not compiling
    module = llama(arguments)
    model: Any = torch.compile(module, backend=backend)
    ids = torch.arange(arguments.tokens)[None] % module.config.vocab_size
    positions = (torch.arange(arguments.tokens) % (arguments.tokens // 4))[None]
    labels = ids.clone()
    for x in (ids, positions, labels) if dynamic else ():
        torch._dynamo.mark_dynamic(x, 1)

    def step() -> Row:
        started, began = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        forward = time.perf_counter() - started
        loss.backward()
        seconds = time.perf_counter() - started
        if parts:
            compiled = parts.pop("compile_graph")
            parts["rest of compile_graph"] = compiled - sum(parts[s] for s in STEPS if s in parts)
            parts["forward without compile_graph (dynamo)"] = forward - compiled
            parts["backward"] = seconds - forward
        return {
            "seconds": seconds,
            "cpu": time.process_time() - began,
            "forward": forward,
            "parts": dict(parts),
        }

    return step


def clocked() -> dict[str, float]:
    """Seconds of every step of the pipeline, counted from now on."""
    from hsap_compile import backend, pipeline

    seconds: dict[str, float] = defaultdict(float)
    for name in STEPS:
        setattr(pipeline, name, timed(getattr(pipeline, name), seconds, name))
    backend.compile_graph = timed(backend.compile_graph, seconds, "compile_graph")
    return seconds


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - started

    return call


def llama(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=arguments.tokens,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
