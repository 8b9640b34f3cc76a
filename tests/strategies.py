"""What tests draw: documents, packs, and masks over them, each with its brute-force meaning."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


@st.composite
def documents(draw: st.DrawFn, tokens: int) -> list[int]:
    """Lengths of documents that fill ``tokens``."""
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6))) if tokens > 1 else []
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)]


@st.composite
def packs(draw: st.DrawFn, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, positions), both (B, S) int64, of documents that lie one after the other in every row."""
    return pack([draw(documents(tokens)) for _ in range(batch)])


def pack(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, positions), both (B, S), of documents of these lengths."""
    labels = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    return torch.stack(labels), torch.stack(positions)


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int]:
    """(query heads, key/value heads), the first a multiple of the second."""
    kv = draw(st.integers(1, 3))
    return kv * draw(st.integers(1, 3)), kv
