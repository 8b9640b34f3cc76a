"""From slices to calls over sequences: every pair once, in few calls, and rows in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attention_cases import drawn, packs
from hsap_compile.kernels import sequences
from hsap_compile.kernels.sequences import ALL, CAUSE, REST, Calls, Rows
from hsap_compile.kernels.slices import BAND, CAUSAL, FULL, MOD
from hsap_compile.plan import Attended, MeshShape, make


def without_formulas(arguments: dict[str, Any]) -> dict[str, Any]:
    """Slices that a formula decides become full ones."""
    rows = [[*row[:4], FULL if row[4] == MOD else row[4], *row[5:]] for row in arguments["slices"]]
    return {**arguments, "slices": rows}


def table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)


def pairs_of(rows: Sequence[Sequence[int]], own: int) -> Counter[tuple[int, int]]:
    """How often slices allow (query, key)."""
    found: Counter[tuple[int, int]] = Counter()
    for q0, q1, k0, k1, kind, lo, hi in rows:
        lo, hi = {FULL: (-(2**40), 2**40), CAUSAL: (0, 2**40), BAND: (lo, hi)}[kind]
        for i in range(q1 - q0):
            found.update((q0 + i, k0 + j) for j in range(k1 - k0) if lo <= i - j <= hi)
    return found


def numbers(rows: Rows) -> list[int]:
    at = np.arange(rows.start, rows.start + rows.size) if rows.numbers is None else rows.numbers
    assert len(at) == rows.size
    return at.tolist()


def pairs_seen(made: Calls, own: int) -> Counter[tuple[int, int]]:
    """How often calls compute (query, key), as flash attention understands them."""
    found: Counter[tuple[int, int]] = Counter()
    before: set[int] = set()
    for call in made.calls:
        queries, keys = numbers(call.q), [x + own * call.remote for x in numbers(call.k)]
        assert len(set(queries)) == len(queries) and call.first is before.isdisjoint(queries)
        before.update(queries)
        (left, right), longest = call.window, [0, 0]
        for a, b, c, d in zip(call.q_ends, call.q_ends[1:], call.k_ends, call.k_ends[1:], strict=False):
            n, m = b - a, d - c
            longest = [max(longest[0], n), max(longest[1], m)]
            seen: Counter[int] = Counter()
            for x in range(n):
                at = x + m - n
                sees = [
                    y for y in range(m) if (left < 0 or y >= at - left) and (right < 0 or y <= at + right)
                ]
                assert sees, "a query without a key"
                seen.update(sees)
                found.update((queries[a + x], keys[c + y]) for y in sees)
            assert len(seen) == m, "a key that nobody sees"
        assert call.longest == tuple(longest)
    return found


def twice(made: Calls, remote: bool) -> bool:
    times = Counter(x for call in made.calls if call.remote is remote for x in numbers(call.k))
    return any(n > 1 for n in times.values())


def check(arguments: dict[str, Any]) -> None:
    rows, own = without_formulas(arguments)["slices"], arguments["own"]
    made = sequences.calls(table(rows), own, arguments["remote"])
    sizes = [call.q.size for call in made.calls]
    assert sizes == sorted(sizes, reverse=True)
    assert pairs_seen(made, own) == pairs_of(rows, own)
    times = Counter(x for call in made.calls for x in numbers(call.q))
    assert made.shared_queries == any(n > 1 for n in times.values())
    assert (made.shared_keys, made.shared_remote) == (twice(made, False), twice(made, True))


@settings(max_examples=150, deadline=None)
@given(drawn())
def test_every_pair_once(arguments: dict[str, Any]) -> None:
    check(arguments)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 2, 0, 2, CAUSAL, 0, 0], [2, 6, 2, 6, BAND, 0, 0]],  # a window that begins two keys further
        [[0, 5, 0, 5, CAUSAL, 0, 0], [5, 20, 5, 20, BAND, 0, 3]],  # one key more than the window
        [[0, 4, 0, 4, CAUSAL, 0, 0], [4, 19, 4, 19, BAND, 0, 3], [2, 3, 8, 9, FULL, 0, 0]],
        [[0, 2, 0, 2, CAUSAL, 0, 0], [2, 9, 0, 2, FULL, 0, 0]],
    ],
    ids=str,
)
def test_what_is_nearly_one_sequence(rows: list[list[int]]) -> None:
    check({"slices": rows, "own": 20, "remote": 0})


@settings(max_examples=60, deadline=None)
@given(packs())
def test_every_pair_of_packs_once(arguments: dict[str, Any]) -> None:
    check(arguments)


def of_rank(lengths: list[int], ranks: int, rank: int, window: int | None = None) -> tuple[Calls, int]:
    """The calls of one rank of ``ranks`` groups, checked; and the rows that it has."""
    labels = np.repeat(np.arange(len(lengths)), lengths)[None]
    mask = Attended(1, sum(lengths), labels=labels, lo=0, hi=None if window is None else window - 1)
    tables = make([mask], MeshShape(tuple((r,) for r in range(ranks)))).tables(rank)
    rows, own = tables.masks[0].slices, len(tables.group_columns)
    made = sequences.calls(torch.from_numpy(rows), own, len(tables.masks[0].remote))
    assert pairs_seen(made, own) == pairs_of(rows.tolist(), own)
    return made, own


PACK = [61, 1, 1, 200, 17]


@pytest.mark.parametrize("window", [None, 16, 150, 1000])
def test_packed_documents_are_one_call_in_place(window: int | None) -> None:
    made, own = of_rank(PACK, 1, 0, window)
    (call,) = made.calls
    assert call.window == (CAUSE if window in (None, 1000) else (window - 1, 0))
    assert call.q_ends.tolist() == call.k_ends.tolist() == [0, *np.cumsum(PACK)]
    assert call.q == call.k == Rows(0, own, None)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_rank_of_many_calls_once_for_its_own_keys_and_once_for_received_ones(ranks: int) -> None:
    for rank in range(ranks):
        made, own = of_rank(PACK, ranks, rank)
        first, *others = made.calls
        assert (first.window, first.remote, first.q) == (CAUSE, False, Rows(0, own, None))
        assert [(c.window, c.remote) for c in others] in ([], [(ALL, True)])


@pytest.mark.parametrize("window", [16, 60])
def test_what_a_window_leaves_of_received_keys(window: int) -> None:
    found = [c for rank in range(3) for c in of_rank([300], 3, rank, window)[0].calls if c.remote]
    assert found and {c.window for c in found} <= {REST, ALL}


def test_what_follows_on_is_one_sequence() -> None:
    rows = [[0, 5, 0, 5, CAUSAL, 0, 0], [5, 9, 0, 5, FULL, 0, 0], [5, 9, 5, 9, CAUSAL, 0, 0]]
    (call,) = sequences.calls(table(rows), 9, 0).calls
    assert (call.window, call.q_ends.tolist(), call.k_ends.tolist()) == (CAUSE, [0, 9], [0, 9])


def test_what_the_same_queries_see_is_one_sequence() -> None:
    rows = [[2, 5, 9, 11, FULL, 0, 0], [2, 5, 13, 15, FULL, 0, 0]]
    (call,) = sequences.calls(table(rows), 9, 6).calls
    assert (call.q, call.q_ends.tolist(), call.k_ends.tolist()) == (Rows(2, 3, None), [0, 3], [0, 4])
    assert numbers(call.k) == [0, 1, 4, 5]


def test_the_tables_of_all_layers_are_read_once() -> None:
    rows = table([[0, 5, 0, 5, CAUSAL, 0, 0]])
    assert sequences.calls(rows, 9, 0) is sequences.calls(rows.clone(), 9, 0)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"slice \[0, 3, 0, 3, 3, 0, 0\] is one that the mask's formula"):
        sequences.calls(table([[0, 3, 0, 3, MOD, 0, 0]]), 9, 0)
    with pytest.raises(
        ValueError, match=r"slice 0 is \[0, 10, 0, 3, 0, 0, 0\], expected queries in \[0, 9\)"
    ):
        sequences.calls(table([[0, 10, 0, 3, FULL, 0, 0]]), 9, 0)
