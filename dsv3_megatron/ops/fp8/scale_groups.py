"""Matrices cut into groups of values that share a scale; edges need not be whole groups."""

from __future__ import annotations

import torch

BLOCK = 128
E4M3_MAX = 448.0
# Rows and columns of a group.
Group = tuple[int, int]
TILE: Group = (1, BLOCK)
SQUARE: Group = (BLOCK, BLOCK)


def split_into_groups(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[..., M, K] as [..., row of groups, rows, column of groups, columns], filled up with zeros at the edges.

    A view of x where nothing has to be filled up.
    """
    rows, columns = group
    down, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    if down or right:
        x = torch.nn.functional.pad(x, (0, right, 0, down))
    return x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)


def join_groups(groups: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `split_into_groups`: a matrix of `shape`, or a stack of them, without the padding."""
    *stack, down, rows, right, columns = groups.shape
    return groups.reshape(*stack, down * rows, right * columns)[..., : shape[-2], : shape[-1]]


def spread(scales: torch.Tensor) -> torch.Tensor:
    """Scales [..., row of groups, column of groups] in a shape that multiplies `split_into_groups`'s result."""
    return scales[..., :, None, :, None]


def num_groups(size: int, group: int = BLOCK) -> int:
    """Groups that `size` values take."""
    return -(-size // group)
