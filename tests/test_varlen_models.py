"""Whole models with ``attention="varlen"`` on simulated ranks against eager, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import test_equivalence
from hsap_compile.errors import Refused
from hsap_compile.options import parse
from hsap_compile.passes._bands import _by_formula, _parts
from hsap_compile.pipeline import _kernel
from hsap_compile.plan import slices
from mask_cases import CASES, error, packed, trace
from models import TOLERANCE, batch, build, difference
from simulate import eager, simulate, simulate_all, traced, widened, worst
from strategies import dynamic
from test_recompiles import LENGTHS, SAME_LENGTH, fresh, graphs
from varlen_reference import reference_kernels
from zoo import ZOO

assert fresh  # a fixture of all tests here


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[list[Any]]:
    with reference_kernels() as calls:
        yield calls


@pytest.mark.parametrize(
    ("name", "mesh"), [("nano", (3, 1)), ("llama", (2, 2)), ("mistral", (3, 1)), ("mistral", (1, 1))], ids=str
)
def test_models(name: str, mesh: tuple[int, int], kernels: list[Any]) -> None:
    kernels.clear()
    test_equivalence.check(name, mesh, test_equivalence.CORNERS, attention="varlen")
    assert {call[0] for call in kernels} == {"forward", "backward"}


def test_rows_that_arrive_in_stages() -> None:
    rows = test_equivalence.CORNERS[2:4]
    test_equivalence.check("llama", (4, 1), rows, attention="varlen", received=3000)


@test_equivalence.OPEN
def test_sinks_and_alternating_windows() -> None:
    entry = ZOO["GPT-OSS"]
    trace = widened(traced(entry.make("eager").double(), entry.batch()))
    for step in simulate(trace, 3, 1, attention="varlen").ranks:
        assert max(worst(step, eager(trace))) <= 1e-12


#: Of the hand-written attentions, those that are bands.
EXACT = {
    "positional", "keywords_and_scale", "is_causal", "everything", "without_batch", "groups_of_heads",
    "of_an_attention", "float_infinite", "float_lowest", "window_over_positions", "chunks", "key_padding",
    "distance", "cut_from_a_larger_mask", "masked_fill", "where_a_constant", "where_the_lowest", "additive",
    "without_gradient", "filled_where_light", "triangles", "casts_and_idle_dropout",
    "keys_with_their_size_first", "three_dimensions", "enable_gqa", "repeated", "repeated_written_out",
    "interleaved", "interleaved_unevenly", "tiles", "tiled_keys_and_repeated_values", "one_head_for_all",
}  # fmt: skip
QUICK = ("key_padding", "distance", "window_over_positions", "chunks", "soft_cap", "alibi", "steps_apart")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_hand_written_attentions_are_exact_or_refused(name: str) -> None:
    attend, kv, left, _ = CASES[name]
    call, more = trace(attend, kv)
    calls = [args for args in (call.args, *more) if next(a for a in args if isinstance(a, int)) >= 8]
    inter, intra = (2, 2) if left % 2 == 0 else (4, 1)
    try:
        found = simulate_all(call, inter, intra, *calls, attention="varlen")
    except Refused as reason:
        assert "flash attention over sequences cannot compute" in str(reason)
        assert name not in EXACT
        return
    assert name in EXACT
    for args, made in zip(calls, found, strict=True):
        for step in made.ranks:
            assert error(step, eager(call, args)) < 1e-12


# --- other documents ------------------------------------------------------------------------------------


def test_other_documents_do_not_compile_again() -> None:
    found = graphs("nano", SAME_LENGTH, attention="varlen")
    assert found == found[:1] * 20
    found = graphs("nano", SAME_LENGTH[:1] + LENGTHS, attention="varlen")
    assert found[-1] - found[0] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "mistral"])
def test_compiled_by_inductor(name: str) -> None:
    model = build(name)
    compiled = torch.compile(build(name), backend="hsap", options={"attention": "varlen"})
    for lengths in ([30, 20, 14], [1, 62, 1], [64]):
        given = batch(name, [lengths, lengths[::-1]])
        assert difference(compiled, compiled._orig_mod, model, given) < TOLERANCE[name]


# --- refusals -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """q, k of ``width`` and v of ``v_width``, one head."""

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 8, v_width: int = 8) -> None:
        super().__init__()
        self.width, self.v_width = width, v_width
        self.words = nn.Embedding(50, 2 * width + v_width).to(dtype)

    def forward(self, ids: Tensor, doc: Tensor) -> Tensor:
        q, k, v = self.words(ids)[:, None].split([self.width, self.width, self.v_width], -1)
        return F.scaled_dot_product_attention(q, k, v, self.mask(q, doc)).sum()

    def mask(self, q: Tensor, doc: Tensor) -> Tensor:
        return packed(q, doc)


class Soft(Attention):
    """Masked by finfo.min; tokens of document 0 see nothing."""

    def mask(self, q: Tensor, doc: Tensor) -> Tensor:
        seen = packed(q, doc) & (doc > 0)[:, None, :, None]
        return torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)


class Learned(Attention):
    """Documents that the model decides on."""

    def mask(self, q: Tensor, doc: Tensor) -> Tensor:
        return packed(q, q[:, 0, :, 0].round())


def given_of(doc: list[int]) -> dict[str, Tensor]:
    return {"ids": torch.arange(len(doc))[None], "doc": torch.tensor([doc])}


def refusal(model: nn.Module, doc: list[int]) -> str:
    of = traced(model, dynamic(given_of(doc)))
    with pytest.raises(Refused) as caught:
        simulate(of, 2, 1, backward=False, attention="varlen")
    return str(caught.value)


DOC = [1, 1, 1, 2, 2, 2, 2, 2]


def test_a_mask_that_is_computed() -> None:
    text = refusal(Learned(), DOC)
    assert "flash attention over sequences cannot wait for a mask" in text
    assert 'do:     pass options={"attention": "flex"}, which evaluates any formula' in text
    assert "scaled_dot_product_attention" in text.partition("at:")[2]


def test_a_query_that_sees_nothing_of_a_finite_mask() -> None:
    of = traced(Soft(), dynamic(given_of(DOC)))
    for step in simulate(of, 2, 1, attention="varlen").ranks:
        assert max(worst(step, eager(of))) <= 1e-12
    text = refusal(Soft(), [*DOC[:5], 0, 2, 2])
    assert "flash attention over sequences cannot compute this batch" in text
    assert "a query without a key (row 0, token 5) where masked logits are finite (mask 0)" in text
    assert "use a boolean mask or -inf instead of finfo.min" in text


def test_documents_in_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused when the batch is planned, as every rank does it, though one alone has all of them."""
    of = traced(Attention(), dynamic(given_of([1, 2] * 6 + [3] * 12)))
    program = simulate(of, 2, 1, backward=False, attention="varlen").program
    monkeypatch.setattr(slices, "MAX_EXACT", 20)
    monkeypatch.setattr(slices, "MAX_EXACT_PER_PIECE", 1)
    plan = replace(program, bands_only=False).plan(program.read(of.args), program.length(of.args))
    assert [_by_formula(plan.masks[0], rank) for rank in range(2)] in ([True, False], [False, True])
    assert _parts(plan, plan.masks[0].structure) > 20
    with pytest.raises(Refused, match="cannot compute this batch") as caught:
        program.plan(program.read(of.args), program.length(of.args))
    assert "documents that interleave into more than 20 parts on one rank (mask 0)" in str(caught.value)


def test_types_and_head_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsap_compile.kernels.varlen.DTYPES", (torch.float16, torch.bfloat16))
    text = refusal(Attention(torch.float32), DOC)
    assert "flash attention over sequences has no kernel of this type" in text
    assert "got:    torch.float32\n  wanted: torch.float16 or torch.bfloat16" in text
    text = refusal(Attention(torch.bfloat16, 8, 264), DOC)
    assert "got:    264, the larger of 8 (queries, keys) and 264 (values)\n  wanted: at most 256" in text


def kernel(device: str, **options: Any) -> str:
    return _kernel(parse(options, None), torch.device(device))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsap_compile.kernels.varlen.DEVICES", ("cuda",))
    assert kernel("cuda") == "flex" and kernel("cpu") == "slices"
    assert kernel("cuda", attention="varlen", received=4096) == "varlen"
    with pytest.raises(Refused, match="there is no flash attention over sequences for cpu") as caught:
        kernel("cpu", attention="varlen")
    assert 'wanted: tensors on cuda, or attention="slices" or "auto" on CPU' in str(caught.value)
    with pytest.raises(Refused, match="there is no kernel of slices for cuda") as caught:
        kernel("cuda", attention="slices")
    assert 'do:     pass options={"attention": "varlen"}, or drop "attention"' in str(caught.value)
    with pytest.raises(Refused, match="flex attention takes all received rows at once") as caught:
        kernel("cuda", attention="flex", received=4096)
    assert '"varlen" on CUDA' in str(caught.value)
