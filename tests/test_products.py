"""Attention written with products of any layout: heads in groups, einsum, scores that are a sum of two."""

from __future__ import annotations

import math

import pytest
import torch

from hsap_compile.passes import _products
from hsap_compile.passes import find_attention as find_attention_pass
from hsap_compile.passes.capture import capture
from hsap_compile.passes.find_attention import find_attention
from hsap_compile.runtime import Program
from product_cases import (
    FORMS,
    MISSES,
    Attend,
    Model,
    grouped,
    groups_first,
    latent,
    own_scales,
    without_gradient_of,
)
from simulate import Traced, eager, simulate, traced, worst
from strategies import dynamic, pack


def trace(attend: Attend, rows: list[list[int]]) -> Traced:
    doc, pos = pack(rows)
    ids = torch.arange(doc.numel()).view(doc.shape) * 5 % 17
    return traced(Model(attend).double(), dynamic({"ids": ids, "doc": doc, "pos": pos}))


def error(call: Traced, inter: int, intra: int) -> tuple[float, Program]:
    """The largest error of a rank's outputs and gradients, and the program they ran."""
    wanted, result = eager(call), simulate(call, inter, intra)
    return max(max(worst(step, wanted)) for step in result.ranks), result.program


SLOW = pytest.mark.slow
MESHES = [
    pytest.param((1, 1), marks=SLOW),
    pytest.param((3, 1), marks=SLOW),
    pytest.param((1, 2), marks=SLOW),
    (2, 2),
]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_attention(name: str, mesh: tuple[int, int]) -> None:
    attend, kv_heads, row = FORMS[name]
    intra = math.gcd(mesh[1], kv_heads)
    found, program = error(trace(attend, [[3, 5, 1, 4], [13]]), mesh[0] * mesh[1] // intra, intra)
    assert found <= 1e-11 and program.fallbacks == ()
    (mask,) = program.masks
    assert mask.mask.labels and mask.mask.bands
    assert [t.kv for t in program.traffic] == [8 * row // intra]


def test_documents_of_one_token() -> None:
    for attend in (grouped, latent):
        found, program = error(trace(attend, [[1, 1, 1, 1], [2, 1, 1]]), 2, 1)
        assert found <= 1e-11 and program.fallbacks == ()


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_attention_is_right(name: str) -> None:
    attend, count, own = MISSES[name]
    call = trace(attend, [[3, 4], [7]])
    found, program = error(call, 3, 1)
    assert found <= 1e-11 and (program.fallbacks == ()) == own
    assert len(find_attention(capture(call.module))) == count


# --- the comparison notices when a rule is broken ---------------------------------------------------------


BROKEN: dict[str, tuple[object, str, object, Attend]] = {
    "all scales one": (_products, "_times", lambda x, number, node: _TIMES(x, 1.0, node), own_scales),
    "heads in another order": (_products, "_layout", lambda *a: _swapped(*a), groups_first),
    "looks through no_grad": (
        find_attention_pass, "without_gradient", lambda module: set(), without_gradient_of("keys")
    ),
}  # fmt: skip
_TIMES, _LAYOUT = _products._times, _products._layout


def _swapped(rows: tuple[int, ...], batches: int, *more: object) -> object:
    return _LAYOUT((*rows[:batches], *reversed(rows[batches:])), batches, *more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken, attend = BROKEN[name]
    call = trace(attend, [[3, 4], [7]])
    assert error(call, 2, 1)[0] <= 1e-11
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        assert error(call, 2, 1)[0] <= 1e-11
