"""Every attention of ``mask_cases`` on four ranks: outputs and all gradients, several packs on one graph."""

from __future__ import annotations

import pytest

from hsap_compile.plan import slices
from mask_cases import CASES, H, attention, error, packed, trace
from simulate import eager, simulate_all


@pytest.mark.parametrize("name", CASES)
def test_hand_written_on_ranks(name: str) -> None:
    attend, kv, left, _ = CASES[name]
    call, more = trace(attend, kv)
    calls = [args for args in (call.args, *more) if _tokens(args) >= 8]  # two a rank
    inter, intra = (2, 2) if left % 2 == 0 else (4, 1)
    for args, made in zip(calls, simulate_all(call, inter, intra, *calls), strict=True):
        for step in made.ranks:
            assert error(step, eager(call, args)) < 1e-12


def test_a_causal_mask_beside_documents_may_need_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents scatter the tokens over ranks, perhaps into too many parts for exact slices."""

    def both(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
        return attention(attention(q, k, v, is_causal=True), k, v, packed(q, doc))

    monkeypatch.setattr(slices, "MAX_EXACT", 0)
    monkeypatch.setattr(slices, "MAX_EXACT_PER_PIECE", 0)
    call, _ = trace(both, H)
    for step in simulate_all(call, 2, 2, call.args)[0].ranks:
        assert error(step, eager(call)) < 1e-12


def _tokens(args: tuple[object, ...]) -> int:
    return next(a for a in args if isinstance(a, int))
