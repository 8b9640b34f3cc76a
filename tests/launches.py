"""Triton kernels that a model launches, on CPU tensors: dynamo captures them, Python does what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._triton as availability
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


@contextmanager
def launches_on_cpu(meanings: Mapping[Any, Callable[..., None]]) -> Iterator[list[str]]:
    """``meanings``: for every kernel a function of its arguments and the grid, which believes the strides
    that it is told.  Gives the names of the kernels in the order in which they ran.  What a kernel writes
    into is read from its own code, which is compiled for a GPU as far as that takes."""
    ran: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        ran.append(kernel.fn.__name__)
        unseen = [x.data if isinstance(x, torch.Tensor) else x for x in args]  # by autograd
        meanings[kernel](*unseen, grid=grid, **named)

    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with (
        mock.patch.dict("os.environ", {"TRITON_DEFAULT_FP_FUSION": "1"}),  # triton 3.9 asks for it
        mock.patch.object(availability, "has_triton", lambda: True),
        mock.patch.object(type(triton.runtime.driver), "active", gpu),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield ran
