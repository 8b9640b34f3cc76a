"""What the benchmarks share: contenders in processes of their own, turns, tables and result files.

Other programs may run on the machine, so contenders take turns (A B A B ...), and what counts is the
least time of each: interference only ever adds.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


class Bar(NamedTuple):
    """A promise: ``got`` is at most ``limit``."""

    name: str
    got: float
    limit: float

    @property
    def met(self) -> bool:
        return self.got <= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.met else ">"
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {self.got:.3g} {sign} {self.limit:.3g}"


class Ranks:
    """``step = build(*args)`` in each of ``count`` new processes; ``turn()`` calls ``step()`` in all.

    ``build`` stands at the top of a module.  With ``distributed`` the processes are gloo ranks.
    ``environment`` is set before they start.  Inductor's cache is a new one.
    """

    def __init__(
        self,
        build: Callable[..., Callable[..., Any]],
        *args: Any,
        count: int = 1,
        distributed: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="benchmark-")
        context = multiprocessing.get_context("spawn")
        store = f"file://{self._directory.name}/store" if distributed else ""
        self._pipes: list[Connection] = []
        self._processes = []
        before = dict(os.environ)
        settings = {"TORCHINDUCTOR_CACHE_DIR": f"{self._directory.name}/inductor", **(environment or {})}
        for rank in range(count):
            ours, theirs = context.Pipe()
            os.environ.update(_launcher(rank, count) if distributed else {}, **settings)
            process = context.Process(target=_serve, args=(theirs, store, rank, count, build, args))
            process.start()
            os.environ.clear()
            os.environ.update(before)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def turn(self, *args: Any) -> list[Any]:
        """What ``step(*args)`` returns on each rank."""
        for pipe in self._pipes:
            pipe.send(args)
        return [pipe.recv() for pipe in self._pipes]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        self._directory.cleanup()


def _launcher(rank: int, count: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _serve(pipe: Connection, store: str, rank: int, count: int, build: Any, args: Sequence[Any]) -> None:
    if store:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    step = build(*args)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            break
        pipe.send(step(*request))
    if store:
        dist.destroy_process_group()


def reset_peak() -> None:
    """Forget this process's peak memory, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Most resident memory of this process since ``reset_peak``, or ever where that is not possible."""
    if Path("/proc/self/status").exists():
        return _status_bytes("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def resident_bytes() -> int:
    """Resident memory of this process now, once freed memory went back to the system (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def allocated_bytes(step: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator had given out at one time in ``step()``, less what it had before:
    every allocation counts as it is asked for, whatever the system makes of it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def _status_bytes(key: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024


def summary(seconds: Sequence[float]) -> Row:
    """Least and median of ``seconds``, and all of them."""
    return {
        "min_s": round(min(seconds), 5),
        "median_s": round(statistics.median(seconds), 5),
        "all_s": [round(s, 5) for s in seconds],
    }


def environment() -> Row:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def report(
    name: str,
    parameters: Mapping[str, Any],
    rows: Sequence[Row],
    bars: Sequence[Bar],
    details: Sequence[Row] = (),
    folder: Path = RESULTS,
) -> None:
    """Print a table (or two) and the bars, and write all of it into ``<folder>/<name>.json``."""
    print(f"\n{name}  {json.dumps(parameters)}")
    for part in (rows, details):
        if part:
            print(table(part), end="\n\n")
    for bar in bars:
        print(bar)
    content = {
        "benchmark": name,
        "machine": environment(),
        "parameters": dict(parameters),
        "results": list(rows),
        "details": list(details),
        "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


def table(rows: Sequence[Row]) -> str:
    """The rows' scalar values in columns."""
    columns = [c for c in rows[0] if not isinstance(rows[0][c], list | dict)]
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
