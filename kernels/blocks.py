"""From slices to the block tables of flex attention, on the host: integers and numpy, never S x S.

Shapes: R query rows, C key rows, M slices, Nq / Nk blocks of 128 query / key rows, W the most blocks that
one row of blocks has.  A block of logits is *full* where the slices allow every pair of it (the kernel then
skips the mask), *partial* where they touch it (the mask decides inside), and absent otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hsap_compile.kernels.attention import BAND, CAUSAL, MOD
from hsap_compile.plan import RankTables

Ints = npt.NDArray[np.int64]

BLOCK = 128  # rows; what Inductor's kernels are tuned for
AT_LEAST = 2  # blocks, and indices a block: sizes 0 and 1 are special to torch.compile
ABSENT = -1  # the batch row of a row that is only padding

_FAR = 2**40  # beyond any row, and twice of it still far from overflowing int64

#: A table of every partial or full block by query blocks, and the same blocks by key blocks.
BLOCK_TABLES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def rank_tables(tables: RankTables, mask: int, batch: int) -> dict[str, npt.NDArray[Any]]:
    """What the attentions of one mask on one rank take as inputs, by name.

    ``own_*`` are the rows of the rank's group, ``remote_*`` received keys for the same queries, ``alone_*``
    the rows that take no part in exchanges.  Of each: ``rows`` (128 N, 2) int64 batch row and column of every
    key, padded with (ABSENT, 0), and the tables of ``BLOCK_TABLES``.
    """
    made = tables.masks[mask]
    own, alone = (_rows(batch, x) for x in (tables.group_columns, tables.columns[: tables.alone]))
    far, shift = made.slices[:, 2] >= len(own), np.array([0, 0, len(own), len(own), 0, 0, 0])
    parts = {
        "own": (made.slices[~far], len(own), own),
        "remote": (made.slices[far] - shift, len(own), made.remote),
        "alone": (made.alone_slices, len(alone), alone),
    }
    result: dict[str, npt.NDArray[Any]] = {}
    for part, (slices, queries, rows) in parts.items():
        result[f"{part}_rows"] = _padded_rows(rows)
        for name, table in block_tables(slices, queries, len(rows)).items():
            result[f"{part}_{name}"] = table
    return result


def _rows(batch: int, columns: Ints) -> Ints:
    grid = np.meshgrid(np.arange(batch), columns, indexing="ij")
    return np.stack(grid, axis=2).reshape(-1, 2)


def _padded_rows(rows: Ints) -> Ints:
    padded = np.zeros((_blocks(len(rows), BLOCK) * BLOCK, 2), np.int64)
    padded[:, 0] = ABSENT
    padded[: len(rows)] = rows
    return padded


def _blocks(rows: int, block: int) -> int:
    return max(AT_LEAST, -(-rows // block))


def block_tables(
    slices: Ints, rows_q: int, rows_k: int, block_q: int = BLOCK, block_k: int = BLOCK
) -> Mapping[str, npt.NDArray[np.int32]]:
    """The tables of ``BLOCK_TABLES`` by name: numbers (1, 1, N), indices (1, 1, N, W), ascending.

    Args:
        slices: (M, 7) rows q_start, q_stop, k_start, k_stop, kind, lo, hi that allow no pair twice.

    Raises:
        ValueError: slices that overlap, or that leave the rows.
    """
    shape = _blocks(rows_q, block_q), _blocks(rows_k, block_k)
    q, k, pairs = _touched(_checked(slices, rows_q, rows_k), block_q, block_k)
    place = q * shape[1] + k
    order = np.argsort(place, kind="stable")  # nearly sorted: slices are sorted by their first query
    place, pairs = place[order], pairs[order]
    first = np.flatnonzero(np.diff(place, prepend=-1))
    pairs = np.add.reduceat(pairs, first) if len(first) else pairs
    q, k = np.divmod(place[first], shape[1])
    wanted = np.minimum(block_q, rows_q - q * block_q) * np.minimum(block_k, rows_k - k * block_k)
    if (pairs > wanted).any():
        at = int(np.argmax(pairs > wanted))
        raise ValueError(
            f"block_tables: the slices allow {pairs[at]} pairs in block ({q[at]}, {k[at]}), which has "
            f"{wanted[at]}; wanted slices that do not overlap"
        )
    # a block that ends in padded keys stays partial: padding must be masked
    full = (pairs == wanted) & ((k + 1) * block_k <= rows_k)
    found: dict[str, npt.NDArray[np.int32]] = {}
    for prefix, chosen in (("", ~full), ("full_", full)):
        found |= _lists(f"{prefix}kv", q[chosen], k[chosen], shape[0])
        turned = np.argsort(k[chosen], kind="stable")
        found |= _lists(f"{prefix}q", k[chosen][turned], q[chosen][turned], shape[1])
    return found


def _checked(slices: Ints, rows_q: int, rows_k: int) -> Ints:
    """The slices that are not empty."""
    slices = slices[(slices[:, 0] < slices[:, 1]) & (slices[:, 2] < slices[:, 3])]
    if slices[:, 1].max(initial=0) > rows_q or slices[:, 3].max(initial=0) > rows_k:
        raise ValueError(
            f"block_tables: slices reach query {slices[:, 1].max()} and key {slices[:, 3].max()}; "
            f"wanted at most {rows_q} and {rows_k} rows"
        )
    return slices


def _touched(slices: Ints, block_q: int, block_k: int) -> tuple[Ints, Ints, Ints]:
    """(query block, key block, pairs allowed there) of every block of every slice; MOD allows none for
    sure."""
    q0, q1, k0, k1, kind, lo, hi = slices.T
    banded = kind == BAND
    lo = np.where(kind == CAUSAL, 0, np.where(banded, np.clip(lo, -_FAR, _FAR), -_FAR))
    hi = np.where(banded, np.clip(hi, -_FAR, _FAR), _FAR)
    # query blocks of every slice
    s, q = _ranges(q0 // block_q, -(-q1 // block_q))
    a, b = np.maximum(q0[s], q * block_q), np.minimum(q1[s], (q + 1) * block_q)
    # the keys that some query of a..b may see are one interval
    shift = q0[s] - k0[s]  # of the slice's own distance i - j
    c = np.maximum(k0[s], a - shift - hi[s])
    d = np.minimum(k1[s], b - shift - lo[s])
    t, k = _ranges(c // block_k, np.where(c < d, -(-d // block_k), c // block_k))
    s, q, a, b, shift = s[t], q[t], a[t], b[t], shift[t]
    c, d = np.maximum(k0[s], k * block_k), np.minimum(k1[s], (k + 1) * block_k)
    start = a - c - shift  # distance of the block's first query and first key
    pairs = _count(b - a, d - c, hi[s] - start) - _count(b - a, d - c, lo[s] - start - 1)
    return q, k, np.where((kind == MOD)[s], 0, np.maximum(pairs, 0))


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """(which interval, integer) for every integer of the intervals, in order."""
    size = stop - start
    which = np.repeat(np.arange(len(size)), size)
    return which, np.arange(len(which)) + np.repeat(start - (np.cumsum(size) - size), size)


def _count(n: Ints, m: Ints, most: Ints) -> Ints:
    """How many (i, j) of n x m have i - j <= most."""
    most = np.clip(most, -m, n)

    def before(y: Ints) -> Ints:  # sum of min(t, m) over 0 <= t <= y
        inside = np.clip(y, 0, m)
        return inside * (inside + 1) // 2 + np.maximum(y - m, 0) * m

    return n * m - before(n - 1 - most) + before(-most - 1)


def _lists(name: str, row: Ints, entry: Ints, rows: int) -> dict[str, npt.NDArray[np.int32]]:
    """The entries of every row, which come sorted by row."""
    number = np.bincount(row, minlength=rows)
    indices = np.zeros((1, 1, rows, max(AT_LEAST, int(number.max(initial=0)))), np.int32)
    indices[0, 0, row, np.arange(len(row)) - (np.cumsum(number) - number)[row]] = entry
    return {f"{name}_num_blocks": number.astype(np.int32)[None, None], f"{name}_indices": indices}
