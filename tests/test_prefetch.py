"""Plans made before their step, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hsap_compile.runtime as runtime
from hsap_compile import prefetch
from models import batch, build

Compiled = Callable[..., Any]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that plans were made for, as they are made."""
    made: list[int] = []
    make = runtime.make

    def counting(masks: Any, *rest: Any, **more: Any) -> Any:
        made.append(masks[0].tokens)
        return make(masks, *rest, **more)

    monkeypatch.setattr(runtime, "make", counting)
    return made


def compiled(**options: Any) -> tuple[torch.nn.Module, Compiled]:
    torch.compiler.reset()
    model = build("nano", torch.float64)
    return model, torch.compile(model, backend="hsap", options={"lower": "eager", **options})


FIRST, SECOND = batch("nano", [[5, 1, 9]]), batch("nano", [[7, 30, 2]])


def test_a_step_finds_the_plan_that_was_made_ahead(planned: list[int]) -> None:
    model, call = compiled()
    call(**FIRST)
    assert planned == [15]
    prefetch(call, **SECOND)
    assert planned == [15, 39]
    wanted = model(**SECOND)[0]
    assert torch.allclose(call(**SECOND)[0], wanted, rtol=1e-12)
    assert planned == [15, 39]


def test_the_first_call_can_be_prefetched(planned: list[int]) -> None:
    _, call = compiled()
    prefetch(call, **FIRST)
    assert planned == [15]
    call(**FIRST)
    assert planned == [15]


def test_nothing_is_computed_ahead() -> None:
    steps: list[Any] = []
    _, call = compiled(on_step=steps.append)
    call(**FIRST)
    state = torch.get_rng_state()
    assert prefetch(call, **SECOND) is None
    assert len(steps) == 1 and torch.equal(torch.get_rng_state(), state)
    call(**SECOND)
    assert len(steps) == 2


def test_errors_of_the_call_are_not_hidden() -> None:
    _, call = compiled()
    call(**FIRST)
    with pytest.raises(TypeError, match="labels"):
        prefetch(call, ids=FIRST["ids"])
    assert call(**FIRST)[1].shape[1] == 15  # and the next call computes


def test_a_thread_plans_while_others_step(planned: list[int]) -> None:
    _, call = compiled()
    call(**FIRST)
    batches = [batch("nano", [[n, 40 - n]]) for n in range(1, 9)]
    thread = threading.Thread(target=lambda: [prefetch(call, **b) for b in batches])
    thread.start()
    for _ in range(4):
        call(**FIRST)
    thread.join()
    assert planned == [15] + [40] * 8
    for given in batches:
        call(**given)
    assert len(planned) == 9
