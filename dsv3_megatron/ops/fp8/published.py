"""FP8 weights with one scale for each block of 128 x 128, DeepSeek-V3's published form: to it, and back.

A weight [out, in] is stored as E4M3 values and FP32 scales [ceil(out/128), ceil(in/128)]; what they stand for
is value * scale, in FP32. Blocks at the lower and right edge may be smaller. This is the reference: plain
torch, any device, a strip of rows at a time so that the FP32 copy stays small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv3_megatron.ops.fp8.scale_groups import (
    BLOCK,
    E4M3_MAX,
    SQUARE,
    join_groups,
    num_groups,
    split_into_groups,
    spread,
)

# Rows that are in FP32 at a time; a multiple of BLOCK.
_STRIP = 1024
# Scales between which both the largest value (448 * scale) and the smallest (2^-9 * scale) are normal numbers of
# BF16, whose exponents are FP32's. Within them `requantize_weight_blocks` undoes `dequantize_weight_blocks`.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-117, 2.0**118


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight of this shape."""
    rows, columns = shape
    return num_groups(rows), num_groups(columns)


def quantize_weight_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to E4M3 with the scale amax / 448 of each block.

    An all-zero block gets the scale 1. A block whose amax / 448 is below the smallest normal FP32 number gets that.

    Args:
        weight: [out, in], floating point.

    Returns:
        values: float8_e4m3fn [out, in], weight / scale rounded to nearest even.
        scales: fp32 [ceil(out/128), ceil(in/128)].

    Raises:
        ValueError: a value is infinite or not a number.

    Source: DeepSeek-V3 report, section 3.3.2 (128 x 128 blocks, amax mapped to the largest E4M3 value).
    """
    scales = torch.empty(scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    for top in range(0, weight.shape[0], _STRIP):
        blocks = split_into_groups(weight[top: top + _STRIP].float(), SQUARE)
        amax = blocks.abs().amax(dim=(1, 3))
        if not torch.isfinite(amax).all():
            raise ValueError("a weight that is infinite or not a number has no FP8 form")
        scale = (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        scales[top // BLOCK: top // BLOCK + len(scale)] = torch.where(amax == 0, torch.ones_like(scale), scale)
    return requantize_weight_blocks(weight, scales), scales


def requantize_weight_blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Round a weight to E4M3 with given scales.

    Where the weight came from E4M3 values times these scales, in FP32 or rounded on to BF16, and the scales lie
    between SMALLEST_SCALE and LARGEST_SCALE, the values come back bit for bit: the rounding to BF16 moves a value by at
    most 2^-9 of it, and the middle between two neighbouring E4M3 values is at least 2^-5 of either away.

    Args:
        weight: [out, in], floating point.
        scales: fp32 [ceil(out/128), ceil(in/128)].

    Returns:
        float8_e4m3fn [out, in].
    """
    _check_scales(tuple(weight.shape), scales)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for top, strip in _strips(weight, scales):
        rows = weight[top: top + _STRIP].float()
        blocks = split_into_groups(rows, SQUARE) / strip  # not in place: rows may be the weight itself
        values[top: top + _STRIP] = join_groups(blocks, rows.shape).to(torch.float8_e4m3fn)
    return values


def dequantize_weight_blocks(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
                             ) -> torch.Tensor:
    """The weight that E4M3 values and their scales stand for: their FP32 product, rounded on to `dtype`.

    Args:
        values: float8_e4m3fn [out, in].
        scales: fp32 [ceil(out/128), ceil(in/128)], to multiply with although checkpoints call them `scale_inv`.
        dtype: Dtype of the result.

    Returns:
        [out, in].
    """
    _check_scales(tuple(values.shape), scales)
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for top, strip in _strips(values, scales):
        rows = values[top: top + _STRIP].float()
        weight[top: top + _STRIP] = join_groups(split_into_groups(rows, SQUARE) * strip, rows.shape)
    return weight


def _check_scales(shape: tuple[int, ...], scales: torch.Tensor) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != scale_shape(shape):
        raise ValueError(f"scales of {scales.dtype} {tuple(scales.shape)} do not fit a weight of shape {shape}: "
                         f"it takes torch.float32 {scale_shape(shape)}")


def _strips(weight: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each strip's first row, and its scales in a shape that multiplies its blocks."""
    step = _STRIP // BLOCK
    for top in range(0, weight.shape[0], _STRIP):
        yield top, spread(scales[top // BLOCK: top // BLOCK + step])
