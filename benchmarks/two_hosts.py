"""One attention on two hosts with a slow link: ours, with and without overlap, against hand-written ones.

    python benchmarks/two_hosts.py            (as root, on Linux, with `ip` and `tc`)

The hosts are two network namespaces of this machine, joined by a veth pair whose rate `tc ... tbf` limits in
both directions; torchrun starts two ranks of one thread in each.  All ranks share this machine's cores.
Contenders, on the same packs, forward and backward in float32:

  ours                   2 x 2: heads are split over a host's ranks, key/value rows travel between hosts
  ours, no overlap       the same graph lowered without the overlap pass
  Ulysses                heads split over all four ranks, one flash call a document
  all-gather             each rank gets all keys and values, and gradients are summed back
  ring                   keys and values go round the four ranks, and their gradients
  Ulysses x ring         heads split over a host's ranks, keys and values go round the hosts
  torch ring             torch's own context parallelism, load balanced; for one document only

``compute_s`` is the least time on the unlimited link, ``communication_s`` the bytes of the busier direction
at the link's rate; no schedule is faster than the larger, ``bound_s``.  Bytes are the interface's own
counters, so that they hold TCP's headers, acknowledgements and barriers.  Every contender's output and
gradients are compared with attention in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from _measure import RESULTS, Bar, Row, report, summary
from _timeline import draw, hidden

HOSTS, PER_HOST = 2, 2
OURS, NO_OVERLAP = "ours", "ours, no overlap"
ULYSSES, GATHER, RING, USP = "Ulysses", "all-gather", "ring", "Ulysses x ring"
TORCH_RING = "torch ring"

UNLIMITED = 0
PORT = 29400
QUEUE_BYTES = 64 * 2**20  # more than any contender has under way: nothing is dropped
LEAST_BURST_BYTES = 64 * 2**10
ANSWER_s = 120  # how long any request may take
START_s = 240  # until the ranks have compiled
END_s = 20  # for each way to end them

HEADERS = 1.1  # of the payload, at most
NOISE = 1.03  # between equal contenders' least times


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays behind
    arguments = parse()
    until = time.monotonic() + arguments.seconds
    with ExitStack() as stack:
        link = stack.enter_context(linked())
        ranks = stack.enter_context(started(link, arguments))
        times, crossed, facts = measure(link, ranks, arguments, until)
        if arguments.timeline:
            link.limit(arguments.timeline_rate)
            events = ranks.turn("timeline", arguments.documents[0], OURS)[0]
            what = f"One attention, rank 0 of 2 x 2, {arguments.timeline_rate} Mbit/s between hosts"
            aside = f"{hidden(events):.0%} of the exchanges' time is hidden"
            draw(events, arguments.timeline, f"{what}: {aside}")
    rows = time_rows(times, crossed)
    details = byte_rows(crossed, facts)
    parameters = {k: v for k, v in vars(arguments).items() if k not in ("results", "timeline")}
    report("two_hosts", parameters, rows, promises(rows, details), details, Path(arguments.results))


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 32, 1])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 300, 1000], help="Mbit/s, one way")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=330, help="no repeat is begun that would end later")
    parser.add_argument("--timeline", help="draw one step of ours into this file")
    parser.add_argument("--timeline-rate", type=int, default=300, help="Mbit/s")
    parser.add_argument("--results", default=str(RESULTS), help="folder for the numbers")
    arguments = parser.parse_args(given)
    arguments.kv_heads = arguments.heads
    return arguments


def contenders(documents: int) -> list[str]:
    return [OURS, NO_OVERLAP, ULYSSES, GATHER, RING, USP, *([TORCH_RING] if documents == 1 else [])]


# --- the network ---------------------------------------------------------------------------------------


class Crossed(NamedTuple):
    """Bytes on the link, from host 0 to host 1 and back."""

    there: float
    back: float

    @property
    def total(self) -> float:
        return self.there + self.back


class Link:
    """Two namespaces, and the interfaces in them that are the ends of one wire."""

    def __init__(self) -> None:
        self.hosts = [f"hsap-{os.getpid()}-{i}" for i in range(HOSTS)]
        self.interfaces = [f"hsap{os.getpid()}{end}" for end in "ab"]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(HOSTS)]

    def inside(self, host: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.hosts[host], *command]

    def limit(self, rate: int) -> None:
        """``rate`` Mbit/s each way, or UNLIMITED."""
        for host, interface in enumerate(self.interfaces):
            on = ["dev", interface, "root"]
            if rate == UNLIMITED:
                subprocess.run(self.inside(host, "tc", "qdisc", "del", *on), capture_output=True)
                continue
            burst = max(LEAST_BURST_BYTES, rate * 125)  # a millisecond's bytes: timers are no finer
            shape = ["rate", f"{rate}mbit", "burst", str(burst), "limit", str(QUEUE_BYTES)]
            _do(*self.inside(host, "tc", "qdisc", "replace", *on, "tbf", *shape))

    def crossed(self) -> Crossed:
        """Since the link was made."""
        folder = f"/sys/class/net/{self.interfaces[0]}/statistics"
        read = _do(*self.inside(0, "cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"))
        return Crossed(*map(int, read.split()))


@contextmanager
def linked() -> Iterator[Link]:
    """Two hosts and the wire between them, removed at the end."""
    link = Link()
    with ExitStack() as stack:
        for host in link.hosts:
            _do("ip", "netns", "add", host)
            stack.callback(_remove, host)
        (a, b), (one, other) = link.hosts, link.interfaces
        _do("ip", "link", "add", one, "netns", a, "type", "veth", "peer", "name", other, "netns", b)
        for host, interface, address in zip(link.hosts, link.interfaces, link.addresses, strict=True):
            _do("ip", "-n", host, "address", "add", f"{address}/24", "dev", interface)
            for name in ("lo", interface):
                _do("ip", "-n", host, "link", "set", name, "up")
        yield link


def _remove(host: str) -> None:
    """The namespace, the interface in it, and what may still run in it: only this run's ranks can."""
    for process in _do("ip", "netns", "pids", host).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    _do("ip", "netns", "del", host)


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


# --- the ranks -----------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Connections to the ranks, in order."""

    pipes: list[Connection]

    def turn(self, *request: Any) -> list[Any]:
        """What every rank answers."""
        for pipe in self.pipes:
            pipe.send(request)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(ANSWER_s):
                raise TimeoutError(f"rank {rank} did not answer {request} in {ANSWER_s} s")
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        """The ranks end by themselves."""
        for pipe in self.pipes:
            pipe.close()


@contextmanager
def started(link: Link, arguments: argparse.Namespace) -> Iterator[Ranks]:
    """torchrun on both hosts; what it writes is shown if anything fails."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="two-hosts-")))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "socket"))
        listener.listen()
        listener.settimeout(1)
        processes = [stack.enter_context(_torchrun(link, host, folder, arguments)) for host in range(HOSTS)]
        try:
            ranks = Ranks(_connections(listener, processes))
            yield ranks
            ranks.close()
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)
            raise


@contextmanager
def _torchrun(
    link: Link, host: int, folder: Path, arguments: argparse.Namespace
) -> Iterator[subprocess.Popen[bytes]]:
    script = str(Path(__file__).with_name("_two_hosts_rank.py"))
    command = [
        sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={HOSTS}", f"--nproc-per-node={PER_HOST}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={link.addresses[0]}:{PORT}", f"--rdzv-id={link.hosts[0]}",
        # both namespaces have this machine's name, by which torchrun tells who hosts the store
        f"--rdzv-conf=is_host={int(host == 0)}", f"--local-addr={link.addresses[host]}",
        script, str(folder / "socket"), json.dumps(vars(arguments)),
    ]  # fmt: skip
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": link.interfaces[host],
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    with (folder / f"host{host}.log").open("wb") as log:
        process = subprocess.Popen(link.inside(host, *command), stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its ranks when it is told to, and by itself when they have ended."""
    for how in (None, signal.SIGTERM, signal.SIGKILL):
        if how is not None and process.poll() is None:
            process.send_signal(how)
        try:
            process.wait(END_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _connections(listener: socket.socket, processes: list[subprocess.Popen[bytes]]) -> list[Connection]:
    """The ranks' connections, in the order of ranks."""
    found: dict[int, Connection] = {}
    until = time.monotonic() + START_s
    while len(found) < HOSTS * PER_HOST:
        if any(p.poll() is not None for p in processes):
            raise RuntimeError("a host ended before its ranks had connected")
        if time.monotonic() > until:
            raise TimeoutError(f"only ranks {sorted(found)} connected in {START_s} s")
        try:
            pipe = Connection(listener.accept()[0].detach())
        except TimeoutError:
            continue
        found[pipe.recv()] = pipe
    return [found[rank] for rank in sorted(found)]


# --- measuring -----------------------------------------------------------------------------------------

Key = tuple[int, int, str]  # documents, rate, contender
Case = tuple[int, str]


def measure(
    link: Link, ranks: Ranks, arguments: argparse.Namespace, until: float
) -> tuple[dict[Key, list[float]], dict[Case, Crossed], dict[Case, Row]]:
    """Seconds of every step, bytes of a step, and each contender's error and predicted bytes."""
    cases = [(n, name) for n in arguments.documents for name in contenders(n)]
    facts = {case: facts_of(ranks, *case) for case in cases}
    times: dict[Key, list[float]] = {}
    counts: dict[Case, list[Crossed]] = {case: [] for case in cases}
    lasted = 0.0
    for repeat in range(arguments.repeats):
        began = time.monotonic()
        if repeat and began + lasted > until:
            break
        for rate in (UNLIMITED, *sorted(arguments.rates, reverse=True)):
            link.limit(rate)
            print(f"repeat {repeat}: {rate or 'unlimited'} Mbit/s", file=sys.stderr, flush=True)
            for case in cases:
                before = link.crossed()
                seconds = max(ranks.turn("seconds", *case))
                after = link.crossed()
                times.setdefault((case[0], rate, case[1]), []).append(seconds)
                counts[case].append(Crossed(*(y - x for x, y in zip(before, after, strict=True))))
        lasted = time.monotonic() - began
    crossed = {
        case: Crossed(mean(c.there for c in many), mean(c.back for c in many))
        for case, many in counts.items()
    }
    return times, crossed, facts


def facts_of(ranks: Ranks, documents: int, name: str) -> Row:
    """The first step, on the unlimited link: it warms up, too."""
    error = max(ranks.turn("error", documents, name))
    predicted = ranks.turn("bytes", documents, name)[0] if name in (OURS, NO_OVERLAP) else None
    return {"largest error": error, "predicted": predicted}


def time_rows(times: dict[Key, list[float]], crossed: dict[Case, Crossed]) -> list[Row]:
    rows = []
    for (documents, rate, name), seconds in times.items():
        compute = min(times[documents, UNLIMITED, name])
        busier = max(crossed[documents, name])
        communication = busier * 8 / (rate * 1e6) if rate != UNLIMITED else 0.0
        bound = max(compute, communication)
        measured = summary(seconds)
        rows.append(
            {"documents": documents, "Mbit/s": rate or "unlimited", "contender": name}
            | measured
            | {"compute_s": round(compute, 4), "communication_s": round(communication, 4)}
            | {"bound_s": round(bound, 4), "time / bound": round(min(seconds) / bound, 3)}
        )
    order = {rate: i for i, rate in enumerate(dict.fromkeys(r["Mbit/s"] for r in rows))}
    return sorted(rows, key=lambda r: (-r["documents"], order[r["Mbit/s"]]))


def byte_rows(crossed: dict[Case, Crossed], facts: dict[Case, Row]) -> list[Row]:
    rows = []
    for (documents, name), sent in crossed.items():
        predicted = facts[documents, name]["predicted"]
        rows.append(
            {
                "documents": documents,
                "contender": name,
                "MB there": round(sent.there / 1e6, 3),
                "MB back": round(sent.back / 1e6, 3),
                "MB": round(sent.total / 1e6, 3),
                "MB predicted": "" if predicted is None else round(predicted / 1e6, 3),
                "measured / predicted": round(sent.total / predicted, 4) if predicted else "",
                "largest error": facts[documents, name]["largest error"],
            }
        )
    return rows


def promises(rows: list[Row], details: list[Row]) -> list[Bar]:
    bars = []
    for documents in dict.fromkeys(r["documents"] for r in details):
        sent = {r["contender"]: r["MB"] for r in details if r["documents"] == documents}
        if documents > 1:
            least = min(mb for name, mb in sent.items() if name not in (OURS, NO_OVERLAP))
            bars.append(
                Bar(f"{documents} documents: bytes of ours / of the best rival", sent[OURS] / least, 1)
            )
        for row in details:
            if row["documents"] == documents and row["measured / predicted"]:
                name = f"{documents} documents: {row['contender']}, bytes"
                bars.append(Bar(f"{name} measured / predicted", row["measured / predicted"], HEADERS))
                bars.append(Bar(f"{name} predicted / measured", 1 / row["measured / predicted"], 1))
        for rate in dict.fromkeys(r["Mbit/s"] for r in rows):
            here = {r["contender"]: r for r in rows if r["documents"] == documents and r["Mbit/s"] == rate}
            bars += _in_time(f"{documents} documents, {rate} Mbit/s", here)
    return bars


def _in_time(what: str, here: dict[str, Row]) -> list[Bar]:
    ours = here[OURS]["min_s"]
    bars = [Bar(f"{what}: with overlap / without", ours / here[NO_OVERLAP]["min_s"], NOISE)]
    rival = min((r for n, r in here.items() if n not in (OURS, NO_OVERLAP)), key=lambda r: r["min_s"])
    if rival["communication_s"] > rival["compute_s"]:  # the link is what limits it
        bars.append(Bar(f"{what}: ours / {rival['contender']}", ours / rival["min_s"], 1))
    return bars


if __name__ == "__main__":
    main()
