"""A pool of gloo ranks: processes that are started once and then run one test function after another.

``Pool().run(function, *args, world=4)`` calls ``function(*args)`` in each of four processes, in which
``torch.distributed`` is initialised and its world has four ranks, and returns the four results.  Every
world size has its own processes, because the product's process group is the world; they start when they
are first needed.  ``function`` and ``args`` are pickled: the function must stand at the top of a module.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

# torch is imported by a rank only after its environment is set, hence not at the top of this file.

GRACE_s = 10.0  # what the other ranks get to answer after one has failed


class RankError(RuntimeError):
    """A rank failed.  The text holds its traceback, ``__cause__`` the exception if it could be pickled."""


class Warned(NamedTuple):
    """A warning that a rank gave, issued again in the test's process so that its filters decide."""

    text: str
    category: type[Warning]
    filename: str
    lineno: int


class Reply(NamedTuple):
    """What a rank sends back: a result, or the traceback (and the exception itself if it pickles)."""

    result: Any = None
    failure: str = ""
    exception: BaseException | None = None
    died: bool = False
    warned: tuple[Warned, ...] = ()


class Pool:
    """Persistent ranks, one set for each world size that was asked for."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pool-")
        self._ranks: dict[int, _Ranks] = {}
        self._started = 0

    def run(
        self, function: Callable[..., Any], *args: Any, world: int = 4, timeout: float = 300.0
    ) -> list[Any]:
        """The results of ``function(*args)`` on each of ``world`` ranks, in order of rank.

        Raises RankError when a rank raises or dies and TimeoutError after ``timeout`` seconds.  After
        either the processes are replaced, unless every rank raised: then none of them is left waiting.
        """
        ranks = self._ranks.get(world) or self._start(world)
        try:
            replies = ranks.call(pickle.dumps((function, args)), timeout)
        except BaseException:
            self._ranks.pop(world).kill()
            raise
        if not _in_step(replies):
            self._ranks.pop(world).kill()
        _warn_again(replies)
        _raise_first(replies)
        return [reply.result for reply in replies]

    def _start(self, world: int) -> _Ranks:
        self._started += 1
        store = os.path.join(self._directory.name, f"store-{self._started}")
        inductor = os.path.join(self._directory.name, "inductor")
        self._ranks[world] = _Ranks(world, store, {"TORCHINDUCTOR_CACHE_DIR": inductor})
        return self._ranks[world]

    def close(self) -> None:
        """Ends all ranks and removes their files."""
        for ranks in self._ranks.values():
            ranks.close()
        self._ranks.clear()
        self._directory.cleanup()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ranks:
    """The processes of one world and the pipes to them."""

    def __init__(self, world: int, store: str, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, world, store, environment)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def call(self, request: bytes, timeout: float) -> list[Reply]:
        """One reply from every rank."""
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes):
            self._send(rank, pipe, request)
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(replies, timeout)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                replies[rank] = self._receive(rank, pipe)
                if replies[rank].failure:
                    deadline = min(deadline, time.monotonic() + GRACE_s)
        return [replies[rank] for rank in range(len(self._pipes))]

    def _give_up(self, replies: dict[int, Reply], timeout: float) -> None:
        _raise_first([replies[rank] for rank in sorted(replies)])
        missing = [rank for rank in range(len(self._pipes)) if rank not in replies]
        raise TimeoutError(f"ranks {missing} of {len(self._pipes)} have not answered after {timeout:g} s")

    def _send(self, rank: int, pipe: Connection, request: bytes) -> None:
        try:
            pipe.send_bytes(request)
        except OSError as error:
            raise RankError(self._obituary(rank)) from error

    def _receive(self, rank: int, pipe: Connection) -> Reply:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return Reply(failure=self._obituary(rank), died=True)

    def _obituary(self, rank: int) -> str:
        self._processes[rank].join(GRACE_s)
        return f"rank {rank} died with exit code {self._processes[rank].exitcode}"

    def close(self) -> None:
        """Lets every rank leave by itself, then ends those that do not."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends these processes, and no others, at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()


def _in_step(replies: list[Reply]) -> bool:
    """Whether all ranks returned or all raised, so that none can be inside a collective."""
    return len({bool(reply.failure) for reply in replies}) == 1 and not any(reply.died for reply in replies)


def _raise_first(replies: list[Reply]) -> None:
    failed = [reply for reply in replies if reply.failure]
    if failed:
        # The other ranks raise too when one dies: they lose their connection to it.
        first = next((reply for reply in failed if reply.died), failed[0])
        raise RankError(first.failure) from first.exception


def _warn_again(replies: list[Reply]) -> None:
    for warned in dict.fromkeys(warned for reply in replies for warned in reply.warned):
        warnings.warn_explicit(warned.text, warned.category, warned.filename, warned.lineno)


def _serve(pipe: Connection, rank: int, world: int, store: str, environment: dict[str, str]) -> None:
    """The life of a rank: answer requests until the pipe is closed."""
    os.environ.update(_launcher_environment(rank, world), **environment)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            break
        pipe.send_bytes(_answer(request, rank))
    torch.distributed.destroy_process_group()


def _launcher_environment(rank: int, world: int) -> dict[str, str]:
    """What torchrun sets, for one machine with one thread a rank."""
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return ours | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def _answer(request: bytes, rank: int) -> bytes:
    """Runs one request and packs its reply; never raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function, args = pickle.loads(request)
            _forget()
            result = function(*args)
            return pickle.dumps(Reply(result, warned=_packed(caught)))
        except BaseException as error:
            text = f"rank {rank}:\n{traceback.format_exc()}"
            return pickle.dumps(Reply(failure=text, exception=_portable(error), warned=_packed(caught)))


def _forget() -> None:
    """Drops compiled code and counters of earlier requests and seeds the generators."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def _packed(caught: list[warnings.WarningMessage]) -> tuple[Warned, ...]:
    return tuple(Warned(str(seen.message), seen.category, seen.filename, seen.lineno) for seen in caught)


def _portable(error: BaseException) -> BaseException | None:
    """The exception if it survives pickling, else None: its traceback is sent as text in any case."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
