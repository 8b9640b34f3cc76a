"""One rank of ``two_hosts.py``, started by torchrun: ``_two_hosts_rank.py SOCKET ARGUMENTS``.

It connects to SOCKET (a path; network namespaces share the file system), says its rank, and then answers
requests until the other end closes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from typing import Any

import _rivals as rivals
import attention_two_ranks as two
import torch
import torch.distributed as dist
from two_hosts import HOSTS, NO_OVERLAP, OURS, PER_HOST, RING, TORCH_RING, ULYSSES, USP, contenders

from hsap_compile.plan import MeshShape
from hsap_compile.runtime import report

NOTHING_ASIDE = {"post_grad_custom_post_pass": None, "reorder_for_compute_comm_overlap": False}


def main() -> None:
    address, arguments = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    dist.init_process_group("gloo")
    answer = serving(arguments)
    with Client(address, family="AF_UNIX") as pipe:
        pipe.send(dist.get_rank())
        while True:
            try:
                request = pipe.recv()
            except EOFError:
                break
            pipe.send(answer(*request))
    dist.destroy_process_group()


def serving(arguments: argparse.Namespace) -> Callable[..., Any]:
    """``answer(what, documents, contender)``: "error", "bytes" (predicted), "seconds" or "timeline"."""
    torch.set_num_threads(1)
    ranks = [tuple(range(h * PER_HOST, (h + 1) * PER_HOST)) for h in range(HOSTS)]
    mesh = MeshShape(tuple(ranks))
    inside, _ = dist.new_subgroups_by_enumeration([list(r) for r in ranks])
    across, _ = dist.new_subgroups_by_enumeration([list(r) for r in zip(*ranks, strict=True)])
    graphs = {
        OURS: two.compiled(mesh, arguments),
        NO_OVERLAP: two.compiled(mesh, arguments, NOTHING_ASIDE),
    }
    whole = two.inputs(arguments)
    lengths = {n: two.document_lengths(arguments.tokens, n) for n in arguments.documents}
    plans = {n: two.planned(mesh, "balanced", lengths[n]) for n in arguments.documents}
    wanted = {n: two.reference(lengths[n], *whole) for n in arguments.documents}

    def contender(name: str, documents: int) -> two.Contender:
        pack = lengths[documents]
        if name in graphs:
            return two.ours(plans[documents], pack, graphs[name])
        if name == TORCH_RING:
            return two.ring(arguments.tokens, "alltoall")
        if name == USP:
            return rivals.ulysses_ring(pack, inside, across)
        return {ULYSSES: two.ulysses, RING: rivals.ring}.get(name, rivals.gathered)(pack)

    made = {(n, name): contender(name, n) for n in arguments.documents for name in contenders(n)}
    local = {key: two.local_inputs(c.columns, *whole) for key, c in made.items()}

    def step(documents: int, name: str) -> Any:
        *leaves, gradient = local[documents, name]
        for x in leaves:
            x.grad = None
        out = made[documents, name].attention(*leaves)
        out.backward(gradient)
        return out

    def answer(what: str, documents: int, name: str) -> Any:
        dist.barrier()
        if what == "error":
            out = step(documents, name)
            got = [out.detach(), *(x.grad for x in local[documents, name][:-1])]
            return two.largest_error(got, wanted[documents], made[documents, name].columns)
        if what == "bytes":
            return report(plans[documents], graphs[name].traffic).inter_bytes
        if what == "timeline":
            return timeline(lambda: step(documents, name))
        started = time.perf_counter()
        step(documents, name)
        dist.barrier()
        return time.perf_counter() - started

    return answer


def timeline(step: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(operator, start, end) in seconds of what torch's profiler sees of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
        dist.barrier()
    events = sorted(recorded.events(), key=lambda e: e.time_range.start)
    first = events[0].time_range.start
    return [(e.name, (e.time_range.start - first) / 1e6, (e.time_range.end - first) / 1e6) for e in events]


if __name__ == "__main__":
    main()
