"""Everything to measure on one GPU, in one command; the table comes last.

    python benchmarks/gpu.py                      # tests, kernels, one rank's share, a model
    python benchmarks/gpu.py --parts kernels,share,model --write   # what "auto" should choose: flex or varlen
    python benchmarks/gpu.py --tiny --device cpu  # the script itself, on a machine without a GPU

tests    ``pytest -m gpu``
kernels  attention over packed documents, forward and forward+backward: ours by flex attention and by flash
         attention over sequences (attention="varlen"); SDPA with the dense mask; flex attention with a
         document mask and varlen_attn as a user writes them
share    one rank's part of 2^20 tokens on 64 ranks, its slices and as many random received rows, both ways,
         against one flash call with as many pairs: what fragments cost
model    a Llama of 1B shape on 2^15 packed tokens: ours both ways, ``torch.compile`` with the dense mask, and
         documents padded to the longest

Times are medians, by CUDA events.  TFLOP/s count attended pairs only (4 x pairs x heads x size, and 2.5
times that for the backward); ``floor_ms`` is that work at this device's own rate for a matrix product.
Packs are drawn from published figures (hsap_compile.plan.lengths).  Parts that cannot run say why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import RESULTS, Row, environment, table
from _ours import by_flex, by_varlen
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hsap_compile.plan import Attended, MeshShape, make
from hsap_compile.plan.lengths import draw
from hsap_compile.plan.tables import RankTables

SOURCES = ("fineweb_like", "longtail_pretrain", "prolong_like")
HEADS, KV_HEADS, WIDTH = 32, 8, 128
BACKWARD = 2.5  # times the forward's matrix work: five products for two
DENSE_LIMIT = 2**33  # bytes of a dense mask that is still tried

Step = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    device: str
    tiny: bool
    repeats: int
    deadline: float
    dtype: torch.dtype

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="tests,kernels,share,model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the script and measure nothing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=25, help="no case starts after so long")
    parser.add_argument("--write", action="store_true", help="write results/gpu.json")
    given = parser.parse_args()
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    deadline = time.monotonic() + 60 * given.minutes
    settings = Settings(given.device, given.tiny, 1 if given.tiny else given.repeats, deadline, dtype)
    found: dict[str, list[Row]] = {}
    for part in given.parts.split(","):
        found[part] = []
        for row in PARTS[part](settings):
            print(json.dumps(row), flush=True)  # what is known when time runs out
            found[part].append(row)
            _free(settings)
    machine = environment() | {"device": _device_name(given.device), "cuda": torch.version.cuda}
    if given.write:
        content = {
            "benchmark": "gpu", "machine": machine, "parameters": vars(given), "results": found
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{json.dumps(machine)}")
    for part, rows in found.items():
        print(f"\n{part}\n{table(rows) if rows else 'nothing'}")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _free(settings: Settings) -> None:
    gc.collect()
    torch.compiler.reset()
    if settings.device == "cuda":
        torch.cuda.empty_cache()


# --- measuring -----------------------------------------------------------------------------------------


def milliseconds(step: Step, settings: Settings) -> float:
    """Median time of ``step`` on the device; two runs warm it up."""
    runs = 1 if settings.tiny else 2
    for _ in range(runs):
        step()
    times = []
    for _ in range(settings.repeats):
        if settings.device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def matrix_rate(settings: Settings) -> float:
    """FLOP/s of a large square matrix product."""
    n = 64 if settings.tiny else 8192
    a, b = (torch.randn(n, n, device=settings.device, dtype=settings.dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * milliseconds(lambda: a @ b, settings))


def measured(make_step: Callable[[], tuple[Step, Step]], settings: Settings) -> Row:
    """ms of forward and of forward+backward, MiB at most; or why not."""
    cuda = settings.device == "cuda"
    try:
        if settings.late():
            raise TimeoutError("no time left")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        forward, both = make_step()
        row: Row = {"forward_ms": milliseconds(forward, settings), "both_ms": milliseconds(both, settings)}
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
        return row | {"peak_MiB": round(peak), "note": ""}
    except Exception as error:  # a contender that cannot run is a result, too
        text = f"{type(error).__name__}: {error}".split("\n")[0][:90]
        return {"forward_ms": float("nan"), "both_ms": float("nan"), "peak_MiB": 0, "note": text}


def rated(row: Row, pairs: int, heads: int, width: int, rate: float) -> Row:
    """``row`` with its TFLOP/s on attended pairs and the floor at the device's matrix rate."""
    flops = 4 * pairs * heads * width
    return {
        **{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "note"},
        "forward_TFLOPs": round(flops / row["forward_ms"] / 1e9, 2),
        "both_TFLOPs": round((1 + BACKWARD) * flops / row["both_ms"] / 1e9, 2),
        "floor_ms": round(1e3 * flops / rate, 3),
        "both_floor_ms": round(1e3 * (1 + BACKWARD) * flops / rate, 3),
        "note": row["note"],
    }


def steps(attention: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> tuple[Step, Step]:
    """Forward alone without gradients, and forward with backward."""

    def forward() -> Any:
        with torch.no_grad():
            return attention(*tensors)

    def both() -> Any:
        return torch.autograd.grad(attention(*tensors), tensors, grad)

    return forward, both


# --- attention over packed documents -------------------------------------------------------------------


def kernels(settings: Settings) -> Iterator[Row]:
    rate = matrix_rate(settings)
    for tokens in (256,) if settings.tiny else (2**13, 2**15, 2**17):
        packs = {source: draw(source, tokens, seed=0) for source in SOURCES} | {"one document": [tokens]}
        if settings.tiny:
            packs = {"tiny": [100, 1, 155]}
        for name, lengths in packs.items():
            for contender in CONTENDERS:
                case = {"pack": name, "tokens": tokens, "documents": len(lengths), "contender": contender}
                yield case | compare(contender, lengths, rate, settings)
                _free(settings)


def compare(contender: str, lengths: list[int], rate: float, settings: Settings) -> Row:
    heads, kv_heads, width = shape(settings)
    *operands, grad = rows_of(sum(lengths), (heads, kv_heads, kv_heads, heads), width, settings)
    attention: list[Callable[..., Tensor]] = []

    def make_step() -> tuple[Step, Step]:
        attention.append(CONTENDERS[contender](lengths, settings))
        return steps(attention[0], operands, grad)

    row, error = measured(make_step, settings), ""
    if sum(lengths) <= 2**13 and not row["note"]:
        wanted = document_loop(*operands, lengths)
        off = (attention[0](*operands).detach() - wanted).abs().max() / wanted.abs().max()
        error = f"{off.item():.1e}"
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return {"error": error} | rated(row, pairs, heads, width, rate)


def shape(settings: Settings) -> tuple[int, int, int]:
    """Query heads, key/value heads, head size."""
    return (4, 2, 16) if settings.tiny else (HEADS, KV_HEADS, WIDTH)


def rows_of(tokens: int, heads: Sequence[int], width: int, settings: Settings) -> list[Tensor]:
    """(tokens, H, D) for every number of heads, laid out as projections are; the last has no gradient."""
    torch.manual_seed(0)
    made = [torch.randn(tokens, h, width, device=settings.device, dtype=settings.dtype) for h in heads]
    return [x.requires_grad_() for x in made[:-1]] + made[-1:]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _rows_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def document_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The truth, one call a document."""
    parts = []
    with torch.no_grad():
        for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            operands = (_heads_first(x).float() for x in (a, b, c))
            parts.append(_rows_first(sdpa(*operands, is_causal=True, enable_gqa=True)).to(q.dtype))
    return torch.cat(parts)


def _labels(lengths: list[int], settings: Settings) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(settings.device)


def ours(by: Callable[..., Any], lengths: list[int], settings: Settings) -> Callable[..., Tensor]:
    labels = _labels(lengths, settings)
    mask = Attended(1, sum(lengths), labels=labels.cpu().numpy()[None], lo=0)
    tables = make([mask], MeshShape(((0,),))).tables(0)
    return by(tables, labels, remote=False, device=settings.device)


def dense(lengths: list[int], settings: Settings) -> Callable[..., Tensor]:
    tokens = sum(lengths)
    if tokens**2 > DENSE_LIMIT:
        raise MemoryError(f"a mask of {tokens**2 / 2**30:.0f} GiB")
    labels = _labels(lengths, settings)
    allowed = (labels[:, None] == labels) & torch.ones(
        tokens, tokens, dtype=torch.bool, device=settings.device
    ).tril()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = (_heads_first(x) for x in (q, k, v))
        return _rows_first(sdpa(*operands, attn_mask=allowed, enable_gqa=True))

    return attention


def user_flex(lengths: list[int], settings: Settings) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    labels, tokens = _labels(lengths, settings), sum(lengths)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (labels[i] == labels[j]) & (j <= i)

    cuda = settings.device == "cuda"
    blocks_of = torch.compile(create_block_mask) if cuda else create_block_mask
    run: Any = torch.compile(flex_attention) if cuda else flex_attention
    mask = blocks_of(allowed, None, None, tokens, tokens, device=settings.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = (_heads_first(x) for x in (q, k, v))
        return _rows_first(run(*operands, block_mask=mask, enable_gqa=True))

    return attention


def varlen(lengths: list[int], settings: Settings) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    if settings.device == "cpu":
        raise NotImplementedError("torch has no such kernel on cpu")
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=settings.device)
    longest = max(lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(
            q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True
        )  # fmt: skip

    return attention


OURS: dict[str, Callable[..., Any]] = {"flex": by_flex, "varlen": by_varlen}
CONTENDERS: dict[str, Callable[..., Any]] = {
    **{f"ours, {name}": functools.partial(ours, by) for name, by in OURS.items()},
    "SDPA, dense mask": dense, "flex, user's mask": user_flex, "varlen, user's": varlen,
}  # fmt: skip


# --- one rank's share of a large mesh ------------------------------------------------------------------


def share(settings: Settings) -> Iterator[Row]:
    rate = matrix_rate(settings)
    tokens, ranks = (512, 4) if settings.tiny else (2**20, 64)
    heads, kv_heads, width = shape(settings)
    mesh = MeshShape(tuple((r,) for r in range(ranks)))
    for source in SOURCES:
        lengths = draw(source, tokens, seed=0)
        labels = np.repeat(np.arange(len(lengths)), lengths)[None]
        plan = make([Attended(1, tokens, labels=labels, lo=0)], mesh)
        rank = int(np.argmax(plan.area))
        of_rank = plan.tables(rank)
        pairs = int(plan.area[rank])
        own, received = len(of_rank.group_columns), len(of_rank.masks[0].remote)
        q, k, v, grad = rows_of(own, (heads, kv_heads, kv_heads, heads), width, settings)
        k_remote, v_remote, _ = rows_of(received, (kv_heads, kv_heads, 1), width, settings)
        columns = torch.from_numpy(labels[0]).to(settings.device)

        n = int(np.sqrt(2 * pairs))
        operands, gradient = [q, k, v, k_remote, v_remote], grad
        makers = {
            **{
                f"ours, {name}": functools.partial(
                    _fragments, by, of_rank, columns, operands, gradient, settings
                )
                for name, by in OURS.items()
            },
            f"one causal call of {n}": functools.partial(_whole, n, settings),
        }
        case = {"pack": source, "tokens": tokens, "ranks": ranks, "own": own, "received": received}
        case["slices"] = len(of_rank.masks[0].slices)
        for contender, make_step in makers.items():
            row = measured(make_step, settings)
            yield case | {"contender": contender} | rated(row, pairs, heads, width, rate)


def _fragments(
    by: Callable[..., Any],
    tables: RankTables,
    columns: Tensor,
    operands: list[Tensor],
    grad: Tensor,
    settings: Settings,
) -> tuple[Step, Step]:
    return steps(by(tables, columns, remote=True, device=settings.device), operands, grad)


def _whole(n: int, settings: Settings) -> tuple[Step, Step]:
    heads, kv_heads, width = shape(settings)
    *operands, grad = rows_of(n, (heads, kv_heads, kv_heads, heads), width, settings)
    return steps(flash, operands, grad)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    operands = (_heads_first(x) for x in (q, k, v))
    return _rows_first(sdpa(*operands, is_causal=True, enable_gqa=True))


# --- a model -------------------------------------------------------------------------------------------


def model(settings: Settings) -> Iterator[Row]:
    tokens = 256 if settings.tiny else 2**15
    for source in SOURCES[:1] if settings.tiny else SOURCES:
        lengths = draw(source, tokens, seed=0)
        # on CPU the only kernel of a backward
        kernels = ("slices",) if settings.device == "cpu" else tuple(OURS)
        others = ("torch.compile, dense mask", "torch.compile, padding")
        for contender in (*(f"hsap, {name}" for name in kernels), *others):
            row = measured(functools.partial(training, contender, lengths, settings), settings)
            row["tokens_per_s"] = round(1e3 * tokens / row["both_ms"], 1)
            case = {"pack": source, "tokens": tokens, "documents": len(lengths), "contender": contender}
            yield case | {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            _free(settings)


def training(contender: str, lengths: list[int], settings: Settings) -> tuple[Step, Step]:
    tokens = sum(lengths)
    module = llama(tokens, settings)
    backend, _, kernel = contender.partition(", ")
    if backend == "hsap":
        compiled: Any = torch.compile(module, backend="hsap", options={"attention": kernel})
    else:
        compiled = torch.compile(module)
    batches = (padded if contender.endswith("padding") else packed)(lengths, tokens, settings)

    def both() -> None:
        module.zero_grad()
        for batch in batches:
            compiled(**batch).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                compiled(**batch)

    return forward, both


def llama(tokens: int, settings: Settings) -> torch.nn.Module:
    """The shape of Llama 3.2 1B, with random weights and a small vocabulary (its head is not attention's)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = (64, 2) if settings.tiny else (2048, 16)
    config = LlamaConfig(
        vocab_size=512 if settings.tiny else 16384,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4 if settings.tiny else 32,
        num_key_value_heads=2 if settings.tiny else 8,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        return LlamaForCausalLM(config).to(settings.dtype)


def packed(lengths: list[int], tokens: int, settings: Settings) -> list[dict[str, Any]]:
    """All documents in one row."""
    ids = torch.randint(512, (1, tokens), device=settings.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(settings.device)
    return [{"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}]


def padded(lengths: list[int], tokens: int, settings: Settings) -> list[dict[str, Any]]:
    """One document a row, each as long as the longest, as many rows a batch as fit into ``tokens``."""
    longest, batches = max(lengths), []
    rows = max(1, tokens // longest)
    for start in range(0, len(lengths), rows):
        chosen = torch.tensor(lengths[start : start + rows])
        real = torch.arange(longest) < chosen[:, None]
        ids = torch.randint(512, real.shape).to(settings.device)
        real = real.to(settings.device)
        labels = ids.masked_fill(~real, -100)
        batches.append(
            {"input_ids": ids, "attention_mask": real.long(), "labels": labels, "use_cache": False}
        )
    return batches


# --- tests ---------------------------------------------------------------------------------------------


def tests(settings: Settings) -> Iterator[Row]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    if settings.tiny:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-8000:])
    lines = done.stdout.strip().splitlines()
    yield {"command": " ".join(command[2:]), "result": lines[-1] if lines else done.stderr[-200:]}


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "tests": tests, "kernels": kernels, "share": share, "model": model
}  # fmt: skip


if __name__ == "__main__":
    main()
