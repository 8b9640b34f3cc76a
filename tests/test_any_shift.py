"""Drawn shifts, windows and convolutions along the tokens, on drawn documents and meshes, against eager; and
that the comparison notices when the re-index is broken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsap_compile.passes import _reindex, _shifts, shard_tokens
from strategies import documents
from test_shifts import SHIFTS, WIDTH, Around, Pattern, check, trace


@dataclass(frozen=True)
class Drawn:
    """One of several operators with drawn numbers: distances may be beyond a rank's share and beyond S."""

    kind: str
    far: int
    near: tuple[int, int, int]

    def __call__(self, p: Around, x: Tensor, i: Tensor) -> Tensor:
        far, (a, b, c) = self.far, self.near
        tokens = x.shape[1]
        if self.kind == "pad":
            x = F.pad(x[:, a:], (0, 0, far, b), value=c - 1.0) if far > -8 else x[:, a : tokens - b]
            return x[:, max(0, far + b - a) :] if far > -8 else F.pad(x, (0, 0, a, b))
        if self.kind == "shift":
            far = max(far, -12)
            return F.pad(x, (0, 0, far, -far)) if far < 0 else F.pad(x, (0, 0, far, 0))[:, :tokens]
        if self.kind == "roll":
            return x[:, a : tokens - b].roll((far, c), (1, 2))
        if self.kind == "meet":
            return x[:, a + b :] * x[:, a : tokens - b] - x[:, : tokens - a - b]
        if self.kind == "diff":
            return x[:, a:].diff(n=b + 1, dim=1)
        if self.kind == "windows":
            return x[:, a:].unfold(1, b + 1, 1).flatten(2)
        if self.kind == "join":
            ends = p.words.expand(x.shape[0], 2, WIDTH)
            front, behind = ([ends[:, :n]] if n else [] for n in (min(a, 2), min(b, 1)))
            return torch.cat([*front, x[:, a : tokens - b], *behind], 1)
        taps, dilation, groups = b + 1, c + 1, (1, 2, WIDTH, 1)[a]
        weight = p.any[:, : WIDTH // groups, :taps]
        reach = dilation * b
        y = F.conv1d(F.pad(x.mT, (a, 0)), weight, p.vector, padding=reach, dilation=dilation, groups=groups)
        return y[..., a : a + tokens].mT


KINDS = ["pad", "shift", "roll", "meet", "diff", "windows", "join", "conv"]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    near = st.integers(0, 3)
    far = draw(st.one_of(st.integers(-3, 6), st.integers(-40, 60)))
    return Drawn(draw(st.sampled_from(KINDS)), far, draw(st.tuples(near, near, near)))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(
    drawn(),
    st.integers(16, 40).flatmap(documents),
    st.sampled_from([1, 2]),
    st.sampled_from([(2, 1), (1, 2), (2, 2), (3, 1)]),
    st.sampled_from(["balanced", "contiguous"]),
)
def test_any_shift(
    pattern: Drawn, lengths: list[int], rows: int, mesh: tuple[int, int], placement: str
) -> None:
    check(trace(pattern, lengths, rows), mesh, placement=placement)


# --- the comparison notices when the re-index is broken -----------------------------------------------


def _wide_view(view: _reindex.View, by: int, slack: int, fill: float | None = None) -> _reindex.View:
    """What was cut away is seen again."""
    return replace(view, by=view.by + by, fill=view.fill if fill is None else fill)


def _logarithm(p: Any, x: Tensor, i: Tensor) -> Tensor:
    """The first token, which is cut off, has none."""
    return x + (x * (torch.arange(x.shape[1]) > 0)[:, None])[:, 1:].abs().log().mean()


#: broken rule: (owner, name, what it becomes, the pattern that needs it)
MUTATIONS: dict[str, tuple[Any, str, Any, Pattern]] = {
    "rows outside kept": (_reindex, "_masked", lambda s, value, *_: value, SHIFTS["padded in place"][0]),
    "cut rows seen": (_shifts, "moved", _wide_view, SHIFTS["padded and cut again"][0]),
    "starts ignored": (shard_tokens, "aligned", lambda s, n, _: s.home[n].node, SHIFTS["difference"][0]),
    "no seam": (_shifts, "taken", lambda *a, wraps=False: _reindex.taken(*a), SHIFTS["rolled"][0]),
    "cut rows as they are": (_reindex, "_ordinary", lambda sharder, rows, *_: rows, _logarithm),
    "every rank gives its row": (_shifts, "where", lambda s, mask, value, _: value, SHIFTS["first"][0]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_rules_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, pattern = MUTATIONS[name]
    of = trace(pattern)
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        check(of, (2, 1))
