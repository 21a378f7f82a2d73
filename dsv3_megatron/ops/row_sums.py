"""Rows copied to several places, and rows of several places added up in fp32: each is the other's backward pass.

Shapes: m rows that are copied, or sums; R copies, or rows that are added; H hidden.

Source: DeepSeek-V3 report, section 3.2.2 (dispatch and combine).
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.backend import wide_dtype

# Rows that are widened at a time: so many in fp32 beside the sums, however many are added.
_CHUNK = 4096


def copy_rows(x_mH: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """Copy rows: x[row], [R, H]; the gradients of copies are added in fp32 and rounded once.

    Args:
        x_mH: Rows that are copied.
        row_R: int64, the row that each copy is of.
    """
    return _Copies.apply(x_mH, row_R)


def sum_rows(x_RH: torch.Tensor, row_R: torch.Tensor, num_rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Add rows up: out[n] = sum of x[r] where row[r] = n, in fp32, rounded once; 0 without any.

    Args:
        x_RH: Rows that are added.
        row_R: int64, the sum that each row is a part of.
        num_rows: Number of sums.
        dtype: Dtype of the sums; None: the rows'.

    Returns:
        [num_rows, H].
    """
    return _Sums.apply(x_RH, row_R, num_rows, dtype or x_RH.dtype)


def add_rows(x_RH: torch.Tensor, row_R: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute `sum_rows` without gradients."""
    wide = wide_dtype(x_RH.dtype)
    sums = torch.zeros(num_rows, x_RH.shape[1], dtype=wide, device=x_RH.device)
    if x_RH.dtype == wide:
        sums.index_add_(0, row_R, x_RH)
    else:
        for start in range(0, len(row_R), _CHUNK):
            part = slice(start, start + _CHUNK)
            sums.index_add_(0, row_R[part], x_RH[part].to(wide))
    return sums.to(dtype)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        ctx.num_rows = len(x)
        return x.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (row,) = ctx.saved_tensors
        return add_rows(grads[0], row, ctx.num_rows, grads[0].dtype), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(row)
        ctx.dtype = x.dtype
        return add_rows(x, row, num_rows, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (row,) = ctx.saved_tensors
        return grads[0].index_select(0, row).to(ctx.dtype), None, None, None
