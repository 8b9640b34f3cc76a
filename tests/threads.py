"""Simulated ranks: threads of one process, with a process group that copies between them.

``run_threads(4, function, *args)`` calls ``function(*args)`` in four threads.  In each of them plain
``torch.distributed`` works on the world, uneven and empty ``all_to_all_single`` splits included, and so
do functional collectives, sub-groups and device meshes, forward and backward.  It starts in milliseconds
and hence suits drawn examples.  What is global in torch stays shared by the threads: random generators
(draw before, not inside), the default dtype, and dynamo (run compiled code in ``tests/pool.py``).

The process group is torch's own test helper (seen working in 2.13).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def run_threads(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """The results of ``function(*args)`` on each of ``world`` simulated ranks, in order of rank.

    The first exception of a rank is raised again, with its traceback and a note that names the rank;
    TimeoutError when a rank waits for others that never come.
    """
    results: list[Any] = [None] * world
    failures: list[BaseException] = []

    def rank_main(rank: int, store: dist.Store) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = function(*args)
        except SystemExit:  # how the process group frees the ranks that wait for one that failed
            pass
        except BaseException as error:
            failures.append(_named(error, rank))
            _free_waiting_ranks()

    with _threaded_world():
        store = dist.HashStore()
        arguments = [(rank, store) for rank in range(world)]
        threads = [threading.Thread(target=rank_main, args=pair, daemon=True) for pair in arguments]
        late = _run(threads, timeout)
    if failures:
        raise failures[0]
    if late:
        raise TimeoutError(f"ranks {late} of {world} were still waiting after {timeout:g} s")
    return results


def _run(threads: list[threading.Thread], timeout: float) -> list[int]:
    """Runs the threads to their end; the ranks that had to be freed, if any."""
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        _free_waiting_ranks()
        for rank in late:
            threads[rank].join(timeout=5.0)
    return late


@contextmanager
def _threaded_world() -> Iterator[None]:
    """Gives every thread a ``torch.distributed`` of its own."""
    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        yield
    finally:
        _uninstall_threaded_pg()
        ProcessLocalGroup.reset()
        _set_thread_isolation_mode(False)


def _free_waiting_ranks() -> None:
    """Ends the collectives that wait; repeated because one may be entered while they are listed."""
    while True:
        try:
            ProcessLocalGroup.exception_handle(None)
            return
        except RuntimeError:
            time.sleep(0.001)


def _named(error: BaseException, rank: int) -> BaseException:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"raised by simulated rank {rank}")
    return error
