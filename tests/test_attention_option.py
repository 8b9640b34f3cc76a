"""The option ``attention``: flex attention instead of slices, on real ranks, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from hsap_compile.errors import Refused
from hsap_compile.options import parse
from models import batch, build
from pool import Pool
from test_ranks import PACKS, compare
from test_row_lengths import PATTERNS, Model
from test_row_lengths import batch as rows


@pytest.mark.parametrize(
    ("name", "intra"),
    [("nano", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("llama", "next token"))],
    ids=str,
)
def test_flex_attention_on_ranks(pool: Pool, name: str, intra: int) -> None:
    options = {"attention": "flex", "intra": intra}
    for errors in pool.run(compare, name, PACKS[:2], "eager", options, world=2):
        assert max(errors) < 2e-5


def other_columns(name: str) -> float:
    """Queries and keys that are a part of the columns."""
    model, given = Model(PATTERNS[name]).float(), rows([9, 1, 14])
    reference = copy.deepcopy(model)
    step = torch.compile(model, backend="hsap", options={"attention": "flex", "lower": "eager"})
    results = [f(**given) for f in (step, reference)]
    for loss, *_ in results:
        loss.backward()
    errors = [float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)]
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        errors.append(0.0 if p.grad is None or q.grad is None else float((p.grad - q.grad).abs().max()))
    return max(errors)


@pytest.mark.parametrize("name", ["memory_in_front", "prompt_of_all_documents"])
def test_flex_attention_of_other_columns(pool: Pool, name: str) -> None:
    assert max(pool.run(other_columns, name, world=2)) < 2e-5


def test_flex_attention_has_no_backward_in_inductor_on_cpu() -> None:
    model = torch.compile(build("nano"), backend="hsap", options={"attention": "flex"})
    with pytest.raises(Exception, match="Inductor has no backward of flex attention on CPU") as caught:
        model(**batch("nano", [[4, 5]]))
    assert 'wanted: attention="slices" on CPU' in str(caught.value)


def test_other_values_are_refused() -> None:
    with pytest.raises(Refused, match='option "attention" has a value that does not exist'):
        parse({"attention": "fast"}, None)
    with pytest.raises(Refused, match='option "kernel_options" has the wrong type'):
        parse({"kernel_options": 3}, None)


def test_kernel_options_are_kept() -> None:
    assert dict(parse({"kernel_options": {"BLOCK_M": 64}}, None).kernel_options) == {"BLOCK_M": 64}
