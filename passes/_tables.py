"""Tables: inputs that a rewritten graph has besides the model's, made on the host for every plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from hsap_compile._torch import fake_table

#: Tables that the host reads; all others index tensors on the device.
ON_HOST = ("splits", "slices", "alone_slices", "head_splits")


@dataclass
class Tables:
    """The table inputs of a graph, made when first asked for.  A key is a name, or what the table belongs to
    (a mask's number, a shift) and a name."""

    graph: Graph
    mode: Any
    device: torch.device

    def __call__(self, key: Any, example: torch.Tensor, dynamic: tuple[int, ...], least: int = 0) -> Node:
        found = self._find(key)
        if found is not None:
            return found
        kind = key[1] if isinstance(key, tuple) else key
        example = example if kind in ON_HOST else example.to(self.device)
        return self.add(key, fake_table(self.mode, example, dynamic, least))

    def add(self, key: Any, value: torch.Tensor) -> Node:
        """The table ``key``, of the fake ``value``'s sizes."""
        found = self._find(key)
        if found is not None:
            return found
        parts = key if isinstance(key, tuple) else (key,)
        name = "_".join(("table", *(str(getattr(part, "name", part)) for part in parts)))
        others = [n for n in self.graph.nodes if n.op == "placeholder"]
        while any(n.target == name for n in others):  # a name may say less than the key
            name += "_"
        with self.graph.inserting_after(others[-1]):
            node = self.graph.placeholder(name)
        node.meta.update(val=value, table=key, parameter=False)
        return node

    def _find(self, key: Any) -> Node | None:
        return next(
            (n for n in self.graph.nodes if n.op == "placeholder" and n.meta.get("table") == key), None
        )
