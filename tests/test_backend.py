"""``torch.compile(..., backend="hsap")`` in one process: what is asked of dynamo, refusals and warnings."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from hsap_compile import outputs
from hsap_compile.errors import Refused
from pool import Pool
from simulate import eager, relative, simulate, since, traced, worst

EAGER = {"lower": "eager"}


class Tiny(torch.nn.Module):
    """One attention over documents given by their numbers."""

    def __init__(self, heads: int = 2, width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.heads, size = heads, heads * width
        self.embedding = torch.nn.Embedding(11, size, dtype=torch.float64)
        self.qkv = torch.nn.Linear(size, 3 * size, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = documents[:, None, :, None] == documents[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def batch(documents: list[int], rows: int = 1) -> dict[str, torch.Tensor]:
    tokens = len(documents)
    return {
        "ids": (torch.arange(rows * tokens) * 7 % 11).view(rows, tokens),
        "documents": torch.tensor(documents).repeat(rows, 1),
    }


def test_one_process_needs_no_process_group() -> None:
    model = Tiny()
    given = batch([0, 0, 1, 1, 1, 2])
    got = torch.compile(model, backend="hsap", options=EAGER)(**given)
    assert relative(got.detach(), model(**given).detach()) <= 1e-13


def test_several_ranks_need_a_batch() -> None:
    """Without one, a graph is a piece between graph breaks, unless it attends or ``strict`` is asked for."""
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    trace = traced(lambda x: x.logsumexp(-1).mean(), {"x": x})
    assert simulate(trace, 2, 1).ranks[1].outputs == eager(trace).outputs
    attending = traced(lambda x: F.scaled_dot_product_attention(x, x, x).mean(), {"x": x})
    for of, options in ((trace, {"strict": True}), (replace(attending, length=None), {})):
        with pytest.raises(Refused, match="no input has the tokens as a dimension") as caught:
            simulate(of, 2, 1, **options)
        assert "do:     compile the function that takes the batch" in str(caught.value)


def test_interleaved_documents_are_legal() -> None:
    documents = np.random.default_rng(0).integers(0, 4, 37).tolist()
    trace = traced(Tiny(), batch(documents))
    wanted = eager(trace)
    for inter, intra in ((1, 1), (2, 2), (4, 1)):
        for step in simulate(trace, inter, intra).ranks:
            assert max(worst(step, wanted)) <= 1e-12


def test_documents_may_be_numbered_in_bfloat16() -> None:
    given = batch([0] * 4 + [1] * 3 + [256] * 2 + [257] * 4)  # the last two round to one number
    trace = traced(Tiny(), given | {"documents": given["documents"].bfloat16()})
    for step in simulate(trace, 3, 1).ranks:
        assert max(worst(step, eager(trace))) <= 1e-12


def test_heads_that_do_not_divide_are_refused_with_what_would() -> None:
    trace = traced(Tiny(heads=3), batch([0] * 12))
    with pytest.raises(Refused, match=r"groups of 2 ranks are not possible") as caught:
        simulate(trace, 1, 2)
    assert "one of [1]" in str(caught.value)


def test_fewer_than_two_tokens_a_rank_are_refused() -> None:
    trace = traced(Tiny(), batch([0] * 7))
    with pytest.raises((Refused, ValueError)) as caught:
        simulate(trace, 4, 1)
    assert "7" in str(caught.value) and "4" in str(caught.value)


def test_other_devices_are_refused() -> None:
    with pytest.raises(Exception, match=r"meta tensors are not supported"):
        torch.compile(lambda x: x * 2, backend="hsap")(torch.ones(4, device="meta"))


def test_nested_tensors_are_refused() -> None:
    rows = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(Exception, match=r"nested tensors are not supported") as caught:
        torch.compile(lambda x: x * 2, backend="hsap")(rows)
    assert "pass x.values()[None] and position_ids that restart" in str(caught.value)


class Shortened(Tiny):
    """Attends over all tokens, then over all but the last."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids, documents)[:, :-1]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("inter", "intra"), [(1, 1), (2, 1), (2, 2)])
def test_an_attention_over_fewer_tokens(inter: int, intra: int) -> None:
    trace = traced(Shortened(), batch([0, 0, 1, 1, 1, 2, 2, 2, 0]))
    wanted = eager(trace)
    for step in simulate(trace, inter, intra).ranks:
        assert max(worst(step, wanted)) <= 1e-12


class Triangle(Tiny):
    """Reads its length first, then a part of a buffer that is no longer than the longest batch."""

    def __init__(self, longest: int) -> None:
        super().__init__(4)
        self.register_buffer("triangle", torch.ones(longest, longest).tril()[None, None])
        self.places = torch.nn.Parameter(torch.linspace(-1, 1, longest, dtype=torch.float64)[None, :, None])

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        rows, tokens = ids.shape
        x = self.embedding(ids) + self.places[:, :tokens]
        qkv = self.qkv(x).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].mT
        scores = scores.masked_fill(self.triangle[:, :, :tokens, :tokens] == 0, -torch.inf)
        scores = scores.masked_fill(documents[:, None, :, None] != documents[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)


@since((2, 12), "a buffer that is exactly as long fixes the length")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_rows_as_long_as_the_models_buffers(fullgraph: bool) -> None:
    """The buffer's size is the batch's: dynamo takes the one for the other, until it is told that it cannot
    know.  One graph then serves shorter rows too."""
    model = Triangle(17)
    compiled = torch.compile(model, backend="hsap", options=EAGER, fullgraph=fullgraph)
    graphs = None
    for tokens in (17, 17, 9, 16):
        given = batch([0] * 5 + [1] * (tokens - 5))
        got, wanted = compiled(**given), model(**given)
        assert relative(got.detach(), wanted.detach()) <= 1e-13
        found = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        for a, b in zip(
            found, torch.autograd.grad(wanted.square().sum(), list(model.parameters())), strict=True
        ):
            assert relative(a, b) <= 1e-12
        graphs = graphs or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


@since((2, 12), "a buffer that is exactly as long fixes the length")
def test_rows_as_long_as_the_models_buffers_on_many_ranks() -> None:
    trace = traced(Triangle(17), batch([0] * 5 + [1] * 12))
    wanted = eager(trace)
    for inter, intra in ((2, 2), (3, 1)):
        for step in simulate(trace, inter, intra).ranks:
            assert max(worst(step, wanted)) <= 1e-12


class OtherRows(Tiny):
    """Attentions over other numbers of rows than the batch has: ``of`` the rows that come from it."""

    def __init__(self, *of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for of in self.of:
            rows = of(x)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(rows).chunk(3, -1))
            mask = of(documents[:, None, :, None] == documents[:, None, None, :])
            made = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + made.sum(0, keepdim=True) * 0.3
        return x


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", [lambda x: x[:1], lambda x: torch.cat([x, x.flip(0)])], ids=["fewer", "more"])
def test_attentions_over_other_numbers_of_rows(of: Any, order: int) -> None:
    given = batch([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3], 2)
    given["documents"][1] = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    trace = traced(OtherRows(*[of, lambda x: x][::order]), given)
    for inter, intra in ((1, 1), (3, 1), (1, 2), (2, 2)):
        found = simulate(trace, inter, intra)
        assert [planned.batch for planned in found.program.masks][::order] == [of(given["ids"]).shape[0], 2]
        assert max(max(worst(step, eager(trace))) for step in found.ranks) <= 1e-12


class Compared(Tiny):
    """A window that is a parameter: nothing but a comparison reads it, so it has no gradient, and not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.window = torch.nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.slope = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        apart = (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs()
        near = (documents[:, None, :, None] == documents[:, None, None, :]) & (apart < self.window)
        return F.scaled_dot_product_attention(q, k, v, torch.where(near, -self.slope * apart, -torch.inf))


@pytest.mark.parametrize(("inter", "intra"), [(1, 1), (3, 1), (1, 2)])
def test_what_is_only_compared_has_no_gradient(inter: int, intra: int) -> None:
    trace = traced(Compared(), batch([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3]))
    wanted = eager(trace)
    assert len(wanted.gradients) == 4  # of all parameters but the window
    assert max(max(worst(step, wanted)) for step in simulate(trace, inter, intra).ranks) <= 1e-12


class OneHead(Tiny):
    """An attention of (B, S, D), which has one row, behind one of (B, H, S, D)."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids, documents)
        mask = documents[:, :, None] == documents[:, None, :]
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), mask)


def test_attentions_with_and_without_heads() -> None:
    given = batch([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3], 2)
    trace = traced(OneHead(), given)
    for inter, intra in ((1, 1), (3, 1)):
        assert max(max(worst(step, eager(trace))) for step in simulate(trace, inter, intra).ranks) <= 1e-12


class Specialised(Tiny):
    """Looks up its length in a Python table, which makes it a constant."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, documents) * {4: 1.0, 5: 2.0}[ids.shape[1]]


def test_a_length_that_stays_a_constant_is_refused_with_the_line_that_fixed_it() -> None:
    with pytest.raises(Exception, match=r"the sequence length stays a constant") as caught:
        traced(Specialised(), batch([0, 0, 1, 1]))
    assert "test_backend.py:" in str(caught.value) and "{4: 1.0, 5: 2.0}[ids.shape[1]]`" in str(caught.value)


class Given(Tiny):
    """The mask is an input, (B, S, S)."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None]).transpose(1, 2).flatten(2)


class TokensFirst(Tiny):
    """Inputs are (S, B), as torch.nn.Transformer takes them."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3) for t in self.qkv(x).chunk(3, -1))
        mask = documents.T[:, None, :, None] == documents.T[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask).permute(2, 0, 1, 3).flatten(2)


class TorchsOwn(Tiny):
    """torch.nn.MultiheadAttention, which takes (S, B, E) unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, dtype=torch.float64)

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x, first = self.embedding(ids), documents[:, 0]
        return self.attention(x, x, x, attn_mask=first[:, None] != first, need_weights=False)[0]


@pytest.mark.parametrize(
    ("model", "rows"),
    [(Given, 1), (Given, 2), (Given, 12), (TokensFirst, 1), (TokensFirst, 2), (TorchsOwn, 1), (TorchsOwn, 2)],
)
def test_tokens_wherever_they_stand(model: type[Tiny], rows: int) -> None:
    given = batch([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3], rows)
    if model is Given:
        same = given.pop("documents")[:, :, None] == torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3])
        given["mask"] = torch.where(same, 0.0, -torch.inf).double()
    else:
        given = {name: x.T.contiguous() for name, x in given.items()}
    trace = traced(model(), given)
    for inter, intra in ((3, 1), (1, 2), (2, 2)):
        found = simulate(trace, inter, intra)
        assert found.program.fallbacks == () and found.program.masks[0].mask.residual == (model is Given)
        assert max(max(worst(step, eager(trace))) for step in found.ranks) <= 1e-12


def test_a_length_that_stays_a_constant_compiles_for_each_on_one_rank(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Specialised()
    compiled = torch.compile(model, backend="hsap", options=EAGER)
    with caplog.at_level(logging.WARNING, "hsap_compile"):
        for documents in ([0, 0, 1, 1], [0, 0, 1, 1, 1]):
            wanted = model(**batch(documents)).detach()
            assert relative(compiled(**batch(documents)).detach(), wanted) <= 1e-13
    assert "another length will compile again: hsap: the sequence length stays a constant" in caplog.text


class Counting(Tiny):
    """Normalises over all tokens, keeps statistics, and counts what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(11, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        x = self.norm(super().forward(ids, documents).transpose(1, 2)).transpose(1, 2)
        self.seen.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 1)), 0.5)
        return x + self.mean


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_buffers_that_the_model_writes(lower: str) -> None:
    model, reference = Counting(), Counting()
    compiled = torch.compile(model, backend="hsap", options={"lower": lower})
    for documents in ([0, 0, 1, 1, 1, 2], [0, 1, 1, 1], [0, 0, 0]):
        got, wanted = compiled(**batch(documents)), reference(**batch(documents))
        assert relative(got.detach(), wanted.detach()) <= 1e-12
        got.pow(3).sum().backward()
        wanted.pow(3).sum().backward()
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert relative(one.grad, other.grad) <= 1e-10


class Cached(Tiny):
    """Returns its keys, as a model with a key/value cache does."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> Any:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(2), k, v


def test_a_key_value_cache_is_refused_on_many_ranks() -> None:
    trace = traced(Cached(), batch([0] * 8))
    with pytest.raises(Refused, match=r"the model returns a key/value cache") as caught:
        simulate(trace, 2, 1)
    assert "use_cache=False" in str(caught.value)
    assert max(worst(simulate(trace, 1, 1).ranks[0], eager(trace))) <= 1e-12


def test_a_large_output_that_is_gathered_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = traced(Tiny(), batch([0] * 12))
    simulate(trace, 2, 1)
    assert "is gathered on every rank" not in caplog.text
    monkeypatch.setattr(outputs, "LARGE", 1)
    simulate(trace, 2, 1)
    (said,) = {r.getMessage() for r in caplog.records if "is gathered on every rank" in r.getMessage()}
    assert re.search(r"^output 0 of the graph, float64 \[1, 12, \d+\] \(0 MiB\), made at .+, is", said)
    assert said.endswith("options={'outputs': 'local'} keeps this rank's rows and sends nothing")
    caplog.clear()
    simulate(trace, 2, 1, outputs="local")
    assert "is gathered on every rank" not in caplog.text


class Positioned(Tiny):
    """Causal over the whole row, whatever the positions say."""

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.embedding(positions)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(2)


def test_restarting_positions_without_a_mask_are_warned_of_once() -> None:
    model = torch.compile(Positioned(), backend="hsap", options=EAGER)
    ids = torch.arange(7)[None]
    with pytest.warns(UserWarning, match=r"really attends across documents.*attention_mask=None"):
        model(ids, torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, torch.tensor([[0, 1, 0, 1, 2, 3, 4]]))
        torch.compile(Positioned(), backend="hsap", options=EAGER)(ids, torch.arange(7)[None])


def test_every_pass_leaves_a_readable_graph(caplog: pytest.LogCaptureFixture) -> None:
    trace = traced(Tiny(), batch([0, 0, 1, 1, 1, 2]))
    with caplog.at_level(logging.DEBUG, logger="hsap_compile"):
        simulate(trace, 1, 2)
    text = caplog.text
    for name in ("capture", "lift_mask", "shard_tokens", "partition_attention"):
        assert f"after {name}:" in text
    assert "torch.ops.hsap.all_to_all.default" in text
    assert "partition_attention: 1 attentions over 1 x 2 ranks" in text


TRACED = """
import torch
from torch.nn import functional as F

def attend(x, doc):
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    mask = doc[:, None, :, None] == doc[:, None, None, :]
    return F.scaled_dot_product_attention(q, q, q, mask)

doc = torch.tensor([[0, 0, 1, 1, 1]])
torch.compile(attend, backend="hsap", options={"lower": "eager"})(torch.randn(1, 5, 8), doc)
"""


def test_a_trace_holds_the_graph_after_every_pass(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TRACED], check=True, env=environment, timeout=300)
    (written,) = tmp_path.glob("*.log")
    found: dict[str, str] = {}
    for line in written.read_text().splitlines():
        if not line.startswith("\t"):  # the payload of the entry before
            entry = json.loads(line[line.index("{") :]).get("artifact", {}).get("name", "")
            found.update({entry: ""} if entry.startswith("hsap_") else {})
        elif entry in found:
            found[entry] += line + "\n"
    assert list(found) == ["hsap_capture", "hsap_lift_mask", "hsap_partition_attention"]
    assert "scaled_dot_product_attention" in found["hsap_capture"]
    assert "torch.ops.hsap.attention" in found["hsap_lift_mask"]
    assert "torch.ops.hsap.attend" in found["hsap_partition_attention"]


class Likelihood(Tiny):
    """The mean log-probability of each row's labels, which nothing but a gather combines with the tokens."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids, documents)[:, :-1].log_softmax(-1)
        return logits.gather(-1, labels[:, 1:, None]).squeeze(-1).mean(-1).sum()


def test_labels_as_long_as_the_rows_stay_with_them() -> None:
    given = batch([0, 0, 1, 1, 1, 2, 2, 2, 0])
    trace = traced(Likelihood(), given | {"labels": given["ids"].flip(1) % 8})
    found = simulate(trace, 3, 1)
    assert found.program.fallbacks == ()
    assert max(max(worst(step, eager(trace))) for step in found.ranks) <= 1e-12


class Beside(Tiny):
    """The tokens, and how many others there are."""

    def forward(self, ids: torch.Tensor, documents: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, documents) * others.sum(1)[:, None, None] * others.shape[1]


def _beside() -> list[float]:
    """Errors when another input is first as long as the rows, and then is not."""
    model, errors = Beside(), []
    compiled = torch.compile(model, backend="hsap", options=EAGER)
    for tokens, others in ((9, 9), (9, 7), (8, 8), (6, 11)):
        given = batch(list(range(tokens))) | {"others": torch.arange(1, others + 1)[None]}
        errors.append(relative(compiled(**given).detach(), model(**given).detach()))
    return errors


def test_another_input_may_be_as_long_by_chance(pool: Pool) -> None:
    assert max(max(errors) for errors in pool.run(_beside, world=2)) <= 1e-12
