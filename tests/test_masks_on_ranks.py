"""Every attention of ``mask_cases`` on four ranks: outputs and all gradients, several packs on one graph."""

from __future__ import annotations

import pytest

from mask_cases import CASES, error, trace
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


def _tokens(args: tuple[object, ...]) -> int:
    return next(a for a in args if isinstance(a, int))
