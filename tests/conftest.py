"""Fixtures that all tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from pool import Pool

# pytest listens to loggers that do not propagate; for this one torch writes a trace of all that is compiled
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Persistent gloo ranks: ``pool.run(function, *args, world=4)``."""
    with Pool() as ranks:
        yield ranks


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session's own: Inductor's does not notice when an operator's meaning changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
