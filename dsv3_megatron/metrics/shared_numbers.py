"""Numbers of many kinds that all ranks share in one collective: named parts of one flat fp64 tensor.

Usage:
    numbers = SharedNumbers({"loads": (4, 8), "seconds": (6,)}, device)
    numbers["loads"][2] = ...
    numbers.reduce(torch.distributed.ReduceOp.SUM)        # one all-reduce
    numbers["loads"].tolist()
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


class SharedNumbers:
    """Numbers that ranks combine in one collective: zeros to begin with, and after `reduce`, on the host, the same on
    every rank.

    Args:
        shapes: Shape of each part, the same on every rank.
        device: Device by which the ranks exchange them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes = dict(shapes)
        self._flat = torch.zeros(sum(math.prod(shape) for shape in self._shapes.values()), dtype=torch.float64,
                                 device=device)
        self._parts = self._split(self._flat)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The part of that name; writing into it before `reduce` is what it is for."""
        return self._parts[name]

    def reduce(self, operation: torch.distributed.ReduceOp.RedOpType) -> None:
        """Combine all ranks' numbers; every rank calls."""
        torch.distributed.all_reduce(self._flat, operation)
        self._parts = self._split(self._flat.cpu())

    def on_device(self, name: str) -> torch.Tensor:
        """The part of that name where ranks exchange it; after `reduce`, what the host has a copy of."""
        return self._split(self._flat)[name]

    def _split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
