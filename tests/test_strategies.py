"""Every strategy against brute force: pairs token by token, bytes by moving what it moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsap_compile.plan.cost import AttentionShape
from hsap_compile.plan.load import LEVELS, Load, Setting
from hsap_compile.plan.strategies import (
    CHUNKS_PER_RANK,
    STRATEGIES,
    chunk_lpt,
    contiguous_ring,
    document_zigzag,
    padding,
    ulysses,
    usp,
    zigzag_ring,
)
from test_pieces import BANDS, allowed

SHAPES = (AttentionShape(4, 4, 2, 4), AttentionShape(4, 2, 3, 2), AttentionShape(8, 1, 2, 2))


@st.composite
def problems(draw: st.DrawFn, powers_of_two: bool = False) -> Setting:
    sizes = [1, 2, 4] if powers_of_two else [1, 2, 3, 4]
    inter, intra = draw(st.sampled_from(sizes)), draw(st.sampled_from([1, 2] if powers_of_two else sizes))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    lengths[0] += max(0, 2 * inter * intra - sum(lengths))
    return Setting(tuple(lengths), inter, intra, draw(BANDS), draw(st.sampled_from(SHAPES)))


def parts(tokens: int, n: int) -> list[np.ndarray]:
    """n runs of tokens, from floor(i S / n) on."""
    return [np.arange(i * tokens // n, (i + 1) * tokens // n) for i in range(n)]


def zigzag(tokens: np.ndarray, n: int) -> list[np.ndarray]:
    """Parts i and 2n - 1 - i of these tokens."""
    of = [tokens[p] for p in parts(len(tokens), 2 * n)]
    return [np.concatenate((of[i], of[2 * n - 1 - i])) for i in range(n)]


class Post:
    """Counts what is sent."""

    def __init__(self, s: Setting) -> None:
        self.group = [r // s.intra for r in range(s.ranks)]
        self.sent, self.received = np.zeros((2, s.ranks), int), np.zeros((2, s.ranks), int)

    def send(self, a: int, b: int, size: int) -> None:
        if a != b:
            level = int(self.group[a] != self.group[b])
            self.sent[level, a] += size
            self.received[level, b] += size

    def check(self, load: Load, which: str, back: bool = False) -> None:
        for i, level in enumerate(LEVELS):
            moved = load.bytes[level, which]  # type: ignore[index]
            a, b = (self.received, self.sent) if back else (self.sent, self.received)
            assert moved.sent.tolist() == a[i].tolist(), (level, which)
            assert moved.received.tolist() == b[i].tolist(), (level, which)


def check_area(s: Setting, load: Load, held: list[np.ndarray], heads: int = 1) -> None:
    """held: tokens of each rank, or of each of `heads` ranks side by side."""
    mask = allowed(list(s.lengths), s.band)
    area = np.repeat([mask[tokens].sum() / heads for tokens in held], heads)
    assert load.area == pytest.approx(area)
    own = np.repeat([mask[np.ix_(tokens, tokens)].sum() / heads for tokens in held], heads)
    assert sum(x.pairs for x in load.forward if not x.remote) == pytest.approx(own)


def ring(s: Setting, load: Load, held: list[np.ndarray], row_bytes: int, ways: int = 1) -> None:
    """Blocks go round until each member has seen all; backward their gradients go on until they are home."""
    n = len(held)
    there, back = Post(s), Post(s)
    at, seen = list(range(n)), [{i} for i in range(n)]
    while any(len(x) < n for x in seen):
        for i in range(n):
            for j in range(ways):
                for post in (there, back):
                    post.send(i * ways + j, (i + 1) % n * ways + j, len(held[at[i]]) * row_bytes)
        at = [at[i - 1] for i in range(n)]
        for i in range(n):
            seen[i].add(at[i])
    for block in range(n):  # a gradient begins at its owner, and needs n steps to be home again
        for step in range(n):
            i = block + step
            for j in range(ways):
                back.send(i % n * ways + j, (i + 1) % n * ways + j, len(held[block]) * row_bytes)
    for name, post in (("forward", there), ("backward", back)):
        load_level = load.bytes["inter", name]  # type: ignore[index]
        assert load_level.sent.tolist() == post.sent[1].tolist()
        assert load_level.received.tolist() == post.received[1].tolist()
        if ways == 1:
            post.check(load, name)


def heads(s: Setting, held: list[np.ndarray], ways: int) -> Post:
    """Ranks of `ways` side by side get each other's heads of all tokens, and give outputs back."""
    post, shape = Post(s), s.shape
    for r, tokens in enumerate(held):
        first = r // ways * ways
        for other in range(first, first + ways):
            mine = range(
                (other - first) * shape.query_heads // ways, (other - first + 1) * shape.query_heads // ways
            )
            kv = {h * shape.kv_heads // shape.query_heads for h in mine}
            row = (len(mine) + 2 * len(kv)) * shape.head_dim * shape.dtype_bytes
            post.send(r, other, len(tokens) * row)
            post.send(other, r, len(tokens) * len(mine) * shape.head_dim * shape.dtype_bytes)
    return post


def ranks_of(groups: list[int], intra: int) -> list[np.ndarray]:
    """As many tokens as each rank of each group holds; which they are does not matter."""
    return [np.arange(n // intra + (j < n % intra)) for n in groups for j in range(intra)]


@settings(max_examples=30, deadline=None)
@given(problems())
def test_rings(s: Setting) -> None:
    for strategy, held in (
        (contiguous_ring, parts(s.tokens, s.ranks)),
        (zigzag_ring, zigzag(np.arange(s.tokens), s.ranks)),
    ):
        load = strategy(s)
        assert load.tokens.tolist() == [len(x) for x in held]
        check_area(s, load, held)
        ring(s, load, held, s.shape.kv_row_bytes)


def check_gather(s: Setting, load: Load, held: list[int]) -> None:
    post, row = Post(s), s.shape.kv_row_bytes
    has = [{r} for r in range(s.ranks)]
    for r in range(s.ranks):
        for other in range(r % s.intra, s.ranks, s.intra):  # equal positions of all groups
            post.send(other, r, held[other] * row)
            has[r].add(other)
    for r in range(s.ranks):
        first = r // s.intra * s.intra
        for other in range(first, first + s.intra):
            for block in has[other]:
                post.send(other, r, held[block] * row)
    post.check(load, "forward")
    post.check(load, "backward", back=True)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_document_zigzag_and_padding(s: Setting) -> None:
    longest = (max(s.lengths),) * len(s.lengths)
    for load, lengths in ((document_zigzag(s), s.lengths), (padding(s), longest)):
        held: list[list[int]] = [[] for _ in range(s.ranks)]
        for start, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
            for mine, tokens in zip(held, zigzag(np.arange(start, start + n), s.ranks), strict=True):
                mine += tokens.tolist()
        assert load.tokens.tolist() == [len(x) for x in held]
        padded = Setting(tuple(lengths), s.inter, s.intra, s.band, s.shape)
        check_area(padded, load, [np.array(x, int) for x in held])
        check_gather(s, load, [len(x) for x in held])


@settings(max_examples=30, deadline=None)
@given(problems(powers_of_two=True))
def test_heads(s: Setting) -> None:
    rows = ranks_of([s.tokens], s.ranks)
    if s.shape.query_heads % s.ranks == 0:
        load = ulysses(s)
        assert load.tokens.tolist() == [len(x) for x in rows]
        check_area(s, load, [np.arange(s.tokens)], s.ranks)
        post = heads(s, rows, s.ranks)
        post.check(load, "forward")
        post.check(load, "backward", back=True)
    groups = zigzag(np.arange(s.tokens), s.inter)
    load = usp(s)
    rows = ranks_of([len(x) for x in groups], s.intra)
    assert load.tokens.tolist() == [len(x) for x in rows]
    check_area(s, load, groups, s.intra)
    post = heads(s, rows, s.intra)
    assert load.bytes["intra", "forward"].sent.tolist() == post.sent[0].tolist()
    assert load.bytes["intra", "backward"].sent.tolist() == post.received[0].tolist()
    kv = max(1, s.shape.kv_heads // s.intra) * 2 * s.shape.head_dim * s.shape.dtype_bytes
    ring(s, load, groups, kv, s.intra)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_chunk_lpt(s: Setting) -> None:
    load, mask = chunk_lpt(s), allowed(list(s.lengths), s.band)
    chunks = parts(s.tokens, CHUNKS_PER_RANK * s.ranks)
    held: list[list[int]] = [[] for _ in range(s.ranks)]
    count, area = [0] * s.ranks, [0] * s.ranks
    for i in sorted(range(len(chunks)), key=lambda i: (-mask[chunks[i]].sum(), i)):
        free = [r for r in range(s.ranks) if count[r] < CHUNKS_PER_RANK]
        r = min(free, key=lambda r: (area[r], r))
        held[r] += chunks[i].tolist()
        count[r] += 1
        area[r] += mask[chunks[i]].sum()
    assert load.tokens.tolist() == [len(x) for x in held]
    check_area(s, load, [np.array(x, int) for x in held])
    post = Post(s)
    for r, mine in enumerate(held):
        for other, theirs in enumerate(held):
            post.send(other, r, int(mask[mine][:, theirs].any(axis=0).sum()) * s.shape.kv_row_bytes)
    post.check(load, "forward")
    post.check(load, "backward", back=True)


@settings(max_examples=30, deadline=None)
@given(problems(powers_of_two=True), st.sampled_from(sorted(set(STRATEGIES) - {"padding"})))
def test_all_of_the_mask_is_computed_and_what_is_sent_arrives(s: Setting, name: str) -> None:
    if name == "ulysses" and s.shape.query_heads % s.ranks:
        return
    load = STRATEGIES[name](s)
    assert load.tokens.sum() == s.tokens
    assert math.isclose(load.area.sum(), allowed(list(s.lengths), s.band).sum())
    assert len(load.bytes) == 4
    for moved in load.bytes.values():
        assert moved.sent.sum() == moved.received.sum()
        assert moved.sent.min() >= 0


@pytest.mark.parametrize(("strategy", "intra", "ways"), [(ulysses, 1, 3), (usp, 3, 3)])
def test_heads_that_do_not_divide(strategy, intra, ways) -> None:
    with pytest.raises(ValueError) as refused:
        strategy(Setting((60,), 3 // intra, intra))
    assert str(refused.value) == (
        f"{strategy.__name__}: got {ways} ranks to share 32 query heads; wanted a divisor of 32: "
        "use fewer ranks, or another strategy"
    )
