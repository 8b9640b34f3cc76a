"""Every model of the zoo on simulated ranks against one process: outputs, loss, all gradients, and how many
operators run on gathered tokens, exactly."""

from __future__ import annotations

import pytest

from zoo import CASES, MESHES, ZOO, compare

pytestmark = [
    pytest.mark.filterwarnings("ignore:hsap. position_ids restart"),  # some know no documents
    # dynamo makes an instance of autograd.Function (torch 2.13)
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

#: One of every kind of rule, in the default run.
FAST = [
    ("Llama, checkpointed", "sdpa", (3, 1)),
    ("Mixtral, router loss", "sdpa", (2, 2)),
    ("Llama4", "sdpa", (3, 1)),
    ("DeepSeek-V3", "eager", (2, 2)),
    ("GPT-OSS", "eager", (3, 1)),
    ("Bloom", "eager", (2, 2)),
    ("Falcon", "sdpa", (3, 1)),
    ("T5", "sdpa", (2, 2)),
    ("Whisper", "sdpa", (3, 1)),
    ("torchtitan Llama", "flex", (2, 2)),
    ("torchtitan Llama, tiled", "sdpa", (3, 1)),
    ("nanoGPT, checkpointed", "sdpa", (2, 2)),
    ("diffusion transformer, two rows", "sdpa", (3, 1)),
]


def check(name: str, attention: str, *meshes: tuple[int, int]) -> None:
    for result in compare(ZOO[name], attention, *meshes):
        assert result.error <= 1e-10
        assert len(result.gathers) == ZOO[name].gathers, result.gathers
        assert not any("/torch/" in text for text in result.gathers), "a line of torch, not of the model"


@pytest.mark.parametrize(("name", "attention", "mesh"), FAST, ids=str)
def test_some(name: str, attention: str, mesh: tuple[int, int]) -> None:
    check(name, attention, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES, ids=str)
def test_all(name: str, attention: str) -> None:
    check(name, attention, *MESHES)


def test_decoders_gather_nothing() -> None:
    assert not any(entry.gathers for entry in ZOO.values() if entry.kind == "decoder")
