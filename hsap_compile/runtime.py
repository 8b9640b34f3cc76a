"""What runs at every call: read the documents, plan, hand the tables to the compiled graph."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hsap_compile._torch import without_autocast
from hsap_compile.agreement import Claim, check
from hsap_compile.documents import attended, unknown
from hsap_compile.errors import Refused, too_few
from hsap_compile.kernels.blocks import rank_tables
from hsap_compile.kernels.flex import TABLES as FLEX_TABLES
from hsap_compile.mesh import place_in
from hsap_compile.passes._bands import check_batch
from hsap_compile.passes._tables import ON_HOST
from hsap_compile.passes.partition_attention import PlannedMask, Traffic
from hsap_compile.passes.shard_tokens import Fallback, Rows
from hsap_compile.plan import Attended, MeshShape, Plan, ReceiveLimit, make
from hsap_compile.plan.chunks import Chunk, Joined, chunk_tables
from hsap_compile.plan.placement import LEAST
from hsap_compile.plan.shifts import Shift, shift_tables

_PLANS_KEPT = 16


@dataclass(frozen=True)
class StepReport:
    """One step's plan, and the bytes all ranks together send for its attentions, forward and backward:
    ``inter_bytes`` of keys and values between groups, ``intra_bytes`` of heads inside groups.
    ``received_bytes``: of the rows that the rank with most receives in a forward; ``again``: whether they are
    received once more in the backward, rather than kept for it."""

    plan: Plan
    inter_bytes: int
    intra_bytes: int
    received_bytes: int
    again: bool = False

    @property
    def rows_bytes(self) -> int:
        """Of keys and values, in a forward."""
        return self.inter_bytes // (3 if self.again else 2)

    @property
    def balance(self) -> float:
        """Attention area of the busiest rank over the mean."""
        return self.plan.balance


def report(plan: Plan, traffic: Sequence[Traffic], again: bool = False) -> StepReport:
    """Count what the attentions of ``traffic`` send under ``plan``; ``again``: rows twice in the backward."""
    to_others = (plan.placement.mesh.intra - 1) * int(plan.exchanged.sum())
    received = sum(plan.masks[t.mask].rows_sent.sum(axis=0) * t.kv for t in traffic)
    inter, most = int(np.sum(received)), int(np.max(received))
    intra = sum(to_others * (t.heads_in + t.heads_out) for t in traffic)
    return StepReport(plan, (3 if again else 2) * inter, 2 * intra, most, again)


@dataclass(frozen=True)
class Program:
    """A compiled graph and what its host side needs to know.

    ``function`` takes the graph's inputs and then the tables named by ``tables``; ``documents`` computes,
    from the inputs, the leaves of all ``masks`` in order; ``tokens`` is (input, dimension, how much more than
    its size S is), or S when it is a constant; ``local_outputs`` the outputs that hold only this rank's rows;
    ``writes`` the inputs that the last outputs are written into, ``writes_with_gradient`` those of them whose
    writes autograd sees; ``names`` what the model calls its inputs;
    ``signature`` is the same wherever the graph is, and ``check`` what ranks compare (see ``Options``);
    ``fallbacks`` are the operators on gathered tokens; ``whole``: every rank computes all; ``random``:
    whether the graph draws random numbers; ``again``: whether rows are received again in the backward;
    ``limit``: in how many stages, and when; ``bands_only``: no kernel evaluates a formula.
    """

    function: Callable[..., Any]
    documents: Callable[..., Any]
    masks: tuple[PlannedMask, ...]
    tables: tuple[Any, ...]
    mesh: MeshShape
    group: str
    placement: Any
    traffic: tuple[Traffic, ...]
    on_step: Callable[[StepReport], None] | None
    tokens: tuple[int, int, int] | int
    local_outputs: Mapping[int, Rows]
    writes: tuple[int, ...]
    parameters: frozenset[int]
    names: tuple[str, ...]
    signature: int
    check: str = "batch"
    fallbacks: tuple[Fallback, ...] = ()
    whole: bool = False
    random: bool = False
    again: bool = False
    limit: ReceiveLimit = ReceiveLimit()
    bands_only: bool = False
    writes_with_gradient: frozenset[int] = frozenset()

    def length(self, args: Sequence[Any]) -> int:
        """S of a call."""
        if isinstance(self.tokens, int):
            return self.tokens
        return self.given(args) + self.tokens[2]

    def given(self, args: Sequence[Any]) -> int:
        """How many tokens the inputs of a call have."""
        if isinstance(self.tokens, int):
            return self.tokens
        position, dim, _ = self.tokens
        return int(args[position].shape[dim])

    def read(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """What the masks of a call read, on the host."""
        with torch.no_grad():
            return [x.detach().cpu() for x in self.documents(*args)]

    def plan(self, leaves: Sequence[torch.Tensor], tokens: int) -> Plan:
        """The plan of a call from what ``read`` and ``length`` say of it.

        Raises ``Refused`` for a batch that the kernel cannot compute, or of too few tokens.
        """
        if tokens < LEAST * self.mesh.size > LEAST:
            raise too_few(tokens, self.mesh.size, LEAST)
        masks = _masks(self, leaves, tokens) or (_nothing(tokens),)
        plan = make(masks, self.mesh, self.placement, limit=self.limit)
        if self.bands_only:
            check_batch(plan)
        return plan

    def report(self, plan: Plan) -> StepReport:
        """What a step under ``plan`` sends."""
        return report(plan, self.traffic, self.again)


@dataclass
class Runner:
    """``program`` as dynamo calls it.  Keeps the last plans by their documents' digest."""

    program: Program
    plans: OrderedDict[bytes, tuple[Plan, dict[int, dict[Any, Any]]]] = field(default_factory=OrderedDict)
    calls: int = 0
    warned: bool = False
    last_plan: Plan | None = None
    planning: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, *args: Any) -> Any:
        with without_autocast():  # which the graph has explicitly, and its caller may be in
            return self._step(args)

    def _step(self, args: Sequence[Any]) -> Any:
        program = self.program
        rank, ranks = place_in(program.group)
        if ranks != program.mesh.size:
            raise Refused(
                "the number of ranks changed after compilation",
                got=f"{ranks} ranks",
                wanted=f"{program.mesh.size}",
                do="call torch.compiler.reset() and compile again",
            )
        if ranks > 1 and any(hasattr(a, "hsap_columns") for a in args):
            raise Refused(
                "one rank's rows enter a compiled graph again",
                got='a tensor that options={"outputs": "local"} kept on its rank, as an input',
                wanted="whole tensors, the same on every rank",
                do='drop "outputs": "local", or compile what returns it and what takes it as one function, '
                "without the graph break between them (TORCH_LOGS=graph_breaks)",
            )
        tokens = program.length(args)
        digest = b""
        try:
            leaves = program.read(args)
            digest = _digest(leaves, tokens)
            planned: Any = self._plan(args, leaves, tokens, rank, digest)
        except Exception as error:  # the other ranks wait for this one's claim all the same
            planned = error
        failed = isinstance(planned, Exception)
        if _AHEAD.get():
            raise planned if failed else _Planned
        first = self.calls == 0
        if ranks > 1 and (first or program.check != "first"):
            made = 0 if failed else planned[0].digest()
            claim = Claim(program.signature, tokens, digest, made, args, program.parameters)
            try:
                check(claim, ranks, program.group, thorough=first or program.check == "always")
            except Refused as refused:
                raise planned if failed else refused from None
        if failed:
            raise planned
        self.calls += 1
        plan, tables = planned
        if not self.warned:
            self.warned = _warn_of_leaks(args, program, plan)
        self.last_plan = plan
        if program.on_step is not None:
            program.on_step(program.report(plan))
        extra = [tables[key] for key in program.tables]
        given = _written_apart(args, program) if program.writes else args
        with _own_random_numbers(rank, args) if program.random and ranks > 1 else nullcontext():
            outputs = program.function(*given, *extra)
        if program.writes:
            outputs, written = outputs[: -len(program.writes)], outputs[-len(program.writes) :]
            for i, value in zip(program.writes, written, strict=True):
                with nullcontext() if i in program.writes_with_gradient else torch.no_grad():
                    args[i].copy_(value)
        if program.local_outputs:
            outputs = list(outputs)
        for i, rows in program.local_outputs.items():
            kept, columns = tables.get(rows, (None, tables["columns"]))
            if kept is not None:
                outputs[i] = outputs[i].index_select(rows.dim, kept)
            outputs[i].hsap_columns = columns
        return outputs

    def _plan(
        self, args: Sequence[Any], leaves: Sequence[torch.Tensor], tokens: int, rank: int, digest: bytes
    ) -> tuple[Plan, dict[Any, Any]]:
        """The plan of a batch, this rank's tables and what its outputs keep, made anew only for documents not
        seen lately."""
        program = self.program
        with self.planning:
            if digest not in self.plans:
                self.plans[digest] = (program.plan(leaves, tokens), {})
                while len(self.plans) > _PLANS_KEPT:
                    self.plans.popitem(last=False)
            self.plans.move_to_end(digest)
            plan, of_rank = self.plans[digest]
            if rank not in of_rank:
                device = next(a.device for a in args if isinstance(a, torch.Tensor))
                tables = _tensors(plan, rank, program.tables)
                columns, outputs = tables["columns"].numpy(), program.local_outputs.values()
                kept = {rows: _kept(rows, columns, tokens, device) for rows in outputs if any(rows[1:])}
                of_rank[rank] = {key: _placed(table, key, device) for key, table in tables.items()} | kept
            return plan, of_rank[rank]


def _kept(rows: Rows, columns: np.ndarray, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Of a local output, which of its rows are part of the value, and which of the whole one's they are."""
    kept = np.flatnonzero((columns >= rows.first) & (columns < tokens - rows.behind))
    return tuple(torch.from_numpy(x).to(device) for x in (kept, columns[kept] - rows.first))


class _Planned(Exception):
    """Ends a call whose plan was all that was wanted."""


_AHEAD: ContextVar[bool] = ContextVar("hsap_planning_ahead", default=False)


def prefetch(compiled: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Plan ``compiled(*args, **kwargs)`` before its turn: nothing is computed and no rank is asked.

    ``compiled``: what ``torch.compile(.., backend="hsap")`` returned, or a function that calls it.  The call
    with the same documents then finds its plan and its tables ready.  It may run in a thread of its own, a
    data loader's for instance, while the step before is under way.  Where the model is compiled in several
    graphs, what stands before the first one runs, and that one is planned.
    """
    token = _AHEAD.set(True)
    try:
        compiled(*args, **kwargs)
    except _Planned:
        pass
    finally:
        _AHEAD.reset(token)


def _written_apart(args: Sequence[Any], program: Program) -> list[Any]:
    """``args``, copies where the graph has a new value for one: a backward may read what it was.

    Raises ``Refused`` where another one lies in the same memory: the graph knows each by itself.
    """
    memory = {i: memory_of(x) for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.numel()}
    numbers, places = list(memory), np.array(list(memory.values()))
    for i in memory.keys() & set(program.writes):
        first, last = memory[i]
        shared = np.flatnonzero((places[:, 0] < last) & (places[:, 1] > first))
        if len(shared) > 1:
            other = next(numbers[at] for at in shared if numbers[at] != i)
            raise Refused(
                "the model writes into an input that shares memory with another one",
                got=f"{program.names[i]}, which is written into, and {program.names[other]}",
                wanted="what is written into in memory of its own",
                do="clone one of the two (x.clone()) before the call, or in the model's constructor",
            )
    return [x.clone() if i in program.writes else x for i, x in enumerate(args)]


def memory_of(x: torch.Tensor) -> tuple[int, int]:
    """From which byte to which it lies."""
    span = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + span * x.itemsize


@contextmanager
def _own_random_numbers(rank: int, args: Sequence[Any]) -> Iterator[None]:
    """Every rank draws other numbers, which the seed of all determines; afterwards their generators agree
    again.  Without it, the same seed would drop the same places of every rank's tokens."""
    devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.is_cuda}
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng(list(devices)):
        torch.default_generator.manual_seed(seed + rank)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed + rank)
        yield


def _masks(program: Program, leaves: Sequence[torch.Tensor], tokens: int) -> tuple[Attended, ...]:
    masks, following = [], iter(leaves)
    for planned in program.masks:
        if planned.plannable:
            mine = [next(following) if leaf is not None else None for leaf in planned.leaves]
            masks.append(attended(planned.mask, mine, planned.batch, tokens))
        else:
            masks.append(unknown(planned.mask, planned.batch, tokens))
    return tuple(masks)


def _nothing(tokens: int) -> Attended:
    """For a graph without attention: every token is alike."""
    return Attended(
        batch=1, tokens=tokens, labels=np.arange(tokens)[None], key_valid=None, query_valid=None,
        lo=None, hi=None,
    )  # fmt: skip


def _tensors(plan: Plan, rank: int, keys: Sequence[Any] | None = None) -> dict[Any, torch.Tensor]:
    """This rank's tables on the host, by the keys of ``Program.tables``; those of flex attention, shifts and
    chunks only where ``keys`` has them."""
    tables, mesh = plan.tables(rank), plan.placement.mesh
    result: dict[Any, Any] = {
        "columns": tables.columns,
        "alone_columns": tables.columns[: tables.alone],
        "order": tables.order,
        "group_columns": tables.group_columns,
        "head_splits": tables.head_splits,
        "position": np.array([mesh.group_of(rank)[1]]),
    }
    for index, mask in enumerate(tables.masks):
        for name in ("slices", "alone_slices"):
            result[index, name] = getattr(mask, name)
        for stage, exchanged in enumerate(mask.exchanges):
            for name, table in vars(exchanged).items():
                result[index, name, stage] = table
    flex = {key[0] for key in keys or () if isinstance(key, tuple) and key[1] in FLEX_TABLES}
    for index in sorted(flex):
        made = rank_tables(tables, index, plan.masks[index].structure.mask.batch)
        result.update({(index, name): table for name, table in made.items()})
    of = dict.fromkeys(key[0] for key in keys or () if isinstance(key, tuple))
    for shift in [key for key in of if isinstance(key, Shift)]:
        of_shift = shift_tables(plan.placement, shift, rank)
        result.update({(shift, name): table for name, table in vars(of_shift).items()})
    chunks = [key for key in of if isinstance(key, Chunk | Joined)]
    result.update(chunk_tables(chunks, tables.columns, plan.placement.tokens))
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in result.items()}


def _placed(table: torch.Tensor, key: Any, device: torch.device) -> torch.Tensor:
    return table if (key[1] if isinstance(key, tuple) else key) in ON_HOST else table.to(device)


def _digest(leaves: Sequence[torch.Tensor], tokens: int) -> bytes:
    digest = hashlib.sha1(str(tokens).encode(), usedforsecurity=False)  # what processors do fastest
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:16]


def _warn_of_leaks(args: Sequence[Any], program: Program, plan: Plan) -> bool:
    """Positions restart, and yet the mask lets documents see one another: say so once."""
    made = [m.structure.mask for m in plan.masks]
    lengths = {
        tokens
        for of, mask in zip(program.masks, made, strict=False)  # of no attention, there is a plan of nothing
        if not of.mask.labels and not mask.residual
        for tokens in (mask.tokens - sum(of.mask.others), program.given(args))
    }
    for value in args:
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        if value.dim() == 0 or value.shape[-1] not in lengths:
            continue
        rows = value.detach().cpu().reshape(-1, value.shape[-1])
        follows, restarts = rows.diff(dim=-1) == 1, rows[:, 1:] == 0
        if bool((follows | restarts).all()) and bool(restarts.any()) and bool(follows.any()):
            warnings.warn(
                "hsap: position_ids restart inside a row, but the model's attention mask lets documents see "
                "one another: the model really attends across documents. If that is not meant, call it "
                "with attention_mask=None and use_cache=False (Hugging Face models then separate the "
                "documents by position_ids), or pass a mask that does.",
                stacklevel=4,
            )
            return True
    return False
