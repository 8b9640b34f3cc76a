"""Attentions over a constant number of tokens more or fewer than the inputs have: inputs cut in the model,
a prompt or a class token in front.  Nothing is gathered; outputs, loss and all gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hsap_compile.passes._attentions as attentions
from mask_cases import causal, columns
from simulate import Traced, eager, rebatched, simulate, simulate_all, since, traced, worst
from strategies import dynamic
from test_collectives import in_graph
from test_shard_tokens import fallbacks
from test_shifts import exchanges

WIDTH, WORDS, PROMPT = 8, 11, 3
TIGHT = 1e-12
Pattern = Callable[["Model", Tensor, Tensor], tuple[Tensor, ...]]


class Model(nn.Module):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pattern = pattern
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WORDS)
        self.prompt, self.sink = nn.Parameter(torch.randn(PROMPT, WIDTH)), nn.Parameter(torch.randn(2))
        self.module = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        self.triangle = nn.Buffer(torch.rand(64, 64).tril() > 0.2)
        self.double()

    def attend(self, x: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        return x + y.transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()  # type: ignore[no-any-return]

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        return F.cross_entropy(logits.transpose(1, 2), labels), logits

    def prompted(self, x: Tensor, count: int = PROMPT) -> Tensor:
        return torch.cat([self.prompt[:count].expand(x.shape[0], -1, -1), x], 1)

    def forward(self, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        return self.pattern(self, ids, documents)


def packed(documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & causal(documents[..., None])


def cut(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = ids[:, :-1]
    return m.loss(m.attend(m.words(x) + m.places(torch.arange(x.shape[1]))), ids[:, 1:])


def cut_documents(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    mask = packed(documents[:, :-1])
    return m.loss(m.attend(m.attend(m.words(ids[:, :-1]), mask), mask), ids[:, 1:])


def cut_when_embedded(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    return m.loss(m.attend(m.words(ids)[:, 1:], packed(documents[:, 1:])), ids[:, :-1])


def cut_at_both_ends(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = ids[:, 1:-1]
    distance = columns(x[..., None])[:, None] - columns(x[..., None])
    return m.loss(m.attend(m.words(x), (distance >= 0) & (distance < 4)), ids[:, 2:])


def labels_of_one_rank(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = ids[:, :-1]
    labels = ids[:, 1:].masked_fill(columns(x[..., None]) > 1, -100)
    return m.loss(m.attend(m.words(ids)[:, :-1], packed(documents[:, :-1])), labels)


def finite_mask(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """With queries that attend to nothing, hence to all tokens of the attention alike."""
    x = ids[:, :-1]
    mask = packed(documents[:, :-1]) & (x != 2)[:, None, None, :]
    bias = torch.where(mask, 0.0, -1e5).double()  # of finfo.min, flash attention's log-sum-exp has no digits
    return m.loss(m.attend(m.attend(m.words(ids)[:, :-1], bias), bias), ids[:, 1:])


def biased(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """By a tensor of the attention's tokens alone, read from its end as well."""
    x = ids[:, :-1]
    weights = m.words(ids)[:, :-1][..., 0]
    turned = x.double().sin()[:, x.shape[1] - 1 - columns(x[..., None])]
    bias = (weights + turned)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    return m.loss(m.attend(m.words(ids)[:, :-1], bias), ids[:, 1:])


def dense(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    mask = packed(documents).double().cumsum(1) > 0  # no formula of q and k
    return m.loss(m.attend(m.words(ids)[:, :-1], mask[:, :, :-1, :-1]), ids[:, 1:])


def clamped_distances(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = ids[:, :-1]
    at = columns(x[..., None])
    bias = m.places((at[None] - at[:, None]).clamp(-10, 10) + 10)[..., :2].permute(2, 0, 1)
    return m.loss(m.attend(m.words(ids)[:, :-1], bias[None]), ids[:, 1:])


def counted_from_the_end(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Negative indices count from the end of what is as long as the attention."""
    x = ids[:, :-1]
    at = columns(x[..., None])
    weights = m.places(at)[:, 0] + x.double().sin()[0]
    return m.loss(m.attend(m.words(ids)[:, :-1], weights[at[None] - at[:, None]][None, None]), ids[:, 1:])


def cut_table(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Of a fixed size, cut to the attention's."""
    x = ids[:, :-1]
    mask = m.triangle[: x.shape[1], : x.shape[1]]
    return m.loss(m.attend(m.words(ids)[:, :-1], mask), ids[:, 1:])


def divided_scores(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """By numbers of tokens, and of their places: of other columns there must be none that is zero."""
    x = m.words(ids)[:, :-1]
    q, k, v = m.heads(x)
    heat = F.softplus(x[..., 0])[:, None, :, None] * (1.0 + columns(x))
    return m.loss(x + (((q @ k.mT) / heat).softmax(-1) @ v).transpose(1, 2).flatten(2), ids[:, 1:])


def divided_tokens(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.words(ids)[:, :-1] / m.places.weight[: ids.shape[1] - 1, :1].abs()
    return m.loss(m.attend(x, packed(documents[:, :-1])), ids[:, 1:])


def context(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Tokens of the row attend to a few of a prompt."""
    x = m.attend(m.words(ids)[:, :-1])
    q, _, _ = m.heads(x)
    _, k, v = m.heads(m.prompt.expand(len(x), -1, -1))
    return m.loss(x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), ids[:, 1:])


def with_sink(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.words(ids)[:, :-1]
    q, k, v = m.heads(x)
    scores = (q @ k.mT).masked_fill(~causal(q), float("-inf"))
    sink = m.sink[None, :, None, None].expand(len(x), 2, x.shape[1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return m.loss((weights @ v).transpose(1, 2).flatten(2), ids[:, 1:])


def two_lengths(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """A second head that predicts one token further on, from a row that is one shorter."""
    x = m.attend(m.words(ids), packed(documents))
    first, _ = m.loss(x[:, :-1], ids[:, 1:])
    x = m.attend(x[:, :-1] + m.words(ids[:, 1:]), packed(documents[:, 1:]))
    second, logits = m.loss(x[:, :-1], ids[:, 2:])
    return first + 0.3 * second, logits


def soft_prompt(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.attend(m.attend(m.prompted(m.words(ids))))
    return m.loss(x[:, PROMPT:-1], ids[:, 1:])


def prompt_of_all_documents(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    owner = F.pad(documents + 1, (PROMPT, 0))
    same = (owner[:, :, None] == owner[:, None, :]) | (owner == 0)[:, None, :]
    x = m.attend(m.prompted(m.words(ids)), (same & causal(owner[..., None]))[:, None])
    return m.loss(x[:, PROMPT:-1], ids[:, 1:])


def prompt_in_every_layer(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.attend(m.prompted(m.words(ids)))
    x = m.attend(m.prompted(x[:, PROMPT:]))[:, PROMPT:]
    return m.loss(x, ids)


def class_token(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.attend(m.prompted(m.words(ids), 1), causal=False)[:, 0]
    return F.cross_entropy(m.head(x), ids[:, 0]), x


def registers_behind(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = torch.cat([m.words(ids), m.prompt.expand(len(ids), -1, -1)], 1)
    return m.loss(m.attend(x, causal=False)[:, :-PROMPT], ids)


def first_word_in_front(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.words(F.pad(ids, (1, 0), value=3))
    return m.loss(m.attend(x)[:, :-1], ids)


def padded_then_cut(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Embedded are more tokens than are attended to, and all of them count."""
    x = m.words(F.pad(ids, (1, 0)))
    loss, logits = m.loss(m.attend(x[:, 1:]), ids)
    return loss + (x * x).mean(), logits


def with_memory(m: Model, x: Tensor, in_front: bool = True) -> tuple[Tensor, ...]:
    """Queries of the row; keys and values of the row and of a few learned ones."""
    (q, k, v), (_, k_more, v_more) = m.heads(x), m.heads(m.prompt.expand(len(x), -1, -1))
    both = ((k_more, k), (v_more, v)) if in_front else ((k, k_more), (v, v_more))
    return q, *(torch.cat(parts, 2) for parts in both)


def memory_in_front(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """In every layer, seen by all documents."""
    x, owner = m.words(ids), F.pad(documents + 1, (PROMPT, 0))
    same = (documents[:, :, None] + 1 == owner[:, None, :]) | (owner == 0)[:, None, :]
    mask = same & (columns(x)[:, None] + PROMPT >= torch.arange(owner.shape[1]))
    for _ in range(2):
        q, k, v = with_memory(m, x)
        x = x + F.scaled_dot_product_attention(q, k, v, mask[:, None]).transpose(1, 2).flatten(2)
    return m.loss(x[:, :-1], ids[:, 1:])


def memory_behind(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    x = m.attend(m.words(ids), packed(documents))
    q, k, v = with_memory(m, x, in_front=False)
    return m.loss(x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), ids)


def memory_and_distances(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """A window that memory is not part of, and a learned bias by distance; some queries have memory alone."""
    x = m.words(ids[:, :-1])
    q, k, v = with_memory(m, x)
    at = columns(x)[:, None]
    distance = at - torch.arange(k.shape[2]) + PROMPT
    bias = m.places(distance.clamp(0, 9))[..., :2].permute(2, 0, 1)
    seen = (distance > at) | ((distance > 0) & (distance < 4))
    scores = (q @ k.mT + bias).masked_fill(~seen, float("-inf"))
    return m.loss(x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), ids[:, 1:])


def memory_and_finite_mask(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """A query may attend to nothing, hence to every key alike, and to memory; a sink takes its part."""
    x = m.words(ids)
    q, k, v = with_memory(m, x)
    at = columns(x)[:, None]
    seen = (torch.arange(k.shape[2]) <= at + PROMPT) & (at % 3 > 0)
    scores = (q @ k.mT).masked_fill(~seen, -1e5)
    sink = m.sink[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return m.loss(x + (weights @ v).transpose(1, 2).flatten(2), ids)


def written_into_zeros(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Rows that start where the prompt leaves room for itself."""
    y = torch.zeros(*ids.shape, WIDTH, dtype=torch.float64)
    y[:, torch.tensor([1, 4])] = m.prompt[:2]
    y = y.index_copy(1, torch.tensor([0, 6]), m.prompt[1:].expand(len(ids), -1, -1))
    return m.loss(m.attend(m.prompted(y + m.words(ids)))[:, PROMPT:], ids)


def torch_memory(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Torch's module, with a learned key and one of zeros."""
    x, mask = m.words(ids), ~causal(ids[..., None])
    y, _ = m.module(x, x, x, need_weights=False, attn_mask=mask)
    return m.loss((x + y)[:, :-1], ids[:, 1:])


def fewer_keys(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """Nobody attends to the prompt, which attends to all tokens."""
    x = m.prompted(m.words(ids))
    q, k, v = m.heads(x)
    y = F.scaled_dot_product_attention(q, k[:, :, PROMPT:], v[:, :, PROMPT:])
    return m.loss((x + y.transpose(1, 2).flatten(2))[:, PROMPT:], ids)


def mixed_streams(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    """A softmax over n of n numbers for every token, and for every head, is no attention of n queries."""
    x = m.words(ids)
    streams = x.unflatten(-1, (2, 4))
    mixed = (streams @ streams.mT).softmax(-1) @ streams
    x = m.attend(x + mixed.flatten(2), packed(documents))
    shares = (m.heads(x)[0] @ m.sink.outer(m.sink)[:, :1].expand(2, 4).mT).softmax(-1)
    return m.loss(x + shares.mean((1, 3))[..., None], ids)


#: By name.  None of them gathers, or moves a row to another rank.
PATTERNS: dict[str, Pattern] = {
    f.__name__: f
    for f in [
        cut,
        cut_documents,
        cut_when_embedded,
        cut_at_both_ends,
        labels_of_one_rank,
        finite_mask,
        biased,
        dense,
        with_sink,
        clamped_distances,
        counted_from_the_end,
        cut_table,
        divided_scores,
        context,
        two_lengths,
        soft_prompt,
        prompt_of_all_documents,
        prompt_in_every_layer,
        class_token,
        registers_behind,
        first_word_in_front,
        padded_then_cut,
        memory_in_front,
        memory_behind,
        memory_and_distances,
        torch_memory,
        memory_and_finite_mask,
        written_into_zeros,
        fewer_keys,
        mixed_streams,
    ]
}
PACKS = [[5, 1, 9, 4, 8], [8], [21, 1, 1, 9], [3, 2, 6]]


def batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    made, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    return {"ids": torch.randint(0, WORDS, (2, tokens), generator=made), "documents": documents.contiguous()}


def check(pattern: Pattern, mesh: tuple[int, int], gathers: int = 0, **options: object) -> int:
    """One graph for packs of other lengths.  Returns its exchanges of shifted rows."""
    first, *others = (batch(lengths, seed) for seed, lengths in enumerate(PACKS))
    of = traced(Model(pattern), dynamic(first))
    calls = [of.args, *(rebatched(of, first, other) for other in others)]
    with fallbacks() as found:
        results = simulate_all(of, *mesh, *calls, **options)
    assert len(found) == gathers, found
    for result, args in zip(results, calls, strict=True):
        expected = eager(of, args)
        assert all(max(worst(step, expected)) <= TIGHT for step in result.ranks)
    return exchanges(results[0])


@pytest.mark.parametrize("mesh", [(3, 1), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_stays_local(name: str, mesh: tuple[int, int]) -> None:
    assert check(PATTERNS[name], mesh) == 0


def test_a_part_of_a_parameter_divides() -> None:
    """Rows without a number of it are not divided by zero."""
    check(divided_tokens, (3, 1))


@pytest.mark.parametrize("pattern", [cut, soft_prompt])
def test_one_process_partitions_the_longest_row(pattern: Pattern) -> None:
    of = traced(Model(pattern), dynamic(batch(PACKS[0])), ranks=1)
    result = simulate(of, 1, 1)
    assert len(result.program.traffic) > 0 and max(worst(result.ranks[0], eager(of))) <= TIGHT


def test_a_token_that_is_cut_may_be_one_that_has_no_logarithm() -> None:
    """Nor has the loss a gradient there, of the row or of what it is multiplied with."""

    def logarithms(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        x = m.attend(m.words(ids)) * (columns(ids[..., None]) > 1)[:, None]
        y = x[:, 2:] * m.prompt[0]
        known = x.detach()[:, 2:]
        return y.square().sum(-1).log().mean(), y.norm(dim=-1).rsqrt(), (m.prompt[1] / known).mean()

    check(logarithms, (4, 1), placement="contiguous")  # of 8 tokens, the first rank has none that is kept


def test_checkpointed_layers_count() -> None:
    def checkpointed(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        x = checkpoint(m.attend, m.prompted(m.words(ids)), use_reentrant=False)
        return m.loss(x[:, PROMPT:], ids)

    check(checkpointed, (2, 1))


def test_another_input_of_words() -> None:
    """Rows are as long as the input that is nearest to what is attended over."""

    class Kinds(Model):
        def forward(self, kind: Tensor, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
            loss, logits = cut(self, ids, documents)
            return loss * kind.sum(), logits

    of = traced(Kinds(cut), {"kind": torch.tensor([1, 2, 3]), **batch(PACKS[0])})
    with fallbacks() as found:
        steps = simulate(of, 2, 1).ranks
    assert found == [] and all(max(worst(step, eager(of))) <= TIGHT for step in steps)


def test_the_largest_of_an_input_behind_a_prompt() -> None:
    class Vectors(Model):
        def forward(self, ids: Tensor, documents: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
            most, place = vectors.max(1)
            loss, logits = self.loss(self.attend(self.prompted(vectors + most[:, None]))[:, PROMPT:], ids)
            return loss, logits, most, place

    first = batch(PACKS[0])
    vectors = torch.randn(*first["ids"].shape, WIDTH, dtype=torch.float64, requires_grad=True)
    of = traced(Vectors(cut), {**dynamic(first), "vectors": vectors})
    with fallbacks() as found:
        steps = simulate(of, 3, 1).ranks
    assert found == [] and all(max(worst(step, eager(of))) <= TIGHT for step in steps)


@since((2, 12), "a buffer that is exactly as long fixes the length")
def test_a_row_that_is_cut_to_a_buffers_length() -> None:
    """Torch takes the one size for the other, until it is told that it cannot know."""

    class Block(Model):
        def forward(self, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
            x = self.words(ids[:, :-1])
            q, k, v = self.heads(x)
            rows = x.shape[1]
            scores = (q @ k.mT).masked_fill(~self.block[:, :, :rows, :rows], float("-inf"))
            return self.loss(x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), ids[:, 1:])

    model = Block(cut)
    model.block = nn.Buffer(torch.ones(26, 26, dtype=torch.bool).tril()[None, None])
    of = traced(model, batch(PACKS[0]))
    assert of.length is not None
    steps = simulate(of, 2, 1).ranks
    assert all(max(worst(step, eager(of))) <= TIGHT for step in steps)


@pytest.mark.parametrize("pattern", [cut_documents, memory_in_front])
def test_received_in_stages(pattern: Pattern) -> None:
    check(pattern, (2, 1), received=2 * 2 * 2 * WIDTH * 8 * 4)


def test_found_without_marked_dimensions() -> None:
    """The first trace knows of no symbol, and no input is as long as the rows."""
    first = batch(PACKS[0])
    for pattern, more in ((cut, -1), (cut_at_both_ends, -2), (soft_prompt, PROMPT), (first_word_in_front, 1)):
        of = traced(Model(pattern), first)
        assert of.length is not None
        given = simulate(of, 2, 1, backward=False).program.tokens
        assert isinstance(given, tuple) and given[-1] == more


def test_a_class_token_moves_nothing() -> None:
    result = simulate(traced(Model(class_token), dynamic(batch(PACKS[0]))), 2, 1, backward=False)
    counted = in_graph(result)
    assert {name: counted[name] for name in ("all_to_all", "sum_ranks", "gather")} == {
        "all_to_all": 1, "sum_ranks": 1, "gather": 0
    }  # fmt: skip


def test_keys_behind_those_of_a_callers_cache_are_returned() -> None:
    """As in prefix tuning: a cache that the model only begins is refused."""

    def cached(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        q, k, v = with_memory(m, m.words(ids))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return *m.loss(y, ids), k, v

    check(cached, (2, 1))


def test_layers_have_one_mask() -> None:
    def layers(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        bias = ids[:, :-1].double().cumsum(1).sin()[:, None, None, :].expand(-1, 1, ids.shape[1] - 1, -1)
        return m.loss(m.attend(m.attend(m.words(ids[:, :-1]), bias), bias), ids[:, 1:])

    program = simulate(traced(Model(layers), dynamic(batch(PACKS[0]))), 2, 1, backward=False).program
    assert len(program.masks) == 1 and len(program.traffic) == 2


def test_columns_that_are_no_tokens_must_be_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is able to fail: without them being kept apart, other numbers come out."""
    monkeypatch.setattr(attentions, "placed", lambda mask, queries, keys: mask)
    of = traced(Model(class_token_of_few), dynamic(batch(PACKS[0])))
    assert _error(of) > 1e-3


def class_token_of_few(m: Model, ids: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
    return m.loss(m.attend(m.words(ids)[:, :-1], causal=False), ids[:, 1:])


def _error(of: Traced) -> float:
    return max(max(worst(step, eager(of))) for step in simulate(of, 2, 1).ranks)
