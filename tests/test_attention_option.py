"""The option ``attention``: flex attention instead of slices, on real ranks, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hsap_compile.errors import Refused
from hsap_compile.options import parse
from models import batch, build
from pool import Pool
from test_ranks import PACKS, compare


@pytest.mark.parametrize(
    ("name", "intra"),
    [("nano", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("llama", "next token"))],
    ids=str,
)
def test_flex_attention_on_ranks(pool: Pool, name: str, intra: int) -> None:
    options = {"attention": "flex", "intra": intra}
    for errors in pool.run(compare, name, PACKS[:2], "eager", options, world=2):
        assert max(errors) < 2e-5


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
