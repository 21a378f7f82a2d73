"""A tensor a few rows at a time: what a conversion computes with is read, computed and written in pieces of a few MB.

Memory is then the same for a tensor of any size, and freed pieces are used again: for every new tensor the kernel
clears pages, which takes longer than the casts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dsv3_megatron.ops.fp8.scale_groups import BLOCK

# Elements of a strip: 2 MB of FP8 and 4 MB of BF16.
STRIP_ELEMENTS = 1 << 21


def row_strips(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each strip: whole rows of FP8's blocks, about `STRIP_ELEMENTS` values.

    Args:
        shape: Shape of the tensor; [rows] or [rows, columns].
    """
    width = math.prod(shape[1:])
    step = max(1, STRIP_ELEMENTS // max(1, BLOCK * width)) * BLOCK
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one dtype have the same bits; NaN equals itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    raw = [tensor.view(-1).view(torch.uint8) for tensor in (one, other)]
    if not any(part.numel() % 8 or part.storage_offset() % 8 for part in raw):
        raw = [part.view(torch.int64) for part in raw]  # eight bytes at a time
    return torch.equal(*raw)
