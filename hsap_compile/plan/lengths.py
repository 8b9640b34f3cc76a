"""Document lengths in tokens as training data has them, drawn from published figures.

Only the figures are here, with their sources: no data set is read. Between two figures lengths are
interpolated log-linearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BLOCK = 256  # documents drawn at once


@dataclass(frozen=True)
class Quantiles:
    """Lengths by figures: `percent[i]` of the documents have at most `length[i]` tokens.

    Attributes:
        source: who published the figures.
        percent: ascending, from 0 to 100.
        length: ascending.
    """

    source: str
    percent: tuple[float, ...]
    length: tuple[int, ...]

    def draw(self, random: np.random.Generator, count: int) -> Floats:
        """(count,) lengths."""
        return np.exp(np.interp(random.uniform(0, 100, count), self.percent, np.log(self.length)))


@dataclass(frozen=True)
class Lognormal:
    """Lengths whose logarithm is normal with mean `mu` and standard deviation `sigma`."""

    source: str
    mu: float
    sigma: float

    def draw(self, random: np.random.Generator, count: int) -> Floats:
        """(count,) lengths."""
        return random.lognormal(self.mu, self.sigma, count)


SOURCES: Mapping[str, Quantiles | Lognormal] = MappingProxyType(
    {
        "wlb_like": Quantiles(
            "published simulator data for a WLB-LLM-like mix, mean 3962",
            (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100),
            (1, 63, 324, 646, 1283, 1932, 2582, 3227, 3861, 4514, 5156, 5784, 6110, 10080, 26070, 69084,
             119754, 124913),
        ),
        "prolong_like": Quantiles(
            "published simulator data for a ProLong-like long-context mix, mean 3052",
            (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100),
            (575, 678, 801, 919, 1130, 1347, 1594, 1914, 2362, 3018, 4050, 6051, 8378, 12308, 16273, 21339,
             47390, 340149),
        ),
        "longtail_pretrain": Quantiles(
            "MagiAttention's published table of 13.46M pretraining documents, mean 1700",
            (0, 0.22, 3.13, 8.33, 18.56, 46.75, 71.38, 87.03, 94.37, 97.42, 98.71, 99.56, 99.7, 99.86, 100),
            (1, 10, 50, 100, 200, 500, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 196608),
        ),
        "fineweb_like": Lognormal("mean of about 700 from a published sample; spread estimated", 5.95, 1.07),
        "slimpajama_like": Lognormal(
            "mean of about 1090 from a published sample; spread estimated", 6.2, 1.26
        ),
        "ultrachat_like": Lognormal("1.47M dialogues of 7.7 messages; lengths estimated", 7.15, 0.45),
    }
)  # fmt: skip


def draw(source: str, tokens: int, seed: int) -> list[int]:
    """Lengths of documents that fill `tokens` exactly; the last one is cut.

    Args:
        source: one of `SOURCES`.
        tokens: at least 1.
        seed: the same seed gives the same documents, and more tokens more of them.

    Raises:
        ValueError: no such source, or no tokens.
    """
    if source not in SOURCES:
        raise ValueError(f"draw: got source {source!r}; wanted one of {', '.join(SOURCES)}: choose one")
    if tokens < 1:
        raise ValueError(f"draw: got tokens={tokens}; wanted at least 1: ask for a longer row")
    random, parts, missing = np.random.default_rng(seed), [], tokens
    while missing > 0:
        part = np.maximum(SOURCES[source].draw(random, BLOCK).astype(np.int64), 1)
        parts.append(part)
        missing -= int(part.sum())
    lengths = np.concatenate(parts)
    ends = np.minimum(np.cumsum(lengths), tokens)
    return [int(n) for n in np.diff(ends, prepend=0) if n > 0]
