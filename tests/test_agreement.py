"""What a rank claims of its plan, on simulated ranks whose host sides differ.

That ranks compare batches, graphs and parameters is in ``tests/test_ranks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hsap_compile.agreement import Claim
from hsap_compile.plan import Plan
from hsap_compile.runtime import Program, Runner
from models import batch, build
from simulate import simulate, traced
from threads import run_threads


class Failing(Program):
    """Finds no plan."""

    def plan(self, *batch: Any) -> Plan:
        raise ValueError("nothing was found")


class Blind(Program):
    """Cannot read the documents."""

    def read(self, *args: Any) -> Any:
        raise ValueError("nothing was found")


@pytest.fixture(scope="module")
def said() -> Callable[..., list[str]]:
    """What each of two ranks says in a step whose host side is another on every rank."""
    of = traced(build("nano"), batch("nano", [[5, 1, 9, 4, 8]]))
    program = simulate(of, 2, 1, backward=False).program

    def step(changes: list[Any]) -> str:
        try:
            Runner(changes[dist.get_rank()](program))(*of.args)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    return lambda *changes: run_threads(2, step, changes)


def elsewhere(program: Program) -> Program:
    return replace(program, placement="contiguous")


def failing(program: Program) -> Program:
    return Failing(**vars(program))


def blind(program: Program) -> Program:
    return Blind(**vars(program))


def test_alike(said: Any) -> None:
    assert said(replace, replace) == said(elsewhere, elsewhere) == ["accepted"] * 2


def test_another_plan_for_the_same_batch_is_refused(said: Any) -> None:
    """As of a processor that rounds otherwise: the rows that it sends are not those that others wait for."""
    for text in said(replace, elsewhere):
        assert text.startswith("Refused: hsap: the ranks made different plans for one batch.")
        assert "got:    ranks [1] differ from rank 0" in text and "do:     run the same version" in text


@pytest.mark.parametrize(
    ("last", "what"),
    [(failing, "made different plans for one batch"), (blind, "were given different batches")],
)
def test_a_rank_that_finds_no_plan_leaves_no_other_waiting(said: Any, last: Any, what: str) -> None:
    first, second = said(replace, last)
    assert first.startswith(f"Refused: hsap: the ranks {what}.")
    assert second == "ValueError: nothing was found"


@pytest.mark.parametrize("both", [failing, blind])
def test_ranks_that_find_no_plan_say_why(said: Any, both: Any) -> None:
    assert said(both, both) == ["ValueError: nothing was found"] * 2


class Opaque(torch.Tensor):
    """Knows no operator but the copy that a parameter is."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].inner) if func is torch.ops.aten.detach.default else NotImplemented


class Quantised(Opaque):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return Quantised(inner["inner"])


def test_parameters_of_a_subclass_are_compared_by_what_they_are_made_of() -> None:
    def sums(*parameters: torch.Tensor) -> float:
        return Claim(0, 0, b"", 0, parameters, frozenset(range(len(parameters)))).nearly()[0]

    plain = torch.arange(6, dtype=torch.int8)
    assert sums(Quantised(plain)) == sums(plain.float()) != sums(Quantised(plain + 1))
    with pytest.raises(NotImplementedError, match="nothing is known of what an? Opaque is made of"):
        sums(Opaque(plain))
