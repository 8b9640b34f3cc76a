"""Real text that is on every machine: Python's own sources and reference, tokenized and packed."""

from __future__ import annotations

import bisect
import itertools
import math
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCABULARY = 2048
PAD = 0
IGNORED = -100  # the label that cross_entropy_loss leaves out
_CHARACTERS = 4_000_000  # as much text as a few seconds allow
_SHORTEST = 16  # tokens of a document
_NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def packed_rows(tokens: int, count: int, seed: int = 0) -> torch.Tensor:
    """At most ``count`` packed rows in random order, ``(row, 3, token)``: token ids, positions and labels.

    Positions restart with every document; a document's first token and the padding at the end of a row,
    which counts as a document, have no label.
    """
    draw = random.Random(seed)
    encoded = tokenize(texts(_CHARACTERS, draw))
    documents = [excerpt for ids in encoded for excerpt in excerpts(ids, tokens, draw)]
    enough = bisect.bisect(list(itertools.accumulate(map(len, documents))), tokens * count) + 1
    rows = first_fit_decreasing([len(ids) for ids in documents[:enough]], tokens)[:count]
    draw.shuffle(rows)
    return torch.stack([_row([documents[index] for index in row], tokens) for row in rows])


def texts(characters: int, draw: random.Random) -> list[str]:
    """Modules of the standard library and topics of the language reference, in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _NOT_TEXT.intersection(path.parts))
    sources: list[Path | str] = [*files, *sorted(topics)]
    draw.shuffle(sources)
    total, chosen = 0, []
    for source in sources:
        text = topics[source] if isinstance(source, str) else source.read_text("utf-8", errors="replace")
        chosen.append(text)
        total += len(text)
        if total >= characters:
            break
    return chosen


def excerpts(ids: list[int], longest: int, draw: random.Random) -> list[list[int]]:
    """A text cut into documents of log-uniformly drawn lengths: many short ones, few that fill a row."""
    cuts = [0]
    while len(ids) - cuts[-1] >= _SHORTEST:
        length = _SHORTEST * (longest / _SHORTEST) ** draw.random()
        cuts.append(min(len(ids), cuts[-1] + math.ceil(length)))
    return [ids[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def tokenize(texts: list[str]) -> list[list[int]]:
    """Byte-level BPE, trained on the very texts that it then encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices: the longest first, each into the first bin that still has room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        chosen = next((i for i, left in enumerate(room) if left >= lengths[index]), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(capacity)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


def _row(documents: Sequence[Sequence[int]], tokens: int) -> torch.Tensor:
    padding = tokens - sum(map(len, documents))
    ids = [token for document in documents for token in document] + [PAD] * padding
    positions = [position for document in documents for position in range(len(document))]
    labels = [label for document in documents for label in (IGNORED, *document[1:])]
    return torch.tensor([ids, positions + list(range(padding)), labels + [IGNORED] * padding])
