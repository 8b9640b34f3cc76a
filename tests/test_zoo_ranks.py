"""Models of the zoo compiled on gloo ranks: experts, sinks, custom functions, checkpoints; in float32."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from models import difference
from pool import Pool
from zoo import ZOO, in_float32


def compare(name: str, attention: str, lower: str) -> float:
    """The relative error of loss, logits and all gradients on this rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, batch = ZOO[name].make(attention).float(), in_float32(ZOO[name].batch())
        if ZOO[name].warm_up:
            model(**batch)
        reference = copy.deepcopy(model)
        options: dict[str, Any] = {"lower": lower, "intra": 1}
        return difference(torch.compile(model, backend="hsap", options=options), model, reference, batch)


@pytest.mark.parametrize(
    ("name", "attention", "lower"),
    [
        pytest.param("Mixtral", "sdpa", "inductor", marks=pytest.mark.slow),
        pytest.param("Mixtral, checkpointed", "sdpa", "inductor", marks=pytest.mark.slow),
        ("Mixtral, router loss", "sdpa", "aot_eager"),
        pytest.param("torchtitan Llama, tiled", "sdpa", "inductor", marks=pytest.mark.slow),
        pytest.param("Llama4", "sdpa", "aot_eager", marks=pytest.mark.slow),
        pytest.param("GPT-OSS", "eager", "inductor", marks=pytest.mark.slow),
        pytest.param("Bloom", "eager", "inductor", marks=pytest.mark.slow),
        pytest.param("DeepSeek-V3", "sdpa", "aot_eager", marks=pytest.mark.slow),
        pytest.param("Whisper", "sdpa", "aot_eager", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks(pool: Pool, name: str, attention: str, lower: str) -> None:
    for error in pool.run(compare, name, attention, lower, world=2):
        assert error < 1e-4
