"""Models written by hand and from a library: after lift_mask, and on ranks, against what was traced."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from hsap_compile import formula
from hsap_compile._torch import fake_mode_of
from hsap_compile.graph import placeholders
from hsap_compile.kernels import dense
from hsap_compile.passes import _elements, _positions
from hsap_compile.passes import lift_mask as lift_mask_pass
from hsap_compile.passes.capture import capture
from hsap_compile.passes.find_attention import find_attention, token_dims
from hsap_compile.passes.lift_mask import lift_mask
from hsap_compile.plan import slices
from hsap_compile.verify import verify
from mask_cases import CASES, PACKS, Attend, H, Model, attention, columns, error, packed, scores, trace
from simulate import Traced, eager, simulate_all, traced
from strategies import dynamic, pack

# --- left as they are -----------------------------------------------------------------------------------

LEFT: dict[str, Attend] = {
    "scores without a gradient": lambda m, q, k, v, doc, pos: (
        (scores(q, k) + scores(q, k).detach()).softmax(-1) @ v
    ),
    "scores of other pairs": lambda m, q, k, v, doc, pos: (k @ q.mT).mT.softmax(-1) @ v,
    "scores summed up": lambda m, q, k, v, doc, pos: scores(q, k).cumsum(-1).softmax(-1) @ v,
    "the best of the scores": lambda m, q, k, v, doc, pos: best(scores(q, k), 3).softmax(-1) @ v,
    "scores of a permutation": lambda m, q, k, v, doc, pos: (
        scores(q, k)[..., columns(q).flip(0) - k.shape[2]].softmax(-1) @ v
    ),
}


def best(scores: Tensor, count: int) -> Tensor:
    """Of scores that are equal only to themselves, the ``count`` largest of a query."""
    least = scores.topk(min(count, scores.shape[-1]), -1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def lifted(call: Traced) -> tuple[Traced, int]:
    """The call's graph after lift_mask, and how many masks stayed dense."""
    graph = capture(call.module)
    mode = fake_mode_of([n.meta["example_value"] for n in placeholders(call.module)])
    count = lift_mask(graph, find_attention(graph), mode)
    verify(graph, "lift_mask")
    return Traced(graph, call.length, call.args), count


def operators(call: Traced) -> list[torch.fx.Node]:
    return [n for n in call.module.graph.nodes if n.target is dense.OP]


@pytest.mark.parametrize("name", CASES)
def test_hand_written(name: str) -> None:
    attend, kv, left, dense_masks = CASES[name]
    call, more = trace(attend, kv)
    after, count = lifted(call)
    assert count == dense_masks
    found = operators(after)
    assert found and all(int(n.args[1].meta["val"].shape[1]) == left for n in found)
    if not dense_masks:  # nothing of size S x S is left
        assert not [n for n in after.module.graph.nodes if len(token_dims(n)) > 1]
    for args in (call.args, *more):
        assert error(eager(after, args), eager(call, args)) < 1e-12
    on_ranks(call, more[:2], left)


def on_ranks(call: Traced, more: list[tuple[Any, ...]], heads: int) -> None:
    """Outputs and all gradients of several packs on one graph."""
    calls = [args for args in (call.args, *more) if next(a for a in args if isinstance(a, int)) >= 8]
    inter, intra = (2, 2) if heads % 2 == 0 else (4, 1)
    for args, made in zip(calls, simulate_all(call, inter, intra, *calls), strict=True):
        for step in made.ranks:
            assert error(step, eager(call, args)) < 1e-12


def test_a_causal_mask_beside_documents_may_need_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents scatter the tokens over ranks, perhaps into too many parts for exact slices."""

    def both(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
        return attention(attention(q, k, v, is_causal=True), k, v, packed(q, doc))

    monkeypatch.setattr(slices, "MAX_EXACT", 0)
    monkeypatch.setattr(slices, "MAX_EXACT_PER_PIECE", 0)
    call, _ = trace(both)
    on_ranks(call, [], H)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_as_it_is_written(name: str) -> None:
    call, more = trace(LEFT[name])
    after, _ = lifted(call)
    assert not operators(after)
    for args in (call.args, *more):
        assert error(eager(after, args), eager(call, args)) < 1e-12


def test_a_mask_that_autocast_rounds_to_infinity() -> None:
    """finfo(float32).min is -inf in bfloat16: a query without keys then gets zeros, not everyone's mean."""

    def attend(m, q, k, v, doc, pos):  # type: ignore[no-untyped-def]
        mask = packed(q, doc) & (doc > 0)[:, None, None, :]
        return attention(q, k, v, torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, lowest))

    lowest = torch.finfo(torch.float32).min
    doc, pos = pack(PACKS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = traced(
            Model(attend), dynamic({"ids": torch.randint(0, 17, doc.shape), "doc": doc, "pos": pos})
        )
        wanted = eager(call)
        after, _ = lifted(call)
    assert not operators(after)[0].meta["mask"].soft
    assert error(eager(after), wanted) < 0.02


LIBRARY = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gptneox": ("GPTNeoXConfig", {}),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in LIBRARY]
)
def test_library_models(name: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    if (name, implementation) == ("gemma2", "sdpa"):
        pytest.skip("the library has no such model: the operator cannot cap scores")
    config, special = LIBRARY[name]
    sizes: dict[str, Any] = {
        "vocab_size": 19, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "num_key_value_heads": 2,
    }  # fmt: skip
    if name in ("gpt2", "gptneox"):
        sizes.pop("num_key_value_heads")
    if name == "gpt2":
        sizes = {
            k: v for k, v in sizes.items() if k.endswith("pdrop") or k.endswith("id") or k == "vocab_size"
        }
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes, **special), attn_implementation=implementation
    ).double()
    model.loss_type = "ForCausalLM"
    doc, pos = pack([[3, 9, 1, 7]])
    ids = torch.randint(3, 19, doc.shape)
    call = traced(model, dynamic({"input_ids": ids, "position_ids": pos, "labels": ids, "use_cache": False}))
    after, count = lifted(call)
    found = operators(after)
    assert (len(found), count) == (2, 0)
    assert not [n for n in after.module.graph.nodes if len(token_dims(n)) > 1]
    for node in found:
        assert node.meta["mask"].labels and node.meta["mask"].bands
        assert int(node.args[1].meta["val"].shape[1]) == sizes.get("num_key_value_heads", 4)
    # written out, these models take the softmax in float32 also where all else is float64
    assert error(eager(after), eager(call)) < (1e-12 if implementation == "sdpa" else 2e-6)


@pytest.mark.parametrize("broken", ["scale", "band", "leaf", "index"])
def test_the_check_sees_a_wrong_rewrite(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = _positions.RULES
    if broken == "scale":
        normalise = lift_mask_pass.normalise
        monkeypatch.setattr(lift_mask_pass, "normalise", lambda x: (normalise(x)[0], 2 * normalise(x)[1]))
    elif broken == "band":
        monkeypatch.setitem(_elements.POINTWISE, "ge", _elements.comparison(sympy.Gt))
    elif broken == "leaf":
        monkeypatch.setattr(formula, "leaf", lambda i, *at: sympy.Function(f"leaf{i}")(*at[:-1], at[-1] * 0))
    else:
        monkeypatch.setitem(rules, "unsqueeze", lambda lifter, n, at: rules["select"](lifter, n, at))
    with pytest.raises((AssertionError, TypeError, ValueError, IndexError)):
        test_hand_written("positional")
