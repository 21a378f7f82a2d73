"""Operands of measured products, out of cache as a step's mostly are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

_POOL_BYTES = 64 << 20


class OperandPools:
    """Three flat tensors, of which each call of a product takes the next part.

    Args:
        numel: Elements of the largest operand.
    """

    def __init__(self, numel: int) -> None:
        self.numel = max(numel, _POOL_BYTES // 4)
        self.left, self.right, self.result = (torch.randn(self.numel) for _ in range(3))

    def product(self, purpose: str, groups: int, rows: int, columns: int, inner: int) -> Callable[[], None]:
        """A product of each group in turn; of weight gradients the sum to what is there."""
        sizes = (groups * rows * inner, groups * inner * columns, groups * rows * columns)
        copies = max(1, self.numel // max(sizes))
        calls = []
        for copy in range(copies):
            a, b, c = (pool[copy * size: (copy + 1) * size] for pool, size in
                       zip((self.left, self.right, self.result), sizes, strict=True))
            if purpose == "wgrad":
                left = a.view(groups, inner, rows).transpose(1, 2)
                right = b.view(groups, inner, columns)
            else:
                left = a.view(groups, rows, inner)
                right = (b.view(groups, columns, inner).transpose(1, 2) if purpose == "fprop"
                         else b.view(groups, inner, columns))
            calls.append(list(zip(c.view(groups, rows, columns), left, right, strict=True)))
        turn = itertools.cycle(calls)

        def call() -> None:
            for total, first, second in next(turn):
                if purpose == "wgrad":
                    total.addmm_(first, second)
                else:
                    torch.mm(first, second, out=total)

        return call
