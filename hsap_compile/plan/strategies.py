"""What others do with a packed row, counted in the same units as a plan of ours.

Each strategy is a pure function of a `Setting`. All are taken at their best: attention is computed on
attended pairs only (of padded documents in `padding`), nothing is rounded up to blocks, and what may run
beside an exchange does. Backward passes send gradients the way back; a ring's send the keys and values round
once more and their gradients all the way home.

Shapes: P ranks, M a matrix of bytes [from, to].
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from hsap_compile.plan.attended import Ints
from hsap_compile.plan.load import Floats, Load, Setting, Stage, stage, there_and_back
from hsap_compile.plan.pieces import Pieces, cut, own_pairs, pair_matrix, rows_needed, total_pairs

CHUNKS_PER_RANK = 8  # of chunk-LPT
_PIECES_AT_ONCE = 1 << 20  # of per-document zigzag: 64 MB


def contiguous_ring(setting: Setting) -> Load:
    """Rank r holds the r-th part of the row; keys and values go round (Ring Attention, arXiv 2310.01889)."""
    return _ring(setting, np.arange(setting.ranks))


def zigzag_ring(setting: Setting) -> Load:
    """As the ring, with parts r and 2P - 1 - r of 2P on rank r, which balances one causal document."""
    return _ring(setting, _zigzag(setting.ranks))


def document_zigzag(setting: Setting) -> Load:
    """Every document in 2P parts dealt as zigzag; keys and values are gathered (Llama 3, arXiv 2407.21783).

    The gather fetches each row of another group once over the links between hosts and passes it on inside.
    """
    ranks, order = setting.ranks, _zigzag(setting.ranks)
    tokens, area, own = (np.zeros(ranks) for _ in range(3))
    unique, times = np.unique(setting.lengths, return_counts=True)
    at_once = max(1, _PIECES_AT_ONCE // (2 * ranks))
    for i in range(0, len(unique), at_once):
        lengths, weight = unique[i : i + at_once], times[i : i + at_once]
        ends = np.cumsum(lengths)
        parts = np.arange(2 * ranks)
        edges = ((ends - lengths)[:, None] + lengths[:, None] * parts // (2 * ranks)).ravel()
        held = np.tile(order, len(lengths))
        keep = np.append(edges[1:], ends[-1]) > edges
        pieces = cut(lengths, np.append(edges[keep], ends[-1]), held[keep])
        for total, values in (
            (tokens, pieces.size),
            (area, total_pairs(pieces, setting.band)),
            (own, own_pairs(pieces, setting.band)),
        ):
            total += np.bincount(pieces.party, weights=values * weight[pieces.document], minlength=ranks)
    gathered = _gather(setting, tokens.astype(np.int64) * setting.shape.kv_row_bytes)
    return there_and_back(
        tokens.astype(np.int64), stage(setting, own, *gathered), stage(setting, area - own, remote=True)
    )


def padding(setting: Setting) -> Load:
    """Every document padded to the longest and computed whole; each is spread over all ranks as above."""
    return document_zigzag(
        dataclasses.replace(setting, lengths=(max(setting.lengths),) * len(setting.lengths))
    )


def ulysses(setting: Setting) -> Load:
    """All heads exchanged over all ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

    Raises:
        ValueError: the ranks do not divide the query heads.
    """
    _check_heads("ulysses", setting, setting.ranks)
    tokens = _even(setting.tokens, setting.ranks)
    whole = cut(setting.lengths, np.array([0, setting.tokens]), np.zeros(1, np.int64))
    area = np.full(setting.ranks, total_pairs(whole, setting.band).sum() / setting.ranks)
    heads_in, heads_out = head_exchange(setting, tokens, np.zeros(setting.ranks, np.int64))
    return there_and_back(
        tokens, stage(setting, None, heads_in), stage(setting, area), stage(setting, None, heads_out)
    )


def usp(setting: Setting) -> Load:
    """Ulysses inside groups, a zigzag ring between them (USP, arXiv 2405.07719).

    Raises:
        ValueError: the ranks of a group do not divide the query heads.
    """
    _check_heads("usp", setting, setting.intra)
    pieces = cut(setting.lengths, _edges(setting.tokens, 2 * setting.inter), _zigzag(setting.inter))
    rows = np.bincount(pieces.party, weights=pieces.size).astype(np.int64)
    tokens = np.concatenate([_even(n, setting.intra) for n in rows])
    heads_in, heads_out = head_exchange(setting, tokens, setting.group)
    block = rows * setting.shape.kv_share_bytes(setting.intra)
    round_trip = _ring_stages(setting, pair_matrix(pieces, setting.inter, setting.band), block)
    first, last = stage(setting, None, heads_in), stage(setting, None, heads_out)
    return Load(
        tokens, (first, *round_trip.forward, last), (last.backward, *round_trip.backward, first.backward)
    )


def chunk_lpt(setting: Setting) -> Load:
    """Equal chunks, equally many on each rank, the largest area first on the least loaded; exactly the needed
    rows are sent (as MagiAttention does, arXiv 2505.13211), here with `CHUNKS_PER_RANK` chunks on each."""
    ranks = setting.ranks
    edges = _edges(setting.tokens, CHUNKS_PER_RANK * ranks)
    pieces = cut(setting.lengths, edges, np.arange(CHUNKS_PER_RANK * ranks))
    area = np.bincount(pieces.party, weights=total_pairs(pieces, setting.band), minlength=len(edges) - 1)
    owner = np.empty(len(area), np.int64)
    heap = [(0.0, r, 0) for r in range(ranks)]
    for chunk in np.argsort(-area, kind="stable").tolist():
        load, r, count = heapq.heappop(heap)
        owner[chunk] = r
        if count + 1 < CHUNKS_PER_RANK:
            heapq.heappush(heap, (load + area[chunk], r, count + 1))
    return exact_need(setting, pieces.of(owner[pieces.party]))


STRATEGIES: Mapping[str, Callable[[Setting], Load]] = MappingProxyType(
    {
        "contiguous ring": contiguous_ring,
        "zigzag ring": zigzag_ring,
        "document zigzag": document_zigzag,
        "ulysses": ulysses,
        "usp": usp,
        "chunk-lpt": chunk_lpt,
        "padding": padding,
    }
)


# --- what they are made of ---


def exact_need(setting: Setting, pieces: Pieces) -> Load:
    """Each rank holds whole heads of its pieces, and is sent the rows that its queries attend to."""
    ranks = setting.ranks
    own = _by_party(pieces, own_pairs(pieces, setting.band), ranks)
    area = _by_party(pieces, total_pairs(pieces, setting.band), ranks)
    moved = rows_needed(pieces, ranks, setting.band) * setting.shape.kv_row_bytes
    tokens = _by_party(pieces, pieces.size, ranks).astype(np.int64)
    return there_and_back(tokens, stage(setting, own, moved), stage(setting, area - own, remote=True))


def head_exchange(setting: Setting, rows: Ints, among: Ints) -> tuple[Ints, Ints]:
    """Bytes (P, P) [from, to] of queries, keys and values to the ranks of equal `among` (P,), and of outputs
    back. `rows` (P,): what each rank gives."""
    same = among[:, None] == among
    ways = int(same[0].sum())
    others = same & ~np.eye(len(rows), dtype=np.bool_)
    shape = setting.shape
    each = shape.query_row_bytes // ways
    return rows[:, None] * others * (each + shape.kv_share_bytes(ways)), rows * others * each


def _ring(setting: Setting, order: Ints) -> Load:
    """The row in equal parts, held in this order; every rank's keys and values visit every other rank."""
    pieces = cut(setting.lengths, _edges(setting.tokens, len(order)), order)
    tokens = _by_party(pieces, pieces.size, setting.ranks).astype(np.int64)
    matrix = pair_matrix(pieces, setting.ranks, setting.band)
    load = _ring_stages(setting, matrix, tokens * setting.shape.kv_row_bytes)
    return dataclasses.replace(load, tokens=tokens)


def _ring_stages(setting: Setting, matrix: Ints, block: Ints) -> Load:
    """A ring of n members that each are P / n ranks side by side, which share the heads.

    matrix: (n, n) pairs [queries of, keys of]. block: (n,) bytes of a member's keys and values on each of its
    ranks. At stage t a member works on the block of the member t before it, and passes it on.
    """
    n, ways = len(block), setting.ranks // len(block)
    member = np.arange(n)
    # to the next member: over the links inside a group, unless the group ends here
    far = (setting.group[member * ways] != setting.group[(member + 1) % n * ways]).astype(np.int64)

    def at(t: int, *moving: int) -> Stage:
        """Work on the block from t members back (none if t is n), and pass on those from `moving` back."""
        work = matrix[member, (member - t) % n] / ways if t < n else np.zeros(n)
        sent = np.zeros((2, n), np.int64)
        for back in moving:
            sent[far, member] += block[(member - back) % n]
        sent = np.repeat(sent, ways, axis=1)
        return Stage(np.repeat(work, ways), sent, np.roll(sent, ways, axis=1), remote=t > 0)

    if n == 1:
        alone = at(0)
        return Load(np.zeros(0, np.int64), (alone,), (alone,))
    forward = tuple(at(t, *([t] if t < n - 1 else [])) for t in range(n))
    # keys and values as before, and the gradients of the block that was worked on one stage ago
    backward = tuple(at(t, *([t] if t < n - 1 else []), *([t - 1] if t > 0 else [])) for t in range(n + 1))
    return Load(np.zeros(0, np.int64), forward, backward)


def _gather(setting: Setting, held: Ints) -> tuple[Ints, Ints]:
    """Bytes (P, P) [from, to] of a gather of `held` (P,): between equal positions of groups, then inside."""
    same_group = setting.group[:, None] == setting.group
    position = np.arange(setting.ranks) % setting.intra
    peers = (position[:, None] == position) & ~same_group
    between = held[:, None] * peers
    inside = (held + between.sum(axis=0))[:, None] * (same_group & ~np.eye(setting.ranks, dtype=np.bool_))
    return between, inside


def _zigzag(ranks: int) -> Ints:
    """(2P,) who holds each part."""
    return np.concatenate((np.arange(ranks), np.arange(ranks)[::-1]))


def _edges(tokens: int, parts: int) -> Ints:
    """(parts + 1,) equal to +-1."""
    return np.arange(parts + 1) * tokens // parts


def _even(tokens: int, ranks: int) -> Ints:
    """(ranks,) equal to +-1."""
    return tokens // ranks + (np.arange(ranks) < tokens % ranks)


def _by_party(pieces: Pieces, values: Ints, parties: int) -> Floats:
    return np.bincount(pieces.party, values, parties).astype(np.float64)


def _check_heads(name: str, setting: Setting, ways: int) -> None:
    if not setting.shape.splits(ways):
        raise ValueError(
            f"{name}: got {ways} ranks to share {setting.shape.query_heads} query heads; wanted a divisor of "
            f"{setting.shape.query_heads}: use fewer ranks, or another strategy"
        )
