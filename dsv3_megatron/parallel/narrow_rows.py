"""Rows that travel in FP8: half the bytes of a dispatch to experts, and of the gradients that go the same way.

A row [H] becomes H bytes of E4M3 and a 4-byte scale for each 128 of them, one record of bytes, so that one transfer
carries both: 7,392 bytes at H = 7168, where BF16 takes 14,336. Scales are powers of two, so that what arrives, in BF16,
is quantized again by the experts' first product without another error.

What comes back is in the run's precision: the sum over a token's experts, forward, and over their gradients, backward.
With one rank nothing travels, but rows are rounded all the same: the layout is not part of the experiment.

Shapes: R rows, H hidden.

Source: DeepSeek-V3 report, section 3.3.3 (low-precision communication).
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.fp8_groups import BLOCK, TILE, num_groups
from dsv3_megatron.ops.fp8_quantize import Quantized, quantize
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits, post_all_to_all

DIRECTIONS = ("", "forward", "backward")


def pack_rows(rows_RH: torch.Tensor) -> torch.Tensor:
    """Quantize rows in 1x128 tiles with power-of-two scales: uint8 [R, H + 4 ceil(H/128)]."""
    quantized = quantize(rows_RH, TILE, power_of_2=True)
    scales = quantized.scales.contiguous().view(torch.uint8)
    return torch.cat((quantized.values.view(torch.uint8), scales), dim=1)


def unpack_rows(records: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Undo `pack_rows`: [R, width] in `dtype`, which holds E4M3 times a power of two exactly."""
    values = records[:, :width].contiguous().view(torch.float8_e4m3fn)
    scales = records[:, width:].contiguous().view(torch.float32)
    assert scales.shape[1] == num_groups(width, BLOCK), "a record is its values and their scales"
    return Quantized(values, scales, TILE, "e4m3", tuple(values.shape)).dequantize(dtype)


def post_narrow(rows_RH: torch.Tensor, splits: Splits, post: PostAllToAll = post_all_to_all) -> Posted:
    """Start an all-to-all of rows in FP8; what is waited for is in their dtype again."""
    return _Narrow(post(pack_rows(rows_RH), splits), rows_RH.shape[1], rows_RH.dtype)


def exchange_rows(rows_RH: torch.Tensor, splits: Splits | None, *, narrow: str) -> torch.Tensor:
    """A differentiable all-to-all of rows, in FP8 in one direction.

    Args:
        rows_RH: By receiving rank.
        splits: How many rows go where; None with one rank.
        narrow: "forward": rows travel in FP8 and their gradients as they are; "backward": the other way round.

    Returns:
        The rows that came.
    """
    assert narrow in DIRECTIONS[1:], narrow
    return _ExchangeRows.apply(rows_RH, splits, narrow)


class _Narrow:
    """A transfer of records under way."""

    def __init__(self, posted: Posted, width: int, dtype: torch.dtype) -> None:
        self.posted, self.width, self.dtype = posted, width, dtype

    def wait(self) -> torch.Tensor:
        return unpack_rows(self.posted.wait(), self.width, self.dtype)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, splits: Splits | None, narrow: str) -> torch.Tensor:
        ctx.splits, ctx.narrow = splits, narrow
        return _send(rows, splits, is_narrow=narrow == "forward")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        back = None if ctx.splits is None else ctx.splits.reversed()
        return _send(grads[0], back, is_narrow=ctx.narrow == "backward"), None, None


def _send(rows: torch.Tensor, splits: Splits | None, *, is_narrow: bool) -> torch.Tensor:
    if splits is None:
        return unpack_rows(pack_rows(rows), rows.shape[1], rows.dtype) if is_narrow else rows.view_as(rows)
    return (post_narrow if is_narrow else post_all_to_all)(rows, splits).wait()
