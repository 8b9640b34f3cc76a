"""Random token-wise programs, rewritten for simulated ranks, against eager: outputs and all gradients.

A program is a chain of steps on x (B, S, F).  Every step is a small pattern that returns (B, S, F) and is
known to stay on this rank's rows (``LOCAL``) or to need gathered tokens for some operators (``GATHERED``,
with how many).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hsap_compile.errors import Refused
from hsap_compile.kernels import exchange
from hsap_compile.passes import _families, _numbered, _operands, _parameters, _totals
from hsap_compile.passes import shard_tokens as sharding
from hsap_compile.runtime import Runner
from simulate import Traced, eager, simulate, traced, worst
from threads import run_threads

WIDTH, WORDS = 6, 11
Pattern = Callable[["Program", Tensor, Tensor], Tensor]
TIGHT = 1e-12  # float64: rounding of sums in another order


class Program(nn.Module):
    """``patterns`` one after another, of all tokens, of some ("cut", or "input cut", of what is whole), or
    with two in front ("prompted"); ``ends``: "loss" (a scalar), "values", or "both"."""

    def __init__(
        self, patterns: tuple[Pattern, ...], ends: str = "both", frozen: bool = False, tokens: str = "all"
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        draw = {
            name: torch.randn(shape, generator=g, dtype=torch.float64) / 2 for name, shape in _SHAPES.items()
        }
        for name, value in draw.items():
            setattr(self, name, nn.Parameter(value, requires_grad=not (frozen and name == "square")))
        self.patterns, self.ends, self.tokens = patterns, ends, tokens

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        # the length of a row is read from integer inputs
        if self.tokens == "input cut":
            x, ids = x[:, 1:], ids[:, 1:]
        x = x * (ids >= 0)[..., None] * self.square[0]
        if self.tokens == "cut":
            x, ids = x[:, :-1], ids[:, :-1]
        elif self.tokens == "prompted":
            x = torch.cat([self.words[:2].expand(len(x), -1, -1), x], 1)
            x, ids = LOCAL["attention"](self, x, ids), F.pad(ids, (2, 0), value=3)
        for pattern in self.patterns:
            x = pattern(self, x, ids)
        loss = (x * x * self.vector).mean()
        return {"loss": (loss,), "values": (x,), "both": (loss, x)}[self.ends]


_SHAPES = {
    "square": (WIDTH, WIDTH), "vector": (WIDTH,), "words": (WORDS, WIDTH), "scalar": (),
    "kernel": (WIDTH, WIDTH, 3), "places": (64, WIDTH),
}  # fmt: skip


def _detached(p: Program, x: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        size = (x @ p.square).abs().mean(1, keepdim=True) + 1.0
    return x / size


def _detached_parts(p: Program, x: Tensor, i: Tensor) -> Tensor:
    with torch.no_grad():
        a, b = x.chunk(2, -1)
        c = a * b
    return x * torch.cat([c, c], -1).exp().clamp(max=2.0)


def _written(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y, z = x.clone(), x * 1.0
    y[i > 4] = 0
    z[i < 3] = p.vector
    return y + z


def _filled(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y = x.clone()
    y[..., 1:3] = x[..., 3:5] * p.scalar
    return y


def _padded_by_hand(p: Program, x: Tensor, i: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1] + 2, WIDTH)
    y[:, 1:-1] = x
    return y[:, :-2] + y[:, 2:]


def _returned_unseen(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Operators that return their operand, where nothing has a gradient."""
    with torch.no_grad():
        scale = x.to(x.dtype).double().type_as(x).to("cpu").sum(-1, keepdim=True)
    return x * p.vector.cos() + scale


LOCAL: dict[str, Pattern] = {
    "linear": lambda p, x, i: F.linear(x, p.square, p.vector),
    "matmul": lambda p, x, i: x @ p.square,
    "matmul left": lambda p, x, i: (p.square @ x.transpose(1, 2)).mT,
    "vector": lambda p, x, i: x + (x @ p.vector)[..., None],
    "einsum": lambda p, x, i: torch.einsum("bsf,fg->bsg", x, p.square),
    "einsum of more": lambda p, x, i: torch.einsum("...f, fg -> ...g", x, p.square),
    "by arguments' names": lambda p, x, i: torch.addcmul(x, x, p.vector, value=2) + torch.addcdiv(
        input=x, tensor1=p.vector, tensor2=x.exp(), value=0.5
    ),
    "affine": lambda p, x, i: x * p.vector + p.scalar,
    "layer norm": lambda p, x, i: x + F.layer_norm(x, (WIDTH,), p.vector, p.vector),
    "rms norm": lambda p, x, i: x + F.rms_norm(x, (WIDTH,), p.vector),
    "similar": lambda p, x, i: (
        x
        + F.cosine_similarity(x, p.vector, dim=-1)[..., None]
        + F.cosine_similarity(p.square[:1], x, dim=2)[..., None]
        + F.cosine_similarity(x, x.exp(), dim=-1)[..., None]
    ),
    "compared with a table": lambda p, x, i: (
        x
        + torch.mv(x.flatten(0, 1), p.vector).view(x.shape[0], -1, 1)
        + torch.bucketize(x, p.vector.detach().sort().values) * p.scalar
        + torch.searchsorted(p.square.detach().sort(-1).values[0], x, right=True) * p.scalar
    ),
    "unit length": lambda p, x, i: x + F.normalize(x, dim=-1),
    "batch norm": lambda p, x, i: F.batch_norm(
        x.mT, p.vector.detach(), p.vector.detach().exp(), p.vector, p.square[0]
    ).mT,
    "gelu": lambda p, x, i: F.gelu(x) + F.silu(x),
    "softmax": lambda p, x, i: torch.softmax(x, -1) + x.log_softmax(-1),
    "folded": lambda p, x, i: (x.reshape(-1, WIDTH) @ p.square).view(x.shape),
    "folded loss": lambda p, x, i: x * F.mse_loss(x.flatten(0, 1), x.flatten(0, 1) @ p.square),
    "heads": lambda p, x, i: x.view(*x.shape[:2], 2, 3).transpose(1, 2).tanh().transpose(1, 2).flatten(2),
    "halves": lambda p, x, i: torch.cat([-x.chunk(2, -1)[1], x[..., : WIDTH // 2]], -1),
    "thirds": lambda p, x, i: torch.stack(x.split(2, -1), 1).sum(1).repeat(1, 1, 3),
    "stacked": lambda p, x, i: torch.stack([x, x @ p.square]).unbind(0)[1],
    "stacked inside": lambda p, x, i: torch.stack([x, -x], 1).amax(1),
    "glu": lambda p, x, i: F.pad(F.glu(x, -1), (0, 3)),
    "features": lambda p, x, i: x - x.mean(-1, keepdim=True) / (x + p.vector).std(-1, keepdim=True).add(2),
    "biggest": lambda p, x, i: x + x.topk(2, -1).values.sum(-1, keepdim=True),
    "sorted": lambda p, x, i: x.sort(-1).values + x.cumsum(-1),
    "returned unseen": _returned_unseen,
    "picked": lambda p, x, i: x.gather(-1, (i[..., None] % WIDTH).expand(-1, -1, WIDTH)),
    "flipped": lambda p, x, i: x.flip(-1) + x.roll(1, -1),
    "words": lambda p, x, i: x + F.embedding(i, p.words),
    "words by index": lambda p, x, i: x + p.words[i],
    "one hot": lambda p, x, i: x + F.one_hot(i % WIDTH, WIDTH).to(x.dtype) * p.scalar,
    "where": lambda p, x, i: torch.where((i > 4)[..., None], x, p.vector),
    "masked": lambda p, x, i: x.masked_fill((i == 3)[..., None], 0.5),
    "positions": lambda p, x, i: x + torch.arange(x.shape[1]).to(x.dtype).div(9).sin()[:, None],
    "places": lambda p, x, i: x + F.embedding(torch.arange(x.shape[1]) % 64, p.places),
    "learned places": lambda p, x, i: x + p.places[: x.shape[1]] * p.places[3 : x.shape[1] + 3],
    "padded by hand": _padded_by_hand,
    "more of one row": lambda p, x, i: (
        x + p.vector.expand(len(x), x.shape[1] + 2, WIDTH).sum(1, keepdim=True) / 9
    ),
    "other names": lambda p, x, i: torch.concat(
        [x.narrow(-1, 0, 3), torch.multiply(x.narrow(2, 3, 3), -1.0)], -1
    ).swapdims(0, 1).swapaxes(0, 1) + torch.broadcast_to(p.vector, x.shape).absolute().clip(max=0.4),
    "joined features": lambda p, x, i: torch.dstack([x.narrow(1, 0, x.shape[1]), x]) @ torch.vstack(
        [p.square, p.square.mT]
    ),
    "outer products": lambda p, x, i: x @ torch.outer(p.vector, p.vector) / 9,
    "counted": lambda p, x, i: x + (i.cumsum(1) % 5)[..., None],
    "shifted labels": lambda p, x, i: x * F.pad(i, (0, 1))[:, 1:, None].to(x.dtype).sigmoid(),
    "spread": lambda p, x, i: x + p.vector.expand(x.shape[0], x.shape[1], WIDTH),
    "filled": _filled,
    "written where": _written,
    "features selected": lambda p, x, i: x.index_select(-1, torch.arange(WIDTH).flip(0)) * p.vector,
    "groups normalised": lambda p, x, i: (
        x + F.group_norm(x.flatten(0, 1), 2, p.vector, p.vector).view(x.shape)
    ),
    "zeros": lambda p, x, i: x + x.new_full(x.shape, 0.5) + torch.ones_like(x) + x.new_zeros(3).sum(),
    "all twice": lambda p, x, i: x + torch.cat([x, -x * p.scalar], 1).mean((0, 1)),
    "repeated": lambda p, x, i: x * x.flatten(0, 1).repeat(3, 1).view(3, -1, WIDTH).sin().mean((0, 1)),
    "each repeated": lambda p, x, i: (
        x.repeat_interleave(2, 1).mul(p.vector).unflatten(1, (-1, 2)).mul(p.square[:2]).sum(2)
    ),
    "features picked": lambda p, x, i: x + x[..., [3]] * p.scalar + x[:, :, torch.arange(WIDTH).flip(0)],
    "complex": lambda p, x, i: (
        x
        + torch.view_as_real(
            torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
            * torch.polar(p.vector[:3].detach(), p.vector[3:])
        ).flatten(2)
    ),
    "length": lambda p, x, i: x / x.shape[1] + x.shape[0],
    "token mean": lambda p, x, i: x - x.mean(1, keepdim=True) / 2,
    "token sum": lambda p, x, i: x * (x * x).sum().tanh() + x.sum((0, 1)) / x.shape[1],
    "token norm": lambda p, x, i: x + F.normalize(x, dim=1),
    "token deviation": lambda p, x, i: x / (1 + x.std(1, keepdim=True)) + x.var(),
    "some token": lambda p, x, i: torch.where((x > 0.5).any(1, keepdim=True), x, p.vector),
    "covariance": lambda p, x, i: x @ (x.mT @ x) / x.shape[1],
    "largest": lambda p, x, i: x - x.amax(1, keepdim=True) * p.vector,
    "token softmax": lambda p, x, i: x.softmax(1),
    "few rows": lambda p, x, i: x + x[:, i[0, :3] % 7].sum(1, keepdim=True) * p.vector,
    "by number": lambda p, x, i: (
        x + p.words.new_zeros(3, WIDTH).index_add(0, i[0] % 3, x[0])[i % 3] / x.shape[1] * p.scalar
    ),
    "rows written": lambda p, x, i: x.index_copy(
        1, torch.stack([i[0, 0] % 4, i[0, 1] % 4 + 4]), p.square[:2].expand(x.shape[0], -1, -1)
    ),
    "first largest": lambda p, x, i: x + F.relu(x).max(1, keepdim=True).values,
    "in the order of a mask": lambda p, x, i: x.masked_scatter((i > 6)[..., None], p.places.sin()),
    "weight in both": lambda p, x, i: F.conv1d(x.mT @ x, p.kernel, padding=1).sum() + x @ p.kernel[..., 0],
    "attention": lambda p, x, i: x + F.scaled_dot_product_attention(*[(x @ p.square)[None, None]] * 3)[0, 0],
    "another's type": lambda p, x, i: (
        x * p.square[0].type_as(x) + i[..., None].type_as(x) * p.vector.type_as(x.detach())
    ),
    "tail mean": lambda p, x, i: x + x[:, 1:].mean((0, 1)),
    "middle sum": lambda p, x, i: x + (x[:, 2:-1] * p.square[0]).sum(1, keepdim=True) / x.shape[1],
    "tail labels": lambda p, x, i: x * F.cross_entropy(x[:, :-1].flatten(0, 1), i[:, 1:].flatten() % WIDTH),
    "new beside parameters": lambda p, x, i: (
        x
        + (x.new_zeros(x.shape[0], 1, WIDTH) + p.vector) * (x.new_full((), 2.0) * p.scalar)
        + (x.new_zeros(4, WIDTH).index_add(0, i[0] % 4, x[0]) @ p.square + p.vector).sin().mean(0)
    ),
    "head labels": lambda p, x, i: x * F.cross_entropy(x[:, 1:].mT, i[:, :-1] % WIDTH, reduction="sum"),
    "losses": lambda p, x, i: x + F.huber_loss(x, p.vector.expand_as(x)) + F.l1_loss(x, x.flip(-1)),
    "divergence": lambda p, x, i: (
        x * F.kl_div(x.log_softmax(-1), (-x).log_softmax(-1), reduction="batchmean", log_target=True)
    ),
    "likelihood": lambda p, x, i: x * F.nll_loss(x.log_softmax(-1).mT, i % WIDTH, p.vector.detach() ** 2),
    "cut": lambda p, x, i: x.detach() * p.scalar + x,
    "no grad": _detached,
    "no grad parts": _detached_parts,
    "regularised": lambda p, x, i: x @ p.square + p.square.pow(2).sum() * p.scalar,
    "turned weight": lambda p, x, i: x @ p.square.flip(0) + x @ p.square,
    "rolled": lambda p, x, i: x.roll(1, 1),
    "difference": lambda p, x, i: x + F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 1)),
    "prefixed": lambda p, x, i: torch.cat([p.vector.expand(x.shape[0], 1, WIDTH), x], 1)[:, :-1],
    "last": lambda p, x, i: x + x[:, -1:],
    "convolution": lambda p, x, i: F.conv1d(x.mT, p.kernel, padding=1).mT,
}  # fmt: skip


GATHERED: dict[str, tuple[Pattern, int]] = {
    "cumsum": (lambda p, x, i: x.cumsum(1) / x.shape[1], 1),
    "turned": (lambda p, x, i: x.flip(1), 1),
    "doubled": (lambda p, x, i: torch.cat([x, x], 1)[:, : x.shape[1]], 1),
    "reordered": (lambda p, x, i: x[:, torch.arange(x.shape[1]).flip(0)], 1),
    "sorted": (lambda p, x, i: x.sort(1).values, 1),
    "token axis first": (
        lambda p, x, i: (x.reshape(x.shape[1], x.shape[0], WIDTH) * x.transpose(0, 1)).reshape(x.shape), 2
    ),
    "counted words": (
        lambda p, x, i: x * torch.bincount(x.argmax(-1).flatten(), minlength=WIDTH)[:WIDTH] / x.shape[1], 1
    ),
    "some tokens": (lambda p, x, i: x * (1 + x[i > 4].mean() + x[i < 4].sum() / x.shape[1]), 2),
    "words by frequency": (lambda p, x, i: x + F.embedding(i, p.words, scale_grad_by_freq=True), 1),
    "taken": (lambda p, x, i: x * torch.take(p.square, i * 3)[..., None], 1),
    "rows and columns": (
        lambda p, x, i: torch.einsum(
            "nd,nd->nd", x.flatten(0, 1), x.transpose(0, 1).reshape(-1, WIDTH)
        ).view(x.shape), 1
    ),
    "numbers of rows and columns": (
        lambda p, x, i: x + p.square[i.flatten() % WIDTH, i.T.flatten() % 5].view(i.shape)[..., None], 1
    ),
    "compared with all tokens": (
        lambda p, x, i: (
            x + torch.bucketize(x[0, :, 1].clone(), x[0, :, 0].detach().clone())[:, None] * p.vector
        ), 1
    ),
    "similar to tokens of the first row": (
        lambda p, x, i: x * F.cosine_similarity(x[..., :1], x[0, :, 0][None], dim=2)[..., None], 1
    ),
    "biases in another order": (
        lambda p, x, i: F.linear(x.flatten(0, 1), p.square, x.transpose(0, 1).flatten(0, 1)).view(x.shape), 1
    ),
    "ignored by the length": (
        lambda p, x, i: x * F.cross_entropy(x.flatten(0, 1), i.flatten() % 6, ignore_index=x.shape[1] - 10), 1
    ),
    "batch norm": (lambda p, x, i: F.batch_norm(x.mT, None, None, p.vector, training=True).mT, 1),
    "rows mixed": (lambda p, x, i: x + F.layer_norm(x.mT, x.shape[1:2]).mT, 1),
}  # fmt: skip

MESHES = [(2, 1), (1, 2), (2, 2), (3, 1)]
#: Rules know of ranks, not of groups: the second mesh is in the slow sweep.
ON_MESHES = pytest.mark.parametrize("mesh", [(3, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """The operators that were reported to run on gathered tokens inside of the block."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runs on gathered tokens" in record.msg:
                found.append(record.getMessage())

    logger, handler = logging.getLogger("hsap_compile"), Handler(logging.WARNING)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def batch(rows: int, tokens: int, grad: bool = True, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, WIDTH, generator=g, dtype=torch.float64)
    return {"x": x.requires_grad_(grad), "ids": torch.randint(0, WORDS, (rows, tokens), generator=g)}


def trace(program: Program, rows: int = 1, tokens: int = 13, grad: bool = True) -> Traced:
    return traced(program, batch(rows, tokens, grad))


def check(of: Traced, inter: int, intra: int, tolerance: float = TIGHT, **options: object) -> list[str]:
    """Every rank returns and differentiates as eager does; what ran on gathered tokens."""
    wanted = eager(of)
    with fallbacks() as found:
        result = simulate(of, inter, intra, **options)
    for step in result.ranks:
        assert max(worst(step, wanted)) <= tolerance
    return found


@pytest.mark.parametrize("name", LOCAL)
def test_stays_local(name: str) -> None:
    assert check(trace(Program((LOCAL["linear"], LOCAL[name])), rows=2), 2, 1) == []


@pytest.mark.parametrize("name", GATHERED)
def test_falls_back(name: str) -> None:
    pattern, count = GATHERED[name]
    found = check(trace(Program((LOCAL["linear"], pattern, LOCAL["affine"])), rows=2), 3, 1)
    assert len(found) == count, found
    assert all(re.search(r" on every rank \(.+\), at .+\.py:\d+, `", text) for text in found), found


@pytest.mark.parametrize("name", ["some tokens", "counted words"])
def test_sizes_that_depend_on_data_are_lowered(name: str) -> None:
    pattern, count = GATHERED[name]
    of = trace(Program((LOCAL["linear"], pattern)), rows=2)
    assert len(check(of, 2, 1, lower="aot_eager")) == count


@pytest.mark.parametrize("name", GATHERED)
def test_strict_refuses(name: str) -> None:
    pattern, _ = GATHERED[name]
    with pytest.raises(Refused, match=r"cannot be computed on one rank's tokens") as caught:
        simulate(trace(Program((pattern,)), rows=2), 2, 1, strict=True)
    assert "drop strict=True" in str(caught.value) and "test_shard_tokens.py:" in str(caught.value)


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(Refused, match=r"an embedding whose gradient is sparse") as caught:
        simulate(trace(Program((lambda p, x, i: x + F.embedding(i, p.words, sparse=True),)), rows=2), 2, 1)
    assert "do:     drop sparse=True" in str(caught.value) and "test_shard_tokens.py:" in str(caught.value)


@pytest.mark.parametrize("name", ["attention", "learned places"])
def test_second_derivatives_are_refused(name: str) -> None:
    """Run as it is: AOTAutograd has a refusal of its own."""
    of = trace(Program((LOCAL[name],)), rows=2)
    program = simulate(of, 2, 1).program

    def rank() -> None:
        args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in of.args]
        learned = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        loss = Runner(program)(*args)[0]
        with pytest.raises(Refused, match="a gradient is differentiated") as caught:
            grads = torch.autograd.grad(loss, learned, create_graph=True)
            sum(g.square().sum() for g in grads).backward()
        assert "do:     compute what needs second derivatives without the backend" in str(caught.value)

    run_threads(2, rank)


#: Shrinking a failure would compile hundreds of programs; the names are readable as they are.
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)

ANY = {**LOCAL, **{f"gathered {name}": pattern for name, (pattern, _) in GATHERED.items()}}


@example(  # equal tokens, whose deviation is zero but for rounding
    names=["some token", "token deviation"], rows=2, tokens=11, mesh=(3, 1), placement="contiguous",
    ends="values", grad=True, frozen=True, part="all",
)  # fmt: skip
@example(  # equal features, less their mean, are nothing but rounding
    names=["picked", "picked", "features"], rows=2, tokens=13, mesh=(2, 1), placement="balanced",
    ends="values", grad=False, frozen=True, part="prompted",
)  # fmt: skip
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=UNSHRUNK)
@given(
    names=st.lists(st.sampled_from(sorted(ANY)), min_size=2, max_size=6),
    rows=st.sampled_from([1, 2]),
    tokens=st.integers(8, 23),
    mesh=st.sampled_from(MESHES),
    placement=st.sampled_from(["balanced", "contiguous"]),
    ends=st.sampled_from(["loss", "values", "both"]),
    grad=st.booleans(),
    frozen=st.booleans(),
    part=st.sampled_from(["all", "cut", "input cut", "prompted"]),
)
def test_programs(
    names: list[str],
    rows: int,
    tokens: int,
    mesh: tuple[int, int],
    placement: str,
    ends: str,
    grad: bool,
    frozen: bool,
    part: str,
) -> None:
    if "attention" in names or part == "prompted":  # it has one head, which no group can share
        mesh = (mesh[0] * mesh[1], 1)
    program = Program(tuple(ANY[name] for name in names), ends, frozen, part)
    check(trace(program, rows, tokens, grad), *mesh, tolerance=1e-9, placement=placement)


# --- the comparison notices when a rule is broken -----------------------------------------------------


def _unsummed(x: Tensor, group: str) -> Tensor:
    return x.clone()


def _first_rows(sharder: sharding.Sharder, node: object, start: int) -> object:
    """Every rank takes the first columns: what a local ``arange`` would give."""
    tables = dict(sharder.tables)
    sharder.tables["columns"] = sharder.emit(torch.ops.aten.arange.default, tables["n"])
    try:
        return _LOCAL_FROM_WHOLE(sharder, node, start)  # type: ignore[arg-type]
    finally:
        sharder.frame.tables = tables


_LOCAL_FROM_WHOLE = sharding.rows_of_whole


def _own_largest(x: Tensor, dims: list[int], least: bool, group: str) -> Tensor:
    return x.amax(dims, keepdim=True)


def _any_row(sharder: sharding.Sharder, source: object, numbers: object) -> object:
    return sharder.emit(torch.ops.aten.clamp.default, numbers, 0, 1)


#: broken rule: (owner, name, what it becomes, the pattern that needs it)
MUTATIONS = {
    "no sum over ranks": (exchange, "SUM_RANKS", _unsummed, LOCAL["token sum"]),
    "no broadcast": (exchange, "BROADCAST", _unsummed, LOCAL["turned weight"]),
    "no share": (exchange, "SHARE", _unsummed, LOCAL["regularised"]),
    "gradients not summed": (sharding, "settle_parameters", lambda sharder: None, LOCAL["linear"]),
    "local positions": (sharding, "rows_of_whole", _first_rows, LOCAL["positions"]),
    "wrong start": (_operands, "Local", lambda node, start=0: sharding.Local(node), LOCAL["head labels"]),
    "rows outside counted": (sharding.Sharder, "valid_rows", lambda *_: None, LOCAL["tail mean"]),
    "rows in front ignored": (_families, "rows_in_front", lambda *_: 1, GATHERED["token axis first"][0]),
    "the largest of one rank": (exchange, "EXTREME", _own_largest, LOCAL["largest"]),
    "rows of others read": (_numbered, "where", lambda _, held, rows, other: rows, LOCAL["few rows"]),
    "written on every rank": (_numbered, "own_rows_at", _any_row, LOCAL["rows written"]),
    "another of equal ones": (_totals, "own_rows_at", _any_row, LOCAL["first largest"]),
    "no_grad forgotten": (sharding.Sharder, "_detached", lambda self, node, new: new, LOCAL["no grad"]),
}


def test_what_is_taken_for_the_same_on_every_rank_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else parameters beside it would have the gradient of every rank."""
    pattern: Pattern = lambda p, x, i: x + x.new_zeros(WIDTH) * p.vector  # noqa: E731
    of = trace(Program((LOCAL["linear"], pattern)), rows=2)
    check(of, 2, 1)
    monkeypatch.setattr(_parameters, "operator_name", lambda target: "")
    with pytest.raises(AssertionError, match="mul.* is taken for the same on every rank, and is not"):
        simulate(of, 2, 1)


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_rules_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, pattern = MUTATIONS[name]
    of = trace(Program((LOCAL["linear"], pattern)), rows=2)
    check(of, 2, 1)
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        check(of, 2, 1)


# --- single cases -------------------------------------------------------------------------------------


def test_an_attention_over_other_tokens_says_which() -> None:
    def longer(p: Program, x: Tensor, i: Tensor) -> Tensor:
        y = (x @ p.square)[:, None]
        twice = torch.cat([y, y], 2)
        return F.scaled_dot_product_attention(y, twice, twice)[:, 0] + x

    (said,) = check(trace(Program((LOCAL["linear"], longer)), rows=2), 3, 1)
    assert "an attention whose queries and keys are not the tokens of a row" in said


def test_a_mask_of_a_context_reads_the_token_that_it_names() -> None:
    def context(p: Program, x: Tensor, i: Tensor) -> Tensor:
        words = p.words.expand(len(x), 1, -1, -1)
        allowed = i[:, None, None, :1] % 3 != torch.arange(WORDS) % 3
        bias = allowed + x[:, None, :1, :1].tanh()
        return x + F.scaled_dot_product_attention(x[:, None], words, words, bias)[:, 0]

    assert check(trace(Program((LOCAL["linear"], context)), rows=2), 3, 1) == []


def test_dropout_on_own_tokens_is_allowed() -> None:
    of = trace(Program((lambda p, x, i: F.dropout(x, 0.5),), ends="values"), rows=2)
    for step in simulate(of, 2, 1).ranks:
        kept = step.outputs[0] != 0
        assert 0.2 < kept.double().mean() < 0.8


def test_outputs_that_are_not_one_row_a_column_stay_whole() -> None:
    """outputs="local" keeps rows only where ``hsap_columns`` names them."""

    class Parts(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            y = x * (ids >= 0)[..., None]
            return y, y[:, 2:-1], y[:, :-1].mT, y.flatten(0, 1), y.sum(1)

    of = traced(Parts(), batch(2, 13, grad=False))
    wanted, result = eager(of), simulate(of, 2, 1, outputs="local")
    held = [result.runner.last_plan.tables(rank).columns for rank in range(2)]  # type: ignore[union-attr]
    for i, dim, first, behind in ((0, 1, 0, 0), (1, 1, 2, 1), (2, 2, 0, 1)):
        for step, columns in zip(result.ranks, held, strict=True):
            mine = torch.from_numpy(columns[(columns >= first) & (columns < 13 - behind)] - first)
            assert torch.equal(step.outputs[i], wanted.outputs[i].index_select(dim, mine))
    for step in result.ranks:
        assert [tuple(o.shape) for o in step.outputs[3:]] == [(26, WIDTH), (2, WIDTH)]


def test_parameters_without_gradient_keep_none() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (nn.Parameter(torch.ones(WIDTH, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            with torch.no_grad():
                size = x * self.unused
            return (x * self.used * (ids >= 0)[..., None] / size.exp()).sum()

    check(traced(Cut(), batch(1, 9, grad=False)), 2, 1)


def test_memory_is_read_of_gathered_tokens() -> None:
    read = lambda p, x, i: x + (x * 2).as_strided((x.shape[1], WIDTH), (1, 2)).sum(0)  # noqa: E731
    assert len(check(trace(Program((LOCAL["linear"], read))), 3, 1)) == 1
