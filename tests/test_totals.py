"""What sums tokens away on ranks: norms, deviations, truth values, products; and what only looks like it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsap_compile.kernels import exchange
from hsap_compile.passes import _totals
from simulate import eager, simulate, since, traced, worst
from test_shard_tokens import LOCAL, ON_MESHES, Pattern, Program, batch, check, trace

einsum = torch.einsum


def linear_attention(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Every query reads one state, the sum over all keys: no softmax over tokens."""
    q, k = F.elu(x @ p.square) + 1, F.elu(x * p.vector) + 1
    state, size = einsum("bsd,bse->bde", k, x), einsum("bsd,bsd->bs", q, k.sum(1, keepdim=True))
    return einsum("bsd,bde->bse", q, state) / size[..., None]


def heads(p: Program, x: Tensor, i: Tensor) -> Tensor:
    """Heads of (B, H, S, D) and their products over S."""
    h = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return (h @ (h.mT @ h.sin())).transpose(1, 2).flatten(2) / x.shape[1]


TOTALS: dict[str, Pattern] = {
    "norm": lambda p, x, i: x / x.norm(dim=1, keepdim=True),
    "norm of everything": lambda p, x, i: x / x.norm() + x.norm(p=3),
    "norm of more": lambda p, x, i: x / x.norm(dim=(1, 2), keepdim=True) + x.norm(1, 1)[:, None],
    "norm of a tail": lambda p, x, i: x / x[:, 2:].norm(dim=1, keepdim=True),
    "normalised": lambda p, x, i: F.normalize(x, dim=1),
    "deviation": lambda p, x, i: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1),
    "deviation of a tail": lambda p, x, i: x * x[:, 1:].std((0, 1), unbiased=False) + x[:, :-2].var(),
    "deviation of equal tokens": lambda p, x, i: (
        x + torch.where((x > 9).any(1, keepdim=True), x, p.vector * 1.1).std(1, keepdim=True)
    ),
    "variance, correction": lambda p, x, i: x * torch.var(x, (1, 2), correction=0, keepdim=True),
    "some": lambda p, x, i: torch.where((x > 2).any(1, keepdim=True), x, p.vector) * (x > -9).any(),
    "all of a head": lambda p, x, i: torch.where((x[:, :-1] > -1).all(1, keepdim=True), x, p.vector),
    "linear attention": linear_attention,
    "heads": heads,
    "pooled": lambda p, x, i: x + einsum("bs,bsd->bd", (x @ p.vector).sigmoid(), x)[:, None],
    "three operands": lambda p, x, i: x + einsum("bsd,de,bse->b", x, p.square, x.cos())[:, None, None],
    "a vector": lambda p, x, i: x + (x[..., 0][:, None] @ x) / x.shape[1],
    "a part": lambda p, x, i: x + (x[:, 1:].mT @ x[:, :-1]).mean(2)[:, None],
    "folded": lambda p, x, i: x + x @ (x.flatten(0, 1).T @ x.flatten(0, 1)) / x.shape[1],
    "largest": lambda p, x, i: x - x.amax(1, keepdim=True) + x.amin((0, 1)),
    "largest of everything": lambda p, x, i: x / x.abs().max() + x.min() - i.max() + i[:, 1:-1].min(),
    "largest of many": lambda p, x, i: x + x.round().clamp(-1, 1).amax((1, 2))[:, None, None],
    "largest of a tail": lambda p, x, i: x + x[:, 2:].amax(1, keepdim=True) + x[:, :-1].sin().min(),
    "largest and a parameter": lambda p, x, i: x + (x.amax(1) @ p.square * p.vector)[:, None],
    "least and largest": lambda p, x, i: (
        x + torch.aminmax(x)[0] * torch.aminmax(x[:, :-1], dim=1, keepdim=True)[1]
    ),
    "the first of equal ones": lambda p, x, i: (
        x + (F.relu(x).min(1).values * p.vector)[:, None] + F.relu(-x).max(1, keepdim=True)[0].sin()
    ),
    "which is the largest": lambda p, x, i: (
        x.gather(1, x.argmax(1, keepdim=True)) * x
        + x[:, 1:].argmin(1)[:, None] / 9
        + i[:, 2:].max(1, keepdim=True)[1][..., None]
    ),
    "where no number is": lambda p, x, i: (
        x + x.detach().masked_fill((i == 4)[..., None], torch.nan).max(1)[1][:, None]
    ),
    "nothing is larger": lambda p, x, i: x + (x[:, 1:] - torch.inf).detach().argmax(1, keepdim=True),
    "deviation and mean": lambda p, x, i: (
        x / (torch.std_mean(x, (0, 1))[0] + 1)
        + torch.var_mean(x[:, 1:], 1, keepdim=True)[1].sin() * torch.var_mean(x, 1)[0][:, None]
    ),
    "logarithm of a sum": lambda p, x, i: x + x.logsumexp(1, keepdim=True) + x[:, 1:].logsumexp((0, 1)),
    "logarithm of nothing": lambda p, x, i: torch.where(
        x.detach().masked_fill(p.vector > 0, -torch.inf).logsumexp(1, keepdim=True) < 0, x, p.vector
    ),
    "softmax": lambda p, x, i: x.softmax(1) + (3 * x).log_softmax(1) / 9,
    "softmax of a part": lambda p, x, i: torch.cat([x[:, :-1].softmax(1), x[:, :1] * 0], 1),
    "softmax of a part, a parameter": lambda p, x, i: (
        x + (x[:, 1:].log_softmax(1) * p.vector).mean(1, keepdim=True)
    ),
    "pooled by softmax": lambda p, x, i: x + ((x @ p.vector).softmax(1)[:, None] @ x),
    "softmax in another type": lambda p, x, i: x * x.detach().float().softmax(1, dtype=torch.float64),
    "summed alone": lambda p, x, i: x + einsum("bsd,de->be", x, p.square)[:, None],
}


_NEEDS = {"least and largest": since((2, 12), "aminmax has no derivative")}


@ON_MESHES
@pytest.mark.parametrize("name", [pytest.param(n, marks=_NEEDS.get(n, ())) for n in TOTALS])
def test_totals_stay_local(name: str, mesh: tuple[int, int]) -> None:
    of = trace(Program((LOCAL["linear"], TOTALS[name], LOCAL["affine"])), rows=2)
    assert check(of, *mesh, tolerance=1e-11) == []


#: Computed on gathered tokens: how many operators.
GATHERED: dict[str, tuple[Pattern, int]] = {
    "the largest": (lambda p, x, i: x / x.norm(float("inf"), dim=1, keepdim=True), 1),
    "complex": (lambda p, x, i: x + torch.view_as_complex(x.unflatten(2, (3, 2))).var(1).sum(), 1),
    "corrected by three": (lambda p, x, i: x * torch.var(x, (1, 2), correction=3, keepdim=True), 1),
    "corrected by a length": (lambda p, x, i: x * x.var(1, correction=x.shape[1] - 3)[:, None], 1),
    "which of everything": (lambda p, x, i: x + x.argmax() / 9, 1),
    "which of folded rows": (lambda p, x, i: x + x.flatten(0, 1).max(0).values, 1),
    "tokens of others": (lambda p, x, i: x + (x[:, 1:].mT @ x[:, :-1].flip(1)).mean(2)[:, None], 1),
    "an ellipsis summed": (lambda p, x, i: x + einsum("...d,...d->d", x, x.cos()) / x.shape[1], 1),
    "two sums": (lambda p, x, i: x + einsum("bsd,bte->bd", x, x.cos())[:, None] / x.shape[1], 1),
    "every pair": (lambda p, x, i: x + einsum("bsd,btd->bst", x, x.cos()).mean((1, 2))[:, None, None], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
def test_what_is_no_total_is_gathered(name: str) -> None:
    pattern, count = GATHERED[name]
    assert len(check(trace(Program((LOCAL["linear"], pattern)), rows=2), 3, 1, tolerance=1e-11)) == count


def test_nothing_has_a_norm_without_gradient() -> None:
    """The root of zero has no derivative: eager takes it as zero, and so do ranks."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = (x * (ids < 0)[..., None]).clamp(min=0)
            return (x * (1 + y.norm(dim=1, keepdim=True) + y.norm() + y.std(1, keepdim=True))).sum()

    of = traced(Zero(), batch(2, 13))
    wanted = eager(of)
    for step in simulate(of, 3, 1).ranks:
        assert max(worst(step, wanted)) <= 1e-12
        assert all(g.isfinite().all() for g in step.gradients.values())


def test_low_precision_is_summed_in_float32() -> None:
    """A sum of ranks' parts in bfloat16 would lose what float32 keeps."""

    class Low(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            y = (x * (ids >= 0)[..., None]).bfloat16()
            return y.norm(dim=1), y.std(1), einsum("bsd,bse->bde", y, y)

    of = traced(Low(), batch(2, 64, grad=False))
    for step in simulate(of, 3, 1, backward=False).ranks:
        for got, wanted in zip(step.outputs, eager(of).outputs, strict=True):
            assert got.dtype == torch.bfloat16
            assert float((got - wanted).abs().max()) <= 2**-7 * float(wanted.abs().max())


BROKEN = {
    "one rank's part": (exchange, "SUM_RANKS", lambda x, group: x.clone(), TOTALS["heads"]),
    "another root": (_totals, "_root", lambda sharder, x, p: _ROOT(sharder, x, 3), TOTALS["norm"]),
    "the mean of a part": (_totals, "_count", lambda source, dims: 7, TOTALS["deviation"]),
}
_ROOT = _totals._root


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, pattern = BROKEN[name]
    of = trace(Program((LOCAL["linear"], pattern)), rows=2)
    check(of, 2, 1, tolerance=1e-11)
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        check(of, 2, 1, tolerance=1e-11)
