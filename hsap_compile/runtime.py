"""What runs at every call: read the documents, plan, hand the tables to the compiled graph."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hsap_compile.documents import attended, unknown
from hsap_compile.errors import Refused
from hsap_compile.kernels.blocks import rank_tables
from hsap_compile.kernels.exchange import all_gather
from hsap_compile.kernels.flex import TABLES as FLEX_TABLES
from hsap_compile.mesh import world
from hsap_compile.passes.partition_attention import ON_HOST, PlannedMask, Traffic
from hsap_compile.passes.shard_tokens import Fallback
from hsap_compile.plan import Attended, MeshShape, Plan, make

_PLANS_KEPT = 64


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
    from the inputs, the leaves of all ``masks`` in order; ``tokens`` is (input, dimension) whose size is
    S, or S when it is a constant; ``local_outputs`` the outputs that hold only this rank's rows;
    ``signature`` is the same wherever the graph is; ``fallbacks`` are the operators on gathered tokens;
    ``random``: whether the graph draws random numbers; ``again``: whether rows are received again in the
    backward.
    """

    function: Callable[..., Any]
    documents: Callable[..., Any]
    masks: tuple[PlannedMask, ...]
    tables: tuple[Any, ...]
    mesh: MeshShape
    group: str
    placement: Any
    batch: int
    traffic: tuple[Traffic, ...]
    on_step: Callable[[StepReport], None] | None
    tokens: tuple[int, int] | int
    local_outputs: frozenset[int]
    parameters: frozenset[int]
    signature: int
    fallbacks: tuple[Fallback, ...] = ()
    random: bool = False
    again: bool = False

    def length(self, args: Sequence[Any]) -> int:
        """S of a call."""
        if isinstance(self.tokens, int):
            return self.tokens
        position, dim = self.tokens
        return int(args[position].shape[dim])

    def read(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """What the masks of a call read, on the host."""
        with torch.no_grad():
            return [x.detach().cpu() for x in self.documents(*args)]

    def plan(self, leaves: Sequence[torch.Tensor], tokens: int) -> Plan:
        """The plan of a call from what ``read`` and ``length`` say of it."""
        masks = _masks(self, leaves, tokens) or (_nothing(self.batch, tokens),)
        return make(masks, self.mesh, self.placement)

    def report(self, plan: Plan) -> StepReport:
        """What a step under ``plan`` sends."""
        return report(plan, self.traffic, self.again)


@dataclass
class Runner:
    """``program`` as dynamo calls it.  Keeps the last plans by their documents' digest."""

    program: Program
    plans: OrderedDict[bytes, tuple[Plan, dict[int, dict[Any, torch.Tensor]]]] = field(
        default_factory=OrderedDict
    )
    calls: int = 0
    warned: bool = False
    last_plan: Plan | None = None

    def __call__(self, *args: Any) -> Any:
        program = self.program
        rank, ranks = world()
        if ranks != program.mesh.size:
            raise Refused(
                "the number of ranks changed after compilation",
                got=f"{ranks} ranks",
                wanted=f"{program.mesh.size}",
                do="call torch.compiler.reset() and compile again",
            )
        tokens = program.length(args)
        if ranks > 1:
            _check_agreement(program, args, tokens, first=self.calls == 0)
        self.calls += 1
        plan, tables = self._plan(args, tokens, rank)
        if not self.warned:
            self.warned = _warn_of_leaks(args, plan)
        self.last_plan = plan
        if program.on_step is not None:
            program.on_step(program.report(plan))
        extra = [tables[key] for key in program.tables]
        with _own_random_numbers(rank) if program.random and ranks > 1 else nullcontext():
            outputs = program.function(*args, *extra)
        for i in program.local_outputs:
            outputs[i].hsap_columns = tables["columns"]
        return outputs

    def _plan(self, args: Sequence[Any], tokens: int, rank: int) -> tuple[Plan, dict[Any, torch.Tensor]]:
        """The plan of a batch and this rank's tables, made anew only for documents not seen lately."""
        program = self.program
        leaves = program.read(args)
        digest = _digest(leaves, tokens)
        if digest not in self.plans:
            self.plans[digest] = (program.plan(leaves, tokens), {})
            while len(self.plans) > _PLANS_KEPT:
                self.plans.popitem(last=False)
        self.plans.move_to_end(digest)
        plan, of_rank = self.plans[digest]
        if rank not in of_rank:
            device = next(a.device for a in args if isinstance(a, torch.Tensor))
            tables = _tensors(plan, rank, program.tables)
            of_rank[rank] = {key: _placed(table, key, device) for key, table in tables.items()}
        return plan, of_rank[rank]


@contextmanager
def _own_random_numbers(rank: int) -> Iterator[None]:
    """Every rank draws other numbers, which the seed of all determines; afterwards their generators agree
    again.  Without it, the same seed would drop the same places of every rank's tokens."""
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng():
        torch.manual_seed(seed + rank)
        yield


def _masks(program: Program, leaves: Sequence[torch.Tensor], tokens: int) -> tuple[Attended, ...]:
    masks, following = [], iter(leaves)
    for planned in program.masks:
        if planned.plannable:
            mine = [next(following) if leaf is not None else None for leaf in planned.leaves]
            masks.append(attended(planned.mask, mine, program.batch, tokens))
        else:
            masks.append(unknown(planned.mask, program.batch, tokens))
    return tuple(masks)


def _nothing(batch: int, tokens: int) -> Attended:
    """For a graph without attention: every token is alike."""
    return Attended(
        batch=batch, tokens=tokens, labels=np.arange(tokens)[None], key_valid=None, query_valid=None,
        lo=None, hi=None,
    )  # fmt: skip


def _tensors(plan: Plan, rank: int, keys: Sequence[Any] | None = None) -> dict[Any, torch.Tensor]:
    """This rank's tables on the host, by the keys of ``Program.tables``; those of flex attention only where
    ``keys`` has them."""
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
        for name in ("send_rows", "splits", "remote", "slices", "alone_slices"):
            result[index, name] = getattr(mask, name)
    flex = {key[0] for key in keys or () if isinstance(key, tuple) and key[1] in FLEX_TABLES}
    for index in sorted(flex):
        made = rank_tables(tables, index, plan.masks[index].structure.mask.batch)
        result.update({(index, name): table for name, table in made.items()})
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in result.items()}


def _placed(table: torch.Tensor, key: Any, device: torch.device) -> torch.Tensor:
    return table if (key[1] if isinstance(key, tuple) else key) in ON_HOST else table.to(device)


def _digest(leaves: Sequence[torch.Tensor], tokens: int) -> bytes:
    digest = hashlib.blake2b(str(tokens).encode(), digest_size=16)
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


# --- what ranks must agree on --------------------------------------------------------------------------


#: What ranks compare, in the order of the numbers they exchange, and what to do when they differ.
_AGREEMENT = (
    (
        "the ranks run different graphs",
        "call the compiled model with the same kinds of inputs on every rank",
    ),
    (
        "the ranks were given batches of different lengths",
        "pass the same whole batch on every rank; the backend shards it",
    ),
    (
        "the ranks were given different batches",
        "pass the same whole batch on every rank (same seed, no sampler per rank)",
    ),
    (
        "the ranks hold different parameters",
        "seed every rank alike, or broadcast the parameters before the first step",
    ),
)


def _check_agreement(program: Program, args: Sequence[Any], tokens: int, first: bool) -> None:
    """Every rank has the same graph, batch and (at the first call) parameters, or nobody goes on."""
    content = 0
    device = torch.device("cpu")
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            device = value.device if value.device.type != "cpu" else device
            if i not in program.parameters and not value.is_floating_point():
                content = zlib.crc32(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes(), content)
    parameters = 0.0
    if first:
        for i in sorted(program.parameters):
            parameters += float(args[i].detach().double().abs().sum())
    bits = int(np.float64(round(parameters, 6)).view(np.int64))
    mine = torch.tensor([program.signature, tokens, content, bits], dtype=torch.int64)
    if dist.get_backend() == "nccl":
        mine = mine.to(device)
    rows = all_gather(mine, program.mesh.size, program.group).view(-1, mine.numel()).tolist()
    for column, (what, do) in enumerate(_AGREEMENT):
        values = [row[column] for row in rows]
        if column == 3:
            values = [float(np.int64(v).view(np.float64)) for v in values]
            same = all(abs(v - values[0]) <= 1e-6 * abs(values[0]) for v in values)
        else:
            same = len(set(values)) == 1
        if not same:
            differing = [r for r, v in enumerate(values) if v != values[0]]
            raise Refused(
                what,
                got=f"ranks {differing} differ from rank 0: {dict(enumerate(values))}",
                wanted="the same on every rank",
                do=do,
            )


def _warn_of_leaks(args: Sequence[Any], plan: Plan) -> bool:
    """Positions restart, and yet the mask lets documents see one another: say so once."""
    masks = [m.structure.mask for m in plan.masks]
    if not any(m.labels is None and not m.residual for m in masks):
        return False
    tokens = masks[0].tokens
    for value in args:
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        if value.dim() == 0 or value.shape[-1] != tokens:
            continue
        steps = value.detach().cpu().reshape(-1, tokens).diff(dim=-1)
        follows, restarts = steps == 1, value.detach().cpu().reshape(-1, tokens)[:, 1:] == 0
        if bool((follows | restarts).all()) and bool(restarts.any()) and bool(follows.any()):
            warnings.warn(
                "hsap: position_ids restart inside a row, but the model's attention mask lets documents see "
                "one another: the model really attends across documents. If that is not meant, call it "
                "with attention_mask=None and use_cache=False (Hugging Face models then separate the "
                "documents by position_ids), or pass a mask that does.",
                stacklevel=3,
            )
            return True
    return False
